"""Ledgers without runs: steps of a known cost, and a run's lives in a folder with no model in it."""

import hashlib
import json
import random
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fastkd import resume
from fastkd.budget import Charge, StepCost
from fastkd.decide import Validations
from fastkd.files import file_sha256, to_line
from fastkd.ledger import NAME, Ledger

COST = StepCost({"student": 60, "teacher": 30, "loss": 10}, real=4000, predicted=600)
PHASES = {"student": 0.3, "backward": 0.6, "optimizer": 0.1}
WANTED = 7  # validations


def charge_step(ledger: Ledger, seconds: float = 1.0, progress: float = 0.1) -> float:
    phase_s = {name: share * seconds for name, share in PHASES.items()}
    return ledger.step(COST, phase_s, progress=progress, epoch=0.0, unique=4000, joules=None, lr=1e-4, loss=2.0)


class Life:
    """One process of a run, from what it finds in the folder to its end: the ledger's part of ``pipeline.train``."""

    def __init__(self, folder: Path, charge: Charge, devices: int = 1) -> None:
        self.folder = folder
        config = SimpleNamespace(charge=charge, validations=WANTED)
        trainer: Any = SimpleNamespace(
            setup=SimpleNamespace(config=config, stages=SimpleNamespace(at=lambda progress: 0)),
            enter=lambda number: None,
            world=SimpleNamespace(size=devices, is_main=True, rank=0),
            objective=None,
            optimizer=None,
        )
        self.ledger: Ledger
        self.validations: Validations
        monitor: Any = SimpleNamespace(rewind=lambda step: None, say=lambda text: None)
        self.ledger, self.validations = resume.resume(trainer, folder, monitor)
        self.totals = self.ledger.totals

    def log(self) -> None:
        """A line of metrics, as it is written after a step."""
        line = {"step": self.totals.step, "charged_s": self.totals.charged_s, "loss": 2.0}
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(to_line(line))

    def save(self) -> Path:
        """A checkpoint without tensors."""
        content = {
            "model.safetensors": b"",
            "optimizer.safetensors": b"",
            "state.json": json.dumps({"step": self.totals.step, "totals": asdict(self.totals)}).encode(),
        }
        folder = self.folder / "checkpoints" / f"step-{self.totals.step}"
        folder.mkdir(parents=True, exist_ok=True)
        self.ledger.copy().copy_to(folder / NAME)
        manifest = {name: hashlib.sha256(data).hexdigest() for name, data in content.items()}
        manifest[NAME] = file_sha256(folder / NAME)
        for name, data in {**content, "manifest.json": json.dumps(manifest).encode()}.items():
            (folder / name).write_bytes(data)
        return folder


def tear(path: Path, chance: random.Random) -> None:
    """Leave the last line half written, as a kill does; it may lack no more than its end."""
    content = path.read_bytes()
    start = content.rfind(b"\n", 0, -1) + 1
    path.write_bytes(content[: chance.randrange(start, len(content))])
