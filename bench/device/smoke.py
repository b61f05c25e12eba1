"""Whatever fails at once on a new machine, each in a row of its own: what has never run there, in its smallest form.

Products into a float32 output (`linear_kd` makes its gradients by them), two cases of every kernel in float32 and
one in half precision against float64, attention on packed rows with empty queries, a captured teacher, and one eager step of
every method. One check that fails does not stop the next.
"""

from __future__ import annotations

import functools
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from markupsafe import Markup
from torch import Tensor

from bench import losses
from bench.contenders import definition, relative_error, scalar, step
from bench.device import part, train_step
from bench.device.part import Context, Recorder, Row
from fastkd import methods
from fastkd.models.attention import choose_backend, varlen_attention
from fastkd.models.captured import Captured
from fastkd.reports.tables import Table, numeric
from fastkd.setup import Setup
from fastkd.train import Trainer

SECONDS = 60


class Sizes(NamedTuple):
    """Two models and a batch."""

    teacher: str
    student: str
    sequences: int
    length: int


# Full width and full batches of 128 tokens a sequence, few layers: depth is full_step's business.
FULL = Sizes("2L-768H-12A", "2L-768H-12A", sequences=128, length=128)
TINY = Sizes("2L-48H-4A", "1L-48H-4A", sequences=16, length=16)
ATTENTION_ERROR = 1e-2  # of bfloat16
PRODUCT_ERROR = 1e-5  # of sums kept in float32
Check = tuple[
    str, Callable[[], str | None]
]  # what, and a call that raises where it fails; it may have something to say


def run(context: Context, rows: Recorder) -> None:
    """Every check, one after the other."""
    for name, check in checks(context):
        if rows.left < 1:
            rows.add(what="check", check=name, skipped="no time was left")
            continue
        started = time.monotonic()
        row: Row = {"what": "check", "check": name, "ok": True}
        try:
            row["found"] = check() or ""
        except Exception as error:
            traceback.print_exc()
            row |= {"ok": False, "error": part.in_one_line(error)}
        rows.add(**row, seconds=time.monotonic() - started)
        if context.device == "cuda":
            torch.cuda.empty_cache()


def checks(context: Context) -> Iterator[Check]:
    """All of them, in their order."""
    device = torch.device(context.device)
    yield from _product_checks(device)
    yield from _kernel_checks(device)
    for width in (32, 64):
        for empty in (False, True):
            name = f"attention, width {width}{', a sequence without queries' if empty else ''}"
            yield name, functools.partial(_attention, device, width, empty)
    if context.device == "cuda":  # before the steps: training with a teacher stands on it
        yield "a teacher, captured", functools.partial(_captured, context)
    for method in methods.available():
        yield f"one eager step of {method}", functools.partial(_step, context, method)


# ---- products -------------------------------------------------------------------------------------------------


def _product_checks(device: torch.device) -> Iterator[Check]:
    """The two forms that write half-precision products as float32, here of a transposed column slice as in linear_kd."""
    yield "mm(out_dtype=float32, out=)", functools.partial(_product, device, add=False)
    yield "addmm(out_dtype=float32, out=), in place", functools.partial(_product, device, add=True)


def _product(device: torch.device, add: bool) -> str | None:
    rows, columns, stride, width = 96, 250, 256, 64
    wide = torch.randn(rows, stride, device=device).bfloat16()
    a, b = wide[:, :columns].t(), torch.randn(rows, width, device=device).bfloat16()
    expected = a.double() @ b.double()
    out = torch.full((columns, width), 3.0, device=device)
    if device.type == "cpu":  # it has neither overload
        result = torch.addmm(out, a.float(), b.float(), beta=int(add), out=out)
    elif add:
        result = torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    else:
        result = torch.mm(a, b, out_dtype=torch.float32, out=out)
    return _within(PRODUCT_ERROR, result, expected + 3.0 * add)


def _within(bound: float, out: Tensor, expected: Tensor) -> str:
    """The relative error in words. Raises AssertionError where it is beyond the bound, or no number."""
    error = relative_error(out, expected)
    if not error <= bound:
        raise AssertionError(f"error {error:.1e}, allowed are {bound:.0e}")
    return f"error {error:.1e}"


# ---- kernels --------------------------------------------------------------------------------------------------


def _kernel_checks(device: torch.device) -> Iterator[Check]:
    for kernel in losses.available():
        cases = losses.load(kernel).CASES
        half = next((case for case in cases if case.dtype in (torch.bfloat16, torch.float16)), None)
        for case in (*cases[:2], *((half,) if half is not None else ())):
            yield f"{kernel}, {case.name}, {str(case.dtype)[6:]}", functools.partial(_kernel, kernel, case, device)


def _kernel(kernel: str, case: Any, device: torch.device) -> str:
    """Value and gradients, of the backend that this device takes, against float64 autograd of the definition."""
    function = getattr(losses.definition(kernel), kernel)
    inputs = case.inputs(device)
    value, gradients = step(lambda x: scalar(function(**x)), inputs)()
    expected, expected_gradients = step(definition(kernel), in_float64(inputs))()
    pairs = [(value, expected), *zip(gradients, expected_gradients, strict=True)]
    return max((_within(case.tolerance, out, ref) for out, ref in pairs), key=lambda text: float(text.split()[1]))


def in_float64(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same arguments in float64, asking for the same gradients."""
    return {
        name: x.detach().double().requires_grad_(x.requires_grad)
        if isinstance(x, Tensor) and x.is_floating_point()
        else x
        for name, x in inputs.items()
    }


# ---- attention ------------------------------------------------------------------------------------------------


def _attention(device: torch.device, width: int, empty: bool) -> str:
    """Forward and backward of the fastest backend in bfloat16 against attention written out in float64."""
    keys, heads = (7, 128, 33, 90), 4
    queries = (2, 0, 33, 0) if empty else keys
    rows = (sum(queries), sum(keys), sum(keys))
    leaves = [torch.randn(n, heads, width, device=device).bfloat16().requires_grad_() for n in rows]
    cu_q, cu_k = (torch.tensor([0, *n], device=device).cumsum(0).int() for n in (queries, keys))
    q, k, v = leaves
    out = varlen_attention(q, k, v, cu_q, cu_k, 128, 128)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    expected = _written_out(exact, queries, keys)
    direction = torch.randn_like(out)
    found = torch.autograd.grad(out, leaves, direction)
    true = torch.autograd.grad(expected, exact, direction.double())
    for result, reference in zip((out, *found), (expected, *true), strict=True):
        _within(ATTENTION_ERROR, result, reference)
    return choose_backend(device, torch.bfloat16, width, dropout=0.0, longest=128)


def _written_out(tensors: Sequence[Tensor], queries: Sequence[int], keys: Sequence[int]) -> Tensor:
    (q, k, v), rows = tensors, []
    for a, b, c in zip(q.split(list(queries)), k.split(list(keys)), v.split(list(keys)), strict=True):
        weights = torch.softmax(torch.einsum("ihd,jhd->hij", a, b) / a.shape[-1] ** 0.5, dim=-1)
        rows.append(torch.einsum("hij,jhd->ihd", weights, c))
    return torch.cat(rows)


# ---- models ---------------------------------------------------------------------------------------------------


def _step(context: Context, method: str) -> str:
    """An eager step leaves a finite loss and a finite gradient."""
    trainer = Trainer(_setup(context, method))
    loss, norm, _ = trainer.step(trainer.stream.step(0), 1e-4)
    if not (loss.isfinite() and norm.isfinite() and norm > 0):
        raise AssertionError(f"loss {float(loss)}, norm of the gradient {float(norm)}")
    return f"loss {float(loss):.4f}, gradient {float(norm):.3g}"


def _captured(context: Context) -> str:
    """Forwards of a teacher as one CUDA graph equal plain ones, for a batch that it was not captured with too."""
    setup = _setup(context, "tinybert")
    teacher, found = setup.teacher, ""
    assert teacher is not None
    stream = setup.stream()
    first, second = (stream.step(number)[0] for number in range(2))
    with torch.inference_mode():
        captured = Captured(teacher, first.input_ids, first)
        for batch in (first, second):
            plain, replayed = teacher(batch.input_ids, batch), captured(batch.input_ids, batch)
            for layer, hidden in plain.hidden.items():
                found = _within(ATTENTION_ERROR, replayed.hidden[layer], hidden.double())
    return found


def _setup(context: Context, method: str) -> Setup:
    sizes = TINY if context.tiny else FULL
    return train_step.setup(
        context, method, teacher=sizes.teacher, student=sizes.student, seq_length=sizes.length,
        batch_tokens=sizes.sequences * sizes.length, micro_batch=str(sizes.sequences * sizes.length), compile=False,
        dtype="bfloat16",
    )  # fmt: skip


# ---- table ----------------------------------------------------------------------------------------------------


def markdown(rows: Sequence[Row]) -> str:
    """A line a check."""
    lines = []
    for row in rows:
        verdict = "passed" if row.get("ok") else "skipped" if "skipped" in row else Markup("**failed**")
        remark = row.get("error") or row.get("skipped") or row["found"]
        seconds = row.get("seconds")
        lines.append((row["check"], verdict, numeric("seconds", seconds, f"{seconds or 0:.1f}"), remark))
    return Table(("check", "", "s", ""), list(lines)).markdown() if rows else "Nothing was checked.\n"
