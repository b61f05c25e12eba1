"""What was spent before this process: the newest checkpoint, and what the ledger charged up to now."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from fastkd import chain, checkpoint, files, ledger
from fastkd.budget import Totals
from fastkd.decide import Validations
from fastkd.distributed import on_main
from fastkd.ledger import Ledger

if TYPE_CHECKING:
    from fastkd.files import Record
    from fastkd.monitor import Monitor
    from fastkd.train import Trainer


def resume(trainer: Trainer, folder: Path, monitor: Monitor) -> tuple[Ledger, Validations]:
    """Load the newest checkpoint into the trainer and take over what was charged; a new run starts at zero.

    Raises:
        ValueError: the ledger was altered, or lacks steps that the checkpoint holds; ``mend_ledger`` comes before.
    """
    config, world = trainer.setup.config, trainer.world
    totals, recent = _restore(trainer, folder / "checkpoints", monitor)
    book = Ledger(folder / ledger.NAME, config.charge, totals, world.size, write=world.is_main)
    validations = Validations(config.validations, world.size)
    totals.charged_s, book.finished = on_main(world, lambda: _take_over(book, recent, validations, monitor))
    return book, validations


def _restore(trainer: Trainer, checkpoints: Path, monitor: Monitor) -> tuple[Totals, list[Record]]:
    """What was spent, and the ledger's lines of the last steps (of an older version), at the newest checkpoint.

    Raises:
        ValueError: a checkpoint that was not written by a run.
    """
    found = on_main(trainer.world, lambda: checkpoint.newest(checkpoints, monitor.say))
    if found is None:
        trainer.enter(0)
        return Totals(), []
    if "totals" not in found.state:
        raise ValueError(f"{found.folder} does not say what was spent: remove it, or give another --output-dir")
    totals = Totals(**found.state["totals"])
    trainer.enter(trainer.setup.stages.at(totals.progress))
    found.restore(trainer.objective, trainer.optimizer)
    return totals, found.state.get("recent", [])


def _take_over(book: Ledger, recent: list[Record], validations: Validations, monitor: Monitor) -> tuple[float, bool]:
    """Charge what the ledger says, with the steps after the checkpoint as one crash.

    Returns the charged GPU-seconds, and whether the run has come to its end.
    """
    totals = book.totals
    book.complete(recent)
    lines = files.read_jsonl(book.path)  # the ledger was verified when it was opened
    steps = ledger.surviving(lines, book.path)
    lost = [step for step in steps if step["step"] > totals.step]
    if [step["step"] for step in steps[: len(steps) - len(lost)]] != list(range(1, totals.step + 1)):
        raise ValueError(f"{book.path} lacks steps before {totals.step}: restore the file or start a new run folder")
    totals.charged_s = ledger.charged_s(lines, book.devices)
    validations.take_over(lines, totals.step)
    if lines:
        monitor.rewind(totals.step)
    if lost:
        book.crash(lost)
        monitor.say(f"resumed at step {totals.step}: {len(lost)} steps after its checkpoint are repeated")
    return totals.charged_s, ledger.holds_its_end(lines) and not lost


# ---- a ledger that was damaged ------------------------------------------------------------------------------


def mend_ledger(folder: Path) -> str | None:
    """Make the ledger of a run whole before it is read, from the copies in its checkpoints. Returns what was done, in a line.

    One that lacks lines or holds altered ones is set aside. What replaces it is the newest sound copy, and the lines after
    it that still fit. One that was only cut gets back what the copy holds.

    Raises:
        ValueError: it is damaged, and no checkpoint holds a copy of what is missing.
    """
    path = folder / ledger.NAME
    copy = _newest_copy(folder / "checkpoints")  # first: a process that still writes only makes the ledger longer
    found = chain.follow(chain.whole_lines(path))
    said = None if copy is None else _restored(path, found, *copy)
    try:
        lines = ledger.read_verified(path) if found.whole and not said else ledger.read(path)
        steps = ledger.surviving(lines, path)
    except ValueError as error:
        raise ValueError(f"{path} is damaged, and no checkpoint holds a copy: {_remedy(folder)}") from error
    if (folder / "final").is_dir():
        more = None if ledger.has_ended(lines) and steps else _end_again(folder, steps)
    else:
        more = _shorter_than_metrics(folder, lines)  # only said: the line of metrics may be what is wrong
    return "; ".join(filter(None, [said, more])) or None


def _newest_copy(checkpoints: Path) -> tuple[Path, chain.Chain] | None:
    """The longest sound copy: a ledger only grows."""
    copies = checkpoint.sound_files(checkpoints, ledger.NAME)
    sound = [(copy, found) for copy in copies if (found := chain.follow(chain.whole_lines(copy))).whole]
    return max(sound, key=lambda each: each[1].sound, default=None)


def _restored(path: Path, found: chain.Chain, copy: Path, known: chain.Chain) -> str | None:
    """Restore a ledger that does not go on from a copy; what was done."""
    both = zip(chain.whole_lines(path), chain.whole_lines(copy), strict=False)
    if found.whole and found.sound >= known.sound and all(line == copied for line, copied in both):
        return None
    lines, copied = list(chain.whole_lines(path)), list(chain.whole_lines(copy))
    count = len(copied)
    if lines == copied[: len(lines)]:
        files.write(path, b"".join(copied))
        return f"{path} lacked its last {count - len(lines)} lines: restored from the copy in a checkpoint"
    later = chain.continued(known.head, lines)
    lost = len({*lines}.difference(copied, later))
    aside = files.set_aside(path)
    files.write(path, b"".join([*copied, *later]))
    return (
        f"{path} was damaged and is kept as {aside.name}: {count} lines restored from the copy in a checkpoint, "
        f"{len(later)} after them kept, {lost} lost"
    )


def _end_again(folder: Path, steps: list[Record]) -> str:
    """Say in the ledger of a finished run that it has ended, where that line was cut off and no step is missing."""
    path = folder / ledger.NAME
    saved = checkpoint.latest(folder / "checkpoints")  # a damaged one too: only its number is read
    if not steps or saved is None or steps[-1]["step"] != checkpoint.step_of(saved):
        raise ValueError(f"{path} was cut, and no checkpoint holds a copy: {_remedy(folder)}")
    last = steps[-1]
    chain.append(path, {"event": "end", "seconds": 0.0, "step": last["step"], "charged": False, "restored": True})
    return f"{path} was cut: its {last['step']} steps are there, lines of uncharged events after them may be lost"


def _shorter_than_metrics(folder: Path, lines: list[Record]) -> str | None:
    """Every line of metrics.jsonl is written after one of the ledger with the same charge: one without it tells of a cut."""
    path, metrics = folder / ledger.NAME, []
    with contextlib.suppress(ValueError):  # damaged itself
        metrics = [line for line in files.read_jsonl(folder / "metrics.jsonl") if "charged_s" in line]
    known = [(line["step"], line["charged_s"]) for line in lines if "charged_s" in line]
    if not metrics or (metrics[-1].get("step"), metrics[-1]["charged_s"]) in known:
        return None
    step, charged = known[-1] if known else (0, 0.0)
    return (
        f"{path} ends at step {step} with {charged:.6g} GPU-seconds, but metrics.jsonl at step {metrics[-1].get('step')} with "
        f"{metrics[-1]['charged_s']:.6g}: what was charged between them is not in the bill"
    )


def _remedy(folder: Path) -> str:
    return f"put a copy of it back, or remove {folder} to start again"
