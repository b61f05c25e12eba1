"""A corpus in parts: each a pure function of its number, read in one order, built ahead by a process that may die."""

import contextlib
import filecmp
import hashlib
import itertools
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fastkd.data import builder
from fastkd.data.batches import BatchStream, SpecialIds, pack_size
from fastkd.data.heldout import choose
from fastkd.data.packing import Packer
from fastkd.data.sequences import Text
from fastkd.data.shards import BuildingFailed, Shards, build_shards
from fastkd.data.tokenise import Tokens

SPECIAL = SpecialIds(cls=0, sep=1, mask=2, pad=3, all_special=frozenset({0, 1, 2, 3, 4}))
WORDS, FIRST = 40_000, 3_000
PACK = pack_size(16)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    special = ["[CLS]", "[SEP]", "[MASK]", "[PAD]", "[UNK]"]
    words = [*special, *(f"w{i}" for i in range(len(special), WORDS))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files in which every word stands once, so that an id says where it comes from."""
    folder = tmp_path_factory.mktemp("parts") / "texts"
    folder.mkdir()
    ends = np.minimum(np.cumsum(np.random.default_rng(0).geometric(1 / 40, size=2_000)) + 5, WORDS)
    lines = [" ".join(f"w{i}" for i in range(a, b)) for a, b in itertools.pairwise(np.unique([5, *ends]))]
    for name, part in (("a", lines[:400]), ("b", lines[400:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in part))
    return folder


@pytest.fixture(scope="module")
def whole(corpus: Path, tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> Shards:
    return build_shards(str(corpus), tokenizer, tmp_path_factory.mktemp("whole"), first_tokens=FIRST)


def stream(shards: Shards, **options: object) -> BatchStream:
    defaults = {"seq_length": 16, "batch_tokens": 2 * PACK, "micro_tokens": PACK, "seed": 5, "device": "cpu"}
    return BatchStream(shards, SPECIAL, **(defaults | options))


def read(stream: BatchStream, steps: range) -> list[torch.Tensor]:
    return [batch.masked_ids for i in steps for batch in stream.step(i)]


def same(one: Path, other: Path) -> bool:
    files = sorted(path.relative_to(one) for path in one.rglob("*.*") if path.is_file())
    return filecmp.cmpfiles(one, other, map(str, files), shallow=False) == (list(map(str, files)), [], [])


def test_parts_double_and_every_token_is_in_one_of_them_or_held_out(whole: Shards) -> None:
    each = [whole.part(number) for number in range(4)]
    assert whole.is_complete and [part.next is None for part in each] == [False, False, False, True]
    assert [round(part.tokens / FIRST) for part in each[:3]] == [1, 2, 4]
    train = np.concatenate([part.documents()[0] for part in each])
    held_out, _ = whole.documents("validation")
    assert sorted([*train.tolist(), *held_out.tolist()]) == list(range(5, WORDS))
    assert whole.unique_tokens == len(train) and whole.held_out_tokens == len(held_out)
    assert len(held_out) == pytest.approx(min(0.02 * WORDS, FIRST / 4), rel=0.1)
    assert np.array_equal(whole.documents()[0], train)


def test_parts_built_one_by_one_by_anyone_are_the_same_bytes(
    whole: Shards, corpus: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Here, in a process of its own, and again after one was lost."""
    shards = build_shards(str(corpus), tokenizer, tmp_path, first_tokens=FIRST, tokens=1)
    assert not shards.is_complete and shards.unique_tokens == pytest.approx(whole.unique_tokens, rel=0.15)
    with contextlib.closing(shards):
        shards.part(1)
    build_shards(str(corpus), tokenizer, tmp_path, first_tokens=FIRST, tokens=5 * FIRST, workers=1)
    (shards.folder / "part-00001" / "train.tokens.bin").write_bytes(b"damaged")
    (shards.folder / "part-00002" / "index.json").write_text("{")
    estimated = build_shards(str(corpus), tokenizer, tmp_path, first_tokens=FIRST, tokens=1)
    assert not estimated.is_complete and estimated.unique_tokens == pytest.approx(whole.unique_tokens, rel=0.15)
    again = build_shards(str(corpus), tokenizer, tmp_path, first_tokens=FIRST)
    assert again.version == whole.version and same(whole.folder, again.folder) and same(again.folder, whole.folder)


def test_a_stream_is_the_same_whatever_parts_are_there(
    whole: Shards, corpus: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Read to the second epoch while parts are built, and resumed anywhere."""
    expected = stream(whole)
    assert expected.is_there(1_000), "all of it"
    last = next(i for i in itertools.count() if expected.epoch_of(i) >= 1.3)
    shards = build_shards(str(corpus), tokenizer, tmp_path, first_tokens=FIRST, tokens=1)
    found = stream(shards)
    found.want(last)
    assert found.epoch_of(last) == pytest.approx(1.3, rel=0.1), "an estimate"
    with contextlib.closing(shards), contextlib.closing(found.prefetch(0)) as ahead:
        for i in range(last):
            for batch, other in zip(next(ahead), expected.step(i), strict=True):
                assert torch.equal(batch.masked_ids, other.masked_ids) and torch.equal(
                    batch.cu_seqlens, other.cu_seqlens
                )
            assert found.epoch_of(i + 1) == expected.epoch_of(i + 1)
            assert found.unique_of(i + 1) == expected.unique_of(i + 1)
    for start in (1, last // 3, last - 2):
        for one, other in zip(
            read(stream(shards), range(start, start + 2)), read(expected, range(start, start + 2)), strict=True
        ):
            assert torch.equal(one, other)
    epochs = np.array([expected.epoch_of(i) for i in range(last)])
    assert (np.diff(epochs) > 0).all()


def test_of_a_corpus_no_more_is_built_than_is_wanted(
    corpus: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    shards = build_shards(str(corpus), tokenizer, tmp_path, first_tokens=FIRST, tokens=1)
    limited = stream(shards, max_unique_tokens=FIRST + 500)
    assert limited.unique_tokens == FIRST + 500
    with contextlib.closing(shards):
        for i in range(30):
            limited.step(i)
    assert limited.epoch_of(30) > 2 and limited.unique_of(30) == limited.unique_tokens == FIRST + 500
    assert sorted(path.name for path in shards.folder.glob("part-*")) == ["part-00000", "part-00001"]


def test_copies_of_held_out_text_are_left_out_of_later_parts(
    whole: Shards, corpus: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """The first part holds out; its texts stand again, many parts later."""
    lines = [line for name in "ab" for line in (corpus / f"{name}.jsonl").read_text().splitlines()]
    (tmp_path / "a.jsonl").write_text("\n".join(lines + lines[:400]) + "\n")
    shards = build_shards(str(tmp_path / "a.jsonl"), tokenizer, tmp_path, first_tokens=FIRST)
    held_out = set(shards.documents("validation")[0].tolist())
    train = shards.documents()[0].tolist()
    assert len(held_out) > 300 and not held_out & set(train)
    assert len(train) > len(set(train)), "other texts stand twice"
    assert len(set(train) | held_out) == WORDS - 5


def test_a_given_folder_of_some_parts_is_all_there_is(
    corpus: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    some = build_shards(str(corpus), tokenizer, tmp_path / "cache", first_tokens=FIRST, tokens=2 * FIRST)
    taken = build_shards(str(some.folder), tokenizer, tmp_path / "unused")
    assert taken.version == some.version + "-2" and taken.is_complete and not (tmp_path / "unused").exists()
    assert stream(taken).epoch_of(100) > 1.2 and read(stream(taken), range(99, 100))


@pytest.fixture
def waiting(corpus: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> Iterator[Shards]:
    """Shards whose part 0 is there, and whose builders wait for a lock that is held here."""
    (tmp_path / "b.jsonl").write_bytes((corpus / "b.jsonl").read_bytes())
    shards = build_shards(str(tmp_path / "b.jsonl"), tokenizer, tmp_path, first_tokens=FIRST, tokens=1)
    with FileLock(shards.folder.with_name(f"{shards.folder.name}.lock")):
        yield shards


def builders(shards: Shards, parent: int | None = None) -> list[int]:
    """Processes that build a corpus: those of a parent that read its text."""
    tasks = Path(f"/proc/{parent or os.getpid()}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_builder_that_is_killed_is_told_when_its_part_is_needed(waiting: Shards) -> None:
    """Once ahead of need, which nobody has to know; then in need."""
    before = set(builders(waiting))
    waiting.ahead(1)
    (first,) = set(builders(waiting)) - before
    os.kill(first, signal.SIGKILL)

    def kill() -> bool:
        for process in set(builders(waiting)) - before - {first}:
            os.kill(process, signal.SIGKILL)
        return False

    with pytest.raises(BuildingFailed, match=r"^the process that tokenises the corpus \(\d+\) ended by signal 9$"):
        waiting.part(1, stop=kill)
    with pytest.raises(InterruptedError):
        waiting.part(1, stop=itertools.chain([False], itertools.repeat(True)).__next__)
    waiting.close()
    waiting.ahead(2)  # as a thread may that reads ahead for a run that has ended
    assert set(builders(waiting)) == before


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_builder_that_is_stopped_is_ended_and_told(waiting: Shards, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was waited for without end. One that itself waits, for a lock, lives."""
    monkeypatch.setattr(builder, "BEAT_SECONDS", 0.1)
    before, looks = set(builders(waiting)), itertools.count()

    def stop() -> bool:
        (process,) = set(builders(waiting)) - before
        imported = os.getpriority(os.PRIO_PROCESS, process) == builder.NICE
        if imported and next(looks) == 10:
            monkeypatch.setattr(builder, "PATIENCE", 1.0)
            os.kill(process, signal.SIGSTOP)
        return False

    waiting.ahead(1)
    with pytest.raises(BuildingFailed, match=r"^the process that tokenises .* \(\d+\) said nothing for 1 s$"):
        waiting.part(1, stop)
    assert next(looks) > 10 and set(builders(waiting)) == before


def test_what_a_builder_fails_of_is_one_line(waiting: Shards) -> None:
    (text,) = waiting.folder.parent.glob("*.jsonl")
    text.write_text(text.read_text().replace("w", "v", 1))
    with pytest.raises(BuildingFailed, match=r"^a file of the corpus '.*b\.jsonl' changed, came or went since"):
        waiting.part(1)
    text.unlink()
    with pytest.raises(BuildingFailed, match=r"^corpus file '.*b\.jsonl' does not exist: give an existing path"):
        waiting.part(1)


PARENT = """
import sys
from fastkd.data.builder import Builder, Job
import json
builder = Builder(Job(**json.loads(sys.argv[1])))
builder.ahead(1)
print("begun", flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_builder_ends_with_its_parent(waiting: Shards) -> None:
    job = {
        "folder": str(waiting.folder), "spec": [str(next(waiting.folder.parent.glob("*.jsonl")))],
        "tokenizer_json": "{}",  # never read: the lock is waited for before
        "vocab_size": WORDS, "recipe": waiting.first.recipe,
    }  # fmt: skip
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, json.dumps(job)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None and parent.stdout.readline() == "begun\n"
    (process,) = builders(waiting, parent.pid)
    ended = os.pidfd_open(process)
    parent.kill()
    parent.communicate()
    assert select.select([ended], [], [], 60)[0], "the builder outlived its parent"
    os.close(ended)


@given(
    lengths=st.lists(st.lists(st.integers(1, 60), max_size=40), min_size=1, max_size=4),
    seq_length=st.sampled_from([8, 16]),
    packing=st.sampled_from(["documents", "full-sentences"]),
    seed=st.integers(0, 99),
)
@settings(max_examples=40)
def test_an_epoch_of_any_parts_holds_every_token_once(
    lengths: list[list[int]], seq_length: int, packing: str, seed: int
) -> None:
    """But for less than a pack at a part's end; part 0 is as large as a pack, as real ones are."""
    size = pack_size(seq_length)
    lengths[0].append(size)
    counts = [sum(part) for part in lengths]
    made = []
    for number, part in enumerate(lengths):
        offsets = np.cumsum([0, *part])
        ids = np.arange(offsets[-1]) + sum(counts[:number])
        share = (number + 1) / len(lengths)
        made.append(Text(ids, offsets, seq_length=seq_length, packing=packing, separator=-1, share=share))
    packer = Packer(made.__getitem__, pack_tokens=size, seed=seed)
    for epoch in range(2):
        packs = packer.packs_per_epoch
        fragments = packer.fragments(epoch * packs, (epoch + 1) * packs)
        places = np.concatenate([np.arange(a, a + n) for a, n in zip(fragments.source, fragments.length, strict=True)])
        ids = packer.ids(places)
        times = np.bincount(ids[ids >= 0], minlength=sum(counts))
        if len(lengths) > 1:
            assert times.max() <= 1
        for number, count in enumerate(counts):
            begin = sum(counts[:number])
            assert (times[begin : begin + count] == 0).sum() < size
        length, _ = fragments.sizes(packs, size)
        assert length.sum() == packs * size
        assert max(len(packer.fragments(p, p + 1).sizes(1, size)[0]) for p in range(packs)) <= packer.max_sequences
    assert packer.epochs(packs, sum(counts)) == pytest.approx(1) and packer.unique(packs) == sum(counts)


@given(
    lengths=st.lists(st.integers(0, 500), min_size=2, max_size=60),
    copies=st.lists(st.integers(0, 59), max_size=20),
    fraction=st.sampled_from([0.001, 0.02, 0.5]),
    share=st.sampled_from([0.01, 1.0]),
)
@settings(max_examples=60)
def test_every_token_is_trained_on_or_held_out_and_no_piece_is_both(
    lengths: list[int], copies: list[int], fraction: float, share: float
) -> None:
    """Of any documents, some of them repeated, in any chunks."""
    ids = np.arange(sum(lengths), dtype=np.uint32)
    documents = np.split(ids, np.cumsum(lengths)[:-1])
    texts = [*documents, *(documents[copy % len(documents)] for copy in copies)]
    chunks = [tokens(texts[first : first + 25]) for first in range(0, len(texts), 25)]
    if sum(len(text) > 0 for text in documents) < 2:
        return
    held_out = choose(chunks, fraction, share)
    train: list[np.ndarray] = []
    held: list[np.ndarray] = []
    for chunk in chunks:
        for kept, (content, sizes) in zip((train, held), held_out.split(chunk), strict=True):
            assert sizes.sum() == len(content) and (sizes > 0).all()
            kept.append(content)
    assert sorted(np.concatenate([*train, *held]).tolist()) == sorted(np.concatenate(texts).tolist())
    assert not set(np.concatenate(train).tolist()) & set(np.concatenate(held).tolist())
    assert min(sum(map(len, train)), sum(map(len, held))) > 0


def tokens(documents: list[np.ndarray]) -> Tokens:
    """Documents that were tokenised; the hash is of the content."""
    hashes = [int.from_bytes(hashlib.blake2b(text.tobytes(), digest_size=8).digest(), "little") for text in documents]
    return Tokens(
        np.concatenate(documents), np.array([len(text) for text in documents]), np.array(hashes, dtype=np.uint64)
    )


def test_a_part_of_much_shorter_documents_keeps_the_static_shape_and_every_token(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def text(lengths: list[int], first: int, share: float) -> Text:
        offsets = np.cumsum([0, *lengths])
        return Text(
            np.arange(offsets[-1]) + first, offsets, seq_length=16, packing="documents", separator=-1, share=share
        )

    made = [text([14] * 200, 0, 0.3), text([1] * 2000, 2800, 0.6), text([14] * 100, 4800, 1.0)]
    packer = Packer(made.__getitem__, pack_tokens=PACK, seed=1)
    packs = packer.packs_per_epoch
    fragments = packer.fragments(0, packs)
    ids = packer.ids(
        np.concatenate([np.arange(a, a + n) for a, n in zip(fragments.source, fragments.length, strict=True)])
    )
    assert "too short documents: several share a sequence" in caplog.text
    assert len(set(ids[ids >= 0].tolist())) == (ids >= 0).sum() > 6200 - 3 * PACK
    assert max(len(packer.fragments(p, p + 1).length) for p in range(packs)) < packer.max_sequences < 40
