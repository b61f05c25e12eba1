"""linear_kd: values and gradients against float64 autograd of its definition, on every backend and case."""

import math
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from oracle import count_graphs
from torch import Tensor

from fastkd.kernels import linear_kd as kernel
from fastkd.kernels import tiling
from fastkd.kernels.linear_kd import CASES, IGNORED, Case, LinearKD, linear_kd

INTERPRETER = pytest.mark.skipif(not tiling.INTERPRETED, reason="Triton is compiled here: see the cuda parameters")
BACKENDS = [
    pytest.param("cpu", "blocked", id="blocked"),
    pytest.param("cpu", "triton", id="triton-interpreted", marks=INTERPRETER),
    pytest.param("cuda", "triton", id="triton-cuda", marks=pytest.mark.gpu),
    pytest.param("cuda", "blocked", id="blocked-cuda", marks=pytest.mark.gpu),
]
on_every_backend = pytest.mark.parametrize(("device", "backend"), BACKENDS)
NAMES = ("student_hidden", "student_weight", "student_bias")
SMALL = Case("small", 40, 300, 24, 32, kl_weight=0.6, ce_weight=0.4, ignored=5)


def evaluate(function: Any, inputs: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    """The three values and the student's gradients of a fresh copy of ``inputs``."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items() if name in NAMES}
    out: LinearKD = function(**{**inputs, **leaves}, **options)
    out.loss.backward()
    return {**{name: x.detach() for name, x in out._asdict().items()}, **{n: x.grad for n, x in leaves.items()}}


def in_float64(inputs: dict[str, Any]) -> dict[str, Any]:
    return {
        name: x.detach().double().cpu() if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in inputs.items()
    } | ({"labels": inputs["labels"].cpu()} if "labels" in inputs else {})


def error(out: Tensor, reference: Tensor) -> float:
    """‖out − ref‖ / ‖ref‖, and 0 where both are 0."""
    out = out.double().cpu()
    if not reference.any():
        return out.norm().item()
    return ((out - reference).norm() / reference.norm()).item()


def in_tiles(case: Case, device: str, backend: str, most: int = 3000) -> Case:
    """The case, in Triton's interpreter with a vocabulary of tens of tiles instead of hundreds, and the same part of one."""
    if backend != "triton" or device != "cpu" or case.vocabulary <= most:
        return case
    return replace(case, vocabulary=most // 1024 * 1024 + case.vocabulary % 128 + 128)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


@on_every_backend
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_matches_float64_autograd_of_the_definition(case: Case, device: str, backend: str) -> None:
    inputs = in_tiles(case, device, backend).inputs(device)
    expected = evaluate(kernel.reference, in_float64(inputs))
    result = evaluate(linear_kd, inputs, backend=backend)
    plain = evaluate(kernel.reference, inputs)
    for name, reference in expected.items():
        limit = case.tolerance
        if case.dtype == torch.float32 and case.gap is not None:
            # A float32 logit of 24 is known to 1e-6, a hundred-thousandth of a gap of 0.1: plain float32 pays too.
            limit = max(limit, 2 * error(plain[name], reference))
        assert error(result[name], reference) <= limit, name


@on_every_backend
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_a_tiny_divergence_is_more_exact_than_the_definitions_in_float32(
    offset: float, device: str, backend: str
) -> None:
    """Of a student that is 1e-3 from its teacher, over several draws: one alone may be right by chance."""
    fused, plain = [], []
    for seed in range(3):
        inputs = Case("", 16, 300, 32, 32, spread=1.0, gap=1e-3, offset=offset).inputs(device, seed)
        inputs = {name: x.detach() if isinstance(x, Tensor) else x for name, x in inputs.items()}
        expected = kernel.reference(**in_float64(inputs)).kl
        assert 0 < expected < 2e-6
        fused.append(error(linear_kd(**inputs, backend=backend).kl, expected))
        plain.append(error(kernel.reference(**inputs).kl, expected))
    assert math.hypot(*fused) <= math.hypot(*plain) / 2


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_a_student_that_equals_its_teacher_has_no_loss_and_no_gradient(
    dtype: torch.dtype, temperature: float, device: str, backend: str
) -> None:
    inputs = Case("", 50, 700, 32, 32, dtype, spread=4.0, temperature=temperature).inputs(device)
    inputs |= {name.replace("student", "teacher"): inputs[name].detach() for name in NAMES}
    result = evaluate(linear_kd, inputs, backend=backend)
    assert abs(result["loss"].item()) <= 1e-7
    for name in NAMES:
        assert not result[name].any(), name


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_runs_give_identical_bits(dtype: torch.dtype, device: str, backend: str) -> None:
    case = Case("", 50, 1100, 40, 56, dtype, ce_weight=0.5, temperature=2.0, ignored=9)
    inputs = in_tiles(case, device, backend, most=300).inputs(device)
    first, second = (evaluate(linear_kd, inputs, backend=backend, chunk_rows=32) for _ in range(2))
    assert same(first, second)


@on_every_backend
def test_the_chunk_does_not_matter(device: str, backend: str) -> None:
    inputs = replace(SMALL, rows=19, vocabulary=150).inputs(device)
    expected = evaluate(linear_kd, inputs, backend=backend)
    for rows in (1, 7, 16, 18, 1000):
        result = evaluate(linear_kd, inputs, backend=backend, chunk_rows=rows)
        for name in expected:
            assert error(result[name], expected[name].double().cpu()) <= 1e-6, (rows, name)


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_add_up_over_chunks(dtype: torch.dtype, device: str, backend: str) -> None:
    """Chunks of more rows than a program has, and a last one of fewer; on a GPU later ones add to the first one's dW."""
    inputs = Case("", 150, 300, 40, 56, dtype, ce_weight=0.5, temperature=2.0, ignored=9).inputs(device)
    expected = evaluate(kernel.reference, in_float64(inputs))
    result = evaluate(linear_kd, inputs, backend=backend, chunk_rows=70)
    for name in expected:
        assert error(result[name], expected[name]) <= (1e-5 if dtype == torch.float32 else 1e-2), name


@on_every_backend
def test_small_probabilities_of_many_rows_in_float16(device: str, backend: str) -> None:
    """Divided by 240 rows, most of what a good student of flat logits has in dz is below float16's normal numbers."""
    inputs = Case("", 260, 1500, 16, 24, torch.float16, spread=1.0, gap=0.15, ignored=20).inputs(device)
    expected = evaluate(kernel.reference, in_float64(inputs))
    result = evaluate(linear_kd, inputs, backend=backend)
    for name in expected:
        assert error(result[name], expected[name]) <= 1e-2, name


@on_every_backend
@pytest.mark.parametrize("temperature", [1.0, 50.0])
@pytest.mark.parametrize("vocabulary", [129, 250])
def test_columns_past_the_vocabulary_leave_no_trace(
    vocabulary: int, temperature: float, device: str, backend: str
) -> None:
    """They are the last word's again before the bias takes them out, and that word has most of the probability."""
    inputs = Case("", 20, vocabulary, 16, 24, ce_weight=0.5, temperature=temperature, ignored=2).inputs(device)
    inputs["student_bias"] = inputs["student_bias"].detach().clone()
    inputs["student_bias"][-1] = temperature * (math.log(vocabulary) + 2)
    expected = evaluate(kernel.reference, in_float64(inputs))
    result = evaluate(linear_kd, inputs, backend=backend)
    for name in expected:
        assert error(result[name], expected[name]) <= 1e-5, name


@pytest.mark.parametrize("backend", ["blocked", pytest.param("triton", marks=INTERPRETER)])
@pytest.mark.parametrize("rows", ["none", "ignored", "some"])
def test_memory_that_nobody_wrote_is_not_read(rows: str, backend: str) -> None:
    """PyTorch's deterministic mode fills new tensors with NaN."""
    inputs = (Case("", 0, 50, 8, 8, ce_weight=1.0) if rows == "none" else SMALL).inputs()
    if rows == "ignored":
        inputs["labels"] = torch.full_like(inputs["labels"], IGNORED)
    torch.use_deterministic_algorithms(True)
    try:
        result = evaluate(linear_kd, inputs, backend=backend, chunk_rows=16)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(x.isfinite().all() for x in result.values())
    assert rows == "some" or not any(x.any() for x in result.values())


@on_every_backend
def test_ignored_rows_count_nowhere(device: str, backend: str) -> None:
    inputs = SMALL.inputs(device)
    kept = inputs["labels"] != IGNORED
    result = evaluate(linear_kd, inputs, backend=backend)
    rows = {name: inputs[name][kept] for name in ("student_hidden", "teacher_hidden", "labels")}
    alone = evaluate(linear_kd, inputs | rows, backend=backend)
    assert not result["student_hidden"][~kept].any()
    result["student_hidden"] = result["student_hidden"][kept]
    for name in alone:
        assert error(result[name], alone[name].double().cpu()) <= 1e-6, name


@on_every_backend
def test_more_rows_than_are_counted_at_a_time(device: str, backend: str) -> None:
    """Labels and parts of the sums, here 16 at a time."""
    inputs = SMALL.inputs(device)
    expected = evaluate(kernel.reference, in_float64(inputs))
    with tiling.using("linear_kd.sums", tiling.Tile(0, 16, 0, 1, 1)):
        result = evaluate(linear_kd, inputs, backend=backend)
        wrong = inputs["labels"].clone()
        wrong[-1] = 300
        if device == "cpu":  # a GPU would stop there for good
            with pytest.raises(ValueError, match="label 300 lies outside"):
                linear_kd(**{**inputs, "labels": wrong}, backend=backend)
    for name in expected:
        assert error(result[name], expected[name]) <= 1e-5, name


@on_every_backend
def test_labels_may_be_a_column_of_a_matrix(device: str, backend: str) -> None:
    inputs = SMALL.inputs(device)
    column = torch.stack([inputs["labels"], inputs["labels"] + 1_000_000], 1)[:, 0]
    expected, found = (
        evaluate(linear_kd, {**inputs, "labels": y}, backend=backend) for y in (inputs["labels"], column)
    )
    assert not column.is_contiguous() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_float64_beside_float32_is_float64_and_no_work_for_triton() -> None:
    inputs = SMALL.inputs()
    inputs["teacher_weight"] = inputs["teacher_weight"].double()
    assert linear_kd(**inputs).loss.dtype == torch.float64
    if tiling.triton is not None:
        with pytest.raises(ValueError, match=r"backend='triton' (has no float64|cannot run on device cpu)"):
            linear_kd(**inputs, backend="triton")


@on_every_backend
def test_all_rows_ignored_is_a_loss_of_zero(device: str, backend: str) -> None:
    inputs = SMALL.inputs(device)
    inputs["labels"] = torch.full_like(inputs["labels"], IGNORED)
    result = evaluate(linear_kd, inputs, backend=backend)
    assert all(not x.any() for x in result.values())


@on_every_backend
def test_no_rows_at_all_is_a_loss_of_zero(device: str, backend: str) -> None:
    inputs = Case("", 0, 50, 8, 8, ce_weight=1.0).inputs(device)
    result = evaluate(linear_kd, inputs, backend=backend)
    assert all(not x.any() for x in result.values())
    assert result["student_weight"].shape == (50, 8)


@on_every_backend
def test_a_vocabulary_index_past_the_last_full_block_is_a_label(device: str, backend: str) -> None:
    inputs = Case("", 6, 1025, 16, None, kl_weight=0.0, ce_weight=1.0).inputs(device)
    inputs["labels"] = torch.tensor([1024, 1024, 0, 1023, 1024, 512], device=device)
    expected = evaluate(kernel.reference, in_float64(inputs))
    result = evaluate(linear_kd, inputs, backend=backend)
    for name in expected:
        assert error(result[name], expected[name]) <= 1e-5, name


@on_every_backend
@pytest.mark.parametrize("hidden_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_under_autocast_gradients_arrive_in_the_parameters_dtype(
    hidden_dtype: torch.dtype, device: str, backend: str
) -> None:
    inputs = Case("", 150, 900, 64, 96, spread=4.0, gap=0.3, ce_weight=0.2, ignored=3).inputs(device)
    inputs["student_hidden"] = inputs["student_hidden"].detach().to(hidden_dtype)
    for name in ("teacher_hidden", "teacher_weight", "teacher_bias"):
        inputs[name] = inputs[name].bfloat16()
    expected = evaluate(kernel.reference, in_float64(inputs))
    with torch.autocast(device, torch.bfloat16):
        result = evaluate(linear_kd, inputs, backend=backend)
    assert result["student_hidden"].dtype == hidden_dtype
    assert result["student_weight"].dtype == result["student_bias"].dtype == result["loss"].dtype == torch.float32
    # Rounding the float32 weights to bfloat16 moves the student itself by more than the gradient's rounding.
    for name in expected:
        assert error(result[name], expected[name]) <= 3e-2, name


@on_every_backend
def test_only_what_is_learnt_gets_a_gradient(device: str, backend: str) -> None:
    inputs = SMALL.inputs(device)
    expected = evaluate(linear_kd, inputs, backend=backend)
    for name in NAMES:
        frozen = {other: inputs[other].detach() for other in NAMES}
        frozen[name].requires_grad_()
        loss = linear_kd(**{**inputs, **frozen}, backend=backend).loss
        loss.backward()
        assert torch.equal(frozen[name].grad, expected[name])
    with torch.no_grad():
        out = linear_kd(**inputs, backend=backend)
    assert not any(x.requires_grad for x in out)
    assert error(out.loss, expected["loss"].double().cpu()) <= 1e-6


@on_every_backend
def test_the_gradient_scales_and_accumulates(device: str, backend: str) -> None:
    inputs = SMALL.inputs(device)
    expected = evaluate(linear_kd, inputs, backend=backend)
    out = linear_kd(**inputs, backend=backend)
    assert not (out.kl.requires_grad or out.ce.requires_grad)
    (3 * out.loss).backward(retain_graph=True)
    (2 * out.loss).backward()
    for name in NAMES:
        assert error(inputs[name].grad, 5 * expected[name].double().cpu()) <= 1e-6


@on_every_backend
def test_a_second_derivative_raises(device: str, backend: str) -> None:
    inputs = SMALL.inputs(device)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(linear_kd(**inputs, backend=backend).loss, inputs["student_weight"], create_graph=True)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_directional_derivatives_in_float64(temperature: float) -> None:
    case = Case("", 30, 1100, 12, 20, torch.float64, ce_weight=0.7, kl_weight=0.4, temperature=temperature, ignored=4)
    inputs = case.inputs()
    gradients = evaluate(linear_kd, inputs)
    generator = torch.Generator().manual_seed(1)
    for name in NAMES:
        direction = torch.randn(inputs[name].shape, generator=generator, dtype=torch.float64)
        step = 1e-6 * direction / direction.norm()
        with torch.no_grad():
            up, down = (linear_kd(**{**inputs, name: inputs[name] + sign * step}).loss for sign in (1, -1))
        slope = (gradients[name] * step).sum() * 2
        assert abs((up - down) / slope - 1) <= 1e-6, name


def test_gradcheck_and_the_operators_registration() -> None:
    case = Case("", 5, 9, 3, 4, torch.float64, ce_weight=0.7, kl_weight=0.4, temperature=2.0, ignored=1)
    inputs = case.inputs()
    tensors = [inputs.pop(name) for name in NAMES]

    def loss(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_kd(student_hidden=x, student_weight=weight, student_bias=bias, **inputs).loss

    assert torch.autograd.gradcheck(loss, tensors)
    arguments = (
        *tensors[:2],
        inputs["labels"],
        tensors[2],
        *(inputs[f"teacher_{x}"] for x in ("hidden", "weight", "bias")),
    )
    options = (0.4, 0.7, 2.0, 16, "blocked", torch.float64, True, True, True)
    torch.library.opcheck(torch.ops.fastkd.linear_kd.default, (*arguments, *options))


@pytest.mark.parametrize("masked", [slice(1024, 1500), slice(700, 1100)], ids=["a whole block", "parts of blocks"])
@pytest.mark.parametrize("value", [-1e10, torch.finfo(torch.float32).min])
def test_words_that_a_bias_masks_out(value: float, masked: slice) -> None:
    inputs = Case("", 8, 1500, 16, 24, ce_weight=0.5).inputs()
    for name in ("student_bias", "teacher_bias"):
        inputs[name] = inputs[name].detach().clone()
        inputs[name][masked] = value
    inputs["labels"].fill_(3)
    expected = evaluate(kernel.reference, inputs)
    result = evaluate(linear_kd, {**inputs, "backend": "blocked"})
    for name in expected:
        assert result[name].isfinite().all() and error(result[name], expected[name].double()) <= 1e-5, name


def test_sizes_share_a_compiled_graph() -> None:
    calls = [Case("", rows, 300, 24, 32).inputs() for rows in (10, 20, 30, 40, 50)]
    assert count_graphs(linear_kd, calls) <= 2  # the first size, then any


@pytest.mark.parametrize("autocast", [False, True])
def test_compiles_into_one_graph(autocast: bool) -> None:
    inputs = SMALL.inputs()

    def step(student_hidden: Tensor, **rest: Any) -> LinearKD:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return linear_kd(student_hidden * 2, **rest)

    expected = evaluate(step, inputs)
    result = evaluate(torch.compile(step, fullgraph=True), inputs)
    for name in expected:
        assert error(result[name], expected[name].double()) <= 1e-6, name


@pytest.mark.gpu
def test_no_step_waits_for_the_device() -> None:
    inputs = SMALL.inputs("cuda")
    evaluate(linear_kd, inputs)  # compiles, and loads modules
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_kd(**inputs).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"kl_weight": float("nan")}, "kl_weight is nan"),
        ({"chunk_rows": 0}, "chunk_rows is 0"),
        ({"labels": torch.full((40,), 300)}, "label 300 lies outside the vocabulary of 300"),
        ({"labels": torch.full((40,), -1)}, "label -1 lies outside"),
        ({"teacher_hidden": None, "teacher_weight": None}, "or none of them"),
        ({"student_hidden": torch.zeros(40, 24, dtype=torch.int64)}, r"student is torch.int64, give float16"),
        ({"student_hidden": torch.zeros(40, 0), "student_weight": torch.zeros(300, 0)}, "V and D above 0"),
        ({"labels": None}, "ce_weight is 0.4 but labels is None"),
        ({"teacher_weight": None}, "both teacher_hidden and teacher_weight"),
        ({"kl_weight": 0.0, "ce_weight": 0.0}, "nothing to compute"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, r"int64 \[40\]"),
        ({"labels": torch.zeros(40)}, "labels are torch.float32"),
        ({"student_weight": torch.zeros(300, 25)}, r"student's hidden \[40, 24\] and weight \[300, 25\]"),
        ({"student_bias": torch.zeros(299)}, r"bias is \[299\], give \[300\]"),
        ({"teacher_hidden": torch.zeros(39, 32)}, "39 teacher rows for 40"),
        ({"teacher_weight": torch.zeros(304, 32), "teacher_bias": None}, "304 for the teacher, 300 for the student"),
        ({"backend": "cuda"}, "choose one of triton, blocked, reference"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_kd(**{**SMALL.inputs(), **change})


def test_float64_is_not_for_triton() -> None:
    inputs = Case("", 4, 9, 3, 4, torch.float64).inputs()
    with pytest.raises(ValueError, match=r"no float64|cannot run on device cpu"):
        linear_kd(**inputs, backend="triton")


def run_python(code: str, *arguments: str) -> str:
    """The output of a fresh process, without Triton's interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
from fastkd.kernels.linear_kd import CASES, linear_kd
inputs = CASES[0].inputs()
linear_kd(**inputs).loss.backward()
print(inputs["student_weight"].grad.shape)
try:
    linear_kd(**inputs, backend="triton")
except ValueError as error:
    print(error)
"""


def test_everything_but_the_triton_backend_works_without_triton() -> None:
    out = run_python(WITHOUT_TRITON)
    assert "torch.Size([1000, 32])" in out
    assert "needs the package triton" in out


COMPILED_ON_A_CPU = """
from fastkd.kernels.linear_kd import CASES, linear_kd
try:
    linear_kd(**CASES[0].inputs(), backend="triton")
except ValueError as error:
    print(error)
"""


def test_triton_on_cpu_tensors_needs_the_interpreter() -> None:
    assert "cannot run on device cpu: use backend='blocked'" in run_python(COMPILED_ON_A_CPU)


PEAK_MEMORY = """
import re, sys, torch
from pathlib import Path
from fastkd.kernels.linear_kd import Case, linear_kd
torch.set_num_threads(1)
inputs = Case("", int(sys.argv[1]), 30522, 64, 64, ce_weight=0.5).inputs()
linear_kd(**inputs).loss.backward()
print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_does_not_grow_with_the_rows() -> None:
    """Four times the rows are four times the chunks, of the same size."""
    small, large = (int(run_python(PEAK_MEMORY, str(rows))) for rows in (1568, 6272))
    matrix = 4704 * 30522 * 4 / 1024  # KiB of the additional rows' logits, once, in float32
    assert large - small < matrix / 5
