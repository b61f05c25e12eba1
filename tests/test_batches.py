"""Batches: pure functions of (seed, step), the same for any ranks and micro-batches; nothing is lost or mixed."""

import itertools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from batch_case import PACK, SPECIAL, WORDS, contents, digest, documents, made_shards, sequences, stream
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fastkd.data.batches import BatchStream, SpecialIds, validation_batches
from fastkd.data.shards import Shards, build_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    return made_shards(tmp_path_factory.mktemp("batches"))


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
from batch_case import digest, stream
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
