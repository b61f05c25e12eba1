"""Folders made to harm: nothing of them is executed or followed, and what cannot be is refused in one line, at once."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import processes
import pytest
import run_case
import torch
from campaign import some

SECONDS = 60  # a refusal takes less


class Payload:
    """What makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.marker),)


def config(teacher: Path, **values: object) -> None:
    """Change fields of its config.json."""
    path = teacher / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def custom_code(teacher: Path, marker: Path) -> None:
    """Classes in a file of its own, which asks to be trusted."""
    names = ("AutoConfig", "AutoModel", "AutoModelForMaskedLM")
    config(teacher, model_type="mine", auto_map={name: f"mine.{name}" for name in names})
    (teacher / "mine.py").write_text(f"import os\nos.mkdir({str(marker)!r})\n")


def custom_tokenizer(teacher: Path, marker: Path) -> None:
    """The same for its tokenizer."""
    path = teacher / "tokenizer_config.json"
    mapped = {"auto_map": {"AutoTokenizer": ["mine.Mine", "mine.Mine"]}, "tokenizer_class": "Mine"}
    path.write_text(json.dumps(json.loads(path.read_text()) | mapped))
    (teacher / "mine.py").write_text(f"import os\nos.mkdir({str(marker)!r})\n")


def pickled(teacher: Path, marker: Path) -> None:
    """Weights that run code when they are unpickled."""
    (teacher / "model.safetensors").unlink()
    torch.save({"weight": torch.zeros(2)}, teacher / "pytorch_model.bin")
    (teacher / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(marker)))


def outside(teacher: Path, marker: Path) -> None:
    """An index of weights that leads out of the folder."""
    shutil.copyfile(teacher / "model.safetensors", teacher.parent / "secret.safetensors")
    (teacher / "model.safetensors").unlink()
    from safetensors import safe_open

    with safe_open(teacher.parent / "secret.safetensors", "pt") as file:
        names = list(file.keys())
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "../secret.safetensors")}
    (teacher / "model.safetensors.index.json").write_text(json.dumps(index))


def long_header(teacher: Path, marker: Path) -> None:
    """A header that says it is longer than memory."""
    path = teacher / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 2**62) + path.read_bytes()[8:])


def deep(teacher: Path, marker: Path) -> None:
    """JSON that is nested too deep to read."""
    (teacher / "config.json").write_text("[" * 100_000 + "]" * 100_000)


FOLDERS: dict[str, Callable[[Path, Path], None]] = {
    "custom code of a model": custom_code,
    "custom code of a tokenizer": custom_tokenizer,
    "a pickle with a payload": pickled,
    "an index of weights that leads outside": outside,
    "a header of 2^62 bytes": long_header,
    "JSON that is nested 100,000 deep": deep,
    "10^9 layers": lambda teacher, marker: config(teacher, num_hidden_layers=10**9),
    "no attention heads": lambda teacher, marker: config(teacher, num_attention_heads=0),
    "a width below zero": lambda teacher, marker: config(teacher, hidden_size=-192),
    "a vocabulary of 10^12": lambda teacher, marker: config(teacher, vocab_size=10**12),
}


SHORT = (
    "custom code of a model",
    "a pickle with a payload",
    "an index of weights that leads outside",
    "no attention heads",
)


@pytest.mark.parametrize("name", some(FOLDERS, SHORT))
def test_a_malicious_model(name: str, light: list[str], made_teacher: Path, tmp_path: Path, fault) -> None:
    teacher, marker, folder = tmp_path / "models" / "teacher", tmp_path / "executed", tmp_path / "run"
    shutil.copytree(made_teacher, teacher)
    FOLDERS[name](teacher, marker)
    (tmp_path / "answers").write_text("y\n" * 100)
    options = [*light, "--teacher", teacher, "--method", "minilmv2", "--student", "1L-24H-12A", "--batch-tokens", "512"]
    with (
        fault("malicious models", "nothing is executed or followed; refused in one line") as tally,
        tally.attempt(name),
    ):
        process = processes.Command(
            "fastkd.run", *options, "--budget-tokens", "600", "--output-dir", folder,
            OMP_NUM_THREADS="1", STDIN=str(tmp_path / "answers"),
        )  # fmt: skip
        done = process.finish(timeout=SECONDS) if ended(process) else None
        assert done is not None, f"still at work after {SECONDS} s"
        assert not marker.exists(), "its code ran"
        if done.returncode != 0 or name != "custom code of a tokenizer":  # a sound tokenizer.json beside it may do
            run_case.check_refusal(done, 2)
            assert not folder.exists(), "a run folder was made"


def ended(process: processes.Command) -> bool:
    """Whether it ends in time; if not it is killed."""
    process.wait_a_little(SECONDS)
    if process.poll() is None:
        process.kill()
        process.finish()
        return False
    return True


@pytest.mark.parametrize("name", some(["ledger.jsonl", "metrics.jsonl", "final", "checkpoints"], ("ledger.jsonl",)))
def test_a_run_folder_with_links(name: str, scratch: run_case.Case, tmp_path: Path, fault) -> None:
    """A folder that was handed over: nothing outside it is written or removed."""
    place = scratch.copied(tmp_path / "try")
    for path in (place.folder / "final", place.folder / "report.html"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    outside = tmp_path / "outside"
    outside.mkdir()
    target, link = outside / name, place.folder / name
    if link.exists():
        link.rename(target)
    elif name == "final":
        target.mkdir()
        (target / "precious").write_text("kept")
    link.symlink_to(target)
    before = contents(outside)
    with (
        fault("run folders with links", "nothing outside the folder is written or removed") as tally,
        tally.attempt(name),
    ):
        done = scratch.run(place)
        assert contents(outside) == before, "written outside"
        if done.returncode != 0:
            run_case.check_refusal(done, 2)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.campaign
def test_names_in_a_report_are_text(
    scratch: run_case.Case, made_teacher: Path, light: list[str], tmp_path: Path, fault
) -> None:
    """A teacher whose folder is named like a tag."""
    teacher = tmp_path / "<img src=x onerror=alert(1)>"
    shutil.copytree(made_teacher, teacher)
    options = [*light, "--teacher", teacher, "--method", "minilmv2", "--student", "1L-24H-12A", "--batch-tokens", "512"]
    with fault("tags in names", "they are text in the report and in the model card") as tally:
        done = processes.run(
            "fastkd.run",
            *options,
            "--budget-tokens",
            "600",
            "--output-dir",
            tmp_path / "run",
            OMP_NUM_THREADS="1",
        )
        for name in ("report.html", "final/README.md"):
            with tally.attempt(name):
                assert done.returncode == 0, run_case.last_line(done)
                assert "<img src=x" not in (tmp_path / "run" / name).read_text("utf-8")
