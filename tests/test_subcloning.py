"""A student cut out of its teacher: consistent in every permutation of neurons, exact where nothing is cut, a start in a run."""

import logging
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import processes
import pytest
import torch
from packed_text import RAGGED, PackedText, bert, pack, roberta
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from fastkd import run
from fastkd.files import read_jsonl
from fastkd.models import families, subcloning
from fastkd.models.encoder import Encoder
from fastkd.models.hf import from_hf, from_hf_model, load
from fastkd.models.importance import Importance, measure
from fastkd.models.needs import Needs
from fastkd.models.student import check_start, init_from_teacher
from fastkd.models.subcloning import Kept, choose, cut
from fastkd.run_folder import read_run

NEEDS = Needs(logits=True, hidden=(0,))
TEXTS = [pack(RAGGED, seed=seed) for seed in (1, 2)]


def encoder_of(make: Callable[[], PreTrainedModel]) -> Encoder:
    return from_hf_model(make(), mlm_head=True)


def importance_of(encoder: Encoder) -> Importance:
    return measure(encoder, [(text.input_ids, text) for text in TEXTS])


def narrow(teacher: Encoder, **sizes: int) -> Encoder:
    """A student that starts from its teacher: 24 of 48 channels, 3 of 4 heads of 8 of 12 dimensions, 60 of 100 neurons."""
    shape = {"num_layers": 2, "hidden_size": 24, "num_heads": 3, "intermediate_size": 60} | sizes
    student = Encoder(replace(teacher.config, **shape), mlm_head=True)
    init_from_teacher(student, teacher, importance_of(teacher))
    return student


@torch.no_grad()
def function(encoder: Encoder, text: PackedText = TEXTS[0]) -> Tensor:
    out = encoder(text.input_ids, text, NEEDS)
    assert out.head_rows is not None
    return out.head_rows @ encoder.decoder_weight.T + encoder.decoder_bias


def shuffled(encoder: Encoder, seed: int = 0) -> Kept:
    """All neurons of an encoder in a random order: channels, heads, dimensions within each head, intermediate neurons."""
    generator, config = torch.Generator().manual_seed(seed), encoder.config

    def order(count: int) -> Tensor:
        return torch.randperm(count, generator=generator)

    def rows(heads: Tensor) -> Tensor:
        return torch.cat([head * config.head_width + order(config.head_width) for head in heads])

    layers = range(config.num_layers)
    heads = [order(config.num_heads) for _ in layers]
    query_key, value = ([rows(heads[layer]) for layer in layers] for _ in range(2))
    return Kept(order(config.hidden_size), query_key, value, [order(config.intermediate_size) for _ in layers])


def permuted(encoder: Encoder, kept: Kept) -> Encoder:
    config = encoder.config
    other = Encoder(config, mlm_head=True)
    other.load_state_dict(cut(encoder.state_dict(), kept, config, config))
    return other


@pytest.mark.parametrize("make", [bert, roberta])
def test_all_neurons_in_another_order_are_the_same_function(make: Callable[[], PreTrainedModel]) -> None:
    teacher = encoder_of(make)
    other = permuted(teacher, shuffled(teacher))
    assert not torch.equal(other.layers[0].qkv.weight, teacher.layers[0].qkv.weight)
    torch.testing.assert_close(function(other), function(teacher), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("make", [bert, roberta])
def test_a_teacher_with_its_neurons_in_another_order_gives_the_same_student(
    make: Callable[[], PreTrainedModel],
) -> None:
    teacher = encoder_of(make)
    students = [narrow(each) for each in (teacher, permuted(teacher, shuffled(teacher)))]
    assert not torch.equal(students[0].word_embeddings.weight, students[1].word_embeddings.weight)
    torch.testing.assert_close(function(students[1]), function(students[0]), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(function(students[0]), function(teacher), atol=0.1)


def test_importance_is_what_its_formulas_say() -> None:
    """Against activations of the forward that keeps them all, with one text, written out layer by layer."""
    teacher, text = encoder_of(bert), TEXTS[0]
    found = measure(teacher, [(text.input_ids, text)])
    L, H, d = 3, 4, 12
    with torch.no_grad():
        out = teacher(text.input_ids, text, Needs(hidden=tuple(range(L + 1)), qkv=tuple(range(1, L + 1))))
        width = out.hidden[0].abs().mean(0)
        for number, layer in enumerate(teacher.layers, start=1):
            q, k, v = (x.unflatten(-1, (H, d)) for x in out.qkv[number])
            context = torch.cat([attend(*(x[rows] for x in (q, k, v))) for rows in rows_of(text)])
            W = layer.attention_output.weight.unflatten(-1, (H, d))
            added = torch.einsum("thi,xhi->thx", context, W)
            each = context.square().mean(0).sqrt() * W.norm(dim=0)
            after = layer.attention_norm(out.hidden[number - 1] + layer.attention_output(context.flatten(1)))
            activated = torch.nn.functional.gelu(layer.up(after))
            width = width + after.abs().mean(0) + out.hidden[number].abs().mean(0)
            products = (q.square().mean(0) * k.var(0, correction=0)).sqrt()
            for mine, theirs in (
                (found.heads, added.square().sum(-1).mean(0).sqrt()),
                (found.value, each),
                (found.query_key, products),
                (found.intermediate, activated.abs().mean(0)),
            ):
                torch.testing.assert_close(mine[number - 1].float(), theirs, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.width.float(), width, atol=1e-5, rtol=1e-5)


def rows_of(text: PackedText) -> list[slice]:
    ends = torch.tensor((0, *text.lengths)).cumsum(0).tolist()
    return [slice(start, end) for start, end in pairwise(ends)]


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[S, H, d] each → the context of one sequence."""
    weights = torch.softmax(torch.einsum("shd,thd->hst", q, k) / q.shape[-1] ** 0.5, -1)
    return torch.einsum("hst,thd->shd", weights, v)


def test_the_most_active_neurons_are_kept_in_their_order() -> None:
    teacher = encoder_of(bert)
    student = replace(teacher.config, num_layers=1, hidden_size=16, num_heads=2, intermediate_size=3)
    scores = importance_of(teacher)
    scores.width[[40, 7]], scores.intermediate[0, [9, 80, 5]], scores.heads[0, [3, 1]] = 1e3, 1e3, 1e3
    scores.value[0, 1, [11, 0]] = 1e3
    kept = choose(scores, student, teacher.config)
    assert kept.width.tolist() == sorted(kept.width.tolist()) and {7, 40} <= set(kept.width.tolist())
    assert kept.intermediate[0].tolist() == [5, 9, 80]
    assert all(set((rows[0] // 12).tolist()) == {1, 3} for rows in (kept.query_key, kept.value))
    assert {12, 23} <= set(kept.value[0].tolist()) and len(kept.query_key[0]) == 16


def test_a_student_of_equal_widths_reads_no_importance() -> None:
    teacher = encoder_of(bert)
    student = Encoder(replace(teacher.config, num_layers=2), mlm_head=True)
    init_from_teacher(student, teacher)
    assert subcloning.remark(student.config, teacher.config) == "2 of 3 layers"
    assert torch.equal(student.layers[1].qkv.weight, teacher.layers[1].qkv.weight)


def test_positions_that_count_from_the_padding_id_stay_where_they_were() -> None:
    teacher = encoder_of(roberta)
    student = narrow(teacher)
    kept = choose(importance_of(teacher), student.config, teacher.config)
    assert student.config.position_offset == teacher.config.position_offset == 2
    table = teacher.position_embeddings.weight[:, kept.width]
    assert torch.equal(student.position_embeddings.weight, table) and table.shape == (66, 24)


def test_the_logits_keep_their_scale() -> None:
    """Half of the channels: the sum over them is multiplied by √2 in the head's LayerNorm, and nothing else is."""
    teacher = encoder_of(bert)
    student, kept = narrow(teacher), choose(importance_of(teacher), narrow(teacher).config, teacher.config)
    assert student.head is not None and teacher.head is not None
    for mine, theirs in zip(student.head.norm.parameters(), teacher.head.norm.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs[kept.width] * 2**0.5)
    dense = teacher.head.dense.weight[kept.width][:, kept.width]
    down = teacher.layers[1].down.weight[kept.width][:, kept.intermediate[1]]
    assert torch.equal(student.head.dense.weight, dense) and torch.equal(student.layers[1].down.weight, down)


def test_a_teacher_without_a_head_leaves_the_students_as_it_was() -> None:
    teacher = from_hf_model(bert(), mlm_head=False)
    student = narrow(teacher)
    fresh = Encoder(student.config, mlm_head=True)
    assert student.head is not None and fresh.head is not None
    assert torch.equal(student.head.dense.weight, fresh.head.dense.weight)
    assert not torch.equal(student.word_embeddings.weight, fresh.word_embeddings.weight)


@pytest.mark.parametrize("model_type", ["bert", "roberta", "xlm-roberta", "camembert"])
@pytest.mark.parametrize("tied", [True, False])
def test_axes_have_the_sizes_of_every_parameter(model_type: str, tied: bool) -> None:
    hf_config = families.of(model_type).classes[model_type].config(
        vocab_size=211, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=52, pad_token_id=1,
        max_position_embeddings=64, tie_word_embeddings=tied,
    )  # fmt: skip
    config = from_hf(hf_config)
    axes, state = config.family.axes(config), Encoder(config, mlm_head=True).state_dict()
    sizes = {"width": 24, "qkv": 72, "context": 24, "decoded": 24, "intermediate": 52}
    assert axes.keys() == state.keys()
    for name, tensor in state.items():
        assert len(axes[name]) == tensor.dim(), name
        assert all(sizes.get(axis, size) == size for axis, size in zip(axes[name], tensor.shape, strict=True)), name
        assert (24 in tensor.shape) == bool({"width", "context", "decoded"} & set(axes[name])), name


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        (
            {"hidden_size": 96},
            "a student no larger than its teacher: at most 3L-48H-4A-100I, not 2L-96H-3A-60I; change --student",
        ),
        ({"num_layers": 4}, "at most 3L-48H-4A-100I, not 4L-24H-3A-60I"),
        ({"intermediate_size": 101}, "at most 3L-48H-4A-100I, not 2L-24H-3A-101I"),
        (
            {"num_heads": 6},
            "4 heads of width 12, from which 6 heads of width 4 .* give --student 24H-2A or 24H-3A or 24H-4A$",
        ),
        ({"num_heads": 1}, "from which 1 heads of width 24 cannot be made"),
        ({"hidden_size": 47, "num_heads": 1}, "give --student a width that is a multiple of 12$"),
        ({"max_positions": 32}, r"the teacher's max_positions \(64\), not 32; leave --tokenizer out"),
    ],
    ids=str,
)
def test_what_cannot_be_cut_is_refused(sizes: dict[str, int], words: str) -> None:
    teacher = encoder_of(bert)
    shape = {"num_layers": 2, "hidden_size": 24, "num_heads": 3, "intermediate_size": 60} | sizes
    student = Encoder(replace(teacher.config, **shape), mlm_head=True)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=words) as refused:
        check_start(student, teacher)
    assert "\n" not in str(refused.value)


def test_an_encoder_that_was_watched_is_as_it_was() -> None:
    teacher = encoder_of(bert)
    before = function(teacher)
    importance_of(teacher)
    assert torch.equal(function(teacher), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in teacher.modules())


# ---- in a run ---------------------------------------------------------------------------------------------------


def test_a_run_starts_with_a_part_of_its_teacher(
    light: list[str], made_teacher: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys
) -> None:
    """And says so wherever it is told of; its data are those of a run that starts at random."""
    options = [*light, "--method", "mlm", "--student", "2L-48H-6A", "--batch-tokens", "512", "--budget-tokens", "600"]
    with caplog.at_level(logging.INFO, "fastkd"):
        assert run.main([*options, "--init-from-teacher", "--output-dir", str(tmp_path / "run")]) == 0
    what = "2 of 4 layers, 48 of 192 channels, 6 of 12 heads, 8 of 16 dimensions of a head, 192 of 384 intermediate neurons"
    assert any(f"starting with {what}, chosen on 8 packs of text in " in line for line in caplog.messages)
    words = f"started from {made_teacher}: {what}"
    folder = tmp_path / "run"
    assert words in capsys.readouterr().out
    assert words in (folder / "report.html").read_text() and words in (folder / "final" / "README.md").read_text()
    assert read_run(folder).plan["student"]["start_remark"] == what
    started, teacher = load(folder).encoder, load(made_teacher).encoder
    nearest = torch.cdist(started.word_embeddings.weight.T, teacher.word_embeddings.weight.T).min(1).values
    assert nearest.max() < 0.1  # one step at the final rate from columns of the teacher's
    setup = next(line for line in read_jsonl(folder / "ledger.jsonl") if line.get("event") == "setup")
    assert not setup["charged"] and setup["seconds"] > 0

    options[options.index("--teacher")] = "--tokenizer"
    assert run.main([*options, "--output-dir", str(tmp_path / "random")]) == 0
    steps = [read_run(path).steps[0] for path in (folder, tmp_path / "random")]
    assert steps[0]["tokens"] == steps[1]["tokens"]


@pytest.mark.exhaustive
def test_two_ranks_start_as_one_does(light: list[str], tmp_path: Path) -> None:
    options = [*light, "--method", "minilmv2", "--init-from-teacher", "--student", "2L-48H-6A"]
    options += ["--budget-tokens", "2100"]
    assert run.main([*options, "--micro-batch", "1024", "--output-dir", str(tmp_path / "one")]) == 0
    done = processes.ranks("fastkd.run", *options, "--micro-batch", "512", "--output-dir", str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    one, two = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("one", "two"))
    assert max(float((one[key] - two[key]).abs().max()) for key in one) <= 1e-5
