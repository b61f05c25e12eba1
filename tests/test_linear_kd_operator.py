"""linear_kd as an operator: derivatives in float64, compilation, refusals, life without Triton, memory."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from head_loss import NAMES, SMALL, error, evaluate
from oracle import count_graphs
from torch import Tensor

from bench.losses.linear_kd import HeadCase
from fastkd.kernels import linear_kd as kernel
from fastkd.kernels.linear_kd import LinearKD, linear_kd

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_directional_derivatives_in_float64(temperature: float) -> None:
    case = HeadCase(
        "", 30, 1100, 12, 20, torch.float64, ce_weight=0.7, kl_weight=0.4, temperature=temperature, ignored=4
    )
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
    case = HeadCase("", 5, 9, 3, 4, torch.float64, ce_weight=0.7, kl_weight=0.4, temperature=2.0, ignored=1)
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
    options = (0.4, 0.7, 2.0, "kl", 16, "blocked", torch.float64, True, True, True)
    torch.library.opcheck(torch.ops.fastkd.linear_kd.default, (*arguments, *options))


@pytest.mark.parametrize("masked", [slice(1024, 1500), slice(700, 1100)], ids=["a whole block", "parts of blocks"])
@pytest.mark.parametrize("value", [-1e10, torch.finfo(torch.float32).min])
def test_words_that_a_bias_masks_out(value: float, masked: slice) -> None:
    inputs = HeadCase("", 8, 1500, 16, 24, ce_weight=0.5).inputs()
    for name in ("student_bias", "teacher_bias"):
        inputs[name] = inputs[name].detach().clone()
        inputs[name][masked] = value
    inputs["labels"].fill_(3)
    expected = evaluate(kernel.reference, inputs)
    result = evaluate(linear_kd, {**inputs, "backend": "blocked"})
    for name in expected:
        assert result[name].isfinite().all() and error(result[name], expected[name].double()) <= 1e-5, name


def test_sizes_share_a_compiled_graph() -> None:
    calls = [HeadCase("", rows, 300, 24, 32).inputs() for rows in (10, 20, 30, 40, 50)]
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
        ({"divergence": "js"}, "divergence is 'js', choose one of kl, reverse_kl, mse"),
        ({"labels": torch.full((40,), 300)}, "label 300 is outside the vocabulary of 300"),
        ({"labels": torch.full((40,), -1)}, "label -1 is outside"),
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
    inputs = HeadCase("", 4, 9, 3, 4, torch.float64).inputs()
    with pytest.raises(ValueError, match=r"no float64|cannot run on device cpu"):
        linear_kd(**inputs, backend="triton")


def run_python(code: str, *arguments: str) -> str:
    """The output of a fresh process, without Triton's interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=ROOT).stdout


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
from bench.losses.linear_kd import CASES
from fastkd.kernels.linear_kd import linear_kd
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
from bench.losses.linear_kd import CASES
from fastkd.kernels.linear_kd import linear_kd
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
from bench.losses.linear_kd import HeadCase
from fastkd.kernels.linear_kd import linear_kd
torch.set_num_threads(1)
inputs = HeadCase("", int(sys.argv[1]), 30522, 64, 64, ce_weight=0.5).inputs()
linear_kd(**inputs).loss.backward()
print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_does_not_grow_with_the_rows() -> None:
    """Four times the rows are four times the chunks, of the same size."""
    small, large = (int(run_python(PEAK_MEMORY, str(rows))) for rows in (1568, 6272))
    matrix = 4704 * 30522 * 4 / 1024  # KiB of the additional rows' logits, once, in float32
    assert large - small < matrix / 5
