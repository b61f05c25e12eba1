"""varlen_attention against attention written out for each sequence in float64, and its backends against each other."""

import itertools
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastkd.models.attention import (
    BACKENDS,
    Setting,
    available_backends,
    choose_backend,
    has_function,
    varlen_attention,
)
from fastkd.models.attention_cpu import group_sequences
from fastkd.run_config import RunConfig

HEADS, WIDTH = 3, 8
Lengths = tuple[int, ...]


def boundaries(lengths: Lengths) -> Tensor:
    return torch.tensor((0, *lengths)).cumsum(0).int()


def inputs(lengths_q: Lengths, lengths_k: Lengths, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q, k and v as slices of one fused projection, as the encoder's are."""
    generator = torch.Generator().manual_seed(0)
    rows = max(sum(lengths_q), sum(lengths_k))
    fused = torch.randn(rows, 3, HEADS, WIDTH, generator=generator, dtype=torch.float64).mul(2).to(dtype)
    return [fused[: sum(lengths_q), 0], fused[: sum(lengths_k), 1], fused[: sum(lengths_k), 2]]


def written_out(q: Tensor, k: Tensor, v: Tensor, lengths_q: Lengths, lengths_k: Lengths) -> Tensor:
    """softmax(q kᵀ / √d) v, sequence by sequence, as in a textbook."""
    rows = []
    for q_b, k_b, v_b in zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True):
        weights = torch.softmax(torch.einsum("ihd,jhd->hij", q_b, k_b) / WIDTH**0.5, dim=-1)
        rows.append(torch.einsum("hij,jhd->ihd", weights, v_b))
    return torch.cat(rows)


def with_gradients(function, tensors: list[Tensor]) -> list[Tensor]:  # type: ignore[no-untyped-def]
    """The function's output and its gradients in a fixed direction, in float64."""
    leaves = [x.clone().requires_grad_() for x in tensors]
    out = function(*leaves)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out.device)
    out.backward(direction.to(out.dtype))
    return [out.detach().double(), *(leaf.grad.double() for leaf in leaves if leaf.grad is not None)]


def ours(lengths_q: Lengths, lengths_k: Lengths, *, slack: int = 0, dropout: float = 0.0, backend: str | None = None):  # type: ignore[no-untyped-def]
    cu = boundaries(lengths_q), boundaries(lengths_k)
    longest = max(lengths_q) + slack, max(lengths_k) + slack
    return lambda q, k, v: varlen_attention(q, k, v, *cu, *longest, dropout=dropout, backend=backend)


def traced(lengths_q: Lengths, lengths_k: Lengths):  # type: ignore[no-untyped-def]
    """The path that a graph, or a GPU without another backend, takes: SDPA over padded sequences."""
    function = ours(lengths_q, lengths_k, slack=3, backend="sdpa")
    torch.compiler.reset()
    return torch.compile(function, backend="eager", fullgraph=True)


CASES = [
    ((7,), (7,)),
    ((1,), (1,)),
    ((5, 1, 12, 3), (5, 1, 12, 3)),
    ((6, 6, 6), (6, 6, 6)),
    ((4, 0, 9, 0, 0), (4, 0, 9, 0, 0)),  # empty sequences
    ((2, 1, 3), (9, 16, 4)),  # predicted rows
    ((2, 0, 3, 0), (9, 16, 4, 7)),  # sequences without a predicted row, the last one too
    ((33, 64, 65, 128, 17), (33, 64, 65, 128, 17)),
]


@pytest.mark.parametrize(("lengths_q", "lengths_k"), CASES, ids=str)
def test_equals_attention_written_out(lengths_q: Lengths, lengths_k: Lengths) -> None:
    tensors = inputs(lengths_q, lengths_k)
    expected = with_gradients(lambda q, k, v: written_out(q, k, v, lengths_q, lengths_k), tensors)
    for function in (ours(lengths_q, lengths_k), traced(lengths_q, lengths_k)):
        for mine, theirs in zip(with_gradients(function, tensors), expected, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(("lengths_q", "lengths_k"), CASES, ids=str)
def test_bfloat16_is_within_its_rounding(lengths_q: Lengths, lengths_k: Lengths) -> None:
    tensors = inputs(lengths_q, lengths_k, torch.bfloat16)
    exact = [x.double() for x in tensors]
    expected = with_gradients(lambda q, k, v: written_out(q, k, v, lengths_q, lengths_k), exact)
    plain = with_gradients(lambda q, k, v: written_out(q, k, v, lengths_q, lengths_k), tensors)
    mine = with_gradients(ours(lengths_q, lengths_k), tensors)
    for out, reference, true in zip(mine, plain, expected, strict=True):
        error, allowed, size = (float(x.norm()) for x in (out - true, reference - true, true))
        assert error <= max(1.5 * allowed, 1e-3 * size), f"{error:.2e} against {allowed:.2e} of {size:.2e}"


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 20)), min_size=1, max_size=12))
def test_any_lengths(pairs: list[tuple[int, int]]) -> None:
    lengths_k = tuple(k for _, k in pairs)
    lengths_q = tuple(min(q, k) for q, k in pairs)
    if not sum(lengths_q):
        lengths_q = lengths_k
    tensors = inputs(lengths_q, lengths_k)
    expected = with_gradients(lambda q, k, v: written_out(q, k, v, lengths_q, lengths_k), tensors)
    for mine, true in zip(with_gradients(ours(lengths_q, lengths_k), tensors), expected, strict=True):
        torch.testing.assert_close(mine, true, atol=1e-12, rtol=1e-12)
    half = with_gradients(ours(lengths_q, lengths_k), [x.bfloat16() for x in tensors])
    for mine, true in zip(half, expected, strict=True):
        torch.testing.assert_close(mine, true, atol=0.15, rtol=0.15)


def test_groups_hold_every_row_once_and_pad_little() -> None:
    generator, heads = torch.Generator().manual_seed(0), 3
    lengths = tuple(torch.randint(1, 129, (64,), generator=generator).tolist())
    keys = group_sequences(lengths, lengths, heads).keys
    assert torch.equal(keys.gather[keys.scatter], torch.arange(sum(lengths) * heads))
    assert len(keys.padding) + sum(lengths) * heads == len(keys.gather) == sum(n * s for n, s in keys.sizes)
    pairs = sum(n * s * s for n, s in keys.sizes) / heads
    assert pairs < 1.6 * sum(n * n for n in lengths) < 64 * 128**2


def test_the_options_backends_are_those_that_there_are() -> None:
    named, _ = get_args(get_type_hints(RunConfig)["attention"])
    assert get_args(named) == BACKENDS


def test_no_sequence_sees_another() -> None:
    lengths = (5, 9, 4)
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = inputs(lengths, lengths, dtype)
        before = ours(lengths, lengths)(q, k, v)
        k, v = k.clone(), v.clone()
        k[5:14], v[5:14] = 50.0, -50.0
        after = ours(lengths, lengths)(q, k, v)
        assert torch.equal(before[:5], after[:5]) and torch.equal(before[14:], after[14:])
        assert not torch.equal(before[5:14], after[5:14])


def test_dropout_drops_attention_weights() -> None:
    lengths = (40, 24)
    q, k, v = inputs(lengths, lengths, torch.float32)
    torch.manual_seed(0)
    draws = torch.stack([ours(lengths, lengths, dropout=0.3)(q, k, v) for _ in range(300)])
    assert draws.std(dim=0).mean() > 0.1
    error = (draws.mean(dim=0) - ours(lengths, lengths)(q, k, v)).abs()
    assert float((error / (draws.std(dim=0) / 300**0.5)).mean()) < 1.2  # of a normal mean: 0.8 standard errors


def test_a_second_derivative_is_refused() -> None:
    q, k, v = (x.requires_grad_() for x in inputs((4, 3), (4, 3), torch.bfloat16))
    (gradient,) = torch.autograd.grad(ours((4, 3), (4, 3))(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_two_runs_give_identical_bits() -> None:
    lengths = (33, 64, 65, 128, 17)
    for dtype in (torch.float32, torch.bfloat16):
        first, again = (with_gradients(ours(lengths, lengths), inputs(lengths, lengths, dtype)) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_the_cpu_takes_sdpa_and_refuses_the_rest() -> None:
    assert choose_backend("cpu", torch.bfloat16, 32, 0.0, 128) == "sdpa"
    assert choose_backend("cpu", torch.float32, 26, 0.1, 128, "sdpa") == "sdpa"
    assert available_backends()[-1] == "sdpa"
    with pytest.raises(ValueError, match="'flash' is unknown; take one of triton, flash_attn, varlen_attn, sdpa"):
        choose_backend("cpu", torch.bfloat16, 32, 0.0, 128, "flash")
    for backend in BACKENDS[:3]:
        with pytest.raises(ValueError, match=f"--attention {backend} .*use --attention sdpa"):
            choose_backend("cpu", torch.bfloat16, 32, 0.0, 128, backend)
        with pytest.raises(ValueError, match=f"--attention {backend}"):
            varlen_attention(*inputs((3,), (3,)), boundaries((3,)), boundaries((3,)), 3, 3, backend=backend)


H100 = {
    "device": "cuda",
    "capability": (9, 0),
    "dtype": torch.bfloat16,
    "head_width": 64,
    "dropout": 0.0,
    "longest": 512,
}
WITHOUT_PACKAGE = ("triton", "varlen_attn", "sdpa")
SHORT = {"longest": 128}


@pytest.mark.parametrize(
    ("changes", "chosen", "remark"),
    [
        ({}, "flash_attn", None),
        ({"available": WITHOUT_PACKAGE}, "varlen_attn", None),
        ({"head_width": 256}, "flash_attn", None),
        ({"head_width": 8}, "flash_attn", None),
        (
            {"head_width": 26},
            "sdpa",
            "head width 26: FlashAttention takes multiples of 8 up to 256; sequences are padded",
        ),
        ({"head_width": 264}, "sdpa", "head width 264: FlashAttention"),
        ({"dtype": torch.float32}, "sdpa", "float32: FlashAttention takes 16 bits; sequences are padded"),
        ({"dtype": torch.float16}, "flash_attn", None),
        ({"capability": (7, 5)}, "sdpa", "FlashAttention needs compute capability 8.0"),
        ({"dropout": 0.1}, "flash_attn", None),
        ({"dropout": 0.1, "available": WITHOUT_PACKAGE}, "sdpa", "dropout 0.1: varlen_attn cannot drop"),
        ({"device": "cpu", "capability": None}, "sdpa", None),
        (SHORT, "triton", None),
        ({"longest": 129}, "flash_attn", None),
        ({**SHORT, "head_width": 26}, "triton", None),
        ({**SHORT, "head_width": 72}, "flash_attn", None),
        ({**SHORT, "dropout": 0.1}, "flash_attn", None),
        ({**SHORT, "dropout": 0.1, "available": WITHOUT_PACKAGE}, "sdpa", "dropout 0.1: varlen_attn cannot drop"),
        ({**SHORT, "dtype": torch.float32}, "sdpa", "float32: FlashAttention takes 16 bits"),
        ({**SHORT, "capability": (7, 5)}, "sdpa", "FlashAttention needs compute capability 8.0"),
        ({**SHORT, "available": ("varlen_attn", "sdpa")}, "varlen_attn", None),
        ({**SHORT, "device": "cpu", "capability": None}, "sdpa", None),
    ],
    ids=str,
)
def test_the_fastest_that_can_is_chosen(changes: dict[str, object], chosen: str, remark: str | None) -> None:
    setting = Setting(**{**H100, **changes})  # type: ignore[arg-type]
    assert setting.choose() == chosen
    found = setting.remark(chosen)
    assert found is None if remark is None else found is not None and found.startswith(remark)
    for other in BACKENDS[: BACKENDS.index(chosen)]:
        with pytest.raises(ValueError, match=f"--attention {other} cannot be taken .*; use --attention sdpa"):
            setting.choose(other)


def test_a_refusal_names_what_is_missing_and_what_works() -> None:
    setting = Setting(**{**H100, "available": WITHOUT_PACKAGE})  # type: ignore[arg-type]
    with pytest.raises(ValueError) as refusal:
        setting.choose("flash_attn")
    assert str(refusal.value) == (
        "--attention flash_attn cannot be taken (flash_attn.flash_attn_varlen_func cannot be imported: pip install "
        "'fastkd[flash]'); use --attention sdpa, or leave it out"
    )
    with pytest.raises(ValueError) as refusal:
        setting.choose("triton")
    assert str(refusal.value) == (
        "--attention triton cannot be taken (sequences of 512 tokens: the kernel takes up to 128); use --attention sdpa, or "
        "leave it out"
    )


def test_a_backend_that_was_asked_for_is_remarked_on() -> None:
    assert Setting(**H100).remark("sdpa") == "as asked; sequences are padded, up to 3 times the rows"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("def flash_attn_varlen_func(): ...", True),
        ("def another_interface(): ...", False),
        ("raise OSError('undefined symbol')", False),
    ],
)
def test_a_package_counts_if_it_has_the_function(
    source: str, found: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"attention_package_{abs(hash(source))}"
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    assert has_function(name, "flash_attn_varlen_func") == found
    assert not has_function(f"{name}_that_is_missing", "flash_attn_varlen_func")


@pytest.mark.gpu
def test_gpu_backends_agree() -> None:
    lengths_q, short, long = (2, 1, 30, 0), (90, 16, 128, 7), (90, 16, 300, 7)
    for sizes in itertools.product((lengths_q, None), (short, long)):
        sizes = (sizes[0] or sizes[1], sizes[1])
        tensors = [x.cuda() for x in inputs(*sizes, torch.bfloat16)]
        exact = [x.double() for x in tensors]
        true = with_gradients(lambda q, k, v, n=sizes: written_out(q, k, v, *n), exact)
        cu, longest = [boundaries(n).cuda() for n in sizes], [max(n) for n in sizes]
        for backend in available_backends():
            if backend == "triton" and max(longest) > 128:
                continue
            function = lambda q, k, v: varlen_attention(q, k, v, *cu, *longest, backend=backend)  # noqa: B023, E731
            for mine, theirs in zip(with_gradients(function, tensors), true, strict=True):
                assert float((mine - theirs).norm() / theirs.norm()) < 1e-2, backend


@pytest.mark.gpu
def test_gpu_takes_the_fastest_and_refuses_dropout_where_it_cannot() -> None:
    fastest, fastest_of_long = available_backends()[:2]
    assert choose_backend("cuda", torch.bfloat16, 64, 0.0, 128) == fastest == "triton"
    assert choose_backend("cuda", torch.bfloat16, 64, 0.0, 512) == fastest_of_long != "sdpa"
    assert choose_backend("cuda", torch.float32, 64, 0.0, 128) == "sdpa"
    assert choose_backend("cuda", torch.bfloat16, 26, 0.0, 512) == "sdpa"
    for backend in ("triton", "varlen_attn"):
        with pytest.raises(ValueError, match="cannot drop attention weights"):
            choose_backend("cuda", torch.bfloat16, 64, 0.1, 128, backend)
    for dropout, backend in itertools.product((0.0, 0.1), available_backends()):
        if not (dropout and backend in ("triton", "varlen_attn")):
            assert choose_backend("cuda", torch.bfloat16, 64, dropout, 128, backend) == backend
