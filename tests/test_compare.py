"""A comparison: matched budgets, rows that resume, failures that stay single, marks on what differs."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fastkd import compare
from fastkd.row import Row, confounds, parse_row
from fastkd.run_folder import read_run
from fastkd.tuning import candidates, tune


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def do(small: list[str], folder: Path, *options: str) -> int:
    return compare.main([*small, *options, "--output-dir", str(folder)])


@pytest.fixture(scope="module")
def seconds_matched(small: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare") / "seconds"
    options = ("--methods", "mlm,minilmv2", "--budget-gpu-hours", "0.0008", "--seeds", "2")
    assert do(small, folder, *options) == 0
    return folder


def test_charged_seconds_agree_within_a_step(seconds_matched: Path) -> None:
    found = results(seconds_matched)
    assert found["match"] == "gpu-seconds" and len(found["rows"]) == 4
    fields = {"method", "seed", "charged_s", "flops", "tokens", "tokens_per_s", "mfu", "joules", "scores", "confounds"}
    for row in found["rows"]:
        assert fields <= set(row) and row["status"] == "ok"
        run = read_run(next((seconds_matched / "rows").glob(f"{row['method']}-*-seed{row['seed']}")))
        a_step = max(sum(step["phase_s"].values()) for step in run.steps)
        assert abs(0.0008 * 3600 - row["charged_s"]) <= 1.5 * a_step


def test_rows_differ_in_their_method_alone_but_for_what_is_listed(seconds_matched: Path) -> None:
    marks = {row["method"]: row["confounds"] for row in results(seconds_matched)["rows"]}
    assert marks["mlm"] == []
    assert marks["minilmv2"] == ["learning rate 0.0006, mlm has 0.001"]


def test_scores_and_references_are_there(seconds_matched: Path) -> None:
    found = results(seconds_matched)
    scratch = next(row for row in found["rows"] if row["method"] == "mlm")
    assert scratch["scores"]["held-out MLM loss"] > 0
    assert {reference["label"] for reference in found["references"]} == {"teacher", "untrained student"}
    table = (seconds_matched / "RESULTS.md").read_text()
    assert "| minilmv2 |" in table and "GPU-seconds" in table


def test_finished_rows_are_not_repeated(seconds_matched: Path, small: list[str]) -> None:
    ledgers = {path: path.read_bytes() for path in seconds_matched.glob("rows/*/ledger.jsonl")}
    options = ("--methods", "mlm,minilmv2", "--budget-gpu-hours", "0.0008", "--seeds", "2")
    assert do(small, seconds_matched, *options) == 0
    assert {path: path.read_bytes() for path in ledgers} == ledgers


def test_flops_agree_within_a_step(small: list[str], tmp_path: Path) -> None:
    assert do(small, tmp_path / "c", "--methods", "mlm,minilmv2", "--match", "flops", "--budget-flops", "1e11") == 0
    for row in results(tmp_path / "c")["rows"]:
        steps = read_run(next((tmp_path / "c" / "rows").glob(f"{row['method']}-*"))).steps
        assert 0 <= 1e11 - row["flops"] <= 1.1 * row["flops"] / len(steps)


def test_kill_9_then_the_same_command_finishes_the_rest(
    small: list[str], command: Callable[..., list[str]], tmp_path: Path
) -> None:
    folder = tmp_path / "c"
    options = ["--methods", "mlm,minilmv2", "--budget-gpu-hours", "0.001"]
    argv = command("compare", *small, *options, "--output-dir", folder)
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not list(folder.glob("rows/minilmv2-*/ledger.jsonl")):
            assert process.poll() is None
            time.sleep(0.02)  # between two looks at the folder
        os.kill(process.pid, signal.SIGKILL)
    first = next(folder.glob("rows/mlm-*/ledger.jsonl")).read_bytes()
    assert subprocess.run(argv, capture_output=True, timeout=300).returncode == 0
    assert next(folder.glob("rows/mlm-*/ledger.jsonl")).read_bytes() == first
    assert [row["status"] for row in results(folder)["rows"]] == ["ok", "ok"]


def test_a_row_that_fails_is_reported_and_the_others_go_on(small: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "c"
    blocked = folder / "rows" / "mlm-4e10-seed0"
    blocked.mkdir(parents=True)
    (blocked / "something else").write_text("")
    assert do(small, folder, "--methods", "mlm,minilmv2", "--match", "flops", "--budget-flops", "4e10") != 2
    rows = {row["method"]: row for row in results(folder)["rows"]}
    assert rows["mlm"]["status"] == "failed" and "not empty" in rows["mlm"]["error"]
    assert rows["minilmv2"]["status"] == "ok"


def test_plan_only_writes_nothing(small: list[str], tmp_path: Path, capsys) -> None:
    options = ("--methods", "mlm,minilmv2", "--budget-gpu-hours", "0.001", "--plan-only")
    assert do(small, tmp_path / "c", *options) == 0
    shown = capsys.readouterr().out
    assert "mlm: " in shown and "minilmv2: " in shown and "tokens" in shown
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--methods", "mlm,nope"], ("nope", "minilmv2")),
        (["--methods", "mlm+as-released"], ("mlm", "no option")),
        (["--methods", "mlm@x"], ("mlm", "without a teacher")),
        (["--methods", "mlm,mlm"], ("twice", "--seeds")),
        (["--methods", ","], ("--methods",)),
        (["--seeds", "0"], ("--seeds",)),
        (["--tune", "1"], ("--tune",)),
        (["--budget-flops", "1e9"], ("--match flops",)),
        (["--glue", "missing"], ("missing", "--glue")),
        (["--glue-tasks", "sst2"], ("--glue",)),
        (["--frobnicate"], ("--frobnicate",)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refusals(options: list[str], words: tuple[str, ...], small: list[str], tmp_path: Path, capsys) -> None:
    assert do(small, tmp_path / "c", "--budget-gpu-hours", "0.001", *options) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(word in error for word in words), error
    assert not (tmp_path / "c").exists()


def test_a_row_is_written_in_one_word() -> None:
    row = parse_row("minilmv2+init-from-teacher@runs/big")
    assert row == Row("minilmv2", ("init_from_teacher",), "runs/big")
    assert row.label == "minilmv2 +init-from-teacher @big"


def test_marks_name_every_difference() -> None:
    rows = [
        parse_row(spec) for spec in ("mlm", "minilmv2", "tinybert", "logit_kd@runs/big", "minilmv2+init-from-teacher")
    ]
    shared = {"preset": "quickstart"}
    assert confounds(rows[0], rows, shared, 1e-3, 1e-3) == []
    assert confounds(rows[3], rows, shared, 5e-4, 1e-3) == [
        "learning rate 0.0005, mlm has 0.001",
        "teacher runs/big, other rows have quickstart",
    ]
    assert any("starts from teacher layers" in mark for mark in confounds(rows[4], rows, shared, 1e-3, 1e-3))


def test_rates_are_tried_around_the_default() -> None:
    assert candidates(1e-3, 3) == [5e-4, 1e-3, 2e-3]
    assert candidates(1e-3, 2) == [1e-3, 2e-3]


def test_a_search_is_done_once_and_takes_the_lowest_loss(small: list[str], tmp_path: Path) -> None:
    from fastkd import run

    tried: list[float] = []

    def try_rate(rate: float, where: Path) -> None:
        tried.append(rate)
        options = [*small, "--method", "mlm", "--lr", str(rate), "--budget-tokens", "9000", "--output-dir", str(where)]
        assert run.main(options) == 0

    rate, seconds = tune(1e-3, 2, try_rate, tmp_path)
    assert (rate, tried) == (2e-3, [1e-3, 2e-3])  # so few steps reward the larger rate
    assert seconds > 0
    assert tune(1e-3, 2, try_rate, tmp_path) == (rate, seconds)
    assert len(tried) == 2
