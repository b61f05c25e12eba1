"""reverse_kl and mse of linear_kd where they need more than the values and gradients of the cases: limits, shifts, edges."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from head_loss import NAMES, SMALL, error, evaluate, in_float64, on_every_backend, same

from bench import step_model
from bench.losses.linear_kd import HeadCase, flops, in_step, steps
from fastkd.kernels import linear_kd as kernel
from fastkd.kernels.linear_kd import linear_kd

OTHERS = pytest.mark.parametrize("divergence", ["reverse_kl", "mse"])


def test_the_definitions_are_pytorch_s() -> None:
    inputs = HeadCase("", 7, 40, 8, 12, torch.float64, temperature=2.0).inputs()
    z_s, z_t = (
        F.linear(inputs[f"{x}_hidden"], inputs[f"{x}_weight"], inputs[f"{x}_bias"]) for x in ("student", "teacher")
    )
    log_p, log_q = (F.log_softmax(z / 2.0, -1) for z in (z_s, z_t))
    centred = (z - z.mean(-1, keepdim=True) for z in (z_s, z_t))
    expected = {
        "kl": 4.0 * F.kl_div(log_p, log_q, log_target=True, reduction="batchmean"),
        "reverse_kl": 4.0 * F.kl_div(log_q, log_p, log_target=True, reduction="batchmean"),
        "mse": F.mse_loss(*centred),
    }
    for divergence, value in expected.items():
        torch.testing.assert_close(kernel.reference(**inputs | {"divergence": divergence}).kl, value.detach())


def test_twice_the_kl_of_a_high_temperature_is_the_mse() -> None:
    inputs = HeadCase("", 9, 60, 8, 12, torch.float64).inputs()
    mse = linear_kd(**inputs | {"divergence": "mse"}).kl
    for divergence in ("kl", "reverse_kl"):
        hot = linear_kd(**inputs | {"divergence": divergence, "temperature": 1e4}).kl
        assert abs(2 * hot / mse - 1) < 1e-3, divergence


@OTHERS
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_gradcheck(divergence: str, temperature: float) -> None:
    case = HeadCase("", 5, 9, 3, 4, torch.float64, ce_weight=0.7, kl_weight=0.4, ignored=1, divergence=divergence)
    inputs = replace(case, temperature=temperature).inputs()
    tensors = [inputs.pop(name) for name in NAMES]

    def loss(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return linear_kd(student_hidden=x, student_weight=weight, student_bias=bias, **inputs).loss

    assert torch.autograd.gradcheck(loss, tensors)


@on_every_backend
@OTHERS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_student_that_equals_its_teacher_has_no_loss_and_no_gradient(
    dtype: torch.dtype, divergence: str, device: str, backend: str
) -> None:
    inputs = HeadCase("", 20, 300, 32, 32, dtype, spread=4.0, temperature=3.0, divergence=divergence).inputs(device)
    inputs |= {name.replace("student", "teacher"): inputs[name].detach() for name in NAMES}
    result = evaluate(linear_kd, inputs, backend=backend)
    assert not any(x.any() for x in result.values())


@on_every_backend
@OTHERS
def test_a_shift_of_a_row_s_logits_changes_nothing(divergence: str, device: str, backend: str) -> None:
    """An uneven vocabulary, so that the tiles' means differ in weight."""
    inputs = HeadCase("", 20, 300, 32, 24, divergence=divergence, ignored=2).inputs(device)
    expected = evaluate(kernel.reference, in_float64(inputs))
    inputs["student_bias"] = inputs["student_bias"].detach() + 8.0
    result = evaluate(linear_kd, inputs, backend=backend)
    for name in expected:
        assert error(result[name], expected[name]) <= 1e-5, name


@on_every_backend
@OTHERS
@pytest.mark.parametrize("ce_weight", [0.0, 0.4])
def test_chunks_read_only_what_they_wrote(ce_weight: float, divergence: str, device: str, backend: str) -> None:
    """New memory is NaN in PyTorch's deterministic mode. Chunks of 16 of 24 rows; a second run has the same bits."""
    changes = {"rows": 24, "vocabulary": 150, "divergence": divergence, "ce_weight": ce_weight, "ignored": 10}
    inputs = replace(SMALL, **changes).inputs(device)
    expected = evaluate(kernel.reference, in_float64(inputs))
    torch.use_deterministic_algorithms(device == "cpu")
    try:
        first, second = (evaluate(linear_kd, inputs, backend=backend, chunk_rows=16) for _ in range(2))
        with torch.no_grad():
            value = linear_kd(**inputs, backend=backend, chunk_rows=16)
    finally:
        torch.use_deterministic_algorithms(False)
    assert same(first, second)
    assert error(value.kl, expected["kl"]) <= 1e-5 and error(value.loss, expected["loss"]) <= 1e-5
    for name in expected:
        assert error(first[name], expected[name]) <= 1e-5, name


@OTHERS
@pytest.mark.parametrize("masked", [slice(1024, 1500), slice(700, 1100)], ids=["a whole block", "parts of blocks"])
@pytest.mark.parametrize("value", [-1e10, torch.finfo(torch.float32).min])
def test_words_that_a_bias_masks_out_of_both(value: float, masked: slice, divergence: str) -> None:
    """A mean square counts such a word too, by what float32 leaves of its logits: that is only held to be finite."""
    inputs = HeadCase("", 8, 1500, 16, 24, divergence=divergence).inputs()
    for name in ("student_bias", "teacher_bias"):
        inputs[name] = inputs[name].detach().clone()
        inputs[name][masked] = value
    expected = evaluate(kernel.reference, inputs)
    result = evaluate(linear_kd, {**inputs, "backend": "blocked"})
    for name in expected:
        assert result[name].isfinite().all(), name
        assert divergence == "mse" or error(result[name], expected[name].double()) <= 1e-5, name


def test_the_operator_s_registration() -> None:
    inputs = HeadCase("", 5, 9, 3, 4, torch.float64, ce_weight=0.7, temperature=2.0).inputs()
    tensors = [inputs[name] for name in NAMES]
    rest = [inputs[f"teacher_{x}"] for x in ("hidden", "weight", "bias")]
    options = (0.4, 0.7, 2.0, "mse", 16, "blocked", torch.float64, True, True, True)
    arguments = (*tensors[:2], inputs["labels"], tensors[2], *rest, *options)
    torch.library.opcheck(torch.ops.fastkd.linear_kd.default, arguments)


def test_the_launches_of_each_divergence() -> None:
    """The same products; another pass over both models' logits for reverse_kl, and no exponentials for mse."""
    case = HeadCase("", 64, 300, 24, 32, torch.bfloat16)
    kl, reverse, mse = (steps(replace(case, divergence=divergence)) for divergence in ("kl", "reverse_kl", "mse"))
    assert {sum(step.flops for step in launches) for launches in (kl, reverse, mse)} == {flops(case)}
    (expected,) = (step for step in reverse if step not in kl)
    assert expected.bytes == 2 * 2 * 64 * 300 and len(reverse) == len(kl) + 1
    assert len(mse) == len(kl) - 1 and not any(step.exponentials for step in mse)
    work = step_model.work("paper-6l", 131_072)
    taught = [in_step(work, kl_weight=0.5, ce_weight=0.5, divergence=each) for each in ("kl", "reverse_kl", "mse")]
    assert len({sum(step.flops for step in launches) for launches in taught}) == 1
    assert sum(step.exponentials for step in taught[1]) > sum(step.exponentials for step in taught[0])
