"""The suite's page: goals are judged by their worst case, by whole parts and only by rows of a GPU."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.device import page, part
from fastkd import methods


def kernel_row(contender: str, seconds: float, **fields: object) -> part.Row:
    row = {"what": "kernel", "kernel": "linear_kd", "case": "ce 768", "dtype": "bfloat16", "contender": contender}
    return row | {"device_s": seconds, "gradient_error": 1e-3, "peak_bytes": 100} | fields


@pytest.fixture
def write_page(tmp_path: Path) -> Callable[..., dict[str, str]]:
    """Writes a folder of results of a device and its page; verdict by claim."""

    def written(device: str, outcome: str = "done", **rows: list[part.Row]) -> dict[str, str]:
        ends = [
            {"what": "part", "part": name, "outcome": outcome, "seconds": 1, "limit_s": 2, "line": "", "device": device,
             "bundle": False, "commit": "abc", "date": "2026-01-01"}
            for name in rows
        ]  # fmt: skip
        for name, content in {**rows, "suite": ends}.items():
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
        table = page.write(tmp_path).read_text().partition("## Claims")[2].partition("## Parts")[0]
        lines = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
        return {cells[0]: cells[-1].strip("* |") for cells in lines[2:]}

    return written


def verdicts(found: dict[str, str], word: str) -> set[str]:
    return {verdict for claim, verdict in found.items() if word in claim}


def test_goals_are_met_by_the_worst_case(write_page: Callable[..., dict[str, str]]) -> None:
    rows = [
        kernel_row("fastkd", 1.0, of_roofline=0.8, roofline="measured"), kernel_row("reference", 4.5),
        kernel_row("reference compiled", 1.4), kernel_row("orda-kernel", 1.5, gradient_error=2e-2),
        kernel_row("liger fused_linear_jsd", 2.0, gradient_error=1e-3),
        kernel_row("fastkd", 1.0, case="kl", of_roofline=0.6, roofline="measured"), kernel_row("reference", 9.0, case="kl"),
        {"what": "kernel", "kernel": "linear_kd", "case": "kl", "contender": "orda-kernel", "error": "out of memory"},
    ]  # fmt: skip
    found = write_page("cuda", kernels=rows)
    assert verdicts(found, "4 times as fast as eager") == {"met"}
    assert verdicts(found, "1.5 times as fast as torch.compile") == {"not met"}
    assert verdicts(found, "faster than orda") == {"met"} == verdicts(found, "faster than Liger")
    assert verdicts(found, "smaller gradient error") == {"not met"}  # an equal one is not smaller
    assert verdicts(found, "linear_kd: at least 70% of the roofline") == {"not met"}
    assert verdicts(found, "relation_kl") == {"not measured"}


def test_training_goals(write_page: Callable[..., dict[str, str]]) -> None:
    full = {"size": "paper-6l", "packing": "full-sentences"}
    rate, tax = (
        full | {"what": "method", "dtype": "bfloat16", "mfu": 0.4, "peak_memory_bytes": 5},
        full | {"what": "tax"},
    )
    rows = [
        rate | {"method": "mlm", "tokens_per_s": 1.6e6},
        rate | {"method": "mlm", "tokens_per_s": 1.0e6, "packing": "documents"},
        tax | {"method": "minilmv2", "tax": 1.7, "bound": 1.5, "over": 1.13},
        tax | {"method": "minilmv2", "size": "paper-12l", "tax": 1.9, "bound": 1.5, "over": 1.26},
        tax | {"method": "minilmv2", "packing": "documents", "tax": 1.9, "bound": 1.5, "over": 1.26},
        tax | {"method": "tinybert", "tax": 2.1, "bound": 1.7, "over": 1.24},
        full | {"what": "residual", "method": "mlm", "tokens_per_s": 1.7e6},
    ]
    found = write_page("cuda", training=rows)
    assert verdicts(found, "scratch") == {"met"} == verdicts(found, "minilmv2: the teacher")
    assert verdicts(found, "tinybert: the teacher") == {"not met"}
    assert verdicts(found, "logit_kd: the teacher") == {"not measured"}
    rows[0] = rate | {"method": "mlm", "tokens_per_s": 1.5e6}
    assert verdicts(write_page("cuda", training=rows), "scratch") == {"not met"}


def test_a_rehearsal_settles_nothing(write_page: Callable[..., dict[str, str]]) -> None:
    checks = [{"what": "check", "check": "a", "ok": True, "seconds": 1.0}]
    assert set(write_page("cpu", smoke=checks, kernels=[kernel_row("fastkd", 1.0)]).values()) == {"not measured"}
    assert verdicts(write_page("cuda", smoke=checks), "smoke") == {"met"}
    checks.append({"what": "check", "check": "b", "ok": False, "seconds": 1.0, "error": "RuntimeError: x"})
    assert verdicts(write_page("cuda", smoke=checks), "smoke") == {"not met"}


TESTS = {
    "what": "tests", "selection": "all", "passed": 5, "failed": 0, "errors": 0, "skipped_tests": 2, "complete": True,
}  # fmt: skip


def test_correctness_is_all_or_nothing(write_page: Callable[..., dict[str, str]]) -> None:
    tests = TESTS
    step = {"what": "gradient", "dtype": "float32", "gradient_error": 1e-6, "bound": 1e-5, "ok": True}
    steps = [step | {"method": method} for method in methods.available()]
    found = write_page("cuda", correctness=[tests, *steps])
    assert verdicts(found, "test passes") == {"met"} == verdicts(found, "gradient in bfloat16")
    found = write_page("cuda", correctness=[tests | {"failed": 1}, step | {"method": "mlm", "ok": False}, *steps[1:]])
    assert verdicts(found, "test passes") == {"not met"} == verdicts(found, "gradient in bfloat16")
    wrong = {"what": "gradient", "method": "mlm", "ok": False, "error": "RuntimeError: no"}
    assert verdicts(write_page("cuda", correctness=[tests, wrong, *steps]), "gradient in bfloat16") == {"not met"}


def test_what_was_cut_off_is_not_met(write_page: Callable[..., dict[str, str]]) -> None:
    tests = TESTS | {"complete": False}
    step = {"what": "gradient", "method": "mlm", "dtype": "float32", "gradient_error": 1e-6, "bound": 1e-5, "ok": True}
    check = {"what": "check", "check": "a", "ok": True, "seconds": 1.0}
    found = write_page("cuda", correctness=[tests, step])
    assert verdicts(found, "test passes") == {"measured"} == verdicts(found, "gradient in bfloat16")
    assert verdicts(write_page("cuda", "cut off", smoke=[check]), "smoke") == {"measured"}
    assert verdicts(write_page("cuda", "cut off", smoke=[check | {"ok": False}]), "smoke") == {"not met"}
