"""Every command answers --help and refuses options in one line, and loads no PyTorch for it, which takes seconds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SLOW = {"torch", "transformers", "datasets", "matplotlib", "triton"}
COMMANDS = ("run", "plan", "compare", "prepare", "glue", "probe")
OF_A_MODEL = ("glue", "probe")  # commands that take no options of a run
TOKENS, HOURS = ("--budget-tokens", "12000"), ("--budget-gpu-hours", "1")
ANSWERS = """
import contextlib, io, json, sys
from fastkd.__main__ import main
for argv in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(argv)
        except SystemExit as stop:
            code = stop.code
    print(json.dumps([code, out.getvalue(), err.getvalue(), [*sys.modules]]))
"""


def answers(*lines: list[str]) -> list[tuple[int, str, str]]:
    """Exit code, standard output and error of each command line, all in one process, which loads nothing slow."""
    argv = [sys.executable, "-c", ANSWERS]
    done = subprocess.run(argv, input=json.dumps(lines), capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    found = []
    for line, answer in zip(lines, done.stdout.splitlines(), strict=True):
        code, out, err, modules = json.loads(answer)
        assert not SLOW & set(modules), line
        found.append((code, out, err))
    return found


@pytest.mark.parametrize("command", COMMANDS)
def test_help_as_users_type_it(command: str) -> None:
    argv = [sys.executable, "-X", "importtime", "-m", f"fastkd.{command}", "--help"]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0 and done.stdout.startswith(f"usage: python -m fastkd.{command} ")
    imports = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "fastkd.cli" in imports and not imports & SLOW


def test_help_lists_the_options() -> None:
    lines = [[command, "--help"] for command in COMMANDS] + [["run", "--help", "--method", "logit_kd"]]
    for (command, *options), (code, out, err) in zip(lines, answers(*lines), strict=True):
        assert code == 0 and not err and "--output-dir OUTPUT_DIR" in out
        assert ("--config FILE" in out) == (command not in OF_A_MODEL)
        assert ("--relation-heads" in out) == (command not in OF_A_MODEL and "logit_kd" not in options)
        assert ("--temperature" in out) == (command == "compare" or "logit_kd" in options)


REFUSED = [
    ("run", ("--frobnicate", *TOKENS), "unknown option '--frobnicate'"),
    ("run", ("stray", *TOKENS), "unknown option 'stray'"),
    ("run", ("--temperature", "3", *TOKENS), "--method minilmv2 does not read --temperature"),
    ("run", ("--seed", "1.5", *TOKENS), "argument --seed: invalid int value: '1.5'"),
    ("run", ("--seed", *TOKENS), "argument --seed: expected one argument"),
    ("run", ("--corpus", *TOKENS), "argument --corpus: expected at least one argument"),
    (
        "run",
        ("--compile", "maybe", *TOKENS),
        "argument --compile: takes true or false",
    ),
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
    ("run", ("--log-to", "carrier-pigeon", *TOKENS), "carrier-pigeon"),
    ("run", ("--student", "huge", *TOKENS), "student 'huge' is malformed"),
    ("run", ("--student", "3L-100H-12A", *TOKENS), "width 100 is not divisible by 12 heads"),
    ("run", ("--optimizer", "lion", *TOKENS), "argument --optimizer: invalid choice: 'lion'"),
    ("run", ("--schedule", "cosine", *TOKENS), "argument --schedule: invalid choice: 'cosine'"),
    ("run", ("--attention", "flash", *TOKENS), "argument --attention: invalid choice: 'flash'"),
    ("run", ("--seq-length", "100", *TOKENS), "--batch-tokens is 4096"),
    ("run", ("--relation-heads", "0", *TOKENS), "--relation-heads 0"),
    ("run", ("--method", "logit_kd", "--temperature", "0", *TOKENS), "--temperature must be above 0"),
    ("run", ("--corpus", "/nowhere.txt", *TOKENS), "'/nowhere.txt' does not exist"),
    ("run", ("--output-dir", "/proc/run", *TOKENS), "is not a folder that can be written"),
    ("run", (), "give exactly one budget"),
    ("run", (*TOKENS, "--budget-flops", "1e9"), "give exactly one budget"),
    ("plan", (), "give exactly one budget"),
    ("plan", ("--corpus", "/nowhere.txt", *TOKENS), "'/nowhere.txt' does not exist"),
    ("plan", ("--json", "perhaps", *TOKENS), "--json: takes true or false"),
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
    ("compare", ("--methods", "mlm+optimizer=lion", *HOURS), "+optimizer=… takes 'adamw' or 'muon', got 'lion'"),
    ("compare", ("--methods", "mlm+schedule", *HOURS), "+schedule=… takes 'linear' or 'wsd', got ''"),
    ("compare", ("--methods", "mlm+mask-rate=2", *HOURS), "--mask-rate must be between 0.01 and 0.9, got 2"),
    ("compare", ("--methods", "mlm+lr=3", *HOURS), "+mask-rate=…, not +lr=3"),
    ("compare", ("--methods", "mlm,mlm", *HOURS), "--methods names mlm twice"),
    ("compare", ("--tune", "1", *HOURS), "--tune takes 0 or from 2 to 20"),
    ("compare", ("--seeds", "0", *HOURS), "--seeds must be at least 1, got 0"),
    ("compare", ("--charge", "all", *HOURS), "--charge is no option of a comparison"),
    ("compare", ("--lr", "20", *HOURS), "--lr must be between 1e-09 and 10, got 20"),
    ("compare", ("--preset", "nope", *HOURS), "unknown preset 'nope'"),
    ("compare", ("--config", "missing.toml", *HOURS), "missing.toml cannot be read"),
    ("compare", ("--log-to", "carrier-pigeon", *HOURS), "carrier-pigeon"),
    ("compare", ("--glue-tasks", "rte", *HOURS), "need --glue"),
    ("compare", ("--budget-gpu-hours", "-1"), "a budget must be above zero and finite, got -1"),
    ("glue", (), "the following arguments are required: MODEL"),
    ("glue", ("model", "--frobnicate"), "unknown option '--frobnicate'"),
    ("glue", ("model", "--protocol", "mine"), "argument --protocol: invalid choice: 'mine'"),
    ("glue", ("model", "--seeds", "0"), "--seeds must be at least 1, not 0"),
    ("glue", ("model", "--train-rows", "few"), "--train-rows takes a number from 1"),
    ("glue", ("model", "--tasks", "nope"), "unknown task 'nope'"),
    ("probe", (), "the following arguments are required: MODEL"),
    ("probe", ("model", "--frobnicate"), "unknown option '--frobnicate'"),
    ("probe", ("model", "--probes", "tokens,nope"), "unknown probe 'nope': choose from tokens, pos, blimp"),
    ("probe", ("model", "--pairs", "0"), "--pairs must be at least 1, not 0"),
    ("probe", ("model", "--references", "perhaps"), "argument --references: takes true or false"),
]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_mistake_is_one_line(command: str) -> None:
    refused = [(options, words) for of, options, words in REFUSED if of == command]
    found = answers(*([command, *options] for options, _ in refused))
    for (options, words), (code, out, err) in zip(refused, found, strict=True):
        assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1, (options, out, err)
        assert words in err, options


def test_a_mistake_in_a_file_is_one_line_with_its_name(tmp_path: Path) -> None:
    unknown, too_high = tmp_path / "unknown.toml", tmp_path / "too_high.toml"
    unknown.write_text("studnet = '3L'")
    too_high.write_text("lr = 20")
    cases = [(unknown, "unknown key 'studnet'"), (too_high, "--lr must be between 1e-09 and 10, got 20")]
    for command in ("run", "plan", "compare", "prepare"):
        found = answers(*([command, "--config", str(path), *HOURS] for path, _ in cases))
        for (path, words), (code, out, err) in zip(cases, found, strict=True):
            assert (code, out) == (2, "") and err.startswith(f"error: {path}: ") and words in err
