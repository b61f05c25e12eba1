"""Batches made ahead in threads: an epoch is shuffled once and before its need; errors reach the reader."""

import collections
import contextlib
import itertools
import threading

import numpy as np
import pytest
from batch_case import PACK, digest, made_shards, stream

from fastkd.data import packing
from fastkd.data.sequences import permutation
from fastkd.data.shards import Shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    return made_shards(tmp_path_factory.mktemp("batches"))


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
