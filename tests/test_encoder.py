"""The encoder against transformers' eager forward, and its partial forwards against its full one."""

import copy
from collections.abc import Callable, Generator
from pathlib import Path

import pytest
import torch
from oracle import assert_rounded_alike
from packed_text import RAGGED, VOCAB, PackedText, bert, pack, roberta
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager
from transformers import AutoModel, PreTrainedModel

from fastkd.models import encoder as encoder_module
from fastkd.models.attention import Sequences
from fastkd.models.encoder import Encoder, EncoderConfig
from fastkd.models.hf import from_hf_model, load
from fastkd.models.lookup import lookup
from fastkd.models.needs import Needs, Outputs

EVERYTHING = Needs(logits=True, hidden=(0, 1, 2, 3), qkv=(1, 2, 3), last_rows=True)
TINY = EncoderConfig("bert", VOCAB, 48, 3, 4, 100, max_positions=64)


def eager(model: PreTrainedModel, text: PackedText) -> tuple[list[Tensor], Tensor]:
    """transformers' hidden states, [T, D] each, and logits at predicted rows [M, V]."""
    ids, real = text.padded(model.config.pad_token_id)
    out = model(input_ids=ids, attention_mask=real.long(), output_hidden_states=True)
    return [hidden[real] for hidden in out.hidden_states], out.logits[real][text.predicted]


def logits(encoder: Encoder, out: Outputs) -> Tensor:
    assert out.head_rows is not None
    return out.head_rows @ encoder.decoder_weight.T + encoder.decoder_bias


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    ours, theirs = ours.detach().float(), theirs.detach().float()
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("make", [bert, roberta])
@pytest.mark.parametrize("lengths", [RAGGED, (16,) * 4, (1,), (59,)], ids=["ragged", "equal", "one token", "one text"])
def test_random_model_equals_transformers(make: Callable[[], PreTrainedModel], lengths: tuple[int, ...]) -> None:
    model, text = make(), pack(lengths)
    hidden, theirs = eager(model, text)
    encoder = from_hf_model(model, mlm_head=True)
    out = encoder(text.input_ids, text, EVERYTHING)
    for layer, state in enumerate(hidden):
        assert_rounded_alike(out.hidden[layer], state)
    assert_rounded_alike(logits(encoder, out), theirs)


def test_quickstart_teacher_equals_transformers(quickstart_teacher: Path) -> None:
    """The same function: to 1e-10 in float64. In float32 each CPU rounds its own way, transformers' forward too: ours lies as
    close to the float64 one as theirs, in the norm of each state and, within a factor of two, in its worst element."""
    model = AutoModel.from_pretrained(quickstart_teacher, attn_implementation="eager")
    encoder = load(quickstart_teacher).encoder
    text = pack((128, 5, 60, 127, 1, 33), vocab=30522)
    ids, real = text.padded(0)
    states: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = {}
    for dtype in (torch.float32, torch.float64):
        model, encoder = model.to(dtype), encoder.to(dtype)
        with torch.no_grad():
            theirs = model(input_ids=ids, attention_mask=real.long(), output_hidden_states=True).hidden_states
            ours = encoder(text.input_ids, text, Needs(hidden=tuple(range(7)))).hidden
        states[dtype] = [(ours[layer].double(), hidden[real].double()) for layer, hidden in enumerate(theirs)]
    for (ours32, theirs32), (ours64, exact) in zip(states[torch.float32], states[torch.float64], strict=True):
        torch.testing.assert_close(ours64, exact, atol=1e-10, rtol=0)
        rounding = theirs32 - exact
        assert (ours32 - exact).norm() <= min(1.1 * rounding.norm(), 2e-6 * exact.norm())
        worst = max(1e-5, 2 * rounding.abs().max().item())
        torch.testing.assert_close(ours32, exact, atol=worst, rtol=0)
        torch.testing.assert_close(ours32, theirs32, atol=worst, rtol=0)


def test_a_lookup_is_an_embedding() -> None:
    table = torch.randn(50, 12, generator=torch.Generator().manual_seed(0))
    ids = torch.randint(50, (400,), generator=torch.Generator().manual_seed(1))
    direction = torch.randn(400, 12, generator=torch.Generator().manual_seed(2))
    found, expected = (table.clone().requires_grad_() for _ in range(2))
    rows = lookup(found, ids, padding=3)
    rows.backward(direction)
    torch.nn.functional.embedding(ids, expected, padding_idx=3).backward(direction)
    assert torch.equal(rows, table[ids]) and (ids == 3).any()
    assert torch.equal(found.grad, expected.grad) and not found.grad[3].any()


def test_gradients_equal_transformers() -> None:
    model, text = bert(), pack(RAGGED)
    _, theirs = eager(model, text)
    encoder = from_hf_model(model, mlm_head=True)
    ours = logits(encoder, encoder(text.input_ids, text, Needs(logits=True)))
    direction = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
    (theirs * direction).sum().backward()
    (ours * direction).sum().backward()
    layer = model.bert.encoder.layer[1]
    pairs = {
        "word": (encoder.word_embeddings, model.bert.embeddings.word_embeddings),
        "position": (encoder.position_embeddings, model.bert.embeddings.position_embeddings),
        "type": (encoder.type_embeddings, model.bert.embeddings.token_type_embeddings),
        "attention": (encoder.layers[1].attention_output, layer.attention.output.dense),
        "norm": (encoder.layers[1].attention_norm, layer.attention.output.LayerNorm),
        "up": (encoder.layers[1].up, layer.intermediate.dense),
        "head": (encoder.head.dense, model.cls.predictions.transform.dense),
    }
    for name, (mine, other) in pairs.items():
        assert relative_error(mine.weight.grad, other.weight.grad) < 1e-5, name
    own = layer.attention.self
    fused = torch.cat([own.query.weight.grad, own.key.weight.grad, own.value.weight.grad])
    assert relative_error(encoder.layers[1].qkv.weight.grad, fused) < 1e-5


PARTIAL = [
    Needs(logits=True),
    Needs(last_rows=True),
    Needs(logits=True, last_rows=True),
    Needs(qkv=(3,)),
    Needs(qkv=(2,)),
    Needs(hidden=(0,)),
    Needs(hidden=(1,), qkv=(1, 2)),
    Needs(hidden=(3,)),
    Needs(logits=True, qkv=(3,)),
    Needs(logits=True, hidden=(3, 0)),
]


def selected(out: Outputs, needs: Needs) -> list[Tensor]:
    """What ``needs`` reads, out of any outputs that hold it."""
    rows = [out.head_rows if needs.logits else None, out.last_rows if needs.last_rows else None]
    return [
        *(row for row in rows if row is not None),
        *(out.hidden[layer] for layer in needs.hidden),
        *(part for layer in needs.qkv for part in out.qkv[layer]),
    ]


def gradients(encoder: Encoder, outputs: list[Tensor]) -> dict[str, Tensor]:
    """Gradients of a fixed random functional of the outputs."""
    generator = torch.Generator().manual_seed(2)
    loss = sum((x * torch.randn(x.shape, generator=generator)).sum() for x in outputs)
    assert isinstance(loss, Tensor)
    encoder.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in encoder.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("needs", PARTIAL, ids=str)
def test_partial_forward_is_exact(needs: Needs) -> None:
    encoder, text = from_hf_model(bert(), mlm_head=True), pack(RAGGED)
    partial = selected(encoder(text.input_ids, text, needs), needs)
    full = selected(encoder(text.input_ids, text, EVERYTHING), needs)
    for ours, whole in zip(partial, full, strict=True):
        torch.testing.assert_close(ours, whole, atol=1e-6, rtol=1e-6)
    mine, plain = gradients(encoder, partial), gradients(encoder, full)
    for name, gradient in plain.items():
        if name in mine:
            assert relative_error(mine[name], gradient) < 1e-5, name
        else:  # not run: the plain computation has nothing to say there either
            assert not gradient.any(), name


def test_layers_above_the_need_are_not_run() -> None:
    encoder, text = from_hf_model(bert(), mlm_head=True), pack(RAGGED)
    reached = gradients(encoder, selected(encoder(text.input_ids, text, Needs(qkv=(2,))), Needs(qkv=(2,))))
    assert "layers.0.down.weight" in reached and "layers.1.qkv.weight" in reached
    assert not [name for name in reached if name.startswith(("layers.2.", "head."))]
    assert not [name for name in reached if name.startswith("layers.1.") and "qkv" not in name]


def test_depth_is_the_deepest_layer_that_is_read() -> None:
    needs = (Needs(logits=True, hidden=(0, 2)), Needs(hidden=(0,)), Needs(qkv=(2,), hidden=(1,)))
    assert [each.depth(3) for each in needs] == [3, 0, 2]


def test_predictions_may_miss_whole_sequences() -> None:
    encoder, text = from_hf_model(bert(), mlm_head=True), pack(RAGGED)
    few = PackedText(**{**vars(text), "predicted": torch.tensor([20, 21, 100])})
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            rows = encoder(few.input_ids, few, Needs(last_rows=True))
            whole = encoder(few.input_ids, few, Needs(hidden=(3,))).hidden[3][few.predicted]
        tolerance = 1e-6 if dtype == torch.float32 else 3e-2
        torch.testing.assert_close(rows.last_rows, whole, atol=tolerance, rtol=tolerance)
        for name, gradient in gradients(encoder, selected(rows, Needs(last_rows=True))).items():
            assert gradient.isfinite().all(), name


@pytest.mark.parametrize("lengths", [RAGGED, (16,) * 4], ids=["ragged", "equal"])
def test_bfloat16_errs_no_more_than_transformers(lengths: tuple[int, ...]) -> None:
    model, text = bert(), pack(lengths)
    exact, exact_logits = eager(model, text)
    encoder = from_hf_model(model, mlm_head=True)
    with torch.autocast("cpu", torch.bfloat16):
        theirs, their_logits = eager(model, text)
        out = encoder(text.input_ids, text, EVERYTHING)
        ours = logits(encoder, out)
    for layer in range(1, 4):
        assert out.hidden[layer].dtype == torch.float32  # the residual stream
        assert relative_error(out.hidden[layer], exact[layer]) < 1.2 * relative_error(theirs[layer], exact[layer])
    assert relative_error(ours, exact_logits) < 1.2 * relative_error(their_logits, exact_logits)


def test_bfloat16_gradients_are_bfloat16_close() -> None:
    encoder, text = from_hf_model(bert(), mlm_head=True), pack(RAGGED)
    needs = Needs(logits=True, qkv=(3,))
    exact = {k: v.clone() for k, v in gradients(encoder, selected(encoder(text.input_ids, text, needs), needs)).items()}
    with torch.autocast("cpu", torch.bfloat16):
        outputs = selected(encoder(text.input_ids, text, needs), needs)
    for name, gradient in gradients(encoder, outputs).items():
        assert gradient.dtype == torch.float32
        assert relative_error(gradient, exact[name]) < 0.05, name


class Traced:
    """A compiler that traces, counts its graphs and runs them as they are."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        self.graphs += 1
        return aot_eager(graph, inputs)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Traced:
    torch.compiler.reset()
    compiler = Traced()
    monkeypatch.setitem(encoder_module.GRAPH, "backend", compiler)
    return compiler


@pytest.fixture(scope="module")
def compiled_layers() -> Generator[Encoder]:
    """An encoder whose layers are traced once for all that is read of it."""
    torch.compiler.reset()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(encoder_module.GRAPH, "backend", Traced())
        encoder = from_hf_model(bert(), mlm_head=True)
        encoder.compile_graphs(layerwise=True)
        yield encoder


# Dynamo itself looks at .grad of a layer's input, which is no leaf.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("needs", [*PARTIAL, Needs(hidden=(0, 1, 2, 3), qkv=(1, 2, 3))], ids=str)
@pytest.mark.parametrize("layerwise", [False, True])
def test_a_compiled_forward_is_the_same(needs: Needs, layerwise: bool, request: pytest.FixtureRequest) -> None:
    encoder, text = from_hf_model(bert(), mlm_head=True), pack(RAGGED)
    plain = selected(encoder(text.input_ids, text, needs), needs)
    expected = {name: x.clone() for name, x in gradients(encoder, plain).items()}
    if layerwise:
        encoder = request.getfixturevalue("compiled_layers")
        outputs = selected(encoder(text.input_ids, text, needs), needs)
    else:
        traced = request.getfixturevalue("traced")
        encoder.compile_graphs()
        outputs = selected(encoder(text.input_ids, text, needs), needs)
        assert traced.graphs == 1
    for ours, theirs in zip(outputs, plain, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    found = gradients(encoder, outputs)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert relative_error(found[name], gradient) < 1e-5, name


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("layerwise", [False, True])
def test_batches_of_one_shape_share_their_graphs(layerwise: bool, traced: Traced) -> None:
    """Lengths, predictions and text differ in every step. A step without gradients has graphs of its own: layer by layer
    they are the embeddings, a layer, one whose projection is read, one of predicted rows, and the head."""
    encoder, needs = from_hf_model(bert(), mlm_head=True), Needs(logits=True, qkv=(2,))
    encoder.compile_graphs(layerwise=layerwise)
    lengths, counts = [(17, 1, 40), (40, 17, 1), (19, 38, 1)], []
    for number, each in enumerate(lengths):
        text = PackedText(**{**vars(pack(each, seed=number)), "max_seqlen": 45})
        sum(x.sum() for x in selected(encoder(text.input_ids, text, needs), needs)).backward()
        with torch.no_grad():
            encoder(text.input_ids, text, needs)
        counts.append(traced.graphs)
    assert len(set(counts)) == 1 and counts[0] == 2 * (5 if layerwise else 1)


@pytest.mark.parametrize("layerwise", [False, True])
@torch.no_grad()
def test_a_copy_of_a_compiled_encoder_runs_its_own_weights(layerwise: bool, traced: Traced) -> None:
    encoder, text, needs = from_hf_model(bert(), mlm_head=True), pack(RAGGED), Needs(logits=True, hidden=(1,))
    encoder.compile_graphs(layerwise=layerwise)
    before = selected(encoder(text.input_ids, text, needs), needs)
    other = copy.deepcopy(encoder)
    other.initialise(1)
    expected = from_hf_model(bert(), mlm_head=True)
    expected.initialise(1)
    found = (selected(each(text.input_ids, text, needs), needs) for each in (other, expected))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    for now, earlier in zip(selected(encoder(text.input_ids, text, needs), needs), before, strict=True):
        assert torch.equal(now, earlier)


def test_a_layer_returns_its_projection_only_if_it_is_read() -> None:
    """An output that nobody reads costs a compiled backward a gradient of zeros, [T, 3D]."""
    encoder, text = from_hf_model(bert(), mlm_head=True), pack(RAGGED)
    layer, x = encoder.layers[0], torch.randn(sum(RAGGED), 48)
    sequences = (Sequences(text.position_ids, text.cu_seqlens, text.max_seqlen), 0.0, "sdpa")
    assert layer(x, *sequences)[1] is None
    assert layer(x, *sequences, return_qkv=True)[1].shape == (sum(RAGGED), 3 * 48)


def test_a_bfloat16_residual_stream_rounds_what_layers_hand_on() -> None:
    """LayerNorms still compute in float32: it adds about as much to the error as the bfloat16 products make."""
    encoder, text = from_hf_model(bert(), mlm_head=True), pack(RAGGED)
    exact, needs = selected(encoder(text.input_ids, text, EVERYTHING), EVERYTHING), EVERYTHING
    true = {name: x.clone() for name, x in gradients(encoder, exact).items()}
    errors, gradient_errors = {}, {}
    for residual in (None, torch.bfloat16):
        encoder.residual = residual
        with torch.autocast("cpu", torch.bfloat16):
            out = encoder(text.input_ids, text, needs)
        assert all(x.dtype == (residual or torch.float32) for x in out.hidden.values())
        assert out.head_rows is not None and out.head_rows.dtype == torch.float32
        errors[residual] = relative_error(out.hidden[3], exact[5])
        found = gradients(encoder, selected(out, needs))
        assert all(x.dtype == torch.float32 for x in found.values())
        gradient_errors[residual] = max(relative_error(x, true[name]) for name, x in found.items())
    assert errors[torch.bfloat16] < 2 * errors[None] < 0.05
    assert gradient_errors[None] < 0.05 and gradient_errors[torch.bfloat16] < 0.05


def test_dropout_is_off_unless_asked_for() -> None:
    encoder, text = from_hf_model(bert(), mlm_head=True), pack(RAGGED)
    encoder.train()
    first, again = (encoder(text.input_ids, text, Needs(hidden=(3,))).hidden[3] for _ in range(2))
    assert torch.equal(first, again)
    for needs in (Needs(hidden=(0, 3)), Needs(last_rows=True)):
        one, two = (encoder(text.input_ids, text, needs, dropout=0.1) for _ in range(2))
        for a, b in zip(selected(one, needs), selected(two, needs), strict=True):
            assert not torch.equal(a, b)
    dropped = encoder(text.input_ids, text, Needs(hidden=(0,)), dropout=0.25).hidden[0]
    assert float((dropped == 0).float().mean()) == pytest.approx(0.25, abs=0.02)


def test_initialisation_is_berts_and_depends_on_the_seed() -> None:
    one, same, other = (Encoder(TINY, mlm_head=True, seed=seed).state_dict() for seed in (1, 1, 2))
    for name, parameter in one.items():
        assert torch.equal(parameter, same[name])
        if name.endswith("bias") or "norm" in name:
            assert torch.equal(parameter, torch.full_like(parameter, float("norm.weight" in name))), name
        else:
            assert not torch.equal(parameter, other[name]), name
            deviation = 0.02 * (1 + 4 / parameter.numel() ** 0.5)
            assert 0.02**2 / deviation < float(parameter.std()) < deviation, name
    assert not one["word_embeddings.weight"][0].any()


def test_padding_has_no_embedding_gradient() -> None:
    encoder, text = from_hf_model(bert(), mlm_head=True), pack(RAGGED)
    text.input_ids[3:6] = 0
    reached = gradients(encoder, selected(encoder(text.input_ids, text, Needs(hidden=(1,))), Needs(hidden=(1,))))
    assert not reached["word_embeddings.weight"][0].any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 5}, "width 48 is not divisible by 5 heads"),
        ({"model_type": "t5"}, "model type 't5'"),
    ],
)
def test_impossible_shapes_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EncoderConfig(**{**vars(TINY), **changes})  # type: ignore[arg-type]


def test_logits_without_a_head_are_refused() -> None:
    encoder, text = Encoder(TINY, mlm_head=False), pack(RAGGED)
    with pytest.raises(ValueError, match="no MLM head"):
        encoder(text.input_ids, text, Needs(logits=True))
    with pytest.raises(ValueError, match="no MLM head"):
        _ = encoder.decoder_bias
