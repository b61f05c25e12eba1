"""What relation_kl and score_mse share: buckets of few shapes, mixed dtypes, empty input, refusals, one graph for all sizes."""

from typing import Any

import pytest
import torch
from oracle import count_graphs, error, exact, value_and_gradients
from torch import Tensor

from bench.losses.packed import PackedCase
from bench.losses.score_mse import ScoreCase
from fastkd.kernels import buckets, packed, relation_kl, score_mse

LOSSES = {"relation_kl": (relation_kl.relation_kl, relation_kl.reference),
          "score_mse": (score_mse.score_mse, score_mse.reference)}  # fmt: skip
each_loss = pytest.mark.parametrize("name", LOSSES)
RAGGED = (15, 16, 17, 3, 0, 1, 16, 2)
DEVICES = {"blocked": "cpu", "triton": "cuda" if torch.cuda.is_available() else "cpu"}


def inputs(name: str, lengths: tuple[int, ...] = RAGGED, device: str = "cpu") -> dict[str, Any]:
    case = PackedCase("", lengths, 2, 32, 48) if name == "relation_kl" else ScoreCase("", lengths, 2, 32, 48)
    return case.inputs(device)


def teachers(given: dict[str, Any]) -> list[str]:
    return [name for name in given if name.startswith("teacher")]


def test_buckets_hold_each_sequence_once_in_few_shapes() -> None:
    lengths = torch.randint(0, 300, (200,), generator=torch.Generator().manual_seed(0))
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    found = list(buckets.by_length(cu_seqlens, 12, int(cu_seqlens[-1]), 300))
    rows = torch.cat([bucket.rows[bucket.valid] for bucket in found])
    assert torch.equal(rows.sort().values, torch.arange(int(lengths.sum())))
    assert all(bucket.length % 16 == 0 and len(bucket.rows).bit_count() == 1 for bucket in found)
    assert sum(bucket.rows.numel() for bucket in found) < 1.1 * int(lengths.sum())


@each_loss
@pytest.mark.parametrize(
    ("student", "teacher"), [("float32", "float64"), ("bfloat16", "float32"), ("float64", "float32")]
)
def test_dtypes_may_differ(name: str, student: str, teacher: str) -> None:
    function, reference = LOSSES[name]
    given = inputs(name)
    for key, value in given.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            dtype = getattr(torch, teacher if key in teachers(given) else student)
            given[key] = value.detach().to(dtype).requires_grad_(value.requires_grad)
    loss, gradients = value_and_gradients(function, given, backend="blocked")
    expected, exact_gradients = value_and_gradients(reference, exact(given))
    tolerance = 1e-2 if student == "bfloat16" else 1e-5
    assert error(loss, expected) <= 1e-5
    for out, ref in zip(gradients, exact_gradients, strict=True):
        assert out.dtype == getattr(torch, student) and error(out, ref) <= tolerance


@each_loss
@pytest.mark.parametrize("backend", ["blocked", "triton"])
def test_cu_seqlens_may_be_a_slice_of_more_slots(name: str, backend: str) -> None:
    """A batch's slots end with empty ones: what is launched for the others is the same without them."""
    given = inputs(name, device=DEVICES[backend])
    cu_seqlens = given["cu_seqlens"]
    slots = torch.cat([cu_seqlens.new_full((3,), 7), cu_seqlens, cu_seqlens[-1:].expand(20)])
    sliced = slots[3 : 3 + len(cu_seqlens)]
    whole = value_and_gradients(LOSSES[name][0], given | {"cu_seqlens": slots[3:]}, backend=backend)
    out = value_and_gradients(LOSSES[name][0], given | {"cu_seqlens": sliced}, backend=backend)
    assert torch.equal(out[0], whole[0])
    assert all(torch.equal(a, b) for a, b in zip(out[1], whole[1], strict=True))


@each_loss
@pytest.mark.parametrize("backend", ["blocked", "triton"])
def test_cu_seqlens_may_be_a_column_of_a_matrix(name: str, backend: str) -> None:
    given = inputs(name, device=DEVICES[backend])
    column = torch.stack([given["cu_seqlens"], given["cu_seqlens"].flip(0)], 1)[:, 0]
    assert not column.is_contiguous()
    (loss, gradients), (expected, others) = (
        value_and_gradients(LOSSES[name][0], {**given, "cu_seqlens": cu}, backend=backend)
        for cu in (column, given["cu_seqlens"])
    )
    assert torch.equal(loss, expected) and all(torch.equal(a, b) for a, b in zip(gradients, others, strict=True))


@each_loss
def test_float64_beside_float32_is_no_work_for_triton(name: str) -> None:
    given = inputs(name, device=DEVICES["triton"])
    given |= {key: given[key].double() for key in teachers(given)}
    with pytest.raises(ValueError, match="backend='triton' has no float64"):
        LOSSES[name][0](**given, backend="triton")


@pytest.mark.parametrize(("name", "cross"), [("relation_kl", False), ("relation_kl", True), ("score_mse", False)])
def test_a_launch_takes_the_lengths_between_two_tiles(name: str, cross: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once each, at the borders too, whether a program has one sequence or goes through all of them."""
    lengths = (32, 33, 0, 64, 128, 65, 1, 31, 63, 0)
    kind = PackedCase if name == "relation_kl" else ScoreCase
    case = kind("", lengths, 2, 32, 32, torch.bfloat16, cross=cross)
    function, reference = LOSSES[name]
    given = case.inputs(DEVICES["triton"])
    expected, exact_gradients = value_and_gradients(reference, exact(given))
    outs = []
    for programs in (packed.PROGRAMS, 2):
        monkeypatch.setattr(packed, "PROGRAMS", programs)
        outs.append(value_and_gradients(function, given, backend="triton"))
    (loss, gradients), (again, same) = outs
    assert error(loss, expected) <= case.tolerance
    for out, ref in zip(gradients, exact_gradients, strict=True):
        for own, expected_of_it in zip(out.split(lengths), ref.split(lengths), strict=True):
            if expected_of_it.any():
                assert error(own, expected_of_it) <= case.tolerance
            else:  # no token, or one, whose relation is 1 in both models
                assert not own.any()
    assert torch.equal(loss, again)
    assert all(torch.equal(x, y) for x, y in zip(gradients, same, strict=True))


@each_loss
def test_no_rows_at_all_is_a_loss_of_zero(name: str) -> None:
    loss, gradients = value_and_gradients(LOSSES[name][0], inputs(name, (0, 0)), backend="blocked")
    assert float(loss) == 0 and all(g.shape == (0, 32) for g in gradients)


def test_float16_gradients_of_large_scores_are_finite() -> None:
    torch.manual_seed(0)
    tensors = [(torch.randn(512, 128) * 10).half() for _ in range(4)]
    names = ("student_query", "student_key", "teacher_query", "teacher_key")
    given = dict(zip(names, tensors, strict=True)) | {"cu_seqlens": torch.tensor([0, 512]), "num_heads": 2}
    for key in names[:2]:
        given[key].requires_grad_()
    _, expected = value_and_gradients(score_mse.reference, exact(given))
    _, gradients = value_and_gradients(score_mse.score_mse, given, backend="blocked")
    assert all(error(out, ref) <= 1e-2 for out, ref in zip(gradients, expected, strict=True))


@each_loss
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 5}, "no positive multiple of num_heads=5"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "rise from 0 to the 70 rows"),
        ({"cu_seqlens": torch.tensor([1, 70])}, "rise from 0 to the 70 rows"),
        ({"cu_seqlens": torch.tensor([0, 40, 30, 70])}, "rise from 0 to the 70 rows"),
        ({"cu_seqlens": torch.tensor([0.0, 70.0])}, "int32"),
        ({"max_seqlen": 16}, "17 tokens, max_seqlen is 16"),
        ({"backend": "magic"}, "magic"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LOSSES[name][0](**inputs(name) | {"backend": "blocked"} | change)


@each_loss
def test_whole_numbers_are_refused(name: str) -> None:
    given = inputs(name)
    for key in teachers(given):
        given[key] = given[key].long()
    with pytest.raises(ValueError, match=r"teacher is torch.int64: give float16, bfloat16"):
        LOSSES[name][0](**given)


@each_loss
def test_sizes_share_a_compiled_graph(name: str) -> None:
    calls = [inputs(name, (length,)) | {"max_seqlen": 64} for length in (10, 20, 30, 40, 50)]
    assert count_graphs(LOSSES[name][0], calls) <= 2  # the first size, then any
