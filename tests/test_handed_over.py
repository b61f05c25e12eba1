"""Folders that someone hands over, made to harm: nothing outside them is written, removed or waited for."""

import hashlib
import json
from pathlib import Path

import pytest

from fastkd.begun import BEGUN, sealed
from fastkd.config import Resolved, parse
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
