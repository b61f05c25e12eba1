"""Every option is told, read, and refused where it cannot work."""

import dataclasses
import re
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from fastkd import config, methods, run_config
from fastkd.config import parse, resolve
from fastkd.config_file import PRESETS, read_preset
from fastkd.run_config import RunConfig

BUDGET = ["--budget-gpu-hours", "1"]


def test_every_option_has_help() -> None:
    configs = [RunConfig, *(methods.load(name).Config for name in methods.available())]
    for cls in configs:
        for field in dataclasses.fields(cls):
            assert field.metadata.get("help"), (cls, field.name)


def test_every_option_is_read() -> None:
    own = [Path(module.__file__) for module in (config, run_config)]
    sources = "\n".join(p.read_text() for p in own[0].parent.rglob("*.py") if p not in own)
    own_text = "\n".join(p.read_text() for p in own)
    for field in dataclasses.fields(RunConfig):
        read = re.search(rf"(config|run)\.{field.name}\b", sources) or re.search(
            rf"self\.(run\.)?{field.name}\b", own_text
        )
        assert read or field.name == "preset", field.name


@pytest.mark.parametrize("path", sorted(PRESETS.glob("*.toml")), ids=lambda path: path.stem)
def test_presets_name_options_alone(path: Path) -> None:
    values = read_preset(path.stem)
    assert set(values) <= {f.name for f in dataclasses.fields(RunConfig)}
    assert resolve({"preset": path.stem, "budget_tokens": 1}).run.student == values["student"]


@pytest.mark.parametrize(
    ("is_there", "preset", "reason", "tokens"),
    [(True, "paper-6l", "a CUDA device is at hand", 131072), (False, "quickstart", "no CUDA device is at hand", 4096)],
)
def test_the_preset_auto_asks_for_a_device(
    is_there: bool, preset: str, reason: str, tokens: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: is_there)
    monkeypatch.setattr(config, "GPU_FILES", (str(tmp_path),))
    resolved = parse(BUDGET)
    assert (resolved.run.preset, resolved.preset_reason) == (preset, reason)
    path = tmp_path / "mine.toml"
    path.write_text("lr = 1e-3")
    of_file = parse(["--config", str(path), *BUDGET])
    assert (of_file.run.preset, of_file.preset_reason, of_file.run.lr) == (preset, reason, 1e-3)
    with pytest.raises(ValueError, match=f"--batch-tokens is {tokens}, no positive multiple of 1600"):
        parse([*BUDGET, "--seq-length", "100"])
    monkeypatch.setattr(config, "GPU_FILES", ())
    assert sys.platform != "linux" or parse(BUDGET).run.preset == "quickstart"  # without a driver there is no device


def test_the_command_line_overrides_the_preset() -> None:
    run = parse([*BUDGET, "--preset", "quickstart", "--student", "2L-48H-12A", "--batch-tokens", "2048"]).run
    assert (run.student, run.batch_tokens, run.teacher) == ("2L-48H-12A", 2048, "quickstart")


def test_a_bfloat16_residual_stream_needs_bfloat16_products() -> None:
    options = [*BUDGET, "--preset", "quickstart", "--residual", "bfloat16"]
    assert parse([*options, "--dtype", "bfloat16"]).run.residual == "bfloat16"
    with pytest.raises(ValueError, match="--residual bfloat16 needs --dtype bfloat16"):
        parse([*options, "--dtype", "float32"])


def test_config_toml_reads_back(tmp_path: Path) -> None:
    resolved = parse([*BUDGET, "--preset", "quickstart", "--method", "logit_kd", "--temperature", "3"])
    named = parse([*BUDGET, "--preset", "quickstart", "--corpus", "töne/\N{MUSICAL SYMBOL G CLEF}.txt"])
    assert tomllib.loads(named.to_toml())["corpus"] == named.run.corpus and named.continues(named.to_toml())
    values = tomllib.loads(resolved.to_toml())
    assert values["method_options"]["temperature"] == 3.0
    assert values["budget_gpu_hours"] == 1.0
    assert values["corpus"] == ["quickstart"]


def test_a_run_goes_on_with_its_own_options_and_may_be_older_than_some_of_them() -> None:
    resolved = parse([*BUDGET, "--preset", "quickstart", "--dtype", "bfloat16"])
    toml = resolved.to_toml()
    newer = ("residual", "warmup", "schedule", "optimizer")
    older = "".join(line for line in toml.splitlines(keepends=True) if not line.startswith(newer))
    assert older != toml and resolved.continues(toml) and resolved.continues(older)
    others = (
        "--residual bfloat16",
        "--warmup 0.1",
        "--schedule wsd",
        "--optimizer muon",
        "--relation-heads 24",
        "--lr 1e-3",
    )
    for other in map(str.split, others):
        changed = parse([*BUDGET, "--preset", "quickstart", "--dtype", "bfloat16", *other])
        assert (
            not changed.continues(toml) and not changed.continues(older) and not resolved.continues(changed.to_toml())
        )
    unlike = parse(
        [*BUDGET, "--preset", "quickstart", "--dtype", "bfloat16", "--log-every", "7", "--checkpoint-minutes", "1"]
    )
    assert unlike.continues(older)
    assert not resolved.continues(toml + "an_option_that_went = 1\n") and not resolved.continues("no toml")


def test_the_recorded_command_means_the_same_run() -> None:
    argv = [*BUDGET, "--preset", "quickstart", "--corpus", "a.txt", "b.txt", "--as-released", "--lr", "1e-3"]
    resolved = parse(argv)
    assert parse(resolved.command()[3:]) == resolved


def test_the_same_command_has_the_same_folder_and_another_has_another() -> None:
    one, same = (parse([*BUDGET, "--preset", "quickstart", "--lr", "1e-3"]).default_output_dir() for _ in range(2))
    other = parse([*BUDGET, "--preset", "quickstart", "--lr", "2e-3"]).default_output_dir()
    shown = parse([*BUDGET, "--preset", "quickstart", "--lr", "1e-3", "--log-every", "3"]).default_output_dir()
    assert one == same == shown != other
    assert parse([*BUDGET, "--preset", "quickstart"]).default_output_dir() == Path("runs/quickstart-minilmv2-1h")


def test_scratch_training_borrows_the_presets_tokenizer() -> None:
    run = parse([*BUDGET, "--preset", "quickstart", "--method", "mlm"]).run
    assert (run.teacher, run.tokenizer) == (None, "quickstart")


def test_help_shows_units_and_the_methods_own_options(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(["--help", "--method", "logit_kd", "--preset", "quickstart"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "--temperature" in shown and "GPU-hours" in shown
