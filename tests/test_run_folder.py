"""A run folder read back: the models that a student was made from."""

from pathlib import Path

import pytest
from made_run import PLAN, make_run

from fastkd.run_folder import ancestors, made_from


def test_the_quickstart_teacher_is_known_by_any_name_and_by_its_weights(
    quickstart_teacher: Path, tmp_path: Path
) -> None:
    assert ancestors(None) == [] and ancestors("google-bert/bert-base-uncased") == ["google-bert/bert-base-uncased"]
    assert ancestors("quickstart") == ["quickstart"]
    hub = "sentence-transformers/all-MiniLM-L6-v2"
    assert ancestors(hub) == [hub, "quickstart"]
    (tmp_path / "copy").symlink_to(quickstart_teacher)
    copy = str(tmp_path / "copy")
    assert ancestors(copy) == [copy, "quickstart"]
    student = make_run(tmp_path / "student", plan=PLAN | {"ancestors": [copy, "quickstart"]})
    (tmp_path / "final").symlink_to(student)
    for place in (student, student / "final", tmp_path / "final"):
        assert ancestors(str(place)) == [str(place), copy, "quickstart"]
    older = {name: value for name, value in PLAN.items() if name != "ancestors"}
    assert made_from(older) == ["quickstart"] and made_from(older | {"teacher": None}) == []


def test_names_that_are_no_folders_have_nothing_to_do_with_a_plan_that_lies_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plan.json").write_text("[1, 2]")
    for name in ("quickstart", "bert-base-uncased"):
        assert ancestors(name) == [name]
