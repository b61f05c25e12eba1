"""The README's table and plot of training speed and memory, made from the results of ``bench.throughput``.

    python -m bench.front_page                    README.md's table and docs/speed*.svg from the device that the README names
    python -m bench.front_page --device NAME      from results/NAME

Nothing is measured here. A pair is a method and a peer of `bench.throughput`; its speed is fastkd's tokens/s over the
peer's, its memory fastkd's peak over the peer's. The table is between two comments of the README and is replaced.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from bench.results import RESULTS
from fastkd import files
from fastkd.reports.plots import STYLE, to_svg

ROOT = Path(__file__).parents[1]
SIZE = "quickstart"
BEGIN, END = "<!-- python -m bench.front_page --device {} -->", "<!-- end of what it writes -->"
BLOCK = re.compile(f"{BEGIN.format('(.+)')}\n(.*?){END}", flags=re.DOTALL)
PEERS = {
    "paper": "the paper's way",
    "trainer": "Hugging Face Trainer",
    "trainer-compile": "Trainer with torch.compile",
    "bertdistiller": "bertdistiller",
}
TABLE = (("logit_kd", "paper"), ("mlm", "trainer"), ("mlm", "trainer-compile"), ("minilmv2", "bertdistiller"))


@dataclass(frozen=True)
class Pair:
    """A method beside a peer, in the dtypes that were measured."""

    method: str
    peer: str  # a key of PEERS
    speed: Mapping[str, float]  # dtype → tokens/s, fastkd's over the peer's
    memory: Mapping[str, float]  # dtype → peak bytes, fastkd's over the peer's

    @property
    def label(self) -> str:
        """What is trained, and beside whom."""
        return f"{self.method}: {PEERS[self.peer]}"


@dataclass(frozen=True)
class Theme:
    """Colours on one background."""

    name: str  # of the file
    ink: str
    faint: str
    bars: tuple[str, str]  # one a dtype


LIGHT = Theme("speed", "#1F2328", "#D9DEE4", ("#0072B2", "#8CC4E6"))
DARK = Theme("speed-dark", "#E6EDF3", "#3D444D", ("#56B4E9", "#2B6C94"))


def read(device: str, results: Path = RESULTS) -> list[Pair]:
    """All pairs of the quickstart's size that a folder of results holds, those of the paper's way first.

    Raises:
        ValueError: there is no such folder, or a pair of the README's table was not measured.
    """
    groups = _groups(device, results)
    ratios = {(group["method"], group["dtype"]): group["compared"] for group in groups}
    pairs = [
        Pair(method, peer, _by_dtype(ratios, method, "speedup", peer), _by_dtype(ratios, method, "memory", peer))
        for peer in PEERS
        for method in dict.fromkeys(method for method, _ in ratios)
    ]
    found = [pair for pair in pairs if pair.speed]
    missing = [f"{method} beside {peer}" for method, peer in TABLE if (method, peer) not in map(_key, found)]
    if missing:
        raise ValueError(f"{device} lacks {', '.join(missing)}: measure with python -m bench.throughput")
    return found


def _groups(device: str, results: Path) -> list[dict[str, Any]]:
    path = results / device / "throughput.json"
    if not path.is_file():
        raise ValueError(f"no {path}: measure with python -m bench.throughput, or name a folder of {results}")
    return [group for group in json.loads(path.read_text("utf-8"))["groups"] if group["size"] == SIZE]


def _by_dtype(ratios: Mapping[tuple[str, str], Any], method: str, what: str, peer: str) -> dict[str, float]:
    found = {dtype: compared.get(what, {}).get(peer) for (name, dtype), compared in ratios.items() if name == method}
    return {dtype: ratio for dtype, ratio in sorted(found.items()) if ratio is not None}


def _key(pair: Pair) -> tuple[str, str]:
    return pair.method, pair.peer


def dtypes(pairs: Sequence[Pair]) -> list[str]:
    """The dtypes that were measured."""
    return sorted({dtype for pair in pairs for dtype in pair.speed})


def table(pairs: Sequence[Pair]) -> str:
    """The README's four rows."""
    columns = dtypes(pairs)
    head = [
        "training",
        "compared with",
        *(f"speed, {dtype}" for dtype in columns),
        *(f"memory, {dtype}" for dtype in columns),
    ]
    rows = [head, ["---", "---", *["---:"] * (2 * len(columns))]]
    by_key = {_key(pair): pair for pair in pairs}
    for pair in (by_key[key] for key in TABLE):
        speeds = [f"**{pair.speed[dtype]:.1f}×**" if dtype in pair.speed else "" for dtype in columns]
        memories = [f"{pair.memory[dtype]:.0%}" if dtype in pair.memory else "" for dtype in columns]
        rows.append([f"`{pair.method}`", PEERS[pair.peer], *speeds, *memories])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def caption(device: str, results: Path = RESULTS) -> str:
    """What the table shows, where it was measured, and how much the rounds of a row differed."""
    groups = _groups(device, results)
    spreads = {
        dtype: max(_spread(row) for group in groups if group["dtype"] == dtype for row in group["rows"].values())
        for dtype in sorted({group["dtype"] for group in groups})
    }
    places = sorted({group["environment"]["device"] for group in groups})
    days = sorted({group["environment"]["date"] for group in groups})
    path = f"bench/results/{device}/throughput.json"
    varied = " and ".join(f"{spread:.0%} in {dtype}" for dtype, spread in spreads.items())
    return (
        "fastkd's tokens/s over theirs, and its peak memory as a share of theirs: "
        f"{', '.join(places)}, {', '.join(days)},\n[`{path}`]({path}),\nmade by `python -m bench.throughput`. "
        f"Rates of a row varied between rounds by up to {varied}."
    )


def _spread(row: Mapping[str, Any]) -> float:
    rates = row["tokens_per_s_rounds"]
    return float((max(rates) - min(rates)) / row["tokens_per_s"])


def block(device: str) -> str:
    """What the README has between the two comments, and these."""
    return f"{BEGIN.format(device)}\n\n{table(read(device))}\n\n{caption(device)}\n\n{END}"


def device_shown(readme: Path) -> str:
    """The folder of results that the README names.

    Raises:
        ValueError: it has no place for the table.
    """
    found = BLOCK.search(readme.read_text("utf-8"))
    if found is None:
        raise ValueError(f"{readme} lacks {BEGIN.format('NAME')!r} or {END!r}")
    return found[1]


def description(pairs: Sequence[Pair]) -> str:
    """The plot in words, for those who cannot see it."""
    said = [
        f"{pair.label} {dtype} {pair.speed[dtype]:.1f} times as fast in {pair.memory[dtype]:.0%} of the memory"
        for pair in pairs
        for dtype in pair.speed
    ]
    return f"Training with fastkd beside others: {'; '.join(said)}"


def plot(pairs: Sequence[Pair], theme: Theme) -> Figure:
    """Speed and memory as bars, a pair a line."""
    at = _places(pairs)
    figure = Figure(figsize=(9.2, 0.8 + 0.37 * (max(at) + 1)), layout="constrained", facecolor="none")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1.25, 1))
    _bars(left, at, [pair.speed for pair in pairs], dtypes(pairs), theme, lambda ratio: f"{ratio:.1f}×")
    _bars(right, at, [pair.memory for pair in pairs], dtypes(pairs), theme, lambda share: f"{share:.0%}")
    left.set_title("Training speed: times as fast")
    right.set_title("Peak memory: share of theirs")
    left.axvline(1, color=theme.ink, linewidth=0.9)
    left.set_xlim(0, 1.12 * max(max(pair.speed.values()) for pair in pairs))
    left.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    left.xaxis.set_major_formatter(FuncFormatter(lambda ratio, _: f"{ratio:g}×"))
    right.set_xlim(0, 1)
    right.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:.0%}"))
    left.set_yticks(at, [f"{pair.method}  vs  {PEERS[pair.peer]}" for pair in pairs])
    left.set_ylim(max(at) + 0.6, -0.6)
    left.legend(loc="lower right", frameon=False)
    return figure


def _places(pairs: Sequence[Pair]) -> list[float]:
    """Where on the vertical axis each pair is: a little space between two peers."""
    at = [0.0]
    for before, pair in itertools.pairwise(pairs):
        at.append(at[-1] + (1 if pair.peer == before.peer else 1.35))
    return at


def _bars(
    axes: Any, at: Sequence[float], rows: Sequence[Mapping[str, float]], names: Sequence[str], theme: Theme, words: Any
) -> None:
    height = 0.76 / len(names)
    for number, (dtype, colour) in enumerate(zip(names, theme.bars, strict=False)):
        shift = (number - (len(names) - 1) / 2) * height
        there = [place + shift for place, row in zip(at, rows, strict=True) if dtype in row]
        values = [row[dtype] for row in rows if dtype in row]
        bars = axes.barh(there, values, 0.88 * height, color=colour, label=dtype)
        axes.bar_label(bars, [words(value) for value in values], padding=3, fontsize=7.5, color=theme.ink)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="y", visible=False)


def style(theme: Theme) -> dict[Any, Any]:
    """matplotlib's settings on one background."""
    ink = ("axes.titlecolor", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor", "text.color")
    faint = ("axes.edgecolor", "grid.color", "xtick.color", "ytick.color")
    colours = dict.fromkeys(ink, theme.ink) | dict.fromkeys(faint, theme.faint)
    return STYLE | colours | {"axes.facecolor": "none", "savefig.facecolor": "none", "svg.hashsalt": theme.name}


def write(device: str | None = None, root: Path = ROOT) -> list[Path]:
    """Draw both plots and replace the README's table; returns the files.

    Raises:
        ValueError: the README has no place for the table, or the device was not measured.
    """
    readme = root / "README.md"
    shown = device_shown(readme)
    device = device or shown
    pairs, new, written = read(device), block(device), [readme]
    files.write(readme, BLOCK.sub(lambda _: new, readme.read_text("utf-8")))
    for theme in (LIGHT, DARK):
        with matplotlib.rc_context(style(theme)):
            written.append(root / "docs" / f"{theme.name}.svg")
            files.write(written[-1], to_svg(plot(pairs, theme), theme.name, description(pairs)) + "\n")
    return written


def main(argv: Sequence[str] | None = None) -> None:
    """Write what the options name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="a folder of bench/results; default: the one that the README names")
    options = parser.parse_args(argv)
    try:
        files = write(options.device)
    except ValueError as error:
        parser.error(str(error))
    print("\n".join(map(str, files)))


if __name__ == "__main__":
    main()
