"""Replaced token detection: the parts of transformers' ELECTRA, tokens drawn by a hash, and a student that learns to find them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import made_model
import pytest
import torch
from packed_text import RAGGED, as_batch, pack
from torch import Tensor
from transformers import ElectraConfig, ElectraForMaskedLM, ElectraForPreTraining

from fastkd import methods
from fastkd.config import resolve
from fastkd.data.masking import mix_tensor
from fastkd.distributed import World
from fastkd.methods import Method
from fastkd.models import encoder, hf, sampling
from fastkd.models.encoder import Encoder, EncoderConfig
from fastkd.setup import Setup, prepare
from fastkd.train import Trainer

STUDENT = EncoderConfig("bert", 211, 48, 2, 4, 104, max_positions=64)
rtd = methods.load("rtd")


def made(config: EncoderConfig = STUDENT, **options: float) -> tuple[Method, Encoder]:
    """The method and a student, neither at its initialisation."""
    method, student = rtd.METHOD(rtd.Config(**options), config, None), Encoder(config, mlm_head=False)
    method.initialise(torch.Generator().manual_seed(1), torch.device("cpu"))
    torch.manual_seed(0)
    with torch.no_grad():
        for module in (student, *method.modules.values()):
            for parameter in module.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return method, student


# ---- beside transformers --------------------------------------------------------------------------------------


def electra(kind: type, student: Encoder, layers: object, width: int, heads: int, inner: int) -> ElectraForMaskedLM:
    """One of transformers' ELECTRA models with a student's embeddings and some layers."""
    D = student.config.hidden_size
    config = ElectraConfig(
        vocab_size=211, embedding_size=D, hidden_size=width, num_hidden_layers=2, num_attention_heads=heads,
        intermediate_size=inner, max_position_embeddings=64, attn_implementation="eager",
    )  # fmt: skip
    model = kind(config).eval()
    bert = hf.to_hf_model(student, mlm_head=False)
    model.electra.embeddings.load_state_dict(bert.embeddings.state_dict(), strict=False)
    source = Encoder(
        replace(student.config, hidden_size=width, num_heads=heads, intermediate_size=inner), mlm_head=False
    )
    source.layers.load_state_dict(layers.state_dict())
    model.electra.encoder.load_state_dict(hf.to_hf_model(source, mlm_head=False).encoder.state_dict())
    return model


def test_the_generator_is_transformers_electra_generator() -> None:
    method, student = made()
    ours, text = method.modules["generator"], pack(RAGGED)
    theirs = electra(ElectraForMaskedLM, student, ours.layers, 12, 1, 26)
    theirs.electra.embeddings_project.load_state_dict(ours.projection.state_dict())
    theirs.generator_predictions.dense.load_state_dict(ours.dense.state_dict())
    theirs.generator_predictions.LayerNorm.load_state_dict(ours.norm.state_dict())
    theirs.generator_lm_head.bias.data.copy_(ours.bias)
    ids, real = text.padded(0)
    expected = theirs(ids, attention_mask=real.long()).logits[real][text.predicted]
    found = ours(student, text.input_ids, text) @ student.word_embeddings.weight.T + ours.bias
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_the_student_s_loss_is_transformers_electra_loss() -> None:
    """Of the same text, for the same tokens; the generator's loss is its cross-entropy."""
    method, student = made(detection_weight=7.0)
    text, detector = pack(RAGGED), method.modules["detector"]
    out = method.read(student, as_batch(text))
    theirs = electra(ElectraForPreTraining, student, student.layers, 48, 4, 104)
    theirs.discriminator_predictions.dense.load_state_dict(detector.dense.state_dict())
    theirs.discriminator_predictions.dense_prediction.load_state_dict(detector.decision.state_dict())
    read, replaced = text_of(method, student, text), torch.zeros_like(text.padded(0)[0])
    ids, real = replace(text, input_ids=read).padded(0)
    replaced[real] = out.replaced.long()
    expected = theirs(ids, attention_mask=real.long(), labels=replaced).loss
    found = method.loss(out, None, as_batch(text))
    torch.testing.assert_close(found.terms["detection"], expected, atol=1e-6, rtol=1e-5)
    logits = out.head_rows @ out.decoder_weight.T + out.decoder_bias
    entropy = torch.nn.functional.cross_entropy(logits, text.input_ids[text.predicted])
    torch.testing.assert_close(found.loss, entropy + 7 * expected, atol=1e-5, rtol=1e-5)


# ---- what is drawn --------------------------------------------------------------------------------------------


def text_of(method: Method, student: Encoder, text: object) -> Tensor:
    """The ids that the student reads."""
    read: list[Tensor] = []
    student.register_forward_pre_hook(lambda _, given: read.append(given[0]))
    method.read(student, as_batch(text))
    return read[-1]


def test_only_masked_positions_are_replaced_and_a_right_guess_is_original() -> None:
    method, student = made()
    batch = as_batch(pack(RAGGED))
    labels = batch.labels.clone()
    labels[::4] = -100  # special tokens that made up a number
    out = method.read(student, replace(batch, labels=labels))
    assert not out.replaced[batch.predicted[::4]].any() and out.replaced.sum() > 5
    hidden = torch.zeros_like(out.replaced).scatter(0, batch.predicted, True)
    assert not out.replaced[~hidden].any()
    with torch.no_grad():  # a generator that always guesses the same token
        method.modules["generator"].bias[int(batch.labels[1])] = 1e4
    sure = method.read(student, batch)
    assert torch.equal(sure.replaced[batch.predicted], batch.labels != batch.labels[1])


def test_draws_have_the_softmax_s_distribution() -> None:
    """χ² of 100,000 draws from 40 tokens: 39 degrees of freedom, below 80 in all but 1 of 10,000 such tests."""
    torch.manual_seed(0)
    logits, rows = 2 * torch.randn(40), 100_000
    keys = mix_tensor(torch.arange(rows))
    drawn = sampling.sample(torch.ones(rows, 1), logits[:, None], torch.zeros(40), keys)
    expected = logits.softmax(0) * rows
    assert float(((drawn.bincount(minlength=40) - expected).square() / expected).sum()) < 80


def test_draws_of_neighbours_in_text_and_vocabulary_are_independent() -> None:
    """The same token twice in a row, and a token and the next one, of rows whose keys are one apart: both as often as chance."""
    keys = torch.arange(50_000)
    drawn = sampling.sample(torch.ones(len(keys), 1), torch.zeros(50, 1), torch.zeros(50), keys)
    for distance in (0, 1, 2):
        share = float((drawn[1:] - drawn[:-1] == distance).double().mean())
        assert share == pytest.approx((50 - distance) / 2500, abs=5 * (0.02 / 50_000) ** 0.5)


def test_a_draw_depends_on_its_sequence_only() -> None:
    """Not on what else is in the micro-batch, nor on the number of rows in a chunk."""
    text, parts = pack(RAGGED, empty=2), RAGGED[2:5]
    start = sum(RAGGED[:2])
    some = slice(start, start + sum(parts))
    cu = torch.tensor([0, *parts]).cumsum(0).int()
    rows = text.predicted[(text.predicted >= some.start) & (text.predicted < some.stop)]
    everything = sampling.row_keys(text.input_ids, text.position_ids, text.cu_seqlens, rows)
    alone = sampling.row_keys(text.input_ids[some], text.position_ids[some], cu, rows - start)
    assert torch.equal(everything, alone) and len(everything.unique()) == len(everything)
    hidden, weight, bias = torch.randn(300, 8), torch.randn(97, 8), torch.randn(97)
    keys = mix_tensor(torch.arange(300))
    whole = sampling.sample(hidden, weight, bias, keys)
    halves = [sampling.sample(hidden[part], weight, bias, keys[part]) for part in (slice(150), slice(150, 300))]
    assert torch.equal(whole, torch.cat(halves))


# ---- runs -----------------------------------------------------------------------------------------------------


@pytest.fixture
def setup_of(made_corpus: Path, made_teacher: Path, tmp_path: Path) -> Callable[..., Setup]:
    def make(method: str = "rtd", **options: object) -> Setup:
        values = {
            "preset": "quickstart", "method": method, "corpus": [str(made_corpus)], "student": "2L-48H-4A",
            "tokenizer": str(made_teacher), "seq_length": 32, "batch_tokens": 1024, "budget_tokens": 1e5, "dtype": "float32",
            **options,
        }  # fmt: skip
        return prepare(resolve(values), World())

    return make


def test_a_student_learns_to_find_what_was_replaced(setup_of: Callable[..., Setup], tmp_path: Path) -> None:
    """On 20 documents of the same 60 words: in text that it is not trained on, better than by calling every token original."""
    words = sorted({word.strip(".").lower() for text in made_model.texts(20) for word in text.split()})[:60]
    documents = [" ".join(words[(7 * number + place) % 60] for place in range(120)) for number in range(20)]
    (tmp_path / "few.txt").write_text("\n\n".join(documents))
    trainer = Trainer(setup_of(corpus=[str(tmp_path / "few.txt")]))
    for step in range(40):
        trainer.step(trainer.stream.step(step), 1e-3)
    right, original, count = 0, 0, 0
    method, student = trainer.setup.method, trainer.setup.student
    for batch in trainer.validation:
        with torch.no_grad():
            out = method.read(student, batch)
            found = method.modules["detector"](out.hidden[2]) > 0
        right, original = right + int((found == out.replaced).sum()), original + int((~out.replaced).sum())
        count += len(found)
    assert original < count and right / count > original / count + 0.02
    assert trainer.validate().loss == trainer.validate().loss


def test_all_that_is_made_is_trained_and_a_later_stage_frees_it(setup_of: Callable[..., Setup]) -> None:
    trainer = Trainer(setup_of("rtd:0.5>mlm"))
    idle = [name for name, parameter in trainer.objective.named_parameters() if not parameter.requires_grad]
    assert idle and all(name.startswith("student.head.") for name in idle)  # mlm's
    trainer.step(trainer.stream.step(0), 1e-3)
    trainer.enter(1)
    assert not trainer.objective.method and not trainer.setup.stages.methods[0].modules
    trainer.step(trainer.stream.step(1), 1e-3)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_graphs_train_the_same(setup_of: Callable[..., Setup], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(encoder.GRAPH, "backend", "aot_eager")
    found = []
    for compiled in (False, True):
        torch.compiler.reset()
        trainer = Trainer(setup_of(compile=compiled))
        trainer.micro_step(trainer.stream.step(0)[0], 1.0)
        found.append([parameter.grad for parameter in trainer.trained])
        trainer.validate()
    for ours, plain in zip(*found, strict=True):
        assert (ours - plain).norm() <= 1e-5 * plain.norm()


# ---- options --------------------------------------------------------------------------------------------------


def test_the_generator_s_shape() -> None:
    base = EncoderConfig("bert", 1000, 768, 12, 12, 3072)
    for share, width, heads in ((0.25, 192, 3), (0.333, 256, 4), (1, 768, 12)):
        config = rtd.generator_config(base, share)
        assert (config.hidden_size, config.num_heads, config.intermediate_size) == (width, heads, 4 * width)
        assert (config.num_layers, config.head_width) == (12, 64)
    with pytest.raises(
        ValueError, match=r"--generator-width-share 0.25 of the student's 6 heads .* give 0.333, or another"
    ):
        rtd.generator_config(EncoderConfig("bert", 1000, 192, 3, 6, 768), 0.25)


@pytest.mark.parametrize(("name", "value"), [("generator_width_share", 0.0), ("generator_width_share", 1.5),
                                             ("detection_weight", 0.0), ("detection_weight", float("nan"))])  # fmt: skip
def test_values_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} must be above 0"):
        rtd.Config(**{name: value})
