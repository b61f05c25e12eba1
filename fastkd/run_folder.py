"""A run folder read back: what was planned, what each step cost, and where the seconds went."""

import json
import logging
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path

from safetensors import SafetensorError, safe_open

from fastkd import ledger, quickstart
from fastkd.begun import BEGUN, begun_with, config_text
from fastkd.device.clock import PHASES
from fastkd.device.power import THROTTLE_BITS
from fastkd.files import Record, sound_lines

log = logging.getLogger(__name__)
UNITS = {"budget_flops": "flops", "budget_tokens": "tokens"}  # budgets that are no time
# The names of what a run, its evaluation or a comparison writes begin with these.
WRITTEN = (
    "config.toml", "environment.json", "plan.json", "ledger.jsonl", "metrics.jsonl", "report.html", "trace.json",
    "checkpoints", "final", ".lock", ".final", BEGUN, "glue", "submission", "probes.json",
    "results.json", "RESULTS.md", "scratch.json", "plots", "references", "rows", "tuning",
)  # fmt: skip
# What is written deeper; a row's run looks into its own folder.
WRITTEN_DEEPER = (
    "checkpoints/**/*", "final/**/*", "glue/*", "submission/*", "plots/*", "references/**/*", "rows/*", "tuning/*", "tuning/*/*",
)  # fmt: skip
INPUTS = {  # what a run reads from outside, by its key in environment.json
    "corpus_version": "corpus",
    "teacher_sha256": "teacher",
    "teacher_version": "teacher",  # as an older run noted it
    "tokenizer_sha256": "tokenizer",
    "student_sha256": "config.json beside the tokenizer",
    "replay_sha256": "ledger that is replayed",
}
MOST_BINS = 120  # points of a learning curve


def ancestors(model: str | None) -> list[str]:
    """A model by the name it was given, then the models that it was made from, as its plan says.

    ``quickstart`` is included if one of them is that teacher under another name. For a ``final/`` that was copied out of its
    run, the models that it was made from are not known.
    """
    if model is None or model == quickstart.NAME:
        return [model] if model else []
    folder = Path(model).absolute()
    places = [folder, *(path.parent for path in (folder, folder.resolve()) if path.name == "final")]
    plans = [place / "plan.json" for place in places if (place / "plan.json").is_file()]
    found = [model, *(made_from(_json(plans[0])) if plans else ())]
    return found if quickstart.NAME in found or not quickstart.is_quickstart(model) else [*found, quickstart.NAME]


def made_from(plan: Record) -> list[str]:
    """The models that a planned student is made from; an older plan names only its teacher."""
    teacher = plan.get("teacher") or {}
    return list(plan["ancestors"]) if "ancestors" in plan else ancestors(teacher.get("source"))


@dataclass(frozen=True)
class Bin:
    """Consecutive steps drawn as one point: means over the steps, `low` and `high` the extreme losses."""

    steps: tuple[int, int]
    stage: int
    spent: float
    loss: float | None
    low: float | None
    high: float | None
    lr: float
    tokens_per_s: float


@dataclass(frozen=True)
class StageSum:
    """What the steps of one stage of a recipe took; seconds are GPU-seconds."""

    number: int  # from 0
    method: str
    steps: int
    tokens: int
    seconds: float
    teacher_seconds: float
    flops: float


@dataclass(frozen=True)
class EventSum:
    """All events of one kind; seconds are GPU-seconds (wall clock times devices)."""

    name: str
    times: int
    seconds: float
    charged: bool


@dataclass(frozen=True)
class Run:
    """The files of a run folder; a missing file is empty. `steps` leaves out steps that a crash lost."""

    folder: Path
    config: Record
    environment: Record
    plan: Record
    steps: list[Record]
    events: list[Record]
    metrics: list[Record]

    @property
    def finished(self) -> bool:
        """Whether the run came to its end and exported a student."""
        return has_student(self.folder)

    @property
    def devices(self) -> int:
        """Devices that shared the work; each is charged for every second."""
        return int(self.plan.get("devices", 1))

    def _devices(self, line: Record) -> int:
        """Devices that a ledger's line charges: a run may go on with others than it began with."""
        return int(line.get("devices", self.devices))

    @property
    def last(self) -> Record | None:
        """The last step's line."""
        return self.steps[-1] if self.steps else None

    @property
    def unit(self) -> str:
        """The governing unit of the budget; where the plan is lost, that of the option in the configuration."""
        given = next((unit for option, unit in UNITS.items() if option in self.config), "gpu-seconds")
        return str(self.plan.get("budget", {}).get("unit", given))

    @property
    def charged_s(self) -> float:
        """Charged GPU-seconds, by the ledger's last line: that of the last event, unless a step came after it."""
        events = [line for line in self.events if "charged_s" in line]
        last = max([*events[-1:], *self.steps[-1:]], key=lambda line: int(line["step"]), default={"charged_s": 0.0})
        return float(last["charged_s"])

    @cached_property
    def phase_s(self) -> dict[str, float]:
        """GPU-seconds of all steps by phase."""
        named = [*PHASES, *sorted({name for step in self.steps for name in step["phase_s"]} - {*PHASES})]
        return {
            name: sum(self._devices(step) * step["phase_s"].get(name, 0.0) for step in self.steps) for name in named
        }

    @cached_property
    def stage_sums(self) -> list[StageSum]:
        """What each stage took; a run by one method has one."""
        names = [stage["method"] for stage in self.plan.get("stages", ())]
        found, tokens, flops = [], 0, 0.0
        for number, group in groupby(self.steps, stage_of):
            steps = list(group)
            seconds = sum(self._devices(step) * sum(step["phase_s"].values()) for step in steps)
            taught = sum(self._devices(step) * step["phase_s"].get("teacher", 0.0) for step in steps)
            at_end = steps[-1]["tokens"]["real"], float(sum(steps[-1]["flops"].values()))
            name = names[number] if number < len(names) else f"stage {number + 1}"
            found.append(StageSum(number, name, len(steps), at_end[0] - tokens, seconds, taught, at_end[1] - flops))
            tokens, flops = at_end
        return found

    @property
    def step_s(self) -> float:
        """GPU-seconds of all steps together."""
        return sum(self.phase_s.values())

    @cached_property
    def event_sums(self) -> list[EventSum]:
        """Events by kind, in order of first appearance; kinds without a duration are left out."""
        sums: dict[tuple[str, bool], EventSum] = {}
        for event in self.events:
            seconds = self._devices(event) * (event.get("seconds") or 0.0)
            key = (event["event"], bool(event.get("charged")))
            before = sums.get(key, EventSum(*key[:1], 0, 0.0, key[1]))
            sums[key] = EventSum(key[0], before.times + 1, before.seconds + seconds, key[1])
        return [total for total in sums.values() if total.seconds > 0]

    @property
    def seconds_by_kind(self) -> dict[str, float]:
        """GPU-seconds by phase and charged event: the pieces of `charged_s`."""
        return {**self.phase_s, **{event.name: event.seconds for event in self.event_sums if event.charged}}

    @property
    def flops_per_s(self) -> float | None:
        """FLOPs over the GPU-seconds of the steps: what one device does."""
        return sum(self.last["flops"].values()) / self.step_s if self.last and self.step_s else None

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens over the wall-clock seconds of the steps, all devices together."""
        return self.last["tokens"]["real"] * self.devices / self.step_s if self.last and self.step_s else None

    @property
    def seconds_per_step(self) -> float | None:
        """Mean wall-clock seconds of a step."""
        return self.step_s / self.devices / len(self.steps) if self.steps else None

    @property
    def teacher_share(self) -> float | None:
        """The teacher's share of the steps' seconds."""
        return self.phase_s["teacher"] / self.step_s if self.step_s else None

    @property
    def peak_flops(self) -> float | None:
        """A device's peak FLOP/s by its data sheet, from the plan's MFU; None where no table knows the device."""
        mfu = self.plan.get("mfu")
        return self.plan["flops_per_s"] / mfu / self.devices if mfu else None

    def flops_per_token(self, part: str) -> float | None:
        """FLOPs of student, teacher or loss over the tokens read."""
        return self.last["flops"][part] / self.last["tokens"]["real"] if self.last else None

    @property
    def accounted_s(self) -> float:
        """Phases of all steps and charged events: what `charged_s` must be made of."""
        return sum(self.seconds_by_kind.values())

    @property
    def validations(self) -> list[Record]:
        """The validations among the metrics."""
        return [line for line in self.metrics if line.get("event") == "validation"]

    @property
    def last_validations(self) -> list[Record]:
        """Those of the last stage: losses of other methods do not compare with them."""
        found = self.validations
        return [line for line in found if stage_of(line) == stage_of(found[-1])]

    @property
    def sm_clock_mhz(self) -> float | None:
        """Mean of the readings of the slowest device's SM clock."""
        known = [line["sm_clock_mhz"] for line in self.metrics if line.get("sm_clock_mhz") is not None]
        return sum(known) / len(known) if known else None

    @property
    def throttle_shares(self) -> dict[str, float] | None:
        """The share of readings that each reason held the clocks down in; None where none was read."""
        readings = [line["throttle"] for line in self.metrics if line.get("throttle") is not None]
        if not readings:
            return None
        return {name: sum(name in found for found in readings) / len(readings) for name in THROTTLE_BITS}

    def spent(self, step: Record) -> float:
        """What was spent of the budget, in its unit, when `step` (a ledger line) ended."""
        if self.unit == "flops":
            return float(sum(step["flops"].values()))
        return float(step["tokens"]["real"] if self.unit == "tokens" else step["charged_s"])

    def spent_at(self) -> Callable[[int], float | None]:
        """A function from a step's number to what was spent when it ended."""
        spent = {step["step"]: self.spent(step) for step in self.steps} | {0: 0.0}
        return spent.get

    def bins(self) -> list[Bin]:
        """The steps as at most `MOST_BINS` points; about five steps a point if there are few steps."""
        size = max(-(-len(self.steps) // MOST_BINS), min(5, len(self.steps) // 20), 1)
        found, begin = [], 0
        for stage in self.stage_sums:
            end = begin + stage.steps
            found += [self._bin(start, min(start + size, end)) for start in range(begin, end, size)]
            begin = end
        return found

    def _bin(self, start: int, stop: int) -> Bin:
        steps = self.steps[start:stop]
        before = self.steps[start - 1]["tokens"]["real"] if start else 0
        losses = [step["loss"] for step in steps if step["loss"] is not None]
        seconds = sum(sum(step["phase_s"].values()) for step in steps)
        return Bin(
            steps=(steps[0]["step"], steps[-1]["step"]),
            stage=stage_of(steps[0]),
            spent=sum(self.spent(step) for step in steps) / len(steps),
            loss=sum(losses) / len(losses) if losses else None,
            low=min(losses, default=None),
            high=max(losses, default=None),
            lr=sum(step["lr"] for step in steps) / len(steps),
            tokens_per_s=(steps[-1]["tokens"]["real"] - before) / seconds if seconds else 0.0,
        )


def stage_of(line: Record) -> int:
    """The number of the stage that a line of the ledger or of the metrics belongs to."""
    return int(line.get("stage", 0))


def has_student(folder: Path) -> bool:
    """Whether a run exported its student: ``final/`` with its configuration and whole weights."""
    weights = list((folder / "final").glob("model*.safetensors"))
    return (folder / "final" / "config.json").is_file() and bool(weights) and all(map(_is_whole, weights))


def _is_whole(weights: Path) -> bool:
    try:
        with safe_open(weights, framework="numpy"):
            return True
    except (OSError, SafetensorError):
        return False


def read_run(folder: Path) -> Run:
    """Reads a run folder; files that are not there yet are empty, and so is a damaged one on which no parameter depends.

    Raises:
        ValueError: no such folder, or a damaged configuration or ledger.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"no run folder {str(folder)!r}: name a folder that python -m fastkd.run made")
    path, metrics = folder / ledger.NAME, folder / "metrics.jsonl"
    lines = ledger.read(path)
    if (folder / "final").is_dir() and not ledger.has_ended(lines):
        raise ValueError(f"{path} was cut: {ledger.REMEDY}")
    sound, damaged = sound_lines(metrics)
    if damaged:
        log.warning("%s has %d damaged lines, left out", metrics, damaged)
    return replace(
        read_opening(folder),
        steps=ledger.surviving(lines, path),
        events=[line for line in lines if "event" in line],
        metrics=sound,
    )


def refuse_links(folder: Path) -> None:
    """Refuse links in the place of what a run, its evaluation or a comparison writes: a folder from elsewhere would have it
    write outside. The folder itself may be a link.

    Raises:
        ValueError: naming the first link.
    """
    own = (path for path in folder.glob("*") if path.name.startswith(WRITTEN) or path.name.endswith(".partial"))
    deeper = (path for pattern in WRITTEN_DEEPER for path in folder.glob(pattern))
    if (link := next((path for path in (*own, *deeper) if path.is_symlink()), None)) is not None:
        raise ValueError(
            f"{link} is a link, and a run writes nothing outside its folder: put in its place what it leads to, or give another "
            "--output-dir"
        )


def find_run(folder: Path) -> Run | None:
    """`read_run`, but None where there is no run that can be read; a damaged one is warned of."""
    try:
        return read_run(folder) if folder.is_dir() else None
    except ValueError as error:
        log.warning("%s", error)
        return None


def read_opening(folder: Path) -> Run:
    """What a run began with; no step, event or metric is read.

    Raises:
        ValueError: its configuration cannot be read.
    """
    config = tomllib.loads(config_text(folder) or "")
    return Run(folder, config, _json(folder / "environment.json"), _json(folder / "plan.json"), [], [], [])


def _json(path: Path) -> Record:
    """What a file held when the run began, or holds now; empty, with a warning, if that is no JSON object."""
    text = begun_with(path.parent).get(path.name)
    if text is not None:
        return dict(json.loads(text))
    if is_object(path):
        return dict(json.loads(path.read_bytes()))
    if path.exists():
        log.warning("%s is damaged: going on without it", path)
    return {}


def is_object(path: Path) -> bool:
    """Whether a file is there and holds a JSON object."""
    try:
        return isinstance(json.loads(path.read_bytes()), dict)
    except (OSError, ValueError, RecursionError):
        return False
