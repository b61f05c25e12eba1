"""Shards: the tokens that transformers would give, whole or not at all, whoever builds, dies or flips a bit."""

import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
from hub import serve
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fastkd.data.corpus import documents
from fastkd.data.part import PartLost
from fastkd.data.shards import Shards, build_shards, tokenizer_hash
from fastkd.data.tokenise import PIECE_CHARACTERS, WorkerLost, tokenise

BUILD = """
import logging, signal, sys
from types import SimpleNamespace
from tokenizers import Tokenizer
from fastkd.data.shards import build_shards
logging.basicConfig(level="INFO", format="%(message)s")
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by what a shell starts in the background
teacher, corpus, folder = sys.argv[1:4]
if len(sys.argv) > 4:
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[4]),) * 2)
try:
    tokenizer = SimpleNamespace(backend_tokenizer=Tokenizer.from_file(teacher + "/tokenizer.json"))
    print(build_shards(corpus, tokenizer, folder, workers=2).folder)
except ValueError as error:
    sys.exit(f"ValueError: {error}")
"""


@pytest.fixture(scope="module")
def tokenizer(quickstart_teacher: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(quickstart_teacher)


@pytest.fixture(scope="module")
def articles() -> list[str]:
    return list(islice(documents("quickstart"), 300))


def write(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def stored(shards: Shards, split: str) -> list[list[int]]:
    tokens, offsets = shards.documents(split)
    return [tokens[a:b].tolist() for a, b in pairwise(offsets)]


def build_process(teacher: Path, corpus: str, folder: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", BUILD, str(teacher), corpus, str(folder), *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_the_tokens_are_those_of_transformers(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, articles: list[str]
) -> None:
    odd = ["naïve Łódź 東京 🙂", "\ud800 half a pair", "x" * 500, "\u200b", "plain"]
    shards = build_shards(write(tmp_path / "a.jsonl", articles + odd), tokenizer, tmp_path / "shards")
    expected = tokenizer([text.replace("\ud800", "?") for text in articles + odd], add_special_tokens=False).input_ids
    train, validation = stored(shards, "train"), stored(shards, "validation")
    assert expected[-2] == [], "a document without a token"
    assert Counter(map(tuple, train + validation)) == Counter(map(tuple, filter(None, expected)))
    assert shards.documents()[0].dtype == np.uint16
    assert shards.unique_tokens == sum(map(len, train))
    assert shards.vocab_size == len(tokenizer)
    assert shards.tokenizer_hash == tokenizer_hash(tokenizer)


def test_a_file_that_is_cut_while_it_is_in_use_is_one_line(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, articles: list[str]
) -> None:
    """A memory map of it would end this process by SIGBUS."""
    shards = build_shards(write(tmp_path / "a.jsonl", articles), tokenizer, tmp_path / "shards")
    (ids, offsets), part = shards.documents(), shards.first.folder
    expected = ids.sum()
    for path in part.glob("*.bin"):
        os.truncate(path, 8)
    assert ids.sum() == expected and offsets[-1] == len(ids)
    with pytest.raises(PartLost, match=r"^shard '.*train\.tokens\.bin' was cut or changed while it was in use$"):
        shards.documents()
    with pytest.raises(ValueError, match=r"heldout\.bin' is corrupted .*: delete"):
        _ = shards.first.held_out
    (part / "train.tokens.bin").unlink()
    with pytest.raises(PartLost, match=r"^shard '.*' cannot be read any more \(No such file or directory\)$"):
        shards.documents()


def test_special_tokens_spelt_in_a_text_are_words(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    texts = ["a [MASK] in a text", "the [SEP] of [CLS] and [PAD]"]
    shards = build_shards(write(tmp_path / "a.jsonl", texts), tokenizer, tmp_path / "shards")
    found = [token for split in ("train", "validation") for token in shards.documents(split)[0].tolist()]
    assert not set(found) & set(tokenizer.all_special_ids)
    assert len(found) == 20


def test_a_vocabulary_past_uint16_is_stored_in_uint32(tmp_path: Path) -> None:
    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(70_000)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    texts = ["w69999 w65536", "w65535 w1"]
    shards = build_shards(
        write(tmp_path / "a.jsonl", texts), PreTrainedTokenizerFast(tokenizer_object=backend), tmp_path / "shards"
    )
    assert shards.documents()[0].dtype == np.uint32
    assert sorted(stored(shards, "train") + stored(shards, "validation")) == [[65535, 1], [69999, 65536]]


def test_workers_change_nothing_and_a_long_document_is_one(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, articles: list[str]
) -> None:
    long = " ".join(articles * 15)
    assert len(long) > 2 * PIECE_CHARACTERS
    texts = [*articles, long, *articles]
    backend = tokenizer.backend_tokenizer.to_str()
    alone = list(tokenise(texts, backend, workers=0))
    for workers in (1, 3):
        chunks = list(tokenise(texts, backend, workers=workers))
        assert len(chunks) == len(alone) > 1
        for found, expected in zip(chunks, alone, strict=True):
            assert np.array_equal(found.ids, expected.ids)
            assert np.array_equal(found.lengths, expected.lengths)
            assert np.array_equal(found.hashes, expected.hashes)
    whole = tokenizer(" ".join(articles), add_special_tokens=False).input_ids
    lengths = np.concatenate([chunk.lengths for chunk in alone])
    start = int(lengths[: len(articles)].sum())
    ids = np.concatenate([chunk.ids for chunk in alone])[start : start + int(lengths[len(articles)])]
    assert ids.tolist() == whole * 15


def test_a_dead_tokeniser_process_is_reported(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(WorkerLost, match=r"^a tokeniser process \(\d+\) died \(exit code 1\)"):
        list(tokenise(["text"], "no tokenizer", workers=1))


def test_the_split_depends_on_the_documents_alone(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, articles: list[str]
) -> None:
    mixed = articles + articles[:40]
    random.Random(1).shuffle(mixed)
    splits = []
    for name, texts in {"a": articles + articles[:40], "b": mixed}.items():
        path = write(tmp_path / f"{name}.jsonl", texts)
        shards = build_shards(path, tokenizer, tmp_path / "shards", validation_fraction=0.1)
        splits.append({split: Counter(map(tuple, stored(shards, split))) for split in ("train", "validation")})
    assert splits[0] == splits[1]
    assert splits[0]["train"].total() + splits[0]["validation"].total() == 340
    assert not splits[0]["train"].keys() & splits[0]["validation"].keys(), "a copy of a held-out document is trained on"
    tokens = {split: sum(len(d) * n for d, n in found.items()) for split, found in splits[0].items()}
    assert tokens["validation"] / sum(tokens.values()) == pytest.approx(0.1, rel=0.1)


SENTENCES = tuple(f"{word} number {i} of the text is about {i * i} and {word}s." for i in range(900) for word in "ab")
HELD_OUT: dict[str, list[str]] = {
    "a book and a licence of a line": [" ".join(SENTENCES), "You may copy this book."],
    "a book": [" ".join(SENTENCES)],
    "lines": list(SENTENCES),
    "a line, often": [*SENTENCES, *["All rights reserved, as everybody knows."] * 900],
    "books": [" ".join(SENTENCES[i::3]) for i in range(3)],
}


@pytest.mark.parametrize("name", HELD_OUT)
def test_about_a_fiftieth_of_the_tokens_is_held_out(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, name: str
) -> None:
    texts = HELD_OUT[name]
    shards = build_shards(write(tmp_path / "a.jsonl", texts), tokenizer, tmp_path / "shards")
    train, held_out = stored(shards, "train"), stored(shards, "validation")
    whole = tokenizer(texts, add_special_tokens=False).input_ids
    assert Counter(token for d in train + held_out for token in d) == Counter(token for d in whole for token in d)
    assert shards.held_out_tokens / sum(map(len, whole)) == pytest.approx(0.02, rel=0.25)
    runs = {tuple(d[a : a + len(piece)]) for piece in held_out for d in whole for a in range(len(d))}
    assert all(tuple(piece) in runs for piece in held_out), "what is held out is no run of its document"
    assert not {tuple(piece) for piece in held_out} & {tuple(d) for d in train}


def test_of_next_to_nothing_something_is_held_out_and_something_is_left(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    for texts in (["a", "b"], ["a", "a", "a b"], ["one two three", *["four"] * 50]):
        shards = build_shards(write(tmp_path / "a.jsonl", texts), tokenizer, tmp_path / "shards")
        assert stored(shards, "validation") and stored(shards, "train")


def test_a_corpus_that_cannot_be_split_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    folder = tmp_path / "shards"
    for texts, held in ((["one"], "1 document"), (["same", "same", "same"], "3 documents")):
        message = rf"holds {held} with text and no two different pieces of 32 tokens, .*: give it more text"
        with pytest.raises(ValueError, match=message):
            build_shards(write(tmp_path / "a.jsonl", texts), tokenizer, folder)
    assert not list(folder.glob("*/")), "something was left behind"
    for fraction in (0, 1, -0.1):
        with pytest.raises(ValueError, match="validation_fraction"):
            build_shards(write(tmp_path / "a.jsonl", ["a", "b"]), tokenizer, folder, validation_fraction=fraction)


def test_an_empty_corpus_and_a_slow_tokenizer_are_refused_before_anything_is_written(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match="is empty"):
        build_shards(str(tmp_path / "empty.txt"), tokenizer, tmp_path / "shards")
    with pytest.raises(ValueError, match=r"object has no Rust tokenizer behind it"):
        build_shards(write(tmp_path / "a.jsonl", ["a", "b"]), object(), tmp_path / "shards")
    assert not (tmp_path / "shards").exists()


def test_a_line_that_is_wrong_far_down_leaves_nothing(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = tmp_path / "a.jsonl"
    write(path, [f"document {i}" for i in range(500)])
    path.write_text(path.read_text() + "{\n")
    with pytest.raises(ValueError, match=r"a\.jsonl:501: not a JSON object"):
        build_shards(str(path), tokenizer, tmp_path / "shards")
    assert not list((tmp_path / "shards").glob("*/"))


def test_a_build_is_used_again_only_for_the_same_corpus_tokenizer_and_split(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, quickstart_teacher: Path
) -> None:
    folder, path = tmp_path / "shards", write(tmp_path / "a.jsonl", ["One", "Two", "Three"])
    first = build_shards(path, tokenizer, folder)
    written = (first.first.folder / "index.json").stat().st_mtime_ns
    moved = write(tmp_path / "elsewhere.jsonl", ["One", "Two", "Three"])
    assert build_shards(moved, tokenizer, folder, workers=2).folder == first.folder
    assert (first.first.folder / "index.json").stat().st_mtime_ns == written
    cased = AutoTokenizer.from_pretrained(quickstart_teacher, do_lower_case=False)
    others = [
        build_shards(path, cased, folder),
        build_shards(path, tokenizer, folder, validation_fraction=0.5),
        build_shards(write(tmp_path / "b.jsonl", ["One", "Two", "Four"]), tokenizer, folder),
        build_shards([path, path], tokenizer, folder),
    ]
    assert len({first.folder, *(shards.folder for shards in others)}) == 5


def test_padding_and_truncation_set_on_a_tokenizer_change_nothing(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, quickstart_teacher: Path, articles: list[str]
) -> None:
    used = AutoTokenizer.from_pretrained(quickstart_teacher)
    used(articles[:3], padding="max_length", truncation=True, max_length=16)
    path = write(tmp_path / "a.jsonl", articles[:5])
    assert (
        build_shards(path, used, tmp_path / "1").first.index
        == build_shards(path, tokenizer, tmp_path / "2").first.index
    )


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["train.tokens.bin", "validation.offsets.bin", "heldout.bin", "index.json"])
@pytest.mark.parametrize("damage", [flip, lambda path: os.truncate(path, 5), Path.unlink])
def test_a_damaged_build_is_refused_and_built_again(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture, name: str, damage
) -> None:
    path = write(tmp_path / "a.jsonl", [f"document {i}" for i in range(30)])
    shards = build_shards(path, tokenizer, tmp_path / "shards")
    before = {file.name: file.read_bytes() for file in shards.first.folder.iterdir()}
    damage(shards.first.folder / name)
    with pytest.raises(ValueError, match=rf"delete '{shards.first.folder}', the next run builds it again"):
        Shards(shards.folder)
    with caplog.at_level(logging.WARNING):
        again = build_shards(path, tokenizer, tmp_path / "shards")
    (said,) = caplog.messages
    assert said.endswith(": it is built again") and "delete" not in said
    assert {file.name: file.read_bytes() for file in again.first.folder.iterdir()} == before


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cannot write shards to .*/file/shards' .* set XDG_CACHE_HOME"):
        build_shards(write(tmp_path / "a.jsonl", ["a", "b"]), tokenizer, tmp_path / "file" / "shards")


@pytest.mark.skipif(sys.platform == "win32", reason="sets a limit that Windows does not have")
def test_a_full_disk_is_reported_and_leaves_nothing(tmp_path: Path, quickstart_teacher: Path) -> None:
    """A limit on the size of files stands for the disk: both refuse the write."""
    build = build_process(quickstart_teacher, "quickstart", tmp_path / "shards", "500000")
    _, stderr = build.communicate()
    assert build.returncode == 1
    assert "ValueError: cannot write shards to" in stderr and "free its disk" in stderr
    assert not list((tmp_path / "shards").glob("**/*.bin"))


def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("death", [signal.SIGKILL, signal.SIGINT])
def test_a_build_that_dies_leaves_nothing_half_built_and_no_process(
    tmp_path: Path,
    quickstart_teacher: Path,
    tokenizer: PreTrainedTokenizerBase,
    death: signal.Signals,
) -> None:
    folder, corpus = tmp_path / "shards", "quickstart"
    build = build_process(quickstart_teacher, corpus, folder)
    workers: list[int] = []
    while len(workers) < 2:
        assert build.poll() is None
        workers = children(build.pid)
        time.sleep(0.01)  # between two looks
    build.send_signal(death)
    build.communicate()
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        time.sleep(0.01)  # between two looks
    assert not list(folder.glob("*/"))


def test_what_a_killed_build_had_written_is_removed(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write(tmp_path / "a.jsonl", [f"document {i}" for i in range(30)])
    left = build_shards(path, tokenizer, tmp_path / "1").first.folder
    half = tmp_path / "2" / left.parent.name / f".{left.name}.building"
    half.mkdir(parents=True)
    (half / "train.tokens.bin").write_bytes(b"half")
    half.with_name(".part-00007.building").mkdir()  # by a run that needed more text than this one
    shards = build_shards(path, tokenizer, tmp_path / "2")
    assert shards.first.index == json.loads((left / "index.json").read_text())
    assert list(shards.folder.iterdir()) == [shards.first.folder]


def test_of_processes_that_want_the_same_build_one_makes_it(tmp_path: Path, quickstart_teacher: Path) -> None:
    builds = [build_process(quickstart_teacher, "quickstart", tmp_path / "shards") for _ in range(3)]
    results = [build.communicate() for build in builds]
    assert [build.returncode for build in builds] == [0, 0, 0], results
    assert len({stdout for stdout, _ in results}) == 1
    assert sum("built " in stderr for _, stderr in results) == 1


def test_shards_of_a_hub_dataset_serve_when_the_hub_does_not(
    tmp_path: Path, quickstart_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "repository"
    repository.mkdir()
    write(repository / "train.jsonl", ["one", "two", "three"])
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with serve("some/data", repository) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        online = build_process(quickstart_teacher, "some/data", tmp_path / "shards")
        first, stderr = online.communicate()
        assert online.returncode == 0, stderr
    damaged = tmp_path / "shards" / "of another corpus" / "part-00000"
    damaged.mkdir(parents=True)
    (damaged / "index.json").write_text("{")
    offline = build_process(quickstart_teacher, "some/data", tmp_path / "shards")
    assert offline.communicate()[0] == first
    other = build_process(quickstart_teacher, "some/data:big", tmp_path / "shards")
    _, stderr = other.communicate()
    assert other.returncode == 1 and "--preset quickstart" in stderr.splitlines()[-1]


def test_an_unknown_split_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    shards = build_shards(write(tmp_path / "a.jsonl", ["a", "b"]), tokenizer, tmp_path / "shards")
    with pytest.raises(ValueError, match="unknown split 'test': take one of train, validation"):
        shards.documents("test")
