"""The command ``fastkd``: its subcommands, what it says at once, its lines as they are, its answers to programs."""

import io
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import fastkd
from fastkd import __main__ as fastkd_command
from fastkd import cli, compare, plan, quickstart, run, terminal

ROOT = Path(__file__).parents[1]
TINY = ["--method", "mlm", "--budget-tokens", "12000"]


def python(*argv: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *argv], capture_output=True, text=True, cwd=ROOT, timeout=120, **options)


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        ([], 0, ("usage: fastkd COMMAND", "run", "plan", "compare", "glue", "probe", "prepare", "--preset quickstart")),
        (["--help"], 0, ("usage: fastkd COMMAND",)),
        (["--version"], 0, (f"fastkd {fastkd.__version__}",)),
        (["rnu"], 2, ("unknown command 'rnu'", "run, plan, compare, glue, probe, prepare")),
        (["--budget-gpu-hours", "24"], 2, ("unknown command '--budget-gpu-hours'",)),
    ],
)
def test_one_clear_answer(argv: list[str], code: int, words: tuple[str, ...], capsys) -> None:
    assert fastkd_command.main(argv) == code
    shown = capsys.readouterr()
    assert all(word in (shown.err if code else shown.out) for word in words)
    assert not (shown.out if code else shown.err) and shown.err.count("\n") == bool(code)


def test_what_needs_no_pytorch_loads_none() -> None:
    code = "import sys; from fastkd.__main__ import main; main([]); main(['--version']); main(['rnu']); print(*sys.modules)"
    assert not {"torch", "transformers", "numpy"} & set(python("-c", code).stdout.split())


def test_a_python_that_is_too_old_is_told_so_in_one_line() -> None:
    done = python("-c", "import sys; sys.version_info = (3, 10, 1, 'final', 0); import fastkd")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: fastkd needs Python 3.11 or newer, this is ")


def test_packages_that_are_too_old_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    for package, version in (("torch", "2.10.1+cpu"), ("transformers", "5.0.0rc1")):
        (tmp_path / f"{package}-{version}.dist-info").mkdir()
        (tmp_path / f"{package}-{version}.dist-info" / "METADATA").write_text(f"Name: {package}\nVersion: {version}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert run.main(TINY) == 2
    error = capsys.readouterr().err
    assert error == "error: fastkd needs torch 2.11 or newer, this is 2.10.1+cpu: pip install -U 'torch>=2.11'\n"


def test_the_oldest_versions_are_those_of_the_metadata() -> None:
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert {f"{package}>={oldest}" for package, oldest in cli.OLDEST.items()} <= set(asked)


@pytest.mark.parametrize(
    ("program", "name"),
    [
        ("/venv/bin/fastkd", "fastkd run"),
        ("C:/venv/Scripts/fastkd.exe", "fastkd run"),
        (str(Path(fastkd.__file__).with_name("__main__.py")), "python -m fastkd run"),
        (str(Path(fastkd.__file__).with_name("run.py")), "python -m fastkd.run"),
        ("/venv/bin/pytest", "python -m fastkd.run"),
    ],
)
def test_usage_is_named_as_it_was_called(program: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [program])
    assert terminal.called("run") == name


# ---- lines as they are ------------------------------------------------------------------------------------------

NAMES = ["exp [a1]", "[/x]", "[bold]b[/bold]", ":smile:", "a\tb", "\N{MUSICAL SYMBOL G CLEF}", "100%", "{0}"]


@pytest.mark.parametrize("name", NAMES)
def test_a_line_is_printed_as_it_is(name: str, capsys) -> None:
    terminal.Console().print(f"student {name}/final")
    terminal.complain(f"no {name}")
    shown = capsys.readouterr()
    assert shown.out == f"student {name}/final\n" and shown.err == f"error: no {name}\n"


def test_a_name_that_is_no_text_does_not_end_a_command() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    terminal.say("runs/\udcff", stream)
    assert stream.buffer.getvalue().decode() == "runs/\N{REPLACEMENT CHARACTER}\n"  # type: ignore[attr-defined]


def test_a_mistake_is_one_line(capsys) -> None:
    terminal.complain("one\ntwo\rthree")
    assert capsys.readouterr().err == "error: one two three\n"


def test_a_run_in_a_folder_of_any_name(small: list[str], tmp_path: Path, capsys) -> None:
    folder = tmp_path / "exp [a1] [bold]" / "[" / "x] :smile: \N{MUSICAL SYMBOL G CLEF}\x7f"
    corpus = tmp_path / "c [b] \N{MUSICAL SYMBOL G CLEF} 'q' \"p\" \n.txt"
    corpus.write_text(Path(small[small.index("--corpus") + 1]).read_text())
    argv = [*small, *TINY, "--corpus", str(corpus), "--output-dir", str(folder)]
    assert run.main(argv) == 0
    shown = capsys.readouterr().out
    assert f"student {folder}/final · report {folder}/report.html" in shown and str(corpus) in shown
    assert shown.count("preset  ") == 1
    assert run.main(["--config", str(folder / "config.toml")]) == 0
    assert capsys.readouterr().out == f"{folder} is finished already: {folder}/final, {folder}/report.html\n"
    assert run.main([*argv, "--seed", "1"]) == 2
    assert f"error: {folder} holds a run of another configuration" in capsys.readouterr().err


# ---- what a long set-up does, and answers to programs -----------------------------------------------------------


def test_a_plan_for_programs(small: list[str], capsys) -> None:
    argv = [*small, "--method", "minilmv2", "--budget-tokens", "12000"]
    assert plan.main([*argv, "--json"]) == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert shown.out.count("\n") == 1
    assert set(found) == plan_keys() and found["budget"] == {"unit": "tokens", "amount": 12000.0}
    assert found["steps"] > 0 and 0 <= found["queued_share"] <= 1
    told = " ".join(re.findall(r"^ *\d+\.\d s +(.*)", shown.err, re.MULTILINE))
    assert all(stage in told for stage in ("loading the teacher quickstart", "trying a micro-batch", "timing steps"))
    assert plan.main([*argv, "--json", "--student", "huge"]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.splitlines()[-1].startswith("error: ")


def plan_keys() -> set[str]:
    """The keys that docs/json.md names for a plan."""
    text = (ROOT / "docs" / "json.md").read_text().split("## plan")[1].split("\n## ")[0]
    return {line.split("`")[1] for line in text.splitlines() if line.startswith("| `")}


def test_a_comparison_for_programs(small: list[str], tmp_path: Path, capsys) -> None:
    argv = [
        *small,
        "--methods",
        "mlm",
        "--match",
        "flops",
        "--budget-flops",
        "1e10",
        "--seeds",
        "1",
        "--output-dir",
        str(tmp_path / "c"),
    ]
    assert compare.main([*argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["results"] == json.loads((tmp_path / "c" / "results.json").read_text())
    assert (
        found["failed"] == 0
        and found["folder"] == str(tmp_path / "c")
        and [set(each) for each in found["plans"]] == [plan_keys() | {"row"}]
    )


def test_missing_packages_of_the_quickstart_are_named_together(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(quickstart, "PACKAGES", {"teacher": "no_such_teacher", "text": "no_such_text"})
    assert run.main(["--preset", "quickstart", "--budget-tokens", "12000"]) == 2
    error = capsys.readouterr().err
    assert error == f"error: the quickstart teacher and text are not installed: {quickstart.INSTALL}\n"
