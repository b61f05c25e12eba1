"""packed_attention against its definition in float64: interpreted, compiled and run on a CPU, and on a GPU."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from oracle import WithoutGradient, error
from torch import Tensor

from fastkd.kernels import packed_attention as module
from fastkd.kernels import tiling
from fastkd.kernels.packed_attention import packed_attention, reference

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(tiling.triton is None, reason="needs the package triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter takes float32, whose rounding hides nothing; a GPU's kernels take half precision.
DTYPE, TOLERANCE = (torch.float32, 1e-5) if DEVICE == "cpu" else (torch.bfloat16, 1e-2)
Lengths = tuple[int, ...]


def boundaries(lengths: Lengths) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=DEVICE)


def inputs(
    lengths_q: Lengths,
    lengths_k: Lengths,
    heads: int = 1,
    width: int = 16,
    dtype: torch.dtype = DTYPE,
    size: float = 1.5,
) -> list[Tensor]:
    """Queries, keys and values, each a slice of columns of one projection, which ask for gradients."""
    generator, rows = torch.Generator().manual_seed(0), max(sum(lengths_q), sum(lengths_k))
    fused = torch.randn(rows, 3 * heads * width, generator=generator).mul(size).to(DEVICE, dtype)
    q, k, v = (x.unflatten(1, (heads, width)) for x in fused.chunk(3, dim=1))
    return [x.requires_grad_() for x in (q[: sum(lengths_q)], k[: sum(lengths_k)], v[: sum(lengths_k)])]


def with_gradients(function, tensors: list[Tensor], lengths_q: Lengths, lengths_k: Lengths, *rest: int) -> list[Tensor]:  # type: ignore[no-untyped-def]
    """The function's output and its gradients in a fixed direction."""
    out = function(*tensors, boundaries(lengths_q), boundaries(lengths_k), *rest)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, tensors[0].dtype)
    return [out.detach(), *torch.autograd.grad(out, tensors, direction.to(out.dtype))]


def check(lengths_q: Lengths, lengths_k: Lengths, tolerance: float = TOLERANCE, **shape) -> None:  # type: ignore[no-untyped-def]
    """Output and gradients within the tolerance of float64; a gradient that is 0, as of the one key's, against the largest one."""
    tensors = inputs(lengths_q, lengths_k, **shape)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    found = with_gradients(packed_attention, tensors, lengths_q, lengths_k, max(*lengths_q, *lengths_k))
    expected = with_gradients(reference, exact, lengths_q, lengths_k)
    largest = max(float(ref.norm()) for ref in expected)
    for out, ref in zip(found, expected, strict=True):
        assert out.dtype == tensors[0].dtype and out.shape == ref.shape
        assert float((out.double() - ref).norm()) <= tolerance * (float(ref.norm()) or largest)


@pytest.mark.parametrize("length", [1, 2, 16, 17, 43, 64, 65, 127, 128])
def test_one_length(length: int) -> None:
    check((length,), (length,))


def test_both_tiles_and_empty_sequences_in_one_call() -> None:
    lengths = (43, 0, 128, 1, 64, 65, 0, 0)
    check(lengths, lengths)


@pytest.mark.parametrize(
    ("lengths_q", "lengths_k"),
    [
        ((3, 1, 16, 70), (20, 43, 90, 128)),
        ((2, 0, 5, 0, 0), (9, 70, 64, 33, 0)),  # keys without queries, whose gradients are zeros; trailing empty slots
        ((70, 3), (5, 90)),  # more queries than keys
        ((7, 3), (3, 7)),  # as many queries as keys, of other sequences
    ],
    ids=str,
)
def test_queries_and_keys_of_different_numbers(lengths_q: Lengths, lengths_k: Lengths) -> None:
    check(lengths_q, lengths_k)


@pytest.mark.parametrize(("heads", "width"), [(1, 8), (2, 26), (5, 32), (3, 64), (12, 16)])
def test_heads(heads: int, width: int) -> None:
    """Widths that no tile has are padded; programs take four heads each, the last of a sequence what is left."""
    check((17, 66), (17, 66), heads=heads, width=width)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    check((43, 128, 0), (43, 128, 0), tolerance=1e-2, heads=2, width=32, dtype=dtype, size=1.0)


def test_large_scores_neither_overflow_nor_vanish() -> None:
    """Scores of some ±1,000, whose exponentials float32 cannot hold."""
    tensors = inputs((43, 100), (43, 100), size=16.0)
    found = with_gradients(packed_attention, tensors, (43, 100), (43, 100), 128)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    out, *_ = with_gradients(reference, exact, (43, 100), (43, 100))
    assert all(x.isfinite().all() for x in found)
    assert error(found[0], out) <= 10 * TOLERANCE


def test_no_sequence_sees_another() -> None:
    lengths = (5, 70, 4)
    q, k, v = (x.detach() for x in inputs(lengths, lengths))
    cu = boundaries(lengths)
    before = packed_attention(q, k, v, cu, cu, 70)
    k, v = k.clone(), v.clone()
    k[5:75], v[5:75] = 50.0, -50.0
    after = packed_attention(q, k, v, cu, cu, 70)
    assert torch.equal(before[:5], after[:5]) and torch.equal(before[75:], after[75:])
    assert not torch.equal(before[5:75], after[5:75])


def test_boundaries_may_be_a_column_of_a_matrix_and_more_than_a_launch_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = (33, 0, 65, 2, 128)
    tensors = inputs(lengths, lengths)
    expected = with_gradients(packed_attention, tensors, lengths, lengths, 128)
    monkeypatch.setattr(module, "LAUNCHED", 2)

    def strided(*tensors: Tensor) -> Tensor:
        q, k, v, *cu, longest = tensors
        columns = [torch.stack([x, x.flip(0)], 1)[:, 0] for x in cu]
        return packed_attention(q, k, v, *columns, longest)

    found = with_gradients(strided, tensors, lengths, lengths, 128)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_two_runs_give_the_same_bits() -> None:
    lengths = (33, 64, 65, 128, 17)
    tensors = inputs(lengths, lengths)
    first, again = (with_gradients(packed_attention, tensors, lengths, lengths, 128) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_a_gradient_with_other_strides_and_no_gradient() -> None:
    """What comes back may be a view; without a gradient to come back nothing is kept."""
    q, k, v = inputs((9, 20), (9, 20), heads=2)
    cu = boundaries((9, 20))
    out = packed_attention(q, k, v, cu, cu, 20)
    direction = torch.randn(2, 29, 16, generator=torch.Generator().manual_seed(2)).to(DEVICE, DTYPE)
    strided, plain = (
        torch.autograd.grad(out, (q, k, v), x, retain_graph=True)
        for x in (direction.transpose(0, 1), direction.transpose(0, 1).contiguous())
    )
    assert all(torch.equal(a, b) for a, b in zip(strided, plain, strict=True))
    with torch.inference_mode():
        assert torch.equal(packed_attention(q, k, v, cu, cu, 20), out)


def test_a_gradient_that_is_none_gives_none() -> None:
    q, k, v = inputs((9, 20), (9, 20))
    cu = boundaries((9, 20))
    (WithoutGradient.apply(packed_attention(q, k, v, cu, cu, 20)).sum() + q.sum()).backward()
    assert torch.equal(q.grad, torch.ones_like(q)) and k.grad is None is v.grad


def test_it_traces_as_one_graph() -> None:
    lengths = (9, 20)
    cu = boundaries(lengths)

    def projected(fused: Tensor) -> Tensor:
        q, k, v = (x.unflatten(1, (2, 16)) for x in fused.chunk(3, dim=1))
        return packed_attention(q, k, v, cu, cu, 20).flatten(1)

    fused = torch.randn(29, 96, generator=torch.Generator().manual_seed(0)).to(DEVICE, DTYPE).requires_grad_()
    torch.compiler.reset()
    compiled = torch.compile(projected, backend="aot_eager", fullgraph=True, dynamic=False)
    outs = [function(fused) for function in (projected, compiled)]
    gradients = [torch.autograd.grad(out, fused, torch.ones_like(out)) for out in outs]
    assert torch.equal(*outs) and torch.equal(gradients[0][0], gradients[1][0])


def test_what_does_not_fit_is_refused() -> None:
    cu = boundaries((4,))
    q, k, v = inputs((4,), (4,))
    with pytest.raises(ValueError, match=r"give \[Tq, H, d\]"):
        packed_attention(q.flatten(1), k, v, cu, cu, 4)
    with pytest.raises(ValueError, match=r"takes float16 and bfloat16, not torch\.float64"):
        packed_attention(q.double(), k.double(), v.double(), cu, cu, 4)
    with pytest.raises(ValueError, match="heads of 80 and sequences of 4: it takes up to 64 and 128"):
        packed_attention(*inputs((4,), (4,), width=80), cu, cu, 4)
    with pytest.raises(ValueError, match="heads of 16 and sequences of 129"):
        packed_attention(q, k, v, cu, cu, 129)
    with pytest.raises(ValueError, match="got 2 and 3 boundaries"):
        packed_attention(q, k, v, cu, boundaries((2, 2)), 4)
    for wrong in (cu[:0], cu[:1], cu[None], cu.float()):  # of which kernels would make nothing, and nobody would hear
        with pytest.raises(ValueError, match=r"packed_attention: cu_seqlens is torch\..*: give B\+1 int32 row numbers"):
            packed_attention(q, k, v, wrong, wrong, 4)
    out = packed_attention(q, k, v, cu, cu, 4)
    (gradient,) = torch.autograd.grad(out.sum(), q, retain_graph=True)
    assert gradient.shape == q.shape
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(out.sum(), q, create_graph=True)


# ---- compiled -------------------------------------------------------------------------------------------------

COMPILED = """
import torch
from bench.compiled import Launcher
from fastkd.kernels import packed_attention as module, tiling
from fastkd.kernels.packed_attention import packed_attention, reference

for name in ("_forward_kernel", "_backward_kernel"):
    setattr(module, name, Launcher(getattr(module, name), 90))
tiling.INTERPRETED, tiling.architecture = True, lambda device: 90  # a CPU's tensors are taken, and an H100's tiles
module.packed.dot_dtype = lambda dtype: module.tl.bfloat16
torch.use_deterministic_algorithms(True)  # new memory holds NaN: what nobody wrote shows when it is read
cases = ((43, 1, 64, 0), (43, 1, 64, 0), 5, 16), ((65, 0, 17), (65, 0, 17), 1, 26), ((3, 0, 66, 0), (70, 5, 128, 0), 2, 32)
for queries, keys, heads, width in cases:
    fused = torch.randn(sum(keys), 3 * heads * width, generator=torch.Generator().manual_seed(0)).bfloat16()
    q, k, v = (x.unflatten(1, (heads, width)) for x in fused.chunk(3, dim=1))
    tensors = [x.detach().requires_grad_() for x in (q[: sum(queries)], k, v)]
    exact = [x.detach().double().requires_grad_() for x in tensors]
    cu = [torch.tensor([0, *n]).cumsum(0).int() for n in (queries, keys)]
    out, expected = packed_attention(*tensors, *cu, 128), reference(*exact, *cu)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    found = out, *torch.autograd.grad(out, tensors, direction)
    true = expected, *torch.autograd.grad(expected, exact, direction.double())
    errors = [float((a.detach().double() - b.detach()).norm() / b.detach().norm()) for a, b in zip(found, true, strict=True)]
    print("ok" if max(errors) <= 1e-2 else errors)
"""


def test_what_the_compiler_made_computes_the_definition(tmp_path: Path) -> None:
    """The compiled IR for an H100, with both tiles, a part of a program's heads, padded heads and fewer queries than keys."""
    script = tmp_path / "compiled.py"
    script.write_text(COMPILED)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = f"{ROOT}:{environment.get('PYTHONPATH', '')}"
    done = subprocess.run([sys.executable, script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["ok"] * 3, done.stdout + done.stderr[-2000:]
