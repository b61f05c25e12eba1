"""Packs of any corpus are full, lose nothing and keep to the bound on their sequences."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastkd.data.packing import Packer
from fastkd.data.sequences import Text, permutation
from fastkd.data.sizes import pack_size

PACK = pack_size(128)


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
