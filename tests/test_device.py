"""The suite for a GPU: parts that crash, hang or are interrupted cost their own rows at most; goals are judged by rows."""

import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import textwrap
import time
from pathlib import Path

import pytest

from bench import losses
from bench.device import correctness, environment, page, part, process, smoke
from bench.device.__main__ import main
from bench.device.suite import PLAN, Suite, available
from fastkd import methods

ROOT = Path(__file__).parents[1]
PARTS = {
    "a_good": """
        def run(context, rows):
            rows.add(what="number", value=1.5, device=context.device, left=rows.left)
    """,
    "b_crash": """
        def run(context, rows):
            rows.add(what="number", value=2.5)
            raise RuntimeError("the kernel was wrong")
    """,
    "c_hang": """
        import os, subprocess, sys, time
        def run(context, rows):
            rows.add(what="number", value=3.5)
            child = subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(15, 1); time.sleep(600)"])
            rows.add(what="children", value=[os.getpid(), child.pid])
            if os.path.exists("hanging"):
                open("hanging", "w").close()
            time.sleep(600)
    """,
    "d_missing": """
        import no_such_package
        def run(context, rows):
            pass
    """,
    "e_bad_table": """
        def run(context, rows):
            rows.add(what="number", value=float("nan"))
        def markdown(rows):
            raise ValueError("no table")
        def draw(rows, path):
            path.write_bytes(b"a picture")
    """,
}
TABLE = """
    SECONDS = {seconds}
    def markdown(rows):
        return "values: " + ", ".join(str(row["value"]) for row in rows) + "\\n"
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder of parts as a package that this process and those of the parts find."""
    folder = tmp_path / "modules" / "trial_parts"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "no_part.py").write_text("import no_such_package\n")
    for name, body in PARTS.items():
        shared = textwrap.dedent(TABLE.format(seconds=40 if name == "c_hang" else 100))
        (folder / f"{name}.py").write_text(shared + textwrap.dedent(body))
    monkeypatch.syspath_prepend(str(folder.parent))
    path = os.pathsep.join([str(folder.parent), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # it holds the scratch folder
    return "trial_parts"


def suite(out: Path, package: str, *parts: str, minutes: float) -> int:
    return Suite(out, "cpu", minutes, parts or None, package=package).start().run()


def outcomes(out: Path) -> dict[str, str]:
    return {row["part"]: row["outcome"] for row in part.read(out / page.OUTCOMES)}


def alive(pid: int) -> bool:
    """Whether a process runs; one that ended and was not collected does not."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_parts_are_found_without_being_imported(package: str) -> None:
    assert available(package) == dict.fromkeys(PARTS, 100) | {"c_hang": 40}
    assert [name for name in PLAN if name in available("bench.device")][:4] == list(PLAN[:4])


@pytest.mark.exhaustive
def test_whatever_happens_to_a_part_the_others_still_come(package: str, tmp_path: Path) -> None:
    out, started = tmp_path / "out", time.monotonic()
    assert suite(out, package, minutes=1.0) == 4
    assert time.monotonic() - started < 60
    ends = {"a_good": "done", "b_crash": "failed", "c_hang": "cut off", "d_missing": "failed", "e_bad_table": "done"}
    assert outcomes(out) == ends
    lines = {row["part"]: row["line"] for row in part.read(out / page.OUTCOMES)}
    assert lines["b_crash"] == "RuntimeError: the kernel was wrong"
    assert lines["d_missing"] == "ModuleNotFoundError: No module named 'no_such_package'"
    assert (out / "b_crash.md").read_text() == "values: 2.5\n"
    hung = part.read(out / "c_hang.jsonl")
    assert (out / "c_hang.md").read_text() == f"values: 3.5, {hung[1]['value']}\n"  # written by the driver
    assert "time.sleep" not in lines["c_hang"] and "in run" in (out / "c_hang.log").read_text()  # where it hung
    assert not any(alive(pid) for pid in hung[1]["value"])
    assert part.read(out / "e_bad_table.jsonl") == [{"what": "number", "value": None}]
    assert (out / "e_bad_table.png").exists() and not (out / "e_bad_table.md").exists()
    text = (out / page.NAME).read_text()
    assert "the kernel was wrong" in text and "values: 3.5" in text and "![e_bad_table](e_bad_table.png)" in text
    with tarfile.open(out.with_name("out.tar.gz")) as archive:
        assert {Path(name).name for name in archive.getnames()} == {path.name for path in out.iterdir()}


def test_what_a_part_leaves_over_the_next_ones_get(package: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert suite(out, package, "a_good", "e_bad_table", minutes=2.0) == 0
    first, second = part.read(out / page.OUTCOMES)
    assert first["limit_s"] == pytest.approx(54, abs=1)  # half of what is not kept for the page
    assert second["limit_s"] == pytest.approx(108 - first["seconds"], abs=5)
    assert first["limit_s"] - 15 < part.read(out / "a_good.jsonl")[0]["left"] < first["limit_s"]


def test_a_later_run_replaces_the_parts_that_it_runs(package: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert suite(out, package, "a_good", "b_crash", minutes=1.0) == 4
    (out / "b_crash.png").write_bytes(b"of an earlier run")
    assert suite(out, package, "b_crash", minutes=1.0) == 4
    assert outcomes(out) == {"a_good": "done", "b_crash": "failed"}
    assert not (out / "b_crash.png").exists() and "values: 1.5" in (out / page.NAME).read_text()


@pytest.mark.exhaustive
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_part_and_still_writes_the_page(package: str, tmp_path: Path, number: int) -> None:
    out = tmp_path / "out"
    code = (
        "import sys, pathlib; from bench.device.suite import Suite; "
        f"sys.exit(Suite(pathlib.Path({str(out)!r}), 'cpu', 5.0, ['a_good', 'c_hang', 'd_missing'], "
        f"package={package!r}).start().run())"
    )
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ["PYTHONPATH"]]),
        "TMPDIR": str(tmp_path),
    }
    os.mkfifo(tmp_path / "hanging")  # in the parts' working folder
    driver = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.DEVNULL, cwd=tmp_path)
    (tmp_path / "hanging").read_text()  # waits for the part
    driver.send_signal(number)
    assert driver.wait(60) == 4
    assert outcomes(out) == {"a_good": "done", "c_hang": "interrupted"}
    assert "values: 3.5" in (out / page.NAME).read_text()
    assert not any(alive(pid) for pid in part.read(out / "c_hang.jsonl")[1]["value"])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--parts", "smoke,nothing"], "no part 'nothing': take of environment, smoke"),
        (["--minutes", "0"], "--minutes is 0.0"),
        (["--bundle", "missing.tar"], "--bundle missing.tar is no file"),
        (["--parts", ","], "--parts names none: take of environment, smoke"),
        (["--minutes", "nan"], "--minutes is nan"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    options: list[str], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["--device", "cpu", "--out", str(out), *options]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and reason in said[0]
    assert not out.exists()


def test_an_out_that_is_a_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("kept")
    assert main(["--device", "cpu", "--out", str(tmp_path / "file" / "out")]) == 2
    assert "is in the way" in capsys.readouterr().err
    assert main(["--device", "cpu", "--out", "/proc/out"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_files_of_somebody_else_are_never_replaced(
    package: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "README.md").write_text("mine")
    (tmp_path / "backup.tar.gz").write_text("mine")
    for name in ("docs", "backup"):
        assert main(["--device", "cpu", "--out", str(tmp_path / name)]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "which no run of this wrote: name a new folder" in said
    assert (tmp_path / "docs" / "README.md").read_text() == (tmp_path / "backup.tar.gz").read_text() == "mine"
    assert not (tmp_path / "backup").exists()


def test_no_room_for_the_archive_costs_the_archive_alone(
    package: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / ".out.tar.gz.partial").mkdir()  # in the way, whoever runs this
    assert suite(tmp_path / "out", package, "a_good", minutes=1.0) == 0
    assert "out.tar.gz is not written" in capsys.readouterr().out and (tmp_path / "out" / page.NAME).exists()


def test_a_process_and_what_it_leaves_behind_end_together(tmp_path: Path) -> None:
    log = tmp_path / "log"
    script = "import subprocess, sys; print(subprocess.Popen(['sleep', '600']).pid); sys.exit(3)"
    ended = process.run([sys.executable, "-c", script], environment=os.environ, log=log, seconds=60)
    assert ended.code == 3 and ended.seconds < 60
    assert not alive(int(ended.line))


# ---- parts ----------------------------------------------------------------------------------------------------


@pytest.mark.exhaustive
def test_the_command_measures_the_machine_and_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # it holds the scratch folder
    out = tmp_path / "out"
    assert main(["--device", "cpu", "--minutes", "4", "--parts", "full_step,environment", "--out", str(out)]) == 0
    assert list(outcomes(out)) == ["environment", "full_step"]  # in the suite's order
    ceilings = [row for row in part.read(out / "environment.jsonl") if row["what"] == "ceiling"]
    assert {row["name"].split()[0] for row in ceilings} == {"copy", "bfloat16", "float32", "exp2"}
    measured = environment.measured(out)
    assert measured is not None and measured.bytes == next(row["value"] for row in ceilings if row["name"] == "copy")
    step = part.read(out / "full_step.jsonl")[0]
    assert step["ok"] and step["tokens_per_s"] > 0 and step["loss"] > 0
    for name in ("environment.png", "environment.md", "full_step.md", "full_step.log"):
        assert (out / name).stat().st_size > 0


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> part.Context:
    """A context whose parts share what they make."""
    folder = tmp_path_factory.mktemp("scratch")
    return part.Context("correctness", str(folder), "cpu", 600.0, True, None, str(folder))


@pytest.mark.parametrize("method", methods.available())
def test_a_step_is_compared_with_the_same_in_float64(method: str, scratch: part.Context) -> None:
    single, half = correctness.gradients(scratch, method)
    assert single["ok"] and half["ok"] and (single["dtype"], half["dtype"]) == ("float32", "bfloat16")
    assert 0 < single["gradient_error"] < 1e-5 < half["gradient_error"] < 0.1
    assert single["loss"] > 1e-4  # of two models that differ


def test_checks_name_what_fails_and_go_on(scratch: part.Context) -> None:
    names = [name for name, _ in smoke.checks(scratch)]
    assert [name for name in names if name.startswith("one eager step of")] == [
        f"one eager step of {method}" for method in methods.available()
    ]
    assert (
        {name.split(",")[0] for name in names} >= set(losses.available()) >= {"linear_kd", "relation_kl", "score_mse"}
    )
    found = {name: check() for name, check in smoke.checks(scratch) if not name.startswith("one eager step")}
    assert found["attention, width 32, a sequence without queries"] == "sdpa"
    rows = [{"what": "check", "check": "a", "ok": False, "error": "ValueError: no", "seconds": 1.0}]
    assert "| a | **failed** | 1.0 | ValueError: no |" in smoke.markdown(rows)


@pytest.mark.parametrize("workers", [[], ["-n", "2"]], ids=["alone", "xdist"])
def test_outcomes_of_tests_are_written_one_by_one(workers: list[str], tmp_path: Path) -> None:
    if workers:
        pytest.importorskip("xdist")
    (tmp_path / "test_trial.py").write_text(
        "import pytest\n"
        "@pytest.fixture\ndef broken(): raise OSError('no disk')\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2, 'not equal'\n"
        "def test_without(broken): pass\n"
        "@pytest.mark.skip\ndef test_skipped(): pass\n"
    )
    (tmp_path / "test_syntax.py").write_text("def test(:\n")
    file = tmp_path / "outcomes.jsonl"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "bench.device.outcomes", "--outcomes", str(file), *workers]
    command += ["--rootdir", str(tmp_path), "--continue-on-collection-errors", str(tmp_path)]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.DEVNULL, check=False, timeout=120)
    rows = {row["test"].split("::")[-1]: row for row in part.read(file)}
    kinds = {"test_good": "passed", "test_bad": "failed", "test_without": "error", "test_skipped": "skipped"}
    assert {name: row["outcome"] for name, row in rows.items() if name in kinds} == kinds
    assert rows["test_bad"]["message"].startswith("test_trial.py:5: AssertionError: not equal")
    assert rows["test_without"]["message"] == "test_trial.py:3: OSError: no disk"
    assert next(row for name, row in rows.items() if "syntax" in name)["outcome"] == "error"


def test_shares_of_tests_are_all_of_them(tmp_path: Path) -> None:
    (tmp_path / "test_trial.py").write_text("def test_a(): pass\ndef test_b(): pass\ndef test_c(): pass\n")
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    found = []
    for share in ("1/2", "2/2"):
        file = tmp_path / "outcomes.jsonl"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "bench.device.outcomes", "--outcomes", str(file)]
        command += ["--share", share, "--rootdir", str(tmp_path), str(tmp_path)]
        subprocess.run(
            command, env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.DEVNULL, check=True, timeout=120
        )
        found.append([row["test"].split("::")[-1] for row in part.read(file)])
    assert found == [["test_a", "test_c"], ["test_b"]]
