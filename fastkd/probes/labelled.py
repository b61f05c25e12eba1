"""The labelled data that ``--probe-data`` names: files of a treebank, and minimal pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastkd.probes import blimp, conllu, pos


@dataclass(frozen=True)
class Labelled:
    """Sentences to fit and to score, and minimal pairs; None where they are not wanted."""

    treebank: pos.Split | None
    paradigms: blimp.Paradigms | None


def read(
    probes: Sequence[str] | None, named: Sequence[str | Path], pairs: int = blimp.PAIRS
) -> tuple[tuple[str, ...], Labelled]:
    """(the probes to make, their data).

    Args:
        probes: that were asked for; None: ``tokens``, and those that there are files for.
        named: CoNLL-U files, archives or folders of minimal pairs, or folders that hold any of them.
        pairs: of a paradigm, the first ones.

    Raises:
        ValueError: a file that is missing, of another kind or damaged; a probe without its data.
    """
    treebank, archives = _find([Path(path).expanduser() for path in named])
    has = {"tokens": True, "pos": bool(treebank), "blimp": bool(archives)}
    wanted = tuple(name for name in has if (has[name] if probes is None else name in probes))
    for name, what in (("pos", "a CoNLL-U file"), ("blimp", "BLiMP's zip or folder")):
        if name in wanted and not has[name]:
            raise ValueError(f"the probe {name} needs {what}: name it by --probe-data")
    if "blimp" in wanted and len(archives) > 1:
        raise ValueError(f"--probe-data names minimal pairs twice, {archives[0]} and {archives[1]}: name one of them")
    return wanted, Labelled(
        pos.sentences(treebank) if "pos" in wanted else None,
        blimp.read(archives[0], pairs) if "blimp" in wanted else None,
    )


def _find(named: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """(CoNLL-U files, archives and folders of minimal pairs) among paths, and in folders among them."""
    treebank: list[Path] = []
    archives: list[Path] = []
    for path in named:
        if not path.exists():
            raise ValueError(
                f"--probe-data {path} does not exist: give CoNLL-U files, BLiMP's zip, or a folder of these"
            )
        inside = sorted(path.iterdir()) if path.is_dir() else [path]
        tagged = [file for file in inside if conllu.is_conllu(file)]
        zipped = [file for file in inside if blimp.is_archive(file)]
        paired = zipped or ([path] if blimp.holds_paradigms(path) else [])
        if not tagged and not paired:
            raise ValueError(
                f"--probe-data {path} holds neither CoNLL-U (.conllu, .conllu.gz) nor BLiMP (.zip, .jsonl)"
            )
        treebank, archives = [*treebank, *tagged], [*archives, *paired]
    return treebank, archives
