"""The table of block sizes, and how one launch is given another."""

import pytest

import fastkd.kernels.linear_kd
import fastkd.kernels.relation_kl  # noqa: F401 (their rules are in the table)
from fastkd.kernels import tiling
from fastkd.kernels.tiling import Tile


def test_a_tile_is_swapped_for_the_block_only() -> None:
    other, kept = Tile(64, 64, 32, 4, 2), tiling.tile("linear_kd.logits", width=768, arch=90)
    assert other != kept
    with tiling.using("linear_kd.logits", other):
        for arch in (80, 90, 120, "gfx942"):
            assert tiling.tile("linear_kd.logits", width=768, arch=arch) == other
        assert tiling.tile("relation_kl.self", width=64, arch=90) != other
    with pytest.raises(ZeroDivisionError), tiling.using("linear_kd.logits", other):
        1 / 0  # noqa: B018
    assert tiling.tile("linear_kd.logits", width=768, arch=90) == kept
