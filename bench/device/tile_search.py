"""Block sizes that may be faster than the table's: what to try on which case, compiled, timed and held against today's.

    python -m bench.device.tile_search JSON         compiles what JSON names, so that another process finds it in Triton's cache

A kernel is compiled for its case with a few rows, which takes the same code, and timed for all of them.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench import losses
from bench.contenders import Inputs, Loss, relative_error, scalar, step
from bench.device import part, worker
from bench.device.part import Row
from bench.device.timer import Timer
from bench.losses import cases
from bench.losses.packed import PackedCase
from fastkd.kernels import linear_kd, packed, tiling
from fastkd.kernels.tiling import Rule, Tile

Outputs = tuple[Tensor, ...]
ROUNDS, ROUND_MS = 3, 3  # of each candidate
LEAST_GAIN = 1.02  # times as fast: less is noise, and today's tile stays


@dataclass(frozen=True)
class Search:
    """Candidates for a kernel, timed in a whole call of its loss."""

    kernel: str  # key of tiling.TABLE
    loss: str  # a folder of kernels/
    case: Any
    width: int  # that the launch code looks the tile up with
    length: int | None
    candidates: tuple[Tile, ...]

    def serving(self, arch: int | str) -> tuple[tuple[Rule, ...], int]:
        """The table's rules for an architecture, and which of them serves this case."""
        rules = tiling.rules(self.kernel, arch)
        return rules, next(number for number, rule in enumerate(rules) if rule.serves(self.width, self.length))

    def tiles(self, arch: int | str) -> list[Tile]:
        """Today's tile, then the candidates."""
        rules, number = self.serving(arch)
        return list(dict.fromkeys((rules[number].tile, *self.candidates)))

    def small(self) -> Any:
        """The case with few rows, so that its inputs cost nothing, and as divisible as the whole."""
        if isinstance(self.case, PackedCase):
            return dataclasses.replace(self.case, lengths=self.case.lengths[:2])
        return dataclasses.replace(self.case, rows=min(self.case.rows, 256))

    def call(self, inputs: Inputs) -> Callable[[], tuple[Tensor, Outputs]]:
        """Value and gradients on Triton, the interpreter's where there is no GPU."""
        function = getattr(losses.definition(self.loss), self.loss)
        return step(lambda inputs: scalar(function(**inputs, backend="triton")), inputs)


# ---- what to try ----------------------------------------------------------------------------------------------


def searches(tiny: bool) -> list[Search]:
    """All searches, the worthiest first; of cases and kernels that are there."""
    for loss in losses.available():
        losses.definition(loss)  # loaded, so that its tiles are in tiling.TABLE
    if tiny:
        case = PackedCase("2×16, 32, A=1", (16, 16), 1, 32, 32)
        return [Search("relation_kl.short_float32", "relation_kl", case, 32, 16, (Tile(16, 0, 0, 4, 1),))]
    found = [
        _linear("linear_kd.logits", "ce 768", _LOGITS),
        _linear("linear_kd.gradient", "kl 384/768", _GRADIENT),
        _packed("relation_kl.short", "256×128, 768, A=48", _SHORT),
        _packed("relation_kl.short", "512×64, 768, A=48", _UP_TO_64),
        _packed("relation_kl.short", "1024×32, 768, A=48", _UP_TO_32),
        _packed("score_mse.short", "256×128, 768/768, A=12", _SHORT),
        _packed("relation_kl.short", "256×128, 768, A=12", _SHORT),
        _hidden("hidden_mse", "131072×768", _HIDDEN),
        _packed("relation_kl.self", "8×1024, 768, A=48", _SELF),
        _packed("relation_kl.stats", "8×1024, 768, A=48", _STATS),
        _linear("linear_kd.logits", "kl+ce 768/768", _LOGITS),
        _packed("score_mse.rows", "16×512, 768/768, A=12", (Tile(64, 64, 0, 4, 2),)),
    ]
    return [search for search in found if search is not None]


_LOGITS = (
    Tile(128, 128, 64, 8, 3), Tile(128, 128, 64, 8, 4), Tile(128, 256, 64, 8, 3), Tile(128, 256, 64, 8, 4),
    Tile(256, 128, 64, 8, 3), Tile(128, 256, 32, 8, 4),
)  # fmt: skip
_GRADIENT = (
    Tile(64, 2048, 0, 8, 1), Tile(64, 1024, 0, 4, 1), Tile(32, 2048, 0, 8, 1), Tile(128, 2048, 0, 8, 1),
    Tile(64, 4096, 0, 16, 1), Tile(64, 2048, 0, 4, 1),
)  # fmt: skip
# The last number: the registers of a thread, so that more programs share a multiprocessor, at a few spilled bytes if need be.
_SHORT = (Tile(128, 0, 0, 4, 1, 168), Tile(128, 0, 0, 8, 1), Tile(128, 0, 0, 8, 1, 128))
_UP_TO_64 = (Tile(64, 0, 0, 4, 1, 80), Tile(64, 0, 0, 4, 1, 128), Tile(64, 0, 0, 8, 1))
_UP_TO_32 = (Tile(32, 0, 0, 1, 1), Tile(32, 0, 0, 4, 1), Tile(64, 0, 0, 4, 1))
_HIDDEN = tuple(Tile(0, block, 0, warps, 1) for block in (2048, 4096, 8192) for warps in (4, 8))
_SELF = (Tile(64, 32, 0, 4, 1), Tile(64, 32, 0, 4, 2), Tile(64, 64, 0, 4, 1))
_STATS = (Tile(64, 64, 0, 4, 2), Tile(128, 64, 0, 8, 2))


def _case(kernel: str, name: str) -> Any:
    loss = kernel.partition(".")[0]
    return next((case for found, case in cases() if (found, case.name) == (loss, name)), None)


def _linear(kernel: str, name: str, candidates: tuple[Tile, ...]) -> Search | None:
    case = _case(kernel, name)
    if case is None or kernel not in tiling.TABLE:
        return None
    widest = max(case.student_width, case.teacher_width or 0)
    width = case.vocabulary if kernel.endswith("gradient") else widest
    return Search(kernel, "linear_kd", case, width, None, candidates)


def _hidden(kernel: str, name: str, candidates: tuple[Tile, ...]) -> Search | None:
    case = _case(kernel, name)
    return None if case is None else Search(kernel, "hidden_mse", case, case.width, None, candidates)


def _packed(kernel: str, name: str, candidates: tuple[Tile, ...]) -> Search | None:
    case = _case(kernel, name)
    if case is None or kernel not in tiling.TABLE:
        return None
    widths = (case.student_width // case.num_heads, case.teacher_width // case.num_heads)
    width = max(packed.pad_width(width) for width in widths)
    return Search(kernel, kernel.partition(".")[0], case, width, max(case.lengths), candidates)


# ---- timing ---------------------------------------------------------------------------------------------------


def timed(search: Search, inputs: Inputs, device: str) -> Iterator[Row]:
    """A row a tile, today's first: seconds of a call, and how far its result is from that of today's tile."""
    arch = tiling.architecture(torch.device(device))
    run = search.call(inputs)
    names = {"what": "tile", "kernel": search.kernel, "case": search.case.name, "arch": arch, "width": search.width}
    names |= {"length": search.length}
    expected: Outputs | None = None
    rows: list[Row] = []
    for number, tile in enumerate(search.tiles(arch)):
        row: Row = {**names, "tile": list(tile), "now": number == 0}
        try:
            with tiling.using(search.kernel, tile):
                value, gradients = run()
            found = (value, *gradients)
            expected = expected or found
            row["difference"] = _difference(found, expected)
            row["ok"] = row["difference"] <= search.case.tolerance
        except Exception as error:
            row["error"] = part.in_one_line(error)
        rows.append(row)
    seconds = _interleaved(search, rows, run, Timer(device))
    for row, values in zip(rows, seconds, strict=True):
        yield row | ({"device_s": statistics.median(values), "rounds_s": values} if values else {})


def _difference(found: Outputs, expected: Outputs) -> float:
    """The worst ‖x − y‖/‖y‖ of the value and the gradients; inf for what is not finite."""
    worst = max(relative_error(x, y) for x, y in zip(found, expected, strict=True))
    return worst if worst == worst else float("inf")


def _interleaved(search: Search, rows: list[Row], run: Callable[[], Any], timer: Timer) -> list[list[float]]:
    """Seconds of every tile that ran, in rounds in which all take turns."""
    seconds: list[list[float]] = [[] for _ in rows]
    for _ in range(ROUNDS):
        for row, values in zip(rows, seconds, strict=True):
            if "error" not in row:
                with tiling.using(search.kernel, Tile(*row["tile"])):
                    values.append(timer.seconds(run, ROUND_MS)[0])
    return seconds


def chunks(device: str, tiny: bool) -> Iterator[Row]:
    """Seconds of ``linear_kd`` for a training step's rows, by the rows of a chunk; the default's first."""
    case = _case("linear_kd", "ce 768")
    case = dataclasses.replace(case, rows=64, vocabulary=500) if tiny else dataclasses.replace(case, rows=19_648)
    inputs, timer, seconds = case.inputs(device), Timer(device), dict[int | None, list[float]]()
    for _ in range(ROUNDS):
        for rows in (None, 32) if tiny else (None, 2048, 4096, 8192):
            run = step(_by_chunks(rows), inputs)
            if rows not in seconds:
                run()
            seconds.setdefault(rows, []).append(timer.seconds(run, ROUND_MS)[0])
    for rows, values in seconds.items():
        row: Row = {"what": "chunk", "kernel": "linear_kd", "case": f"ce 768, {case.rows:,} rows", "chunk_rows": rows}
        yield row | {"now": rows is None, "device_s": statistics.median(values), "rounds_s": values}


def _by_chunks(rows: int | None) -> Loss:
    return lambda inputs: linear_kd.linear_kd(**inputs, chunk_rows=rows).loss


def proposal(search: Search, rows: list[Row], arch: int | str) -> Row | None:
    """The rule of ``tiling.TABLE`` that the timing speaks for: the fastest tile whose result is right."""
    good = [row for row in rows if "device_s" in row and row["ok"]]
    now = next((row for row in good if row["now"]), None)
    if now is None:
        return None
    best = min(good, key=lambda row: row["device_s"])
    if now["device_s"] < LEAST_GAIN * best["device_s"]:
        best = now
    return {
        "what": "proposed", "kernel": search.kernel, "case": search.case.name, "arch": arch, "row": _text(search, best, arch),
        "tile": best["tile"], "device_s": best["device_s"], "now_s": now["device_s"],
        "speedup": now["device_s"] / best["device_s"],
    }  # fmt: skip


def _text(search: Search, best: Row, arch: int | str) -> str:
    """What to write into the table: the architecture's rules with one replaced, or put before it if that serves wider ones."""
    rules, number = search.serving(arch)
    serving, tile, kept = rules[number], Tile(*best["tile"]), list(rules)
    if serving.max_width in (None, search.width):
        kept[number] = serving._replace(tile=tile)
    elif not best["now"]:
        shorter = ".short" in search.kernel and tile.block_m < serving.tile.block_m
        kept.insert(number, Rule(tile, search.width, search.length if shorter else serving.max_length))
    inner = ", ".join(_rule_text(rule) for rule in kept)
    return f"{json.dumps(arch)}: ({inner}{',' if len(kept) == 1 else ''})"


def _rule_text(rule: Rule) -> str:
    """As a rule stands in the table: what is None at an end is left out."""
    return f"Rule({_listed([f'Tile({_listed(rule.tile)})', rule.max_width, rule.max_length])})"


def _listed(values: Sequence[object]) -> str:
    last = max(number for number, value in enumerate(values) if value is not None)
    return ", ".join(str(value) for value in values[: last + 1])


# ---- compiling ahead ------------------------------------------------------------------------------------------


def main() -> None:
    """Compile the tiles that are named by (search, tile) numbers; a row for each that cannot be."""
    named = json.loads(sys.argv[1])
    device, arch, everything = (
        named["device"],
        tiling.architecture(torch.device(named["device"])),
        searches(named["tiny"]),
    )
    calls: dict[int, Callable[[], Any]] = {}
    for number, place in named["pairs"]:
        search = everything[number]
        tiles = search.tiles(arch)
        if place >= len(tiles):  # today's tile is one of the candidates
            continue
        tile = tiles[place]
        try:
            if number not in calls:
                calls[number] = search.call(search.small().inputs(device))
            with tiling.using(search.kernel, tile):
                calls[number]()
        except Exception as error:
            worker.hand_over(
                {"what": "compiled", "kernel": search.kernel, "tile": list(tile), "error": part.in_one_line(error)}
            )


if __name__ == "__main__":
    main()
