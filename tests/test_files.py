"""Files of a run: what is damaged is set aside, what a kill left goes, modes follow the umask."""

from pathlib import Path

from fastkd import files


def test_what_is_set_aside_overwrites_nothing(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    for number, name in enumerate(("plan.json.damaged", "plan.json.damaged-2", "plan.json.damaged-3")):
        path.write_text(str(number))
        assert files.set_aside(path) == tmp_path / name
    assert [(tmp_path / f"plan.json.damaged{end}").read_text() for end in ("", "-2", "-3")] == ["0", "1", "2"]
    path.mkdir()
    assert files.set_aside(path).is_dir() and not path.exists()
