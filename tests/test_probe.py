"""`fastkd probe`: a run, its floor and its ceiling on the same items, twice the same bits, and what is refused."""

import json
import shutil
from pathlib import Path

import given_model
import made_model
import numpy as np
import pytest
from test_blimp import write as write_pairs
from transformers import AutoTokenizer

from fastkd import ledger, probe, run
from fastkd.data.assembly import SpecialIds
from fastkd.data.shards import build_shards
from fastkd.models import hf
from fastkd.probes import evaluation, tokens
from fastkd.probes.conllu import UPOS
from fastkd.probes.scores import packed, standard_error, unpacked

FIT, TEST = 4096, 2048  # tokens


@pytest.fixture(scope="module", autouse=True)
def little_text() -> object:
    """Less text than a user's: the scores are noisy, and nothing else changes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "FIT_TOKENS", FIT)
        patch.setattr(tokens, "TEST_TOKENS", TEST)
        yield


@pytest.fixture(scope="module")
def data(made_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A treebank in which a word's part of speech is its length, and minimal pairs of its words."""
    folder = tmp_path_factory.mktemp("data")
    words = [text.split()[:12] for text in made_corpus.read_text().split("\n\n")]
    rows = [
        "".join(f"{i}\t{word}\t_\t{UPOS[len(word) % 7]}\t_\t_\t_\t_\t_\t_\n" for i, word in enumerate(sentence, 1))
        for sentence in words
    ]
    (folder / "made-dev.conllu").write_text("\n".join(rows[:200]))
    (folder / "made-test.conllu").write_text("\n".join(rows[200:]))
    pairs = [(" ".join(sentence), " ".join(reversed(sentence))) for sentence in words[:3]]
    write_pairs(folder, {"order": pairs, "other": pairs[:2]})
    return folder


@pytest.fixture(scope="module")
def student(light: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with a teacher."""
    folder = tmp_path_factory.mktemp("runs") / "student"
    assert run.main([*light, "--method", "minilmv2", "--budget-tokens", "8000", "--output-dir", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def scored(student: Path, data: Path) -> dict:
    """What the command writes into the run folder."""
    assert probe.main([str(student), "--probe-data", str(data)]) == 0
    return json.loads((student / "probes.json").read_text())


def test_a_run_its_floor_and_its_ceiling(scored: dict, student: Path, made_teacher: Path) -> None:
    assert [*scored["models"]] == ["model", "untrained", "teacher"] and [*scored["probes"]] == [
        "tokens",
        "pos",
        "blimp",
    ]
    model, untrained, teacher = scored["models"].values()
    assert model["name"] == "student" and model["shape"] == untrained["shape"] == "2L-48H-12A-192I"
    assert teacher["name"] == str(made_teacher) and (model["longest"], teacher["longest"]) == (32, 128)
    environment = json.loads((student / "environment.json").read_text())
    assert scored["corpus_version"] == environment["corpus_version"]
    for name in ("tokens", "pos"):
        found = scored["probes"][name]
        assert sum(found["groups"]) == found["items"] > 100 and 0 < found["majority"] < 1
        for label, depth in (("model", 2), ("untrained", 2), ("teacher", 4)):
            check_scores(found["scores"][label], depth, found["groups"])
    absent = {"absent": "no MLM head: it gives no token a probability"}
    pairs = scored["probes"]["blimp"]["scores"]
    assert pairs["model"] == pairs["untrained"] == absent and [*pairs["teacher"]["paradigms"]] == ["order", "other"]


def test_a_run_ends_with_its_probes(
    light: list[str], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*light, "--method", "minilmv2", "--budget-tokens", "4000", "--output-dir", str(tmp_path / "run")]
    named = ["--probes", "tokens,pos", "--probe-data", str(data)]
    assert run.main([*options, "--probes", "pos", "--output-dir", str(tmp_path / "none")]) == 2
    assert "needs a CoNLL-U file" in capsys.readouterr().err and not (tmp_path / "none").exists()
    assert run.main([*options, *named]) == 0
    out, path = capsys.readouterr().out, tmp_path / "run" / "probes.json"
    assert out.index("validation loss") < out.index("tokens: identity of masked tokens") < out.index("report ")
    made, (end, spent) = path.read_bytes(), ledger.read(tmp_path / "run" / "ledger.jsonl")[-2:]
    assert json.loads(made)["probes"].keys() == {"tokens", "pos"}
    assert (end["event"], spent["event"], spent["charged"], spent["probes"]) == (
        "end",
        "probe",
        False,
        ["tokens", "pos"],
    )
    page = (tmp_path / "run" / "report.html").read_text()
    assert "not charged: probe × 1" in page and 'data-name="probe.pos.untrained"' in page
    assert run.main([*options, *named]) == 0, "nothing is done again"
    assert path.read_bytes() == made and "tokens:" not in capsys.readouterr().out
    path.unlink()  # as a kill before it was written leaves it
    assert run.main([*options, *named]) == 0 and path.read_bytes() == made
    other = tmp_path / "other"
    other.mkdir()
    for name in ("dev", "test"):
        (other / f"o-{name}.conllu").write_text((data / "made-dev.conllu").read_text())
    assert run.main([*options, "--probes", "tokens,pos", "--probe-data", str(other)]) == 0 and path.read_bytes() != made
    path.write_text("{}")
    assert run.main([*options, "--probes", "none"]) == 0 and path.read_text() == "{}"


def test_a_student_whose_corpus_is_too_small_is_finished(
    light: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = tmp_path / "few.txt"
    few.write_text("\n\n".join(made_model.texts()[:9]))
    options = ["--method", "mlm", "--corpus", str(few), "--budget-tokens", "2000", "--probes", "tokens"]
    start = ["--init-from-teacher", "--student", "4L-192H-12A-384I"]
    assert run.main([*light, *options, *start, "--output-dir", str(tmp_path / "run")]) == 0
    assert "the student is not probed: " in capsys.readouterr().err
    assert (tmp_path / "run" / "report.html").is_file() and not (tmp_path / "run" / "probes.json").exists()


def check_scores(scores: dict, depth: int, groups: list[int]) -> None:
    """The numbers of a read-out follow from its bits."""
    assert len(scores["layers"]) == depth + 1
    right = [unpacked(layer["right"], sum(groups)).astype(float) for layer in scores["layers"]]
    assert [layer["accuracy"] for layer in scores["layers"]] == [each.mean() for each in right]
    assert scores["best"] == np.argmax([layer["dev"] for layer in scores["layers"]])
    best, gain = right[scores["best"]], right[scores["best"]] - right[0]
    assert (scores["accuracy"], scores["context"]) == (best.mean(), gain.mean())
    assert scores["stderr"] == standard_error(best, groups) and scores["context_stderr"] == standard_error(gain, groups)


def test_parts_of_speech_that_words_tell_are_found(scored: dict) -> None:
    found = scored["probes"]["pos"]
    assert found["scores"]["teacher"]["layers"][0]["accuracy"] > found["majority"] + 0.1


def test_twice_the_same_bits(scored: dict, student: Path, data: Path, tmp_path: Path) -> None:
    record = evaluation.probe(student, probe_data=[data], output_dir=tmp_path)
    assert (tmp_path / "probes.json").read_bytes() == (student / "probes.json").read_bytes()
    assert record == scored


def test_other_models_are_scored_on_the_same_items(
    scored: dict, data: Path, made_teacher: Path, made_corpus: Path, tmp_path: Path
) -> None:
    """A loaded model, without a run: its corpus is named."""
    loaded = hf.load(made_teacher)
    record = evaluation.probe(
        loaded, probe_data=[data], corpus=[str(made_corpus)], references=False, output_dir=tmp_path / "scores"
    )
    assert [*record["models"]] == ["model"]
    for name, found in record["probes"].items():
        theirs = scored["probes"][name]
        assert found["items_sha256"] == theirs["items_sha256"] and found["groups"] == theirs["groups"]
        assert found["scores"]["model"] == theirs["scores"]["teacher"]


def test_items_of_masked_text(made_teacher: Path, made_corpus: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(made_teacher)
    special = SpecialIds.of(tokenizer)
    fit, test = tokens.masked_text(build_shards(str(made_corpus), tokenizer, tmp_path), special)
    for items, most in ((fit, FIT), (test, TEST)):
        assert most / 2 < len(items.ids) <= most and items.lengths.max() <= 126
        assert (items.ids[items.rows] == special.mask).all() and not {*items.labels} & special.all_special
        assert len(items) == pytest.approx(0.8 * 0.15 * len(items.ids), rel=0.2)
        assert (np.diff(items.rows) > 0).all() and (np.diff(items.groups) >= 0).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--probe-data", "nowhere"], "--probe-data nowhere does not exist"),
        (["--probes", "pos"], "the probe pos needs a CoNLL-U file"),
        (["--corpus", "nowhere.txt"], "corpus file 'nowhere.txt' does not exist"),
        (["--output-dir", "/proc/scores"], "is not a folder that can be written"),
    ],
)
def test_a_mistake_is_one_line(
    options: list[str], words: str, made_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    assert probe.main([str(made_teacher), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and words in error
    assert not any(tmp_path.iterdir())


def test_no_link_is_written_through(made_teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "scores").mkdir()
    (tmp_path / "scores" / "probes.json").symlink_to(tmp_path / "outside")
    with pytest.raises(ValueError, match=r"probes\.json is a link"):
        evaluation.probe(made_teacher, output_dir=tmp_path / "scores")


def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    folder = given_model.write(tmp_path / "model", vocab_size=100)
    with pytest.raises(ValueError, match="has embeddings for 100 tokens, its tokenizer 211"):
        evaluation.probe(folder, output_dir=tmp_path)


def test_a_corpus_that_is_too_small_is_refused(made_teacher: Path, made_corpus: Path, tmp_path: Path) -> None:
    text = made_corpus.read_text().split("\n\n")
    (tmp_path / "short.txt").write_text("\n\n".join(text[:2]))
    with pytest.raises(
        ValueError, match=r"the corpus gives .* items in . texts, too few to fit: name a larger --corpus"
    ):
        evaluation.probe(made_teacher, corpus=[str(tmp_path / "short.txt")], output_dir=tmp_path / "scores")


def test_a_teacher_that_is_gone_is_left_out(student: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "run"
    shutil.copytree(student, folder)
    (folder / ".begun.json").unlink()
    config = folder / "config.toml"
    lines = [line for line in config.read_text().splitlines() if not line.startswith("teacher =")]
    config.write_text("\n".join([f"teacher = '{tmp_path}/gone'", *lines]))
    assert [*evaluation.probe(folder)["models"]] == ["model", "untrained"]
    assert "the run's teacher is not probed" in caplog.text and "gone" in caplog.text


def test_standard_errors() -> None:
    values = np.random.default_rng(0).random(50)
    assert standard_error(values, [1] * 50) == pytest.approx(values.std(ddof=1) / 50**0.5)
    # Items that are copies of each other tell no more than one of them.
    assert standard_error(values.repeat(4), [4] * 50) == pytest.approx(values.std(ddof=1) / 50**0.5)
    assert np.isnan(standard_error(values, [50]))


@pytest.mark.parametrize("count", [1, 7, 8, 9, 1000])
def test_bits_of_items(count: int) -> None:
    right = np.random.default_rng(count).random(count) < 0.5
    assert (unpacked(packed(right), count) == right).all()
    with pytest.raises(ValueError, match="do not hold"):
        unpacked(packed(right), count + 8)
