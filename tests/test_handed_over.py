"""Folders that someone hands over, made to harm: nothing outside them is written, removed or waited for."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest

from fastkd import compare, files, manifest
from fastkd.begun import BEGUN, sealed
from fastkd.config import Resolved, parse
from fastkd.data import hub
from fastkd.glue.evaluation import evaluate
from fastkd.opening import alone_in, take_over, write_opening


@pytest.fixture
def resolved(from_scratch: list[str], tmp_path: Path) -> Resolved:
    return parse([*from_scratch, "--method", "mlm", "--budget-tokens", "9000", "--output-dir", str(tmp_path / "run")])


@pytest.mark.parametrize(
    "crafted",
    [
        {"../victim": "evil"},
        {"ledger.jsonl": "evil"},
        {"plan.json": "[1]"},
        {"plan.json": 1},
        [],
        [["plan.json", "{}"]],
        "x",
    ],
    ids=str,
)
def test_a_copy_that_holds_other_files_is_set_aside(crafted: object, resolved: Resolved, caplog) -> None:
    """Its digest is right: anyone can make one."""
    folder, victim = resolved.output_dir, resolved.output_dir.parent / "victim"
    contents = {"environment.json": '{"command": ["x"]}\n', "plan.json": "{}\n", "config.toml": resolved.to_toml()}
    write_opening(folder, contents)
    victim.write_text("precious")
    made = contents | crafted if isinstance(crafted, dict) else crafted
    digest = hashlib.sha256(json.dumps(made, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
    (folder / BEGUN).write_text(json.dumps({"files": made, "sha256": digest}))
    with alone_in(folder):
        assert take_over(folder, resolved) is not None
    assert victim.read_text() == "precious"
    assert {path.name for path in folder.iterdir()} == {*contents, BEGUN, f"{BEGUN}.damaged", ".lock"}
    assert (folder / BEGUN).read_text() == sealed(contents) and f"{BEGUN} is damaged" in caplog.text


@pytest.mark.parametrize("name", ["ledger.jsonl", "glue", "glue.md", "glue/sst2.json", "submission", "final/README.md"])
def test_an_evaluation_writes_through_no_link(name: str, quickstart_teacher: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(quickstart_teacher, folder / "final")
    outside = lead_outside(folder / name, tmp_path / "outside")
    other = {} if name == "ledger.jsonl" else {"output_dir": tmp_path / "scores"}
    for options in ({}, other):
        with pytest.raises(ValueError, match=f"run/{name} is a link, and a run writes nothing outside its folder"):
            evaluate(folder, **options)
    with pytest.raises(ValueError, match=f"run/{name} is a link"):
        evaluate(quickstart_teacher, output_dir=folder)
    assert contents(outside) == PRECIOUS


@pytest.mark.parametrize(
    "name",
    ["plots", "plots/curve.svg", "references", "references/untrained", "references/untrained/model.safetensors",
     "rows", "rows/mlm-0.001-seed0", "tuning", "tuning/mlm-0.001", "tuning/mlm-0.001/tuning.json",
     "results.json", "RESULTS.md", "scratch.json"],
)  # fmt: skip
def test_a_comparison_writes_through_no_link(name: str, from_scratch: list[str], tmp_path: Path, capsys) -> None:
    outside = lead_outside(tmp_path / "run" / name, tmp_path / "outside")
    options = [*from_scratch, "--methods", "mlm", "--budget-gpu-hours", "0.001", "--output-dir", str(tmp_path / "run")]
    assert compare.main(options) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"run/{name} is a link, and a run writes nothing outside its folder" in error
    assert contents(outside) == PRECIOUS


@pytest.mark.parametrize("name", ["glue", "plots", "references", "references/untrained", "checkpoints", "final"])
def test_nothing_is_cleared_through_a_link(name: str, tmp_path: Path) -> None:
    outside = lead_outside(tmp_path / "run" / name, tmp_path / "outside")
    files.clear(tmp_path / "run")
    assert contents(outside) == PRECIOUS


@pytest.mark.parametrize(
    ("name", "words"),
    [("/dev/zero", "manifest.json is damaged"), ("../secret", "manifest.json is damaged"),
     ("a/../../secret", "manifest.json is damaged"), ("pipe", "pipe cannot be read .it is no regular"),
     ("a", "a cannot be read .it is no regular")],
)  # fmt: skip
def test_a_list_of_files_leads_nowhere_else(name: str, words: str, tmp_path: Path) -> None:
    final = tmp_path / "final"
    (final / "a").mkdir(parents=True)
    (tmp_path / "secret").write_text("words")
    os.mkfifo(final / "pipe")
    listed = {name: hashlib.sha256(b"words").hexdigest()}
    digest = hashlib.sha256(json.dumps(listed).encode()).hexdigest()
    (final / "manifest.json").write_text(json.dumps({"files": listed, "sha256": digest}))
    with pytest.raises(ValueError, match=f"{words}.*: copy the folder again"):
        manifest.verify(final)


@pytest.mark.parametrize(
    "sources", [None, 1, [1], [{"hub": "a/b", "commit": "c"}], [{"hub": ["a"], "revision": "", "commit": "c"}]]
)
def test_what_is_no_source_pins_nothing(sources: object) -> None:
    with hub.pinned(sources), hub.pinned([{"hub": "a/b", "revision": "", "commit": "1234"}]):
        found = hub.HubDataset.parse("a/b")
        assert found is not None and found.commit == "1234"


PRECIOUS = {".final-1": None, "curve.svg": "precious", ".final-1/a": "precious", "x.json.99999999.partial": "precious"}


def lead_outside(link: Path, outside: Path) -> Path:
    """Put a link in a place to a new folder, which holds what looks like debris; returns that folder."""
    (outside / ".final-1").mkdir(parents=True)
    for name, text in PRECIOUS.items():
        if text is not None:
            (outside / name).write_text(text)
    if link.is_dir():
        shutil.rmtree(link)
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(outside)
    return outside


def contents(folder: Path) -> dict[str, str | None]:
    """What is below a folder; None for a folder."""
    return {str(path.relative_to(folder)): None if path.is_dir() else path.read_text() for path in folder.rglob("*")}
