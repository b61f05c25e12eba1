"""Predicted times: the closed forms beside numbers from elsewhere, what must grow with what, and the table of docs/gpu.md."""

import itertools
from pathlib import Path

import pytest
import torch

from bench import losses, predictions, roofline, step_model
from bench.predictions import Ceilings
from fastkd import methods

T, D, I = 131_072, 768, 3072  # noqa: E741
WORK = step_model.work("paper-6l", T)
METHODS = [name for name in methods.available() if not predictions.undescribed(name, "paper-6l")]
PAIRS = list(itertools.product(METHODS, predictions.PREDICTED))
CASES = [pytest.param(*entry, id=f"{entry[0]}: {entry[1].name}") for entry in losses.cases()]


def test_a_full_layer_s_products_take_5_57_teraflop() -> None:
    """2·T·(4D² + 2DI) forward, twice that backward."""
    products = 3 * step_model.layer_products(WORK.student, "all", WORK)
    assert sum(step.flops for step in products) == 6 * T * (4 * D * D + 2 * D * I)
    assert sum(step.flops for step in products) == pytest.approx(5.57e12, rel=1e-3)


def test_flops_a_token_of_scratch_training() -> None:
    """252.4 M as run at full length (251.6 M in shorter text), 283.5 M if the last layer ran whole."""
    mlm = step_model.method_of("mlm", WORK)
    M, V, share = WORK.predicted, 30_522, WORK.predicted / T
    layer, head = 8 * D * D + 4 * D * I + 4 * D * 128, 2 * M / T * (D * D + V * D)
    last = 4 * D * D + share * (4 * D * D + 4 * D * I + 4 * D * 128)
    assert M == 19_648
    assert step_model.executed_flops(mlm, WORK) / T == pytest.approx(3 * (5 * layer + last + head), rel=1e-5)
    assert step_model.executed_flops(mlm, WORK) / T == pytest.approx(251.6e6, rel=5e-3)
    assert step_model.executed_flops(mlm, WORK, whole=True) / T == pytest.approx(283.5e6, rel=1e-4)


def test_bytes_of_a_layer_are_those_of_the_compiled_kernels() -> None:
    """As counted in torch.compile's code with every layer a graph of its own: 4.8 GB forward and 10.9 GB backward.

    A bfloat16 stream was counted at 10.8 GB in all. 1.2 GB of that were for gradients of zeros, and 1.2 GB of both laid dq, dk and
    dv side by side: these are gone.
    """

    def elementwise(stream: step_model.Stream) -> tuple[float, float]:
        forward = step_model.layer_forward(WORK.student, "all", WORK, stream.forward)
        backward = step_model.layer_backward(WORK.student, "all", WORK, stream.backward)
        return forward[-1].bytes, backward[-1].bytes

    assert elementwise(step_model.LAYERS_APART) == pytest.approx((4.83e9, 10.87e9 - 12 * T * D), rel=2e-3)
    assert sum(elementwise(step_model.STREAMS["bfloat16"])) == pytest.approx(9.6e9 - 12 * T * D, rel=1e-2)


@pytest.mark.parametrize(("method", "measured"), [("mlm", 81.9), ("minilmv2", 129.5), ("logit_kd", 137.7)])
def test_steps_are_as_measured_on_an_h100(method: str, measured: float) -> None:
    """ms a step of paper-6l (bench/results/nvidia-h100): up to 8% longer, for a power cap held its clock at 1.6 to 1.8 GHz."""
    expected = 1e3 * predictions.step(method, "paper-6l", "H100").step_s
    assert expected < measured < 1.08 * expected


@pytest.mark.parametrize(
    ("name", "floor_us"),
    [
        ("ce 768", 730), ("kl 384/768", 710), ("256×128, 768, A=12", 45), ("256×128, 768, A=48", 104),
        ("256×128, 768, A=12 cross", 90), ("256×128, 768/768, A=12", 90), ("8×1024, 768, A=48", 417),
    ],
)  # fmt: skip
def test_floors_on_an_h100(name: str, floor_us: float) -> None:
    kernel, case = next(entry for entry in losses.cases() if entry[1].name == name)
    assert 1e6 * predictions.kernel(kernel, case, "H100").floor_s == pytest.approx(floor_us, rel=1e-2)


@pytest.mark.parametrize(("kernel", "case"), CASES)
def test_every_bench_case_has_a_prediction_above_its_floor(kernel: str, case: object) -> None:
    found = [predictions.kernel(kernel, case, gpu) for gpu in predictions.GPUS]
    assert all(0 < p.floor_s < p.expected_s for p in found)
    assert found == sorted(found, key=lambda p: -p.expected_s)  # A100, H100, H200


@pytest.mark.parametrize(("method", "size"), PAIRS)
def test_every_method_and_size_has_a_prediction(method: str, size: str) -> None:
    found = [predictions.step(method, size, gpu) for gpu in predictions.GPUS]
    for p in found:
        assert p.step_s == pytest.approx(sum(p.parts.values()) / 1e3) == pytest.approx(T / p.tokens_per_s)
        assert 0 < p.mfu_executed <= p.mfu_full < predictions.KINDS["product"].flops
        assert p.floor_s < p.step_s and p.host_s <= p.step_s
        assert (p.tax, p.tax_bound) == (1, 1) if method == "mlm" else min(p.tax, p.tax_bound) > 1
    assert found[0].step_s > found[1].step_s >= found[2].step_s  # A100, H100, H200


@pytest.mark.parametrize("method", METHODS)
def test_more_tokens_take_longer_and_a_small_step_waits_for_the_host(method: str) -> None:
    steps = [predictions.step(method, "paper-6l", "H100", tokens=n) for n in (2048, 16_384, T, 2 * T)]
    assert [p.step_s for p in steps] == sorted(p.step_s for p in steps)
    assert steps[-1].step_s > 1.9 * steps[-2].step_s
    assert steps[0].step_s == pytest.approx(steps[0].host_s) and "waiting for the host" in steps[0].parts
    assert "waiting for the host" not in steps[-1].parts


def test_a_method_whose_loss_describes_no_launches_breaks_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def others() -> list[str]:
        return [line for line in predictions.steps_table("paper-6l", "H100").splitlines() if "`tinybert`" not in line]

    before = others()
    monkeypatch.delattr(losses.load("score_mse"), "in_step")
    assert "| `tinybert` | not described: score_mse |" in predictions.steps_table("paper-6l", "H100")
    assert others() == before and "tinybert" not in predictions.parts_table("paper-6l", "H100")
    with pytest.raises(ValueError, match=r"'score_mse': write in_step and host_operations in bench/losses/score_mse"):
        predictions.step("tinybert", "paper-6l", "H100")


def test_a_bfloat16_stream_speeds_up_only_the_student() -> None:
    wide = predictions.step("minilmv2", "paper-6l", "H100")
    narrow = predictions.step("minilmv2", "paper-6l", "H100", residual="bfloat16")
    assert {part for part in wide.parts if narrow.parts[part] < wide.parts[part]} == {
        "layers below the last", "embeddings"
    }  # fmt: skip
    assert narrow.parts["teacher"] == wide.parts["teacher"]


def test_measured_ceilings_replace_the_datasheet() -> None:
    """Those that are expected change nothing; a faster memory speeds up what moves bytes, and leaves the floor."""
    kernel, case = next(entry for entry in losses.cases() if entry[0] == "score_mse")
    h100 = roofline.DEVICES[1]
    shares = predictions.CEILING_SHARES
    expected = Ceilings(
        shares["bytes"] * h100.bytes, shares["half"] * h100.half, shares["exponentials"] * h100.exponentials
    )
    usual = predictions.kernel(kernel, case, "H100")
    assert predictions.kernel(kernel, case, "H100", expected).expected_s == pytest.approx(usual.expected_s)
    faster = predictions.kernel(kernel, case, "H100", Ceilings(copy=h100.bytes))
    assert faster.expected_s < usual.expected_s and faster.floor_s == usual.floor_s
    steps = [
        predictions.step("mlm", "paper-6l", "H100", ceilings=c) for c in (None, expected, Ceilings(copy=h100.bytes))
    ]
    assert steps[0].step_s == pytest.approx(steps[1].step_s) and steps[2].step_s < steps[0].step_s


def test_float32_products_run_on_the_slow_units() -> None:
    _, case = next(entry for entry in losses.cases() if entry[0] == "linear_kd" and entry[1].dtype == torch.float32)
    p = predictions.kernel("linear_kd", case, "H100")
    assert p.expected_s > 8 * predictions.kernel("linear_kd", losses.load("linear_kd").BENCHES[0], "H100").expected_s


def test_gpus_by_the_driver_s_name() -> None:
    assert predictions.gpu_named("NVIDIA H100 80GB HBM3") == "H100"
    assert predictions.gpu_named("NVIDIA A100-SXM4-80GB") == "A100"
    assert predictions.gpu_named("NVIDIA H100 PCIe") is None


@pytest.mark.parametrize(
    ("arguments", "options", "said"),
    [
        (("dpo", "paper-6l", "H100"), {}, "unknown method 'dpo'"),
        (("mlm", "paper-7l", "H100"), {}, "no size 'paper-7l': choose one of tiny, quickstart"),
        (("mlm", "paper-6l", "B200"), {}, "no GPU 'B200': choose one of A100, H100, H200"),
        (("mlm", "paper-6l", "H100"), {"residual": "float16"}, "choose one of float32, bfloat16"),
        (("mlm", "paper-6l", "H100"), {"tokens": 3000}, "give a multiple of 2048"),
    ],
)
def test_unknown_names_are_refused_in_one_line(
    arguments: tuple[str, str, str], options: dict[str, object], said: str
) -> None:
    with pytest.raises(ValueError, match=said) as error:
        predictions.step(*arguments, **options)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


def test_an_unknown_kernel_is_refused() -> None:
    with pytest.raises(ValueError, match="no kernel 'softmax': choose one of hidden_mse, linear_kd"):
        predictions.kernel("softmax", None, "H100")


def test_the_page_has_what_the_command_prints() -> None:
    """Its table comes from ``python -m bench.predictions``; a changed prediction changes it, or this fails."""
    text = (Path(__file__).parents[1] / "docs" / "gpu.md").read_text(encoding="utf-8")
    section = text.split("## Predicted\n")[1]
    table = "\n".join(line for line in section.splitlines() if line.startswith("|"))
    printed = predictions.steps_table("paper-6l", "H100")
    assert printed in "\n\n".join(predictions.page())
    shown = [line for line in printed.splitlines() if line in table.splitlines()]  # a new method may lack its line
    assert table == "\n".join(shown) and len(shown) >= 2 + 5
