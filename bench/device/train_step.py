"""What a part's train step is made of: a method, a random teacher of some size, and text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from bench.device import material
from bench.device.part import Context
from fastkd import methods
from fastkd.config import resolve
from fastkd.distributed import World
from fastkd.setup import Setup, prepare


def files(context: Context, teacher: str) -> tuple[str, list[str]]:
    """Folder of a random teacher of this size, and the corpus; what an earlier part made is taken again."""
    root = Path(context.scratch or context.out) / (Path(context.bundle).name if context.bundle else "generated")
    folder = material.teacher(teacher, root / teacher, material.like(context, root / "tokenizer"))
    return str(folder), material.corpus(context, root / ("tiny" if context.tiny else "full"))


def setup(context: Context, method: str, *, teacher: str, student: str, **options: Any) -> Setup:
    """What a run with these options is made of, on the part's device."""
    folder, corpus = files(context, teacher)
    name = "teacher" if methods.load(method).METHOD.uses_teacher else "tokenizer"
    values: dict[str, Any] = {"preset": "quickstart", "method": method, name: folder, "student": student}
    values |= {"corpus": corpus, "budget_tokens": 1e15, **options}
    return prepare(resolve(values), World(device=torch.device(context.device)))
