"""The probes of a comparison: made once on the same items, again where these changed, refused if they were asked for in vain."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import made_model
import pytest

from fastkd import compare
from fastkd.comparison.items import scores_of
from fastkd.probes.evaluation import NAME, Prober


def do(light: list[str], folder: Path, *options: str) -> int:
    return compare.main([*light, *options, "--output-dir", str(folder)])


def test_scores_are_made_once_and_again_where_the_items_are_others(
    made_teacher: Path, made_corpus: Path, tmp_path: Path
) -> None:
    prober, path = Prober(None, []), tmp_path / NAME
    prober.prepare(made_teacher, [str(made_corpus)], "text")
    prober.probe(made_teacher, tmp_path)
    found, made = prober.record_of(tmp_path), path.read_text()
    assert 0 <= scores_of(found)["token probe"] <= 100 and prober.record_of(tmp_path / "another") is None
    path.write_text(made + " ")  # as it would not be written
    prober.probe(made_teacher, tmp_path)
    assert path.read_text() == made + " ", "it was there"
    for damaged in (made.replace(json.loads(made)["probes"]["tokens"]["items_sha256"], "0" * 64), "{}", "["):
        path.write_text(damaged)
        prober.probe(made_teacher, tmp_path)
        assert path.read_text() == made and prober.record_of(tmp_path) == found


def test_a_model_that_cannot_be_probed_is_left_out(
    made_teacher: Path, made_corpus: Path, quickstart_teacher: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prober = Prober("tokens", [])
    prober.prepare(made_teacher, [str(made_corpus)], "text")
    with caplog.at_level(logging.WARNING):
        prober.probe("quickstart", tmp_path / "a")
        prober.probe(tmp_path / "none", tmp_path / "b")
    first, second = (record.message for record in caplog.records)
    assert "quickstart is not probed: it has another tokenizer" in first and "is not probed" in second
    assert prober.record_of(tmp_path / "a") is prober.record_of(tmp_path / "b") is None
    prober.probe(made_teacher, tmp_path / "c")
    assert prober.record_of(tmp_path / "c")


def test_none_reads_no_scores(tmp_path: Path) -> None:
    (tmp_path / NAME).write_text("{}")
    prober = Prober("none", [])
    prober.prepare(tmp_path, [], "text")
    prober.probe(tmp_path, tmp_path)
    assert not prober.wanted and prober.record_of(tmp_path) is None


def test_probes_that_cannot_be_made_are_left_out_or_refused_if_they_were_asked_for(
    light: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = tmp_path / "few.txt"
    few.write_text("\n\n".join(made_model.texts()[:9]))
    options = ["--match", "flops", "--budget-flops", "4e9", "--methods", "mlm", "--seeds", "1", "--corpus", str(few)]
    assert do(light, tmp_path / "asked", *options, "--probes", "tokens") == 2
    assert "name a larger --corpus" in capsys.readouterr().err and not list((tmp_path / "asked").glob("rows/*"))
    assert do(light, tmp_path / "asked", *options, "--probes", "words") == 2
    assert "unknown probe 'words': choose from tokens, pos, blimp" in capsys.readouterr().err
    assert do(light, tmp_path / "asked", *options, "--probe-data", str(tmp_path / "no.conllu")) == 2
    assert "no.conllu does not exist" in capsys.readouterr().err
    assert do(light, tmp_path / "default", *options) == 0
    (row,) = json.loads((tmp_path / "default" / "results.json").read_text())["rows"]
    assert row["status"] == "ok" and "token probe" not in row["scores"]
