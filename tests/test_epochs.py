"""Epochs: each made once, whoever asks first; nobody waits for another's; the order of packs is what it always was."""

import gc
import hashlib
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from fastkd.data import packing
from fastkd.data.batches import pack_size
from fastkd.data.epochs import Epochs
from fastkd.data.packing import Packer
from fastkd.data.sequences import Text, permutation

UNEVEN = tuple(1 + i * 7919 % 400 for i in range(3_000))
WAIT = 60  # seconds after which a test that would hang fails


def text_of(lengths: tuple[int, ...], *, seq_length: int = 128, packing: str = "documents") -> Text:
    offsets = np.cumsum([0, *lengths])
    tokens = np.arange(offsets[-1])
    return Text(tokens, offsets, seq_length=seq_length, packing=packing, separator=-1, max_tokens=None)


@pytest.mark.parametrize(
    ("lengths", "seq_length", "style", "packs", "expected"),
    [
        (UNEVEN, 128, "documents", 1_500, "965433a5b3ad2d61"),
        (UNEVEN, 128, "full-sentences", 1_500, "d8a9a0144fbea38e"),
        ((*[1] * 200, *[126] * 46), 128, "documents", 180, "2eaf17b17b418bff"),  # some shuffles are tried again
        ((3, 9, 4), 8, "documents", 50, "b7c16b83212fa1ca"),  # repeated inside a pack
    ],
)
def test_the_order_of_packs_never_changes(
    lengths: tuple[int, ...], seq_length: int, style: str, packs: int, expected: str
) -> None:
    """Several epochs of it. A change makes old runs impossible to resume or replay."""
    text = text_of(lengths, seq_length=seq_length, packing=style)
    packer = Packer([text].__getitem__, pack_tokens=pack_size(seq_length), seed=1 if seq_length == 8 else 5)
    found = packer.fragments(0, packs)
    sha256 = hashlib.sha256(str((packer.packs_per_epoch, packer.max_sequences)).encode())
    for part in (found.source, found.length, found.pack):
        sha256.update(part.astype(np.int64).tobytes())
    assert sha256.hexdigest().startswith(expected)


def test_threads_that_ask_together_shuffle_an_epoch_once(monkeypatch: pytest.MonkeyPatch) -> None:
    keys: list[int] = []

    def recorded(count: int, key: int) -> np.ndarray:
        keys.append(key)
        return permutation(count, key)

    monkeypatch.setattr(packing, "permutation", recorded)
    packer = Packer([text_of(UNEVEN * 20)].__getitem__, pack_tokens=2048, seed=5)
    together = threading.Barrier(8)

    def read(_: int) -> int:
        together.wait(WAIT)
        first = 2 * packer.packs_per_epoch
        return int(packer.fragments(first - 5, first + 5).source.sum())  # the end of epoch 1, the begin of epoch 2

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(read, range(8)))) == 1
    assert len(keys) == len(set(keys)) == 3


def test_an_epoch_that_is_there_is_read_while_the_next_is_made() -> None:
    go = threading.Event()

    def make(number: int) -> int:
        assert number == 0 or go.wait(WAIT)
        return 10 * number

    epochs = Epochs(make)
    with ThreadPoolExecutor(1) as pool:
        assert epochs(0) == 0
        epochs.ahead(1, pool)
        assert epochs(0) == 0
        go.set()
        assert epochs(1) == 10


def test_who_wants_an_epoch_that_a_pool_was_given_does_not_make_it() -> None:
    made: list[tuple[int, str]] = []
    epochs = Epochs(lambda number: made.append((number, threading.current_thread().name)))
    with ThreadPoolExecutor(1, "ahead") as pool:
        epochs.ahead(7, pool)
        epochs.ahead(7, pool)
        epochs(7)
    assert made == [(7, "ahead_0")]


def test_an_epoch_whose_pool_closes_before_it_begins_is_made_by_the_next_who_wants_it() -> None:
    """Such as the pool of a reader that is closed while it still has a part of the corpus read."""
    busy, go = threading.Event(), threading.Event()
    epochs, found = Epochs(lambda number: 10 * number), []

    def work() -> None:
        busy.set()
        assert go.wait(WAIT)

    pool = ThreadPoolExecutor(1)
    pool.submit(work)
    assert busy.wait(WAIT)
    epochs.ahead(7, pool)
    waiting = threading.Thread(target=lambda: found.append(epochs(7)), daemon=True)
    waiting.start()
    pool.shutdown(wait=False, cancel_futures=True)
    waiting.join(WAIT)
    go.set()
    pool.shutdown()
    assert found == [70] and epochs(7) == 70


def test_two_epochs_are_held() -> None:
    class Made:
        def __init__(self, number: int) -> None:
            self.number = number
            alive.add(self)

    alive: weakref.WeakSet[Made] = weakref.WeakSet()
    epochs = Epochs(Made)
    for number in (0, 1, 0, 2, 3, 2):
        assert epochs(number).number == number
    gc.collect()
    assert sorted(made.number for made in alive) == [2, 3]
    assert epochs(0).number == 0  # any other is made again


def test_what_making_an_epoch_raises_is_raised_to_its_readers_and_it_can_be_made_again() -> None:
    room = threading.Event()
    begun, go = threading.Event(), threading.Event()

    def make(number: int) -> int:
        begun.set()
        assert go.wait(WAIT)
        if not room.is_set():
            raise MemoryError("no room")
        return number

    epochs = Epochs(make)
    with ThreadPoolExecutor(2) as pool:
        epochs.ahead(1, pool)
        assert begun.wait(WAIT)
        reader = pool.submit(epochs, 1)
        go.set()
        with pytest.raises(MemoryError, match="no room"):
            reader.result(WAIT)
    room.set()
    assert epochs(1) == 1
