"""The ledger adds up, after any sequence of crashes, under every charging policy."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest
from ledgers import WANTED, Life, charge_step, tear
from made_run import make_run, write_lines

from fastkd import resume
from fastkd.budget import Charge, Totals
from fastkd.checkpoint import Checkpoint
from fastkd.decide import Validations
from fastkd.files import read_jsonl
from fastkd.ledger import NAME, Ledger, replayed_progress, surviving, surviving_steps
from fastkd.resume import mend_ledger
from fastkd.run_folder import read_run


def test_lines_hold_cumulative_totals(tmp_path: Path) -> None:
    totals = Totals()
    ledger = Ledger(tmp_path / "ledger.jsonl", "loop", totals, devices=2)
    for _ in range(3):
        charge_step(ledger)
    ledger.close()
    last = read_jsonl(tmp_path / "ledger.jsonl")[-1]
    assert last["step"] == 3
    assert last["charged_s"] == pytest.approx(6.0)  # two devices
    assert last["flops"] == {"student": 180, "teacher": 90, "loss": 30}
    assert last["tokens"] == {"real": 12000, "predicted": 1800, "unique": 4000}
    assert last["joules"] is None


@pytest.mark.parametrize(("charge", "expected"), [("compute", 1.0), ("loop", 4.0), ("all", 9.0)])
def test_charging_policies(charge: Charge, expected: float, tmp_path: Path) -> None:
    totals = Totals()
    ledger = Ledger(tmp_path / "ledger.jsonl", charge, totals)
    ledger.event("setup", 5.0)
    charge_step(ledger)
    ledger.event("validation", 2.0)
    ledger.event("checkpoint", 1.0)
    ledger.event("validation", 7.0, in_loop=False)  # after the last step: free under every policy
    ledger.close()
    assert totals.charged_s == pytest.approx(expected)
    events = [line for line in read_jsonl(tmp_path / "ledger.jsonl") if "event" in line]
    assert [line["event"] for line in events] == ["setup", "validation", "checkpoint", "validation"]


def test_steps_lost_in_a_crash_do_not_count_twice(tmp_path: Path) -> None:
    path, totals = tmp_path / "ledger.jsonl", Totals()
    ledger = Ledger(path, "loop", totals)
    for _ in range(4):
        charge_step(ledger)
    totals.step = 2  # back at a checkpoint
    ledger.crash(surviving_steps(path)[2:])
    charge_step(ledger)
    ledger.close()
    with open(path, "a") as file:
        file.write('{"step": 4, "prog')  # torn by kill -9
    assert [line["step"] for line in surviving_steps(path)] == [1, 2, 3]
    assert json.loads(path.read_text().splitlines()[-2])["charged_s"] == pytest.approx(5.0)


def test_what_is_replayed_is_the_progress_of_the_steps_that_count(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_text(
        '{"event": "setup", "seconds": 1}\n{"step": 1, "progress": 0.5}\n{"step": 2, "progress": 0.9}\n'
        '{"event": "crash", "step": 1}\n{"step": 2, "progress": 0.4}\n{"step": 3, "progress": 1.0}\n'
    )
    assert replayed_progress(path) == [0.5, 0.4, 1.0]  # the step after a fast one may be behind it


def test_a_checkpoint_fills_in_what_rank_0_died_before_writing(tmp_path: Path) -> None:
    path, totals = tmp_path / "ledger.jsonl", Totals()
    ledger = Ledger(path, "loop", totals)
    for _ in range(5):
        charge_step(ledger)
    ledger.close()
    whole, recent = path.read_text(), list(ledger.recent)
    path.write_text("".join(whole.splitlines(keepends=True)[:4]))
    resumed = Ledger(path, "loop", totals)
    resumed.complete(recent)
    resumed.complete(recent)
    resumed.close()
    assert path.read_text() == whole
    assert [line["step"] for line in surviving_steps(path)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("change", [lambda name: f"{name}x", None], ids=["key", "value"])
def test_a_ledger_without_sums_in_which_anything_was_changed_is_refused_in_one_line(change, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    path, whole = run / NAME, read_jsonl(run / NAME)
    for place in (1, 10, len(whole) - 1):  # an event, a step, an event at the end
        for name in whole[place].keys() - {"charged"}:
            line = dict(whole[place])
            value = line.pop(name)
            line[change(name) if change else name] = value if change else [value]
            write_lines(path, [*whole[:place], line, *whole[place + 1 :]])
            if change and name == "charged_s" and "event" in line:
                read_run(run)  # what an event adds is in its seconds
                continue
            for read in (read_run, mend_ledger):
                with pytest.raises(ValueError, match=r"has a line without its|is damaged, and no checkpoint"):
                    read(run)


# ---- random histories, against a model of the truth that knows no ledger ------------------------------------

# What each policy charges besides the steps that count, by docs/budget.md.
PAID = {
    "compute": (),
    "loop": ("validation", "checkpoint", "compile", "lost"),
    "all": ("validation", "checkpoint", "compile", "lost", "setup"),
}


class Truth:
    """What was really spent, in GPU-seconds, one entry for each thing that happened and was written down."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, float]] = []  # that count: GPU-seconds, progress
        self.spent = dict.fromkeys(("validation", "checkpoint", "compile", "lost", "setup"), 0.0)
        self.validations: list[tuple[int, float]] = []  # that count: the step before, progress
        self.validated = 0

    def charged(self, charge: Charge) -> float:
        return sum(seconds for seconds, _ in self.steps) + sum(self.spent[name] for name in PAID[charge])

    def back_to(self, step: int) -> None:
        self.spent["lost"] += sum(seconds for seconds, _ in self.steps[step:])
        del self.steps[step:]
        self.validations = [each for each in self.validations if each[0] <= step]

    @property
    def progress(self) -> float:
        return max((progress for _, progress in [*self.steps, *self.validations]), default=0.0)


class History:
    """A run that is killed, stopped and damaged at random; what it charges is compared with the truth in each life."""

    def __init__(self, folder: Path, charge: Charge, chance: random.Random) -> None:
        self.folder, self.charge, self.chance, self.truth = folder, charge, chance, Truth()
        self.saved: list[int] = []  # steps of sound checkpoints
        self.undo = lambda: None  # what is not known of if the last line is torn
        folder.mkdir()
        for _ in range(chance.randint(2, 4)):
            self.live()
        self.finish()

    def live(self) -> None:
        self.begin()
        for _ in range(self.chance.randint(0, 9)):
            self.chance.choices([self.step, self.validate, self.save], [8, 1, 2])[0]()
        self.chance.choice([self.stop, self.kill, self.kill])()

    def begin(self) -> None:
        if len(self.saved) > 1 and self.chance.random() < 0.2:
            (self.folder / "checkpoints" / f"step-{self.saved.pop()}" / "state.json").write_text("damaged")
        elif self.saved and self.chance.random() < 0.05:
            shutil.rmtree(self.folder / "checkpoints")
            self.saved = []
        self.found = (self.folder / NAME).stat().st_size if (self.folder / NAME).exists() else 0
        assert self.chance.random() < 0.8 or mend_ledger(self.folder) is None, "a kill damages nothing"
        self.life = Life(self.folder, self.charge, self.chance.randint(1, 3))
        self.truth.back_to(self.saved[-1] if self.saved else 0)
        self.undo = lambda: None
        self.compare()
        for name in ("setup", "compile"):
            if self.chance.random() < 0.7:
                self.event(name)

    def step(self) -> None:
        seconds, progress = self.chance.uniform(0.5, 2.0), len(self.truth.steps) / 60 + self.chance.uniform(0.001, 0.01)
        self.truth.steps.append((charge_step(self.life.ledger, seconds, progress), progress))
        self.undo = lambda: self.truth.steps.pop()

    def event(self, name: str, **details: float) -> None:
        seconds = self.chance.uniform(0.1, 3.0)
        self.life.ledger.event(name, seconds, **details)
        cost = seconds * self.life.ledger.devices
        self.truth.spent[name] += cost
        self.undo = lambda: self.truth.spent.update({name: self.truth.spent[name] - cost})

    def validate(self) -> None:
        count, counted = self.truth.validated, list(self.truth.validations)
        self.event("validation", progress=self.truth.progress + 0.001)
        self.truth.validated += self.life.totals.step > 0
        self.truth.validations.append((self.life.totals.step, self.truth.progress + 0.001))
        unspent = self.undo

        def undo() -> None:
            unspent()
            self.truth.validated, self.truth.validations = count, counted

        self.undo = undo

    def save(self) -> None:
        step = self.life.totals.step
        self.life.save()
        self.saved = [*(each for each in self.saved if each < step), step][-2:]
        for folder in (self.folder / "checkpoints").iterdir():
            if folder.name[5:].isdigit() and int(folder.name[5:]) not in self.saved:
                shutil.rmtree(folder)
        self.event("checkpoint")

    def stop(self) -> None:
        self.save()
        self.life.ledger.close()

    def kill(self) -> None:
        self.life.ledger.close()
        path = self.folder / NAME
        content = path.read_bytes()
        copied = content in [copy.read_bytes() for copy in self.folder.glob(f"checkpoints/*/{NAME}")]
        if len(content) > self.found and not copied and self.chance.random() < 0.5:
            tear(path, self.chance)
            self.undo()

    def finish(self) -> None:
        self.begin()
        self.step()
        self.save()
        self.life.ledger.end()
        self.life.ledger.close()
        (self.folder / "final").mkdir()
        assert mend_ledger(self.folder) is None
        assert replayed_progress(self.folder / NAME) == [progress for _, progress in self.truth.steps]
        run, truth = read_run(self.folder), self.truth.charged(self.charge)
        assert run.charged_s == pytest.approx(truth, rel=1e-9) and run.accounted_s == pytest.approx(truth, rel=1e-9)

    def compare(self) -> None:
        life, truth = self.life, self.truth
        assert life.totals.charged_s == pytest.approx(truth.charged(self.charge), rel=1e-9, abs=1e-9)
        lines = read_jsonl(self.folder / NAME)
        assert [line["step"] for line in surviving(lines, self.folder)] == list(range(1, len(truth.steps) + 1))
        taken_over = Validations(WANTED, 1)
        taken_over.take_over(lines, life.totals.step)
        assert taken_over.count == truth.validated
        reached = int(truth.progress * WANTED)
        assert not taken_over.due(min(truth.progress, 0.999), 1e9) and taken_over.due((reached + 1.01) / WANTED, 1e9)


@pytest.mark.parametrize("charge", ["compute", "loop", "all"])
def test_what_is_charged_is_what_was_spent_in_any_history(
    charge: Charge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resume, "on_main", lambda world, work: work())
    monkeypatch.setattr(Checkpoint, "restore", lambda *_: None)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # no power is cut here
    for seed in range(500):
        History(tmp_path / str(seed), charge, random.Random(f"{charge} {seed}"))
