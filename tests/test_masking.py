"""Masks: exactly as many as said, 80/10/10, the same bits everywhere, nothing read back from the device."""

import itertools

import numpy as np
import pytest
import torch
from batch_case import PACK, SPECIAL, WORDS, digest, made_shards, stream

from fastkd.data.masking import Masker, key_of, mix, mix_tensor
from fastkd.data.shards import Shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    return made_shards(tmp_path_factory.mktemp("batches"))


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
    # χ²(19), 7e-4.
    assert ((bins - len(other) / 20) ** 2 / (len(other) / 20)).sum() < 45, "random tokens are not uniform"
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
