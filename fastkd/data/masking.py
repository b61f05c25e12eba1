"""Masks drawn from a hash of (seed, epoch, pack, position): no state, and the same bits on every device."""

import numpy as np
import torch
from torch import Tensor

# splitmix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators", and its public-domain C code)
_GOLDEN = 0x9E3779B97F4A7C15
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB
_LOW_31 = 2**31 - 1


def mix(counter: np.ndarray) -> np.ndarray:
    """splitmix64's output for a state, [n] uint64 → [n] uint64: a bijection, so different states never collide."""
    z = counter + np.uint64(_GOLDEN)  # all sums and products are modulo 2^64
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
    """``mix`` for int64 tensors: torch has no uint64 arithmetic. Sums and products wrap the same way; shifts need ``_shift``."""
    z = counter + _signed(_GOLDEN)
    z = (z ^ _shift(z, 30)) * _signed(_FIRST)
    z = (z ^ _shift(z, 27)) * _signed(_SECOND)
    return z ^ _shift(z, 31)


def _signed(value: int) -> int:
    """The int64 with the same 64 bits as an unsigned number."""
    return value - 2**64 if value >= 2**63 else value


def _shift(z: Tensor, bits: int) -> Tensor:
    """A right shift that fills up with zeros; torch's fills up with the sign, which the mask takes away."""
    return (z >> bits) & (2 ** (64 - bits) - 1)


class Masker:
    """Picks exactly ``count`` positions of each pack and hides them: 80% [MASK], 10% a random token, 10% unchanged.

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
            masked ids [n·P]; predicted rows [n·count] int64, ascending; labels [n·count] int64. In a pack with fewer than
            ``count`` ordinary tokens, special tokens make up the number: they are left unchanged, with label −100.
        """
        packs, length = ids.shape
        position = torch.arange(length, device=ids.device)
        bits = length.bit_length()  # that hold a position
        # One integer a position; the ``count`` smallest of a pack are picked. From the highest bit down:
        #   bit 62         1 for a special token: these come last
        #   bits 61..bits  of the position's hash: a random order; even counters draw here, odd ones in _replace
        #   bits below     the position: no two are equal, and it is read back from what was picked
        draw = mix_tensor(keys[:, None] + 2 * position) & (2**62 - 2**bits)
        score = self._is_special[ids].long() << 62 | draw | position
        picked = score.topk(self._count, largest=False, sorted=False).values
        # (position, special or not) as position · 2 + flag: one sort brings both into the order of positions.
        ordered = ((picked & (2**bits - 1)) << 1 | picked >> 62).sort().values
        position, idle = ordered >> 1, (ordered & 1).bool()  # [n, count]
        plain = ids.gather(1, position)
        hidden = torch.where(idle, plain, self._replace(plain, mix_tensor(keys[:, None] + 2 * position + 1)))
        # Rows of the micro-batch, not of the pack.
        rows = position + length * torch.arange(packs, device=ids.device)[:, None]
        return (
            ids.scatter(1, position, hidden).flatten(),
            rows.flatten(),
            plain.masked_fill(idle, -100).flatten(),
        )

    def _replace(self, plain: Tensor, draw: Tensor) -> Tensor:
        """80% [MASK], 10% a random ordinary token, 10% unchanged, by the draw [n, count] int64."""
        action = (draw & _LOW_31) % 10  # bits 0 to 30 choose what to do, bits 31 to 61 the random token
        other = self._ordinary[(_shift(draw, 31) & _LOW_31) % len(self._ordinary)]
        return torch.where(action < 8, self._mask_id, torch.where(action == 8, other, plain))
