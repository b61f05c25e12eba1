"""Damage of a file, seeded: what disks, copies and editors do to one."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

KINDS = ("flip", "digit", "truncate", "cut at a line", "empty", "delete", "append", "swap", "zero", "repeat", "drop")


def mutate(path: Path, others: list[Path], seed: int) -> str:
    """Damage a file in one of the ways, by its seed; says how. ``others``: files to swap with, put back by nobody."""
    drawn, kind = random.Random(seed), KINDS[seed % len(KINDS)]
    data = bytearray(path.read_bytes())
    lines = bytes(data).splitlines(keepends=True)
    digits = [place for place, byte in enumerate(data) if chr(byte).isdigit()] if len(data) < 100_000 else []
    if kind == "delete":
        path.unlink()
        return f"{path.name} deleted"
    if kind == "swap" and others:
        other = drawn.choice(others)
        shutil.copyfile(other, path)
        return f"{path.name} is {other.name}"
    if kind == "digit" and digits:
        place = drawn.choice(digits)
        data[place] = ord(drawn.choice([digit for digit in "0123456789" if ord(digit) != data[place]]))
    elif kind == "truncate":
        del data[drawn.randrange(len(data)) :]
    elif kind == "cut at a line" and len(lines) > 1:
        data = bytearray(b"".join(lines[: drawn.randrange(1, len(lines))]))
    elif kind == "empty":
        data = bytearray()
    elif kind == "append":
        data += drawn.randbytes(drawn.randint(1, 40))
    elif kind == "zero":
        place = drawn.randrange(len(data))
        data[place : place + 64] = bytes(len(data[place : place + 64]))
    elif kind == "repeat" and len(lines) > 1:
        place = drawn.randrange(len(lines))
        data = bytearray(b"".join([*lines[:place], lines[place], *lines[place:]]))
    elif kind == "drop" and len(lines) > 1:
        place = drawn.randrange(len(lines))
        data = bytearray(b"".join(lines[:place] + lines[place + 1 :]))
    else:
        kind, place = "flip", drawn.randrange(len(data))
        data[place] ^= 1 << drawn.randrange(8)
    path.write_bytes(bytes(data))
    return f"{path.name}: {kind}"
