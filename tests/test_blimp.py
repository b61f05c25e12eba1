"""Minimal pairs: what is read, pseudo-log-likelihood against transformers, and what is refused by file and line."""

import json
import zipfile
from pathlib import Path

import given_model
import numpy as np
import pytest
import torch
from transformers import BertForMaskedLM, BertModel

from fastkd.data.assembly import SpecialIds
from fastkd.models import hf
from fastkd.probes import blimp, labelled
from fastkd.probes.scores import unpacked
from fastkd.probes.subject import Subject
from fastkd.probes.yardstick import NO_HEAD, Yardstick

PAIRS = {
    "agreement": [("w1 w2 w3", "w1 w2"), ("w9 w8", "w8 w9"), ("w20", "w21")],
    "binding": [("w5 w6 w7", "w5 w60 w7")],
}


def line(good: object, bad: object) -> str:
    return json.dumps({"sentence_good": good, "sentence_bad": bad, "UID": "x"}) + "\n"


def write(folder: Path, pairs: dict[str, list[tuple[str, str]]] = PAIRS) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, each in pairs.items():
        (folder / f"{name}.jsonl").write_text("".join(line(*pair) for pair in each))
    return folder


def zipped(folder: Path) -> Path:
    """The archive of a folder, with the hidden files that macOS adds."""
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in folder.glob("*.jsonl"):
            archive.write(file, f"data/{file.name}")
            archive.writestr(f"__MACOSX/data/._{file.name}", b"\0\1")
    return path


def test_the_archive_and_its_folder_are_the_same(tmp_path: Path) -> None:
    folder = write(tmp_path / "b" / "data")
    path = zipped(folder)
    found = [blimp.read(place) for place in (path, folder, folder.parent)]
    assert [[(name, [(p.good, p.bad) for p in each]) for name, each in one.items()] for one in found] == [
        [*PAIRS.items()]
    ] * 3
    assert len({blimp.digest(one) for one in found}) == 1
    assert [*map(len, blimp.read(path, 2).values())] == [2, 1]
    for place in (path, folder):
        assert labelled.read(None, [place], 2)[0] == ("tokens", "blimp")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (line("a b", "b a") + "{'no'}\n", "x.jsonl:2: no JSON object"),
        (line("a b", "b a") * 2 + "[1]\n", "x.jsonl:3: lacks sentence_good or sentence_bad"),
        (line("a", 1), "x.jsonl:1: lacks sentence_good or sentence_bad"),
        (line("a", " "), "x.jsonl:1: lacks sentence_good or sentence_bad"),
        (line("a", "a"), "x.jsonl:1: both sentences are 'a'"),
        ("\xff\n", "x.jsonl:1: no JSON object"),
        ("", "x.jsonl is empty"),
    ],
)
def test_a_damaged_file_is_refused_by_line(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.jsonl").write_text(text, encoding="latin-1")
    for place in (tmp_path / "b", zipped(tmp_path / "b")):
        with pytest.raises(ValueError) as error:
            blimp.read(place)
        assert words in str(error.value) and "\n" not in str(error.value)


def test_a_damaged_archive_is_refused(tmp_path: Path) -> None:
    path = zipped(write(tmp_path / "b"))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"b.zip is no complete zip archive .*: download BLiMP again"):
        blimp.read(path)
    path.write_bytes(data.replace(b"sentence_good", b"sentence_goOd", 1))
    with pytest.raises(ValueError, match=r"b.zip/data/\w+.jsonl cannot be read .*CRC"):
        blimp.read(path)
    with pytest.raises(ValueError, match="minimal pairs twice"):
        labelled.read(["blimp"], [zipped(write(tmp_path / "c")), tmp_path / "c"])


@pytest.mark.parametrize(
    ("probes", "named", "words"),
    [
        (["blimp"], [], "the probe blimp needs BLiMP's zip or folder: name it by --probe-data"),
        (["tokens", "pos"], [], "the probe pos needs a CoNLL-U file: name it by --probe-data"),
        (None, ["nowhere"], "--probe-data nowhere does not exist"),
        (None, ["."], "holds neither CoNLL-U"),
    ],
)
def test_missing_data_is_refused(
    probes: list[str] | None, named: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=words):
        labelled.read(probes, named)


def test_pseudo_log_likelihood_is_that_of_transformers(tmp_path: Path) -> None:
    folder = given_model.write(tmp_path / "model")
    loaded, theirs = hf.load(folder), BertForMaskedLM.from_pretrained(folder).eval()
    special = SpecialIds.of(loaded.tokenizer)
    rows = [
        [loaded.tokenizer.convert_tokens_to_ids(f"w{i}") for i in words] for words in ([4, 9, 30, 4], [7], [2, 50, 3])
    ]
    lengths = np.array([*map(len, rows)])
    found = blimp.pseudo_log_likelihood(loaded.encoder, np.concatenate(rows), lengths, special, 64)
    for ids, ours in zip(rows, found, strict=True):
        text = torch.tensor([special.cls, *ids, special.sep]).expand(len(ids), -1).clone()
        place = torch.arange(len(ids))
        text[place, place + 1] = special.mask
        with torch.no_grad():
            logits = theirs(text).logits[place, place + 1]
        assert ours == pytest.approx(float(logits.log_softmax(1)[place, torch.tensor(ids)].sum()), abs=1e-4)


def test_scores_of_pairs(tmp_path: Path) -> None:
    loaded = hf.load(given_model.write(tmp_path / "model"))
    data = labelled.read(["blimp"], [write(tmp_path / "b")])[1]
    scores = Yardstick.of(loaded.tokenizer, None, data).score(Subject.of("model", "m", loaded))["blimp"]
    right = unpacked(scores["right"], 4)
    assert scores["paradigms"] == {"agreement": right[:3].mean(), "binding": right[3]}
    assert scores["accuracy"] == pytest.approx((right[:3].mean() + right[3]) / 2)
    ids = [loaded.tokenizer.encode(text, add_special_tokens=False) for text in PAIRS["binding"][0]]
    likelihoods = blimp.pseudo_log_likelihood(
        loaded.encoder, np.concatenate(ids), np.array([3, 3]), SpecialIds.of(loaded.tokenizer), 64
    )
    assert right[3] == (likelihoods[0] > likelihoods[1])


def test_a_model_without_a_head_has_no_scores(tmp_path: Path) -> None:
    loaded = hf.load(given_model.write(tmp_path / "model", BertModel))
    data = labelled.read(["blimp"], [write(tmp_path / "b")])[1]
    assert Yardstick.of(loaded.tokenizer, None, data).score(Subject.of("model", "m", loaded)) == {
        "blimp": {"absent": NO_HEAD}
    }


def test_a_sentence_that_is_too_long_is_named(tmp_path: Path) -> None:
    loaded = hf.load(given_model.write(tmp_path / "model"))
    pairs = {"long": [("w1", "w2"), ("w3", " ".join(["w1"] * 63))]}
    data = labelled.read(["blimp"], [write(tmp_path / "b", pairs)])[1]
    with pytest.raises(ValueError, match=r"long.jsonl:2: a sentence of 63 tokens, where 1 to 62 are read"):
        Yardstick.of(loaded.tokenizer, None, data).score(Subject.of("model", "m", loaded))
