"""The probes at a run's end: of its student, of random weights as floor and of its teacher as ceiling."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fastkd.data import hub
from fastkd.models import tokenizer as tokenizers
from fastkd.probes import labelled
from fastkd.probes.evaluation import NAME, probe
from fastkd.probes.names import NONE, chosen
from fastkd.probes.scores import lines
from fastkd.probes.yardstick import Yardstick
from fastkd.run_folder import read_opening

if TYPE_CHECKING:
    from fastkd.probes.labelled import Labelled
    from fastkd.run_config import RunConfig
    from fastkd.terminal import Console

log = logging.getLogger(__name__)


def check(run: RunConfig) -> None:
    """Read what ``--probe-data`` names, before anything is spent.

    Raises:
        ValueError: a file that is missing or damaged, or a probe without its data.
    """
    if run.probes != NONE:
        labelled.read(chosen(run.probes), run.probe_data)


def probe_student(folder: Path, run: RunConfig, console: Console) -> None:
    """Probe a finished run's student, and print its scores, unless its probes.json has scores by the same probes.

    A student that cannot be probed, because its corpus is too small or its teacher leaves no memory, is finished all the same.
    """
    if run.probes == NONE:
        return
    asked = chosen(run.probes)
    try:
        if _made(folder, *labelled.read(asked, run.probe_data)):
            return
        with hub.pinned(read_opening(folder).environment.get("corpus_sources", [])):
            record = probe(folder, asked, probe_data=run.probe_data)
    except (ValueError, torch.OutOfMemoryError) as error:
        log.warning("the student is not probed: %s", str(error).splitlines()[0])
        return
    for line in lines(record):
        console.print(line)


def _made(folder: Path, wanted: tuple[str, ...], data: Labelled) -> bool:
    """Whether a run's student has scores by these probes, on this data."""
    try:
        found = json.loads((folder / NAME).read_bytes())["probes"]
        about = Yardstick.of(tokenizers.load(str(folder / "final")), None, data).record()
        same = all(found[name]["items_sha256"] == each["items_sha256"] for name, each in about.items())
        return same and all("model" in found[name]["scores"] for name in wanted)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return False
