"""In a comparison, a row that starts from its teacher stands beside scratch training from the same start."""

import json
from pathlib import Path

import given_model
import pytest

from fastkd import compare
from fastkd.comparison import differences
from fastkd.comparison.rows import ROW_OPTIONS, controls, parse_row

ROW = ["--methods", "minilmv2+init-from-teacher"]
OPTIONS = [*ROW, "--match", "flops", "--budget-flops", "3e9", "--batch-tokens", "512"]
ADDED = "row added: mlm +init-from-teacher, what the start gives without the method"


def test_a_start_is_named_beside_its_control() -> None:
    rows = [parse_row(spec) for spec in ("mlm", "minilmv2+init-from-teacher", "tinybert+init-from-teacher@runs/big")]
    added = controls(rows)
    assert added == [parse_row("mlm+init-from-teacher"), parse_row("mlm+init-from-teacher@runs/big")]
    assert controls([*rows, *added]) == [] == controls(rows[:1])
    found = differences.of_options(rows[1], [*rows, *added], {"preset": "quickstart"}, 1e-3, 1e-3)
    assert found == [ROW_OPTIONS["init_from_teacher"], "the same start as mlm +init-from-teacher"]


def test_a_control_is_added_run_and_told(light: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main([*light, *OPTIONS, "--output-dir", str(tmp_path / "c")]) == 0
    assert capsys.readouterr().out.count(ADDED) == 1
    rows = json.loads((tmp_path / "c" / "results.json").read_text())["rows"]
    found = {row["label"]: row["confounds"] for row in rows}
    assert list(found) == ["minilmv2 +init-from-teacher", "mlm +init-from-teacher"]
    start = "start: 2 of 4 layers, 48 of 192 channels, 4 of 16 dimensions of a head, 192 of 384 intermediate neurons"
    assert all(start in confounds for confounds in found.values())


def test_no_control_is_added_where_none_is_wanted(
    light: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*light, *OPTIONS, "--controls", "false", "--plan-only", "--json", "--output-dir", str(tmp_path / "c")]
    assert compare.main(options) == 0
    assert [plan["row"] for plan in json.loads(capsys.readouterr().out)["plans"]] == ["minilmv2 +init-from-teacher"]


def test_a_control_that_cannot_be_names_the_way_out(
    light: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given_model.rewrite(given_model.write(tmp_path / "untied"), given_model.untie)
    texts = (" ".join(f"w{(7 * i + j) % 200}" for j in range(40)) for i in range(100))
    (tmp_path / "corpus.txt").write_text("\n\n".join(texts))
    options = [*light, *OPTIONS, "--teacher", str(tmp_path / "untied"), "--corpus", str(tmp_path / "corpus.txt")]
    assert compare.main([*options, "--student", "2L-24H-4A-52I", "--output-dir", str(tmp_path / "c")]) == 2
    (error,) = (line for line in capsys.readouterr().err.splitlines(keepends=True) if "error: " in line)
    assert error.count("\n") == 1 and "error: row mlm +init-from-teacher, which was added: " in error
    assert "(untied)" in error and "add none with --controls false" in error and not (tmp_path / "c").exists()
