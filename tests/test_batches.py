"""Batches: pure functions of (seed, step); packs that lose and mix nothing; masks that are exactly as said."""

import collections
import contextlib
import hashlib
import itertools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fastkd.data import packing
from fastkd.data.batches import Batch, BatchStream, SpecialIds, pack_size, validation_batches
from fastkd.data.masking import Masker, key_of, mix, mix_tensor
from fastkd.data.packing import Packer
from fastkd.data.sequences import Text, permutation
from fastkd.data.shards import Shards, build_shards

PACK = pack_size(128)
SPECIAL = SpecialIds(cls=0, sep=1, mask=2, pad=3, all_special=frozenset({0, 1, 2, 3, 4}))
WORDS = 70_000


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    """A corpus in which every word stands once, so that an id says which document and place it comes from."""
    folder = tmp_path_factory.mktemp("batches")
    special = ["[CLS]", "[SEP]", "[MASK]", "[PAD]", "[UNK]"]
    words = [*special, *(f"w{i}" for i in range(len(special), WORDS))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    lengths = np.random.default_rng(0).geometric(1 / 90, size=2_000)
    ends = np.minimum(np.cumsum(lengths) + len(special), WORDS)
    bounds = np.unique([len(special), *ends])
    texts = [" ".join(words[a:b]) for a, b in itertools.pairwise(bounds)]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    return build_shards(str(folder / "a.jsonl"), tokenizer, folder / "shards", validation_fraction=0.15)


def stream(shards: Shards, **options: object) -> BatchStream:
    defaults = {"batch_tokens": 8 * PACK, "micro_tokens": 2 * PACK, "seed": 5, "device": "cpu"}
    return BatchStream(shards, SPECIAL, **(defaults | options))


def documents(shards: Shards, split: str = "train") -> list[list[int]]:
    tokens, offsets = shards.documents(split)
    return [tokens[a:b].tolist() for a, b in itertools.pairwise(offsets)]


def sequences(batch: Batch) -> list[list[int]]:
    return [part.tolist() for part in batch.input_ids.split(batch.lengths)]


def contents(batch: Batch) -> list[list[int]]:
    """What stands between [CLS] and [SEP] in every sequence that is no filler."""
    return [sequence[1:-1] for sequence in sequences(batch) if sequence[0] != SPECIAL.pad]


def digest(batches: Sequence[Batch]) -> str:
    sha256 = hashlib.sha256()
    for batch in batches:
        for field in fields(batch):
            if field.name == "predicted_share":  # follows from the labels, and came later than the digest below
                continue
            value = getattr(batch, field.name)
            sha256.update(value.numpy().tobytes() if isinstance(value, torch.Tensor) else repr(value).encode())
    return sha256.hexdigest()


def test_every_micro_batch_is_well_formed(shards: Shards) -> None:
    predicted = round(0.15 * PACK)
    shapes = set()
    for batch in itertools.chain.from_iterable(stream(shards).step(i) for i in range(5)):
        assert sum(batch.lengths) == len(batch.input_ids) == len(batch.masked_ids) == 2 * PACK
        assert batch.max_seqlen == 128 >= max(batch.lengths)
        cu = batch.cu_seqlens.tolist()
        assert cu[: len(batch.lengths) + 1] == np.cumsum([0, *batch.lengths]).tolist()
        assert set(cu[len(batch.lengths) :]) == {2 * PACK}
        assert batch.sequences.tolist() == cu[: len(batch.lengths) + 1]
        assert batch.sequences[-1] == 2 * PACK and batch.sequences.data_ptr() == batch.cu_seqlens.data_ptr()
        assert batch.position_ids.tolist() == [place for length in batch.lengths for place in range(length)]
        for sequence in sequences(batch):
            if sequence[0] == SPECIAL.pad:
                assert set(sequence) == {SPECIAL.pad} and len(sequence) <= 4
            else:
                assert sequence[0] == SPECIAL.cls and sequence[-1] == SPECIAL.sep and len(sequence) >= 3
                assert not set(sequence[1:-1]) & SPECIAL.all_special
        assert batch.real_tokens == int((batch.input_ids != SPECIAL.pad).sum())
        assert batch.pairs == sum(length**2 for length in batch.lengths)
        rows = batch.predicted.view(2, predicted)
        assert bool((batch.predicted.diff() > 0).all())
        assert rows[0].max() < PACK <= rows[1].min()
        shapes.add((batch.cu_seqlens.shape, batch.predicted.shape, batch.labels.shape))
        types = [batch.input_ids, batch.masked_ids, batch.position_ids, batch.predicted, batch.labels]
        assert {tensor.dtype for tensor in types} == {torch.int64} and batch.cu_seqlens.dtype == torch.int32
    assert len(shapes) == 1, "shapes are not static"


def test_an_epoch_holds_every_token_once_and_never_joins_documents(shards: Shards) -> None:
    whole = documents(shards)
    owner = {token: number for number, document in enumerate(whole) for token in document}
    batches = stream(shards, batch_tokens=PACK, micro_tokens=PACK)
    packs = round(1 / batches.epoch_of(1))
    first = [batch for i in range(packs) for batch in batches.step(i)]
    found = [content for batch in first for content in contents(batch)]
    tokens = [token for content in found for token in content]
    assert len(tokens) == len(set(tokens))
    assert 0 <= sum(map(len, whole)) - len(tokens) < PACK, "more than a pack's worth of the tail is missing"
    for content in found:
        assert len({owner[token] for token in content}) == 1
        assert content == list(range(content[0], content[-1] + 1)), "a sequence is no run of its document"
    assert max(map(len, found)) == 126


def test_a_sequence_that_a_pack_cuts_goes_on_in_the_next(shards: Shards) -> None:
    batches = stream(shards, batch_tokens=PACK, micro_tokens=PACK)
    whole = documents(shards)
    cut_places = {document[at] for document in whole for at in range(126, len(document), 126)}
    starts = {document[0] for document in whole}
    cuts = 0
    for i in range(20):
        last, first = contents(batches.step(i)[0])[-1], contents(batches.step(i + 1)[0])[0]
        cut = first[0] not in starts | cut_places
        cuts += cut
        assert not cut or first[0] == last[-1] + 1
    assert cuts > 10


def test_epochs_differ_in_order_and_masks(shards: Shards) -> None:
    batches = stream(shards, batch_tokens=PACK, micro_tokens=PACK)
    packs = round(1 / batches.epoch_of(1))
    first, second = batches.step(0)[0], batches.step(packs)[0]
    assert batches.epoch_of(packs) == 1.0
    assert not torch.equal(first.input_ids, second.input_ids)
    assert not torch.equal(first.predicted, second.predicted)


@pytest.mark.parametrize(("world", "micro"), [(1, 1), (1, 8), (2, 1), (2, 4), (4, 2), (8, 1)])
def test_ranks_and_micro_batches_only_slice_the_batch(shards: Shards, world: int, micro: int) -> None:
    whole = stream(shards, micro_tokens=8 * PACK)
    size = micro * PACK
    parts = [stream(shards, world=world, rank=rank, micro_tokens=size) for rank in range(world)]
    for i in (0, 3, 40):
        (expected,) = whole.step(i)
        batches = [batch for part in parts for batch in part.step(i)]
        for name in ("input_ids", "masked_ids", "position_ids", "labels"):
            assert torch.equal(torch.cat([getattr(batch, name) for batch in batches]), getattr(expected, name))
        rows = torch.cat([batch.predicted + number * size for number, batch in enumerate(batches)])
        assert torch.equal(rows, expected.predicted)
        assert tuple(itertools.chain.from_iterable(batch.lengths for batch in batches)) == expected.lengths
        pairs = sum(batch.pairs for batch in batches)
        assert pairs == expected.pairs
        for batch in batches:
            assert batch.pairs_share == pytest.approx(batch.pairs * len(batches) / pairs, rel=1e-12)


@pytest.mark.parametrize(("world", "micro"), [(1, 2), (2, 1)])
def test_a_micro_batch_knows_its_share_of_what_the_step_predicts(shards: Shards, world: int, micro: int) -> None:
    """Where most ids are special, packs have too few ordinary tokens, each as many as it happens to."""
    special = replace(SPECIAL, all_special=frozenset(range(60_000)))
    sizes = {"batch_tokens": 8 * PACK, "micro_tokens": micro * PACK, "seed": 5, "device": "cpu", "world": world}
    batches = [b for rank in range(world) for b in BatchStream(shards, special, rank=rank, **sizes).step(3)]
    counts = [int((batch.labels >= 0).sum()) for batch in batches]
    assert len(set(counts)) > 1
    for batch, number in zip(batches, counts, strict=True):
        assert batch.predicted_share == pytest.approx(number * len(counts) / sum(counts), rel=1e-12)


def test_counts_of_a_step_are_those_of_its_batches(shards: Shards) -> None:
    batches = stream(shards, world=2)
    for i in (0, 7):
        both = [batch for rank in range(2) for batch in stream(shards, world=2, rank=rank).step(i)]
        counts = batches.tokens_of(i)
        assert counts.real == sum(batch.real_tokens for batch in both)
        assert counts.predicted == sum(len(batch.predicted) for batch in both)
        assert counts.pairs == sum(batch.pairs for batch in both)
    assert batches.unique_of(0) == 0
    assert batches.unique_of(10_000) == batches.unique_tokens == shards.unique_tokens
    seen = {token for i in range(2) for batch in batches.step(i) for content in contents(batch) for token in content}
    assert 2 * len(seen) == pytest.approx(batches.unique_of(2), rel=0.02)


DIGEST = """
import sys
from fastkd.data.batches import SpecialIds
from fastkd.data.shards import Shards
from test_batches import digest, stream
print(digest([batch for i in (0, 30, 31) for batch in stream(Shards(sys.argv[1])).step(i)]))
"""


def test_another_process_makes_the_same_bits(shards: Shards) -> None:
    here = digest([batch for i in (0, 30, 31) for batch in stream(shards).step(i)])
    command = [sys.executable, "-c", DIGEST, str(shards.folder)]
    paths = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONHASHSEED": "123"}
    there = subprocess.run(command, env=paths, capture_output=True, text=True)
    assert there.stdout.strip() == here, there.stderr
    assert digest(stream(shards, seed=6).step(0)) != digest(stream(shards).step(0))
    # Whatever the versions of NumPy and torch; a change of it makes old runs impossible to resume or replay.
    assert here.startswith("23622d4ac51275dd")


def test_prefetching_resumes_at_any_step_and_ends_its_thread(shards: Shards) -> None:
    expected = [digest(stream(shards).step(i)) for i in range(6)]
    for start in (0, 4):
        ahead = stream(shards).prefetch(start)
        assert [digest(batches) for batches in itertools.islice(ahead, 6 - start)] == expected[start:]
        assert any(thread.name.startswith("batches") for thread in threading.enumerate())
        ahead.close()
        assert not any(thread.name.startswith("batches") for thread in threading.enumerate())


def test_an_exception_of_the_prefetching_thread_is_raised_to_the_reader(shards: Shards) -> None:
    with pytest.raises(ValueError, match="step is -1: steps count from 0"):
        next(stream(shards).prefetch(-1))
    assert not any(thread.name.startswith("batches") for thread in threading.enumerate())


@pytest.fixture
def shuffles(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str]]:
    """(key, thread) of every shuffle, as it begins."""
    begun: list[tuple[int, str]] = []

    def recorded(count: int, key: int) -> np.ndarray:
        begun.append((key, threading.current_thread().name))
        return permutation(count, key)

    monkeypatch.setattr(packing, "permutation", recorded)
    return begun


def test_every_epoch_is_shuffled_once_and_ahead_of_its_need(shards: Shards, shuffles: list[tuple[int, str]]) -> None:
    batches = stream(shards, batch_tokens=PACK, micro_tokens=PACK)
    epoch = round(1 / batches.epoch_of(1))
    with contextlib.closing(batches.prefetch(0)) as ahead:
        for i, step in enumerate(itertools.islice(ahead, 3 * epoch + epoch // 4)):
            assert batches.tokens_of(i).real == step[0].real_tokens
    keys, threads = zip(*shuffles, strict=True)
    assert len(set(keys)) == len(keys) >= 4
    assert threads[0] == threading.current_thread().name  # the first, which sets the shapes
    assert all(thread.startswith("epochs") for thread in threads[1:])
    assert digest(step) == digest(stream(shards, batch_tokens=PACK, micro_tokens=PACK).step(i))


def test_a_recut_stream_is_another_micro_batch_of_the_same_steps(
    shards: Shards, shuffles: list[tuple[int, str]]
) -> None:
    """Nothing is shuffled for it, as a run that halves its micro-batch may have a large corpus."""
    whole = stream(shards, world=2, rank=1, micro_tokens=4 * PACK)
    expected = digest(whole.step(3))
    before = len(shuffles)
    halves = whole.recut(2 * PACK)
    found, counted = digest(halves.step(3)), halves.tokens_of(3)
    assert len(shuffles) == before
    assert found == digest(stream(shards, world=2, rank=1, micro_tokens=2 * PACK).step(3)) != expected
    assert digest(whole.step(3)) == expected and counted == whole.tokens_of(3)
    with pytest.raises(ValueError, match="--batch-tokens is"):
        whole.recut(3 * PACK)


def test_closing_does_not_wait_for_a_shuffle(shards: Shards, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = stream(shards, batch_tokens=PACK, micro_tokens=PACK)
    begun, go = threading.Event(), threading.Event()

    def held_up(count: int, key: int) -> np.ndarray:
        begun.set()
        assert go.wait(60)
        return permutation(count, key)

    monkeypatch.setattr(packing, "permutation", held_up)
    others = set(threading.enumerate())
    ahead = batches.prefetch(round(0.6 / batches.epoch_of(1)))
    assert len(next(ahead)) == 1, "a step waited for the next epoch"
    assert begun.wait(60)
    ahead.close()
    (left,) = set(threading.enumerate()) - others
    go.set()
    left.join(60)
    assert not left.is_alive()


def test_an_exception_of_the_shuffling_thread_is_raised_to_the_reader(
    shards: Shards, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = stream(shards, batch_tokens=PACK, micro_tokens=PACK)

    def fails(count: int, key: int) -> np.ndarray:
        raise MemoryError(f"no room for {count} sequences")

    monkeypatch.setattr(packing, "permutation", fails)
    with contextlib.closing(batches.prefetch(0)) as ahead, pytest.raises(MemoryError, match="no room for"):
        collections.deque(ahead, maxlen=0)


def test_masks_are_exactly_15_percent_and_80_10_10(shards: Shards) -> None:
    batches = [batch for i in range(24) for batch in stream(shards).step(i)]
    plain = torch.cat([batch.input_ids[batch.predicted] for batch in batches])
    hidden = torch.cat([batch.masked_ids[batch.predicted] for batch in batches])
    labels = torch.cat([batch.labels for batch in batches])
    total = len(labels)
    assert total == 24 * 8 * round(0.15 * PACK)
    assert torch.equal(labels, plain), "a label is not the plain id"
    assert not torch.isin(plain, torch.tensor(sorted(SPECIAL.all_special))).any(), "a special token is predicted"
    shares = torch.stack([hidden == SPECIAL.mask, hidden == plain]).double().mean(1)
    for share, p in zip(shares.tolist(), (0.8, 0.1), strict=True):
        assert abs(share - p) < 5 * (p * (1 - p) / total) ** 0.5
    other = hidden[(hidden != SPECIAL.mask) & (hidden != plain)]
    assert other.min() >= 5 and other.max() < WORDS, "a random token is special or outside the vocabulary"
    bins = torch.histc(other.double(), 20, min=5, max=WORDS)
    assert ((bins - len(other) / 20) ** 2 / (len(other) / 20)).sum() < 45, (
        "random tokens are not uniform"
    )  # χ²(19), 7e-4
    for batch in batches:
        untouched = torch.ones(len(batch.input_ids), dtype=torch.bool).index_fill(0, batch.predicted, False)
        assert torch.equal(batch.masked_ids[untouched], batch.input_ids[untouched])


def test_every_place_of_a_pack_is_as_likely_to_be_predicted() -> None:
    masker = Masker(1_000, frozenset(range(5)), 2, 100, torch.device("cpu"))
    ids = torch.arange(5, 517).expand(4_000, -1)
    keys = torch.tensor([key_of(1, 0, pack) - 2**63 for pack in range(4_000)])
    _, rows, _ = masker(ids, keys)
    counts = torch.bincount(rows % 512, minlength=512).double()
    expected = 4_000 * 100 / 512
    # A place is drawn without replacement, so its count has variance n·p·(1 − p).
    chi2 = float(((counts - expected) ** 2 / (expected * (1 - 100 / 512))).sum())
    assert abs(chi2 - 511) < 4 * (2 * 511) ** 0.5


def test_a_pack_with_too_few_ordinary_tokens_ignores_the_rest() -> None:
    masker = Masker(100, frozenset(range(5)), 2, 10, torch.device("cpu"))
    ids = torch.full((2, 64), SPECIAL.pad)
    ids[0, 10:14] = torch.tensor([7, 8, 9, 10])
    ids[1] = 50
    masked, rows, labels = masker(ids, torch.tensor([1, 2]))
    labels, rows = labels.view(2, 10), rows.view(2, 10)
    assert labels[0][labels[0] != -100].tolist() == [7, 8, 9, 10]
    assert rows[0][labels[0] != -100].tolist() == [10, 11, 12, 13]
    assert (rows.diff(dim=1) > 0).all()
    assert labels[1].tolist() == [50] * 10
    assert (masked.view(2, 64)[0, rows[0][labels[0] == -100]] == SPECIAL.pad).all()


def test_the_hash_is_splitmix64_in_numpy_and_in_torch() -> None:
    # The first outputs of splitmix64 for seed 1234567, from its reference implementation.
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    golden = 0x9E3779B97F4A7C15
    states = np.array([(1234567 + golden * i) % 2**64 for i in range(5)], np.uint64)
    assert mix(states).tolist() == published
    counters = np.random.default_rng(0).integers(0, 2**64, 10_000, np.uint64)
    assert (
        mix_tensor(torch.from_numpy(counters.view(np.int64))).numpy().view(np.uint64).tolist() == mix(counters).tolist()
    )


def test_nothing_is_read_back_from_the_device(shards: Shards) -> None:
    """A meta device has shapes and no data: reading any value there raises."""
    for batch in stream(shards, device="meta").step(3):
        assert batch.masked_ids.shape == (2 * PACK,) and batch.labels.shape == (2 * round(0.15 * PACK),)


@pytest.mark.gpu
def test_a_gpu_makes_the_same_bits_without_waiting(shards: Shards) -> None:
    expected = [stream(shards).step(i) for i in range(4)]
    batches = stream(shards, device="cuda")
    batches.step(0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = list(itertools.islice(batches.prefetch(0), 4))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [digest([batch.to("cpu") for batch in step]) for step in found] == [digest(step) for step in expected]


def test_full_sentences_run_documents_together(shards: Shards) -> None:
    whole = documents(shards)
    joined = [token for document in whole for token in [*document, SPECIAL.sep]]
    place = {token: at for at, token in enumerate(joined) if token != SPECIAL.sep}
    batches = stream(shards, packing="full-sentences", batch_tokens=PACK, micro_tokens=PACK)
    packs = round(1 / batches.epoch_of(1))
    found = [content for i in range(packs) for batch in batches.step(i) for content in contents(batch)]
    for content in found:
        first = next(at for at, token in enumerate(content) if token != SPECIAL.sep)
        start = place[content[first]] - first
        assert content == joined[start : start + len(content)]
    tokens = [token for content in found for token in content if token != SPECIAL.sep]
    assert len(tokens) == len(set(tokens)) > sum(map(len, whole)) - PACK
    assert np.mean([len(content) for content in found]) > 115, "sequences are not full"
    for batch in batches.step(0):
        assert not torch.isin(batch.labels, torch.tensor([SPECIAL.sep])).any()


@pytest.mark.parametrize("packing", ["documents", "full-sentences"])
def test_a_limit_on_unique_tokens_is_exact(shards: Shards, packing: str) -> None:
    batches = stream(shards, max_unique_tokens=9_000, packing=packing, batch_tokens=PACK, micro_tokens=PACK)
    assert batches.unique_tokens == 9_000
    found = [content for i in range(40) for batch in batches.step(i) for content in contents(batch)]
    tokens = {token for content in found for token in content} - {SPECIAL.sep}
    assert len(tokens) == 9_000
    positions = np.array(sorted(tokens)) / WORDS
    assert 0.4 < positions.mean() < 0.6, "the documents in use are not spread over the corpus"
    assert batches.epoch_of(40) > 7
    assert stream(shards, max_unique_tokens=10**9).unique_tokens == shards.unique_tokens


def tiny(folder: Path, texts: list[str], quickstart_teacher: Path) -> tuple[Shards, SpecialIds]:
    (folder / "a.txt").write_text("\n\n".join(texts))
    tokenizer = AutoTokenizer.from_pretrained(quickstart_teacher)
    return build_shards(str(folder / "a.txt"), tokenizer, folder / "shards"), SpecialIds.of(tokenizer)


def test_a_corpus_smaller_than_a_pack_repeats_inside_it(tmp_path: Path, quickstart_teacher: Path) -> None:
    texts = [f"This is the short document number {word}." for word in ("one", "two", "three", "four", "five")]
    shards, special = tiny(tmp_path, texts, quickstart_teacher)
    batches = BatchStream(shards, special, batch_tokens=PACK, micro_tokens=PACK, seed=1, device="cpu")
    (batch,) = batches.step(0)
    count = len(batch.lengths)
    assert count > 100
    copies = batch.real_tokens / (shards.unique_tokens + 2 * 4)
    assert batches.epoch_of(10) == pytest.approx(10 * copies, rel=0.01)
    assert (batch.labels != -100).all()
    (held_out,) = validation_batches(shards, special, micro_tokens=PACK, device="cpu")
    assert held_out.real_tokens > PACK - 5


def test_an_id_that_no_token_has_is_never_put_in(tmp_path: Path) -> None:
    names = ("cls", "sep", "mask", "pad", "unk")
    words = {f"[{name.upper()}]": i for i, name in enumerate(names)} | {f"w{i}": 10 * i for i in range(1, 40)}
    backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, **{f"{name}_token": f"[{name.upper()}]" for name in names}
    )
    special = SpecialIds.of(tokenizer)
    assert special.absent == set(range(390)) - set(words.values())
    texts = [" ".join(f"w{i % 39 + 1}" for i in range(first, 5_000)) for first in range(4)]
    (tmp_path / "a.txt").write_text("\n\n".join(texts))
    batches = BatchStream(
        build_shards(str(tmp_path / "a.txt"), tokenizer, tmp_path / "shards"), special,
        batch_tokens=4 * PACK, micro_tokens=4 * PACK, mask_rate=0.5, seed=1, device="cpu",
    )  # fmt: skip
    (batch,) = batches.step(0)
    hidden, plain = batch.masked_ids[batch.predicted], batch.input_ids[batch.predicted]
    other = set(hidden[(hidden != special.mask) & (hidden != plain)].tolist())
    assert other == {10 * i for i in range(1, 40)}


def test_the_special_ids_are_those_of_the_tokenizer(quickstart_teacher: Path) -> None:
    special = SpecialIds.of(AutoTokenizer.from_pretrained(quickstart_teacher))
    assert special == SpecialIds(cls=101, sep=102, mask=103, pad=0, all_special=frozenset({0, 100, 101, 102, 103}))
    without = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(ValueError, match="no cls, sep, mask, pad token"):
        SpecialIds.of(without)


def test_validation_batches_hold_the_whole_split_with_fixed_masks(shards: Shards) -> None:
    everything = {token for document in documents(shards, "validation") for token in document}
    batches = validation_batches(shards, SPECIAL, micro_tokens=PACK, device="cpu")
    seen = [token for batch in batches for content in contents(batch) for token in content]
    assert len(seen) == len(set(seen)) > len(everything) - PACK
    assert set(seen) <= everything
    assert digest(batches) == digest(validation_batches(shards, SPECIAL, micro_tokens=PACK, device="cpu"))
    one = validation_batches(shards, SPECIAL, micro_tokens=PACK, device="cpu", max_tokens=1)
    assert len(one) == 1 and torch.equal(one[0].masked_ids, batches[0].masked_ids)
    halves = [validation_batches(shards, SPECIAL, micro_tokens=PACK, device="cpu", rank=r, world=2) for r in range(2)]
    assert len(halves[0]) == len(halves[1])
    ranks = torch.cat([batch.masked_ids for half in halves for batch in half])
    assert torch.equal(ranks[: len(batches) * PACK], torch.cat([batch.masked_ids for batch in batches]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"micro_tokens": 5_000}, r"--micro-batch is 5000, no positive multiple of 2048 .*: take 4096$"),
        ({"micro_tokens": 0}, r"--micro-batch is 0, .*: take 2048$"),
        ({"batch_tokens": 3 * PACK}, r"--batch-tokens is 6144, no positive multiple of 4096 .*: take 8192$"),
        (
            {"batch_tokens": 8 * PACK, "world": 3},
            r"no positive multiple of 12288 \(3 × micro-batches of 4096 .*: take 12288",
        ),
        ({"mask_rate": 0.0}, r"mask_rate is 0\.0"),
        ({"mask_rate": 1.0}, r"mask_rate is 1\.0"),
        ({"packing": "dense"}, r"unknown packing 'dense': take one of documents, full-sentences"),
        ({"max_unique_tokens": 0}, r"max_unique_tokens is 0: take at least 1"),
        ({"seq_length": 4}, r"seq_length is 4: take at least 8"),
        ({"split": "test"}, r"unknown split 'test'"),
    ],
)
def test_options_that_do_not_fit_are_refused(shards: Shards, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stream(shards, **options)


@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=60),
    seq_length=st.sampled_from([8, 16, 33]),
    seed=st.integers(-(2**70), 2**70),
    packing=st.sampled_from(["documents", "full-sentences"]),
)
@settings(max_examples=60)
def test_packs_of_any_corpus_are_full_and_lose_nothing(
    lengths: list[int], seq_length: int, seed: int, packing: str
) -> None:
    offsets = np.cumsum([0, *lengths])
    tokens = np.arange(offsets[-1])
    text = Text(tokens, offsets, seq_length=seq_length, packing=packing, separator=-1, max_tokens=None)
    size = pack_size(seq_length)
    packer = Packer([text].__getitem__, pack_tokens=size, seed=seed)
    copies = -(-(size - 2) // (int(text.length.sum()) + 2 * len(text.length)))
    for epoch in range(3):
        first = epoch * packer.packs_per_epoch
        fragments = packer.fragments(first, first + packer.packs_per_epoch)
        length, is_filler = fragments.sizes(packer.packs_per_epoch, size)
        begins = np.cumsum(length) - length
        assert length.sum() == packer.packs_per_epoch * size
        assert set(range(0, length.sum(), size)) <= set(begins.tolist()), "a sequence crosses a pack's border"
        assert length[is_filler].max(initial=0) <= 4 and length.max() <= seq_length
        assert np.bincount(begins // size).max() <= packer.max_sequences
        places = np.concatenate([np.arange(a, a + n) for a, n in zip(fragments.source, fragments.length, strict=True)])
        times = np.bincount(places, minlength=int(text.length.sum()))
        assert set(times.tolist()) <= {copies - 1, copies}
        assert copies > 1 or (times == 0).sum() < size
        ids = text.ids(places)
        assert np.array_equal(ids[ids >= 0] if packing == "full-sentences" else places, ids[ids >= 0])


def test_a_few_long_documents_among_many_short_ones_keep_to_the_static_bound() -> None:
    """Here one shuffle in three puts more sequences into a pack than the bound has room for."""
    offsets = np.cumsum([0, *[1] * 200, *[126] * 46])
    tokens = np.arange(offsets[-1])
    text = Text(tokens, offsets, seq_length=128, packing="documents", separator=-1, max_tokens=None)
    packer = Packer([text].__getitem__, pack_tokens=PACK, seed=5)
    assert packer.packs_per_epoch == 3
    for pack in range(3 * 60):
        length, _ = packer.fragments(pack, pack + 1).sizes(1, PACK)
        assert len(length) <= packer.max_sequences


@pytest.mark.parametrize("count", [1, 2, 3, 1_000])
def test_a_shuffle_is_a_permutation_that_depends_on_its_key(count: int) -> None:
    assert sorted(permutation(count, 7).tolist()) == list(range(count))
    assert permutation(count, 7).tolist() == permutation(count, 7).tolist()
    assert count < 4 or permutation(count, 7).tolist() != permutation(count, 8).tolist()
