"""Every command answers --help and refuses options in one line, and loads no PyTorch for it, which takes seconds."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SLOW = {"torch", "transformers", "datasets", "matplotlib", "triton"}
COMMANDS = ("run", "plan", "compare", "prepare", "glue")
TOKENS, HOURS = ("--budget-tokens", "12000"), ("--budget-gpu-hours", "1")


def answer(*argv: str) -> tuple[int, str, str]:
    """Exit code, standard output and error of ``python -m fastkd``, in a process that loads nothing slow."""
    command = [sys.executable, "-X", "importtime", "-m", "fastkd", *argv]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    lines = done.stderr.splitlines(keepends=True)
    imported = [line for line in lines if line.startswith("import time:")]
    packages = {line.split("|")[-1].strip().partition(".")[0] for line in imported}
    assert "fastkd" in packages and not packages & SLOW
    return done.returncode, done.stdout, "".join(line for line in lines if line not in imported)


@pytest.mark.parametrize("argv", [("--help",), ("--version",)])
def test_about_all_commands(argv: tuple[str, ...]) -> None:
    code, out, err = answer(*argv)
    assert code == 0 and out and not err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of(command: str) -> None:
    code, out, err = answer(command, "--help")
    assert code == 0 and not err
    assert f"usage: python -m fastkd {command}" in out and "--output-dir" in out


def test_help_of_another_method() -> None:
    assert "--temperature" in answer("run", "--help", "--method", "logit_kd")[1]


REFUSED = [
    ("run", ("--frobnicate", *TOKENS), "unknown option '--frobnicate'"),
    ("run", ("stray", *TOKENS), "unknown option 'stray'"),
    ("run", ("--temperature", "3", *TOKENS), "--method minilmv2 does not read --temperature"),
    ("run", ("--seed", "1.5", *TOKENS), "argument --seed: invalid int value: '1.5'"),
    ("run", ("--seed", *TOKENS), "argument --seed: expected one argument"),
    ("run", ("--corpus", *TOKENS), "argument --corpus: expected at least one argument"),
    ("run", ("--compile", "maybe", *TOKENS), "argument --compile: takes true or false, got 'maybe'"),
    ("run", ("--packing", "tight", *TOKENS), "argument --packing: invalid choice: 'tight'"),
    ("run", ("--lr", "20", *TOKENS), "--lr must be between 1e-09 and 10, got 20"),
    ("run", ("--batch-tokens", "1000", *TOKENS), "--batch-tokens is 1000"),
    ("run", ("--micro-batch", "many", *TOKENS), "--micro-batch takes auto"),
    ("run", ("--preset", "nope", *TOKENS), "unknown preset 'nope'"),
    ("run", ("--method", "nope", *TOKENS), "unknown method 'nope'"),
    ("run", ("--method", "mlm", "--teacher", "x", *TOKENS), "--method mlm trains without a teacher"),
    ("run", ("--config", "missing.toml", *TOKENS), "missing.toml cannot be read"),
    ("run", ("--config", "README.md", *TOKENS), "README.md is no TOML"),
    ("run", ("--replay", "missing.jsonl", *TOKENS), "--replay missing.jsonl is no file"),
    ("run", (), "give exactly one budget"),
    ("run", (*TOKENS, "--budget-flops", "1e9"), "give exactly one budget"),
    ("plan", (), "give exactly one budget"),
    ("plan", ("--json", "perhaps", *TOKENS), "--json: takes true or false, got 'perhaps'"),
    ("plan", ("--json", "--dropout", "1", *TOKENS), "--dropout must be between 0 and 0.99, got 1"),
    ("prepare", ("--tokens", "0"), "--tokens must be between 1 and 1e15, got 0"),
    ("prepare", ("--tokens", "many"), "argument --tokens: invalid float value: 'many'"),
    ("prepare", (*TOKENS, "--budget-flops", "1e9"), "give exactly one budget"),
    ("prepare", ("--preset", "nope"), "unknown preset 'nope'"),
    ("compare", (), "give a budget"),
    ("compare", ("--frobnicate", *HOURS), "unknown option '--frobnicate'"),
    ("compare", ("--match", "time", *HOURS), "argument --match: invalid choice: 'time'"),
    ("compare", ("--methods", "nope", *HOURS), "unknown method 'nope'"),
    ("compare", ("--methods", "mlm+as-released", *HOURS), "not +as-released"),
    ("compare", ("--methods", "mlm,mlm", *HOURS), "--methods names mlm twice"),
    ("compare", ("--tune", "1", *HOURS), "--tune takes 0 or from 2 to 20"),
    ("compare", ("--seeds", "0", *HOURS), "--seeds must be at least 1, got 0"),
    ("compare", ("--charge", "all", *HOURS), "--charge is no option of a comparison"),
    ("compare", ("--lr", "20", *HOURS), "--lr must be between 1e-09 and 10, got 20"),
    ("compare", ("--preset", "nope", *HOURS), "unknown preset 'nope'"),
    ("compare", ("--config", "missing.toml", *HOURS), "missing.toml cannot be read"),
    ("compare", ("--glue-tasks", "rte", *HOURS), "need --glue"),
    ("compare", ("--budget-gpu-hours", "-1"), "a budget must be above zero and finite, got -1"),
    ("glue", (), "the following arguments are required: MODEL"),
    ("glue", ("model", "--frobnicate"), "unknown option '--frobnicate'"),
    ("glue", ("model", "--protocol", "mine"), "argument --protocol: invalid choice: 'mine'"),
    ("glue", ("model", "--seeds", "0"), "--seeds must be at least 1, not 0"),
    ("glue", ("model", "--train-rows", "few"), "--train-rows takes a number from 1"),
    ("glue", ("model", "--tasks", "nope"), "unknown task 'nope'"),
]


@pytest.mark.parametrize(
    ("command", "options", "words"), REFUSED, ids=lambda value: value if isinstance(value, str) else " ".join(value)
)
def test_a_mistake_is_one_line(command: str, options: tuple[str, ...], words: str) -> None:
    code, out, err = answer(command, *options)
    assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1
    assert words in err


def test_a_mistake_in_a_file_is_one_line(tmp_path: Path) -> None:
    for text, words in (("studnet = '3L'", "unknown key 'studnet'"), ("lr = 20", "--lr must be between")):
        (tmp_path / "mine.toml").write_text(text)
        for command in ("run", "compare", "prepare"):
            code, out, err = answer(command, "--config", str(tmp_path / "mine.toml"), *HOURS)
            assert (code, out) == (2, "") and err.startswith(f"error: {tmp_path}/mine.toml: ") and words in err
