"""What a run began with has changed: refused in one line that names it, and with it back the same command goes on."""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import run_case
import shim
import torch
from campaign import some
from run_case import Case, Try
from safetensors.torch import load_file, save_file

PROMISE = "refused in one line that names what changed; brought back, the same command goes on"


@pytest.fixture(scope="module")
def own(
    light: list[str], made_teacher: Path, made_corpus: Path, shimmed: None, tmp_path_factory: pytest.TempPathFactory
) -> Case:
    """A run of minilmv2 whose teacher and corpus are copies that may be changed."""
    inputs = tmp_path_factory.mktemp("inputs")
    shutil.copytree(made_teacher, inputs / "teacher")
    shutil.copyfile(made_corpus, inputs / "corpus.txt")
    options = [
        *light,
        "--teacher",
        str(inputs / "teacher"),
        "--corpus",
        str(inputs / "corpus.txt"),
        "--method",
        "minilmv2",
    ]
    options += [
        "--student",
        "1L-24H-12A",
        "--batch-tokens",
        "512",
        "--budget-tokens",
        "2800",
        "--checkpoint-minutes",
        "0",
    ]
    return run_case.undisturbed(options, tmp_path_factory.mktemp("own"))


@pytest.fixture(scope="module")
def begun(own: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where it was killed with a step to go."""
    where = tmp_path_factory.mktemp("begun")
    place = Try.below(where)
    at = next(number for number, name in enumerate(own.operations, start=1) if "step-5" in name)
    armed = shim.faults(place.folder, place.cache, counter=place.counter, how="kill", at=at)
    assert own.run(place, **armed).returncode == -signal.SIGKILL
    return where


def again(begun: Path, where: Path) -> Try:
    """A copy of the run that was killed."""
    place = Try.below(where / "try")
    shutil.copytree(begun / "run", place.folder)
    shutil.copytree(begun / "cache", place.cache)
    return place


def option(case: Case, name: str) -> Path:
    """The last value of an option."""
    last = max(number for number, word in enumerate(case.options) if word == name)
    return Path(case.options[last + 1])


def edit_json(path: Path, **values: object) -> None:
    """Change fields of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def one_weight(teacher: Path) -> None:
    """A number of one weight."""
    path = teacher / "model.safetensors"
    tensors = load_file(path)
    tensors["bert.encoder.layer.3.attention.self.key.weight"][0, 0] += 1.0
    save_file(tensors, path, metadata={"format": "pt"})


def another_format(teacher: Path) -> None:
    """Other weights, as PyTorch's own file, which older models have."""
    tensors = load_file(teacher / "model.safetensors")
    torch.save({name: tensor * 1.5 for name, tensor in tensors.items()}, teacher / "pytorch_model.bin")
    (teacher / "model.safetensors").unlink()


def another_mask(teacher: Path) -> None:
    """[MASK] is another entry of the vocabulary."""
    edit_json(teacher / "tokenizer_config.json", mask_token="[UNK]")


def other_entries(teacher: Path) -> None:
    """Two entries of the vocabulary change places."""
    path = teacher / "tokenizer.json"
    parts = json.loads(path.read_text())
    entries = parts["model"]["vocab"]
    a, b = list(entries)[-2:]
    entries[a], entries[b] = entries[b], entries[a]
    path.write_text(json.dumps(parts))


def another_word(corpus: Path) -> None:
    """One letter, the same size."""
    text = corpus.read_text()
    corpus.write_text(text[:100] + ("x" if text[100] != "x" else "y") + text[101:])


CHANGES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "one weight of the teacher": ("--teacher", one_weight),
    "layer_norm_eps of the teacher": ("--teacher", lambda path: edit_json(path / "config.json", layer_norm_eps=1e-3)),
    "the teacher's weights in another format": ("--teacher", another_format),
    "the [MASK] token": ("--teacher", another_mask),
    "two entries of the vocabulary": ("--teacher", other_entries),
    "a letter of the corpus": ("--corpus", another_word),
    "a document more": ("--corpus", lambda path: path.write_text(path.read_text() + "\n\nOne more.\n")),
}
SHORT = ("the [MASK] token",)
OPTIONS = {"lr": "0.003", "seed": "5", "warmup": "0.2", "batch-tokens": "1024", "weight-decay": "0.5", "dropout": "0.2",
           "validations": "3", "method": "tinybert"}  # fmt: skip


@pytest.mark.parametrize("name", some(CHANGES, SHORT))
def test_a_changed_input_is_refused(name: str, own: Case, begun: Path, tmp_path: Path, fault) -> None:
    place = again(begun, tmp_path)
    flag, change = CHANGES[name]
    path = option(own, flag)
    kept = tmp_path / path.name
    (shutil.copytree if path.is_dir() else shutil.copyfile)(path, kept)
    with fault("changed inputs", PROMISE) as tally, tally.attempt(name):
        try:
            change(path)
            done = own.run(place)
            assert done.returncode != 0, "went on with it"
            run_case.check_refusal(done, 2)
            shutil.rmtree(place.cache)  # it may hold the other corpus too
            shutil.copytree(begun / "cache", place.cache)
        finally:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            (shutil.copytree if kept.is_dir() else shutil.copyfile)(kept, path)
        own.check(place, own.run(place))


@pytest.mark.parametrize("name", some(OPTIONS, ("lr",)))
def test_a_changed_option_is_refused_by_its_name(name: str, own: Case, begun: Path, tmp_path: Path, fault) -> None:
    place = again(begun, tmp_path)
    with (
        fault("changed options", "refused in one line that names the option, old and new") as tally,
        tally.attempt(name),
    ):
        done = own.run(place, f"--{name}", OPTIONS[name])
        run_case.check_refusal(done, 2)
        line = run_case.last_line(done)
        assert re.search(rf"\b{name.replace('-', '[-_]')}\b", line) and OPTIONS[name] in line, line
