"""Training that left the finite numbers: its error, and which of rate, teacher and text is the likely cause.

Imports no torch: a command line knows the error before it loads PyTorch.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from pathlib import Path

    from fastkd.models.needs import Outputs
    from fastkd.setup import Setup
    from fastkd.train import Trainer

Cause = Literal["rate", "teacher", "data"]
SMALLER = 4  # a rate that diverged is divided by this for the next try


class Diverged(Exception):
    """Weights, moments, or the gradients of step after step are not finite. ``cause`` is the likely one."""

    def __init__(self, text: str, cause: Cause = "rate") -> None:
        super().__init__(text)
        self.cause = cause


def likely_cause(trainer: Trainer, number: int) -> Cause:
    """What makes step ``number`` (from 0) not finite, though every weight is finite: every rank asks this together.

    The teacher, if its own outputs are not finite; the text, if the student's loss is not finite there but is on held-out
    text; else the rate, which moved the weights to where a forward or a backward overflows.
    """
    from fastkd.distributed import any_rank  # only now: it loads PyTorch

    batches = trainer.stream.step(number)
    if any_rank(trainer.world, not all(finite_outputs(trainer.teach(batch)) for batch in batches)):
        return "teacher"
    is_text = math.isfinite(trainer.validate().loss) and not math.isfinite(trainer.loss_of(batches))
    return "data" if any_rank(trainer.world, is_text) else "rate"


def finite_outputs(outputs: Outputs | None) -> bool:
    """Whether all that a forward gave is finite."""
    if outputs is None:
        return True
    rows = (
        outputs.head_rows,
        outputs.last_rows,
        *outputs.hidden.values(),
        *(x for qkv in outputs.qkv.values() for x in qkv),
    )
    return all(bool(x.isfinite().all()) for x in rows if x is not None)


def remedy(cause: Cause, setup: Setup, folder: Path) -> str:
    """The likely cause in words, and what to give instead: options for the end of the same command."""
    config, another = setup.config, f"--output-dir {folder}"
    if cause == "teacher":
        numerics = "" if setup.dtype.itemsize == 4 else f"--dtype float32 {another}-float32, or "
        return f"the likely cause is the teacher {config.teacher}, whose outputs are not finite: give {numerics}another --teacher"
    if cause == "data":
        return (
            "the likely cause is the text: held-out text has a finite loss, the text of these steps has not: give "
            f"--seed {config.seed + 1} {another}-seed{config.seed + 1}, or another --corpus"
        )
    rate = min(setup.lr / SMALLER, setup.method.default_lr)
    return f"the likely cause is the learning rate {setup.lr:g}: give --lr {rate:g} {another}-lr{rate:g}"
