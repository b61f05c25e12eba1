"""Masks from a counter-based hash: a pure function of (seed, epoch, pack, position), the same bits on every device."""

import numpy as np
import torch
from torch import Tensor

# splitmix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators", and its public-domain C code)
_GOLDEN = 0x9E3779B97F4A7C15
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB
_LOW_31 = 2**31 - 1


def mix(counter: np.ndarray) -> np.ndarray:
    """splitmix64's output for a state, [n] uint64 → [n] uint64."""
    z = counter + np.uint64(_GOLDEN)
    z = (z ^ z >> np.uint64(30)) * np.uint64(_FIRST)
    z = (z ^ z >> np.uint64(27)) * np.uint64(_SECOND)
    return z ^ z >> np.uint64(31)


def key_of(*numbers: int) -> int:
    """Hash integers, in order, to one in [0, 2^64)."""
    key = np.zeros(1, np.uint64)
    for number in numbers:
        key = mix(key + np.uint64(number % 2**64))
    return int(key[0])


def mix_tensor(counter: Tensor) -> Tensor:
    """``mix`` on int64 tensors, whose arithmetic wraps as uint64's does; a right shift must not carry the sign."""
    z = counter + _signed(_GOLDEN)
    z = (z ^ _shift(z, 30)) * _signed(_FIRST)
    z = (z ^ _shift(z, 27)) * _signed(_SECOND)
    return z ^ _shift(z, 31)


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _shift(z: Tensor, bits: int) -> Tensor:
    return (z >> bits) & (2 ** (64 - bits) - 1)


class Masker:
    """Picks exactly ``count`` positions of each pack and hides them: 80% [MASK], 10% another token, 10% unchanged.

    Special tokens are neither picked nor put in. Reads nothing back from the device.
    """

    def __init__(
        self, vocab_size: int, special: frozenset[int], mask_id: int, count: int, device: torch.device
    ) -> None:
        is_special = torch.zeros(vocab_size, dtype=torch.bool)
        is_special[list(special)] = True
        self._ordinary = (~is_special).nonzero().flatten().to(device)  # [V − specials] int64
        self._is_special = is_special.to(device)
        self._mask_id = mask_id
        self._count = count

    def __call__(self, ids: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mask packs.

        Args:
            ids: [n, P] int64 plain ids.
            keys: [n] int64, one hash per pack.

        Returns:
            masked ids [n·P]; predicted rows [n·count] int64, ascending; labels [n·count] int64, −100 for rows that fill
            up a pack with too few ordinary tokens (special tokens, left as they are).
        """
        packs, length = ids.shape
        position = torch.arange(length, device=ids.device)
        bits = length.bit_length()
        # One integer per position: special last, then by hash, ties impossible because the position is in it.
        draw = mix_tensor(keys[:, None] + 2 * position) & (2**62 - 2**bits)
        score = self._is_special[ids].long() << 62 | draw | position
        picked = score.topk(self._count, largest=False, sorted=False).values
        ordered = ((picked & (2**bits - 1)) << 1 | picked >> 62).sort().values
        position, idle = ordered >> 1, (ordered & 1).bool()  # [n, count]
        plain = ids.gather(1, position)
        hidden = torch.where(idle, plain, self._replace(plain, mix_tensor(keys[:, None] + 2 * position + 1)))
        rows = position + length * torch.arange(packs, device=ids.device)[:, None]
        return (
            ids.scatter(1, position, hidden).flatten(),
            rows.flatten(),
            plain.masked_fill(idle, -100).flatten(),
        )

    def _replace(self, plain: Tensor, draw: Tensor) -> Tensor:
        """80% [MASK], 10% a random ordinary token, 10% unchanged, by the draw [n, count] int64."""
        action = (draw & _LOW_31) % 10
        other = self._ordinary[(_shift(draw, 31) & _LOW_31) % len(self._ordinary)]
        return torch.where(action < 8, self._mask_id, torch.where(action == 8, other, plain))
