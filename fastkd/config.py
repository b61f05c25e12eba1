"""RunConfig: every option of a run, once, with its help text and unit; and how a command line becomes one.

Values come, in rising priority, from the dataclass's defaults, the preset (``presets/*.toml``), the file that ``--config``
names and the command line.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn, cast

import torch
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from fastkd import config_file, methods
from fastkd.budget import Budget, Charge, replayed_progress
from fastkd.data.batches import check_sizes, pack_size
from fastkd.terminal import LOST

PRESETS = Path(__file__).parent / "presets"
# The range of each number, both ends included; None where an option may be left out.
RANGES: dict[str, tuple[float, float]] = {
    "warmup": (0, 0.99),
    "dropout": (0, 0.99),
    "mask_rate": (0.01, 0.9),
    "seq_length": (8, 8192),
    "clip_norm": (0, 1e9),
    "lr": (1e-9, 10),
    "weight_decay": (0, 1),
    "adam_beta2": (0, 0.99999),
    "unique_tokens": (1, 1e15),
    "log_every": (1, 1e9),
    "checkpoint_minutes": (0, 1e9),
    "validations": (0, 1e6),
    "trace": (0, 1000),
    "seed": (0, 2**63 - 1),
}
BFLOAT16_STREAM = "--residual bfloat16 needs --dtype bfloat16: the products of a float32 run would round their inputs"
# Options that change what is shown or where it lies, not what is trained: no part of a run's name.
PRESENTATION = ("output_dir", "push_to_hub", "log_to", "log_every", "trace")
BUDGETS = ("budget_gpu_hours", "budget_flops", "budget_tokens")
FREE_TO_CHANGE = (*PRESENTATION, "checkpoint_minutes")  # when a run goes on


def option(default: Any, help: str) -> Any:
    """A dataclass field with its help text."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class RunConfig:
    """One run under one budget."""

    preset: str = option("auto", "auto (paper-6l with a CUDA device, else quickstart), or a file of fastkd/presets/")
    method: str = option("minilmv2", "a file of fastkd/methods/: mlm, logit_kd, tinybert, minilm, minilmv2")
    teacher: str | None = option(
        None, "hub id, Hugging Face folder or finished run folder; 'quickstart' names the packaged one"
    )
    tokenizer: str | None = option(None, "hub id or folder of the student's tokenizer; default: the teacher's")
    student: str = option("3L-384H-12A", "layers, width, heads and optionally intermediate width: 6L-768H-12A[-3072I]")
    corpus: list[str] = option(
        ["quickstart"],
        "hub datasets (id[:config[:split]]), or text, jsonl, parquet files and globs (.gz too), or one folder of shards; "
        "+join at a name's end joins its rows into running text",
    )
    unique_tokens: int | None = option(None, "use only so many tokens of the corpus, in whole documents")
    text_field: str = option("text", "field or column that holds a document in jsonl, parquet and hub datasets")
    budget_gpu_hours: float | None = option(None, "budget in GPU-hours, summed over devices")
    budget_flops: float | None = option(None, "budget in FLOPs of student, teacher and loss")
    budget_tokens: float | None = option(None, "budget in tokens read")
    charge: Charge = option(
        "loop", "what costs GPU-seconds: loop (first to last step, all included), compute (steps alone), all"
    )
    seed: int = option(0, "seed of initialisation, data order and masks")
    output_dir: str | None = option(
        None, "run folder; default runs/PRESET-METHOD-BUDGET, the same for the same command"
    )
    init_from_teacher: bool = option(
        False, "start the student from the teacher's layers, every other one for half its depth (equal widths)"
    )
    lr: float | None = option(None, "peak learning rate; default: the method's")
    warmup: float = option(0.06, "share of the budget over which the learning rate rises")
    weight_decay: float = option(0.01, "AdamW's weight decay of matrices")
    adam_beta2: float = option(0.98, "AdamW's second-moment decay")
    clip_norm: float = option(1.0, "largest 2-norm of the gradient; 0 does not clip")
    dropout: float = option(0.0, "student's dropout probability (0.1 in the paper)")
    seq_length: int = option(128, "tokens in a sequence at most, [CLS] and [SEP] included")
    mask_rate: float = option(0.15, "share of positions that are predicted")
    packing: Literal["documents", "full-sentences"] = option(
        "documents", "full-sentences lets documents share a sequence"
    )
    batch_tokens: int = option(4096, "tokens in a step, over all devices")
    micro_batch: str = option("auto", "tokens in one forward on one device, or auto: as many as memory takes")
    dtype: Literal["auto", "bfloat16", "float32"] = option(
        "auto", "compute dtype; auto: bfloat16 where it is faster than float32 (a CPU is measured)"
    )
    residual: Literal["float32", "bfloat16"] = option(
        "float32",
        "dtype of the student's residual stream; bfloat16 (of bfloat16 products alone) moves fewer bytes and rounds after "
        "every layer",
    )
    teacher_dtype: Literal["auto", "float8"] = option(
        "auto", "the teacher's; float8 (torchao): refused if it moves the loss by 1%% more than bfloat16 does"
    )
    attention: str | None = option(
        None,
        "flash_attn, varlen_attn or sdpa; default: for student and teacher the fastest that takes their head widths",
    )
    compile: bool | None = option(None, "torch.compile student and teacher; default: on CUDA only")
    checkpoint_minutes: float = option(10.0, "minutes between checkpoints; 0 saves after every step")
    validations: int = option(
        10, "validations over the budget, of which those are left out that would cost over 2%% of it"
    )
    replay: str | None = option(
        None, "ledger.jsonl of a finished run: take each step's progress from it instead of the clock"
    )
    push_to_hub: str | None = option(
        None,
        "at the end, push the student to the Hugging Face hub as NAME or OWNER/NAME; a finished run is pushed again",
    )
    log_to: list[str] = option([], "also log to tensorboard, wandb or trackio")
    log_every: int = option(10, "steps between lines of metrics.jsonl")
    trace: int = option(0, "write a torch.profiler trace of so many steps")

    @property
    def budget(self) -> Budget:
        """The one budget that is set.

        Raises:
            ValueError: none, several, or one that is not above zero.
        """
        hours, flops, tokens = self.budget_gpu_hours, self.budget_flops, self.budget_tokens
        given = [value for value in (hours, flops, tokens) if value is not None]
        if len(given) != 1:
            raise ValueError("give exactly one budget: --budget-gpu-hours, --budget-flops or --budget-tokens")
        if not 0 < given[0] < float("inf"):
            raise ValueError(f"a budget must be above zero and finite, got {given[0]:g}")
        if hours is not None:
            return Budget("gpu-seconds", hours * 3600)
        return Budget("flops", flops) if flops is not None else Budget("tokens", cast(float, tokens))

    def check(self) -> None:
        """Refuse values outside their range.

        Raises:
            ValueError: naming the option, its value and its range.
        """
        _ = self.budget
        check_texts(dataclasses.asdict(self))
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag} must lie between {low:g} and {high:g}, got {value:g}")
        if self.residual == "bfloat16" and self.dtype == "float32":
            raise ValueError(BFLOAT16_STREAM)
        self._check_batch()
        if self.replay is not None:
            replayed_progress(Path(self.replay))

    def _check_batch(self) -> None:
        """Refuse sizes that no number of ranks could take."""
        pack, micro = pack_size(self.seq_length), self.micro_batch
        if micro != "auto" and (not micro.isdecimal() or int(micro) == 0):
            raise ValueError(f"--micro-batch takes auto or a positive multiple of {pack} tokens, got {micro!r}")
        check_sizes(self.batch_tokens, pack if micro == "auto" else int(micro), pack, world=1)


def check_texts(values: dict[str, Any]) -> None:
    """Refuse a path whose bytes are no text: neither a configuration file nor a tokenizer could hold it.

    Raises:
        ValueError: naming the option and the path.
    """
    for name, value in values.items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and LOST.search(text):
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag} {text!r} is no UTF-8 text: rename it, or name its folder or a pattern")


@dataclass(frozen=True)
class ConfigFile:
    """What ``--config`` read: options of a run, and those of its method."""

    path: Path
    run: dict[str, Any]
    method_options: dict[str, Any]
    method: str

    @property
    def folder(self) -> Path | None:
        """The run folder that the file stands in, where a run wrote it."""
        written = self.path.name == "config.toml" and (self.path.parent / "environment.json").is_file()
        return self.path.parent if written else None


@dataclass(frozen=True)
class Resolved:
    """What a command line means: the run, its method's options, and how the preset was chosen."""

    run: RunConfig
    method: Any
    preset_reason: str
    explicit: frozenset[str]
    folder: Path | None = None  # of the run whose config.toml was read, where this is the same run

    def default_output_dir(self) -> Path:
        """``runs/PRESET-METHOD-BUDGET[-HASH]``: the hash stands for all other options given, if any."""
        if self.folder is not None:
            return self.folder
        budget = self.run.budget
        amount = {
            "gpu-seconds": f"{budget.amount / 3600:g}h",
            "flops": f"{budget.amount:g}flop",
            "tokens": f"{budget.amount:g}tok",
        }
        name = f"{self.run.preset}-{self.run.method}-{amount[budget.unit]}".replace("+", "")
        named = {"preset", "method", *BUDGETS, *PRESENTATION}
        values = dataclasses.asdict(self.run) | dataclasses.asdict(self.method)
        others = {key: values[key] for key in sorted(self.explicit - named)}
        if others:
            name += "-" + hashlib.sha256(json.dumps(others).encode()).hexdigest()[:6]
        return Path("runs") / name

    def command(self) -> list[str]:
        """The command line that means this run."""
        values, argv = dataclasses.asdict(self.run) | dataclasses.asdict(self.method), ["python", "-m", "fastkd.run"]
        for name in sorted(self.explicit):
            value = values[name]
            if value is None or value == []:
                continue
            argv.append("--" + name.replace("_", "-"))
            if isinstance(value, bool):
                argv += [] if value else ["false"]
            else:
                argv += [str(item) for item in (value if isinstance(value, list) else [value])]
        return argv

    def to_toml(self) -> str:
        """The resolved configuration, as config.toml holds it; options that are not set are left out."""
        return config_file.to_toml(dataclasses.asdict(self.run), dataclasses.asdict(self.method))

    def continues(self, toml: str) -> bool:
        """Whether a config.toml, perhaps an older one, means this run: an option that it lacks had its default."""
        try:
            run = tomllib.loads(toml)
        except tomllib.TOMLDecodeError:
            return False
        method = run.pop(config_file.METHOD_OPTIONS, {})
        return _choices(self.run) == _choices(RunConfig(), run) and _choices(self.method) == _choices(
            type(self.method)(), method
        )


class _Parser(HfArgumentParser):
    """argparse says usage and error over many lines; a user's mistake here is one line. A switch alone means true."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        for action in self._actions:
            if action.type is string_to_bool:
                action.nargs, action.const = "?", True

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


@dataclass(frozen=True)
class _Nothing:
    """No options beside those of a run."""


def parse(argv: Sequence[str], prog: str = "python -m fastkd.run") -> Resolved:
    """Read a command line.

    Raises:
        ValueError: an unknown preset, method or option, a value of the wrong kind, or one out of range.
    """
    return parse_with(_Nothing, argv, prog)[1]


def parse_with(own: Any, argv: Sequence[str], prog: str) -> tuple[Any, Resolved]:
    """Read a command line that holds the options of ``own`` (a dataclass) beside those of one run: an ``own``, the run.

    Raises:
        ValueError: an unknown preset, method or option, a value of the wrong kind, or one out of range.
    """
    chosen, _ = _namespace(_parser([RunConfig], prog, add_help=False), argv)
    file = read_config(chosen.pop("config", None))
    module = methods.load(_layers(chosen, file)[0]["method"])
    parser = _parser(
        [RunConfig, module.Config, own], prog, epilog="--method NAME --help lists another method's options."
    )
    explicit, unknown = _namespace(parser, argv)
    if unknown:
        raise ValueError(_explain_unknown(unknown[0], module.METHOD.name))
    explicit.pop("config", None)
    names = {f.name for f in dataclasses.fields(own)}
    mine = own(**{k: v for k, v in explicit.items() if k in names})
    return mine, resolve({k: v for k, v in explicit.items() if k not in names}, file)


def gives_budget(argv: Sequence[str], prog: str) -> bool:
    """Whether a command line has a budget, or the file that its --config names.

    Raises:
        ValueError: as ``read_config``.
    """
    given, _ = _namespace(_parser([RunConfig], prog, add_help=False), argv)
    file = read_config(given.get("config"))
    return any(name in given or (file is not None and name in file.run) for name in BUDGETS)


def resolve(explicit: dict[str, Any], file: ConfigFile | None = None) -> Resolved:
    """The run that explicit options mean, on top of a file, their preset and the defaults.

    Raises:
        ValueError: an unknown preset or method, or a value out of range.
    """
    values, reason = _layers(explicit, file)
    module = methods.load(values["method"])
    if not module.METHOD.uses_teacher:
        values = _without_teacher(values, explicit)
    run = RunConfig(**_fields(RunConfig, values))
    run.check()
    resolved = Resolved(run, module.Config(**_fields(module.Config, values)), reason, frozenset(explicit))
    return resolved if file is None else _of_file(resolved, file)


def _layers(explicit: dict[str, Any], file: ConfigFile | None) -> tuple[dict[str, Any], str]:
    """All values that are given: preset, file, command line, each above the one before; and how the preset was chosen.

    A preset that the command line names is above the file. A layer with a budget takes the place of other budgets.
    """
    given = dict(file.run) if file else {}
    name, reason = _choose_preset(explicit.get("preset", given.get("preset", "auto")))
    preset = read_preset(name)
    if file and "preset" in given and "preset" not in explicit:
        reason = f"named by {file.path}"
    layers = [given, preset, explicit] if "preset" in explicit else [preset, given, explicit]
    method = next(layer["method"] for layer in (*reversed(layers), {"method": RunConfig.method}) if "method" in layer)
    if file and method == file.method:
        given |= file.method_options
    values: dict[str, Any] = {}
    for layer in layers:
        if any(budget in layer for budget in BUDGETS):
            values = {key: value for key, value in values.items() if key not in BUDGETS}
        values |= layer
    return values | {"preset": name, "method": method}, reason


def _of_file(resolved: Resolved, file: ConfigFile) -> Resolved:
    """A run read from a file: what is explicit of it is what its preset and the defaults do not say."""
    values, plain = (
        dataclasses.asdict(each.run) | dataclasses.asdict(each.method) for each in (resolved, _plain(resolved))
    )
    given = (file.run.keys() | file.method_options) & values.keys()
    explicit = resolved.explicit | {"preset", "method"} | {name for name in given if values[name] != plain[name]}
    explicit |= {"init_from_teacher"} if resolved.run.init_from_teacher else set()
    resolved = dataclasses.replace(resolved, explicit=frozenset(explicit))
    same = file.folder is not None and resolved.continues(file.path.read_text(encoding="utf-8"))
    return dataclasses.replace(resolved, folder=file.folder if same else None)


def _plain(resolved: Resolved) -> Resolved:
    """The run of the same preset, method and start with nothing else given."""
    run = resolved.run
    alike = {"preset": run.preset, "method": run.method, "init_from_teacher": run.init_from_teacher}
    return resolve(alike | {"budget_tokens": 1.0})


def read_config(name: str | None) -> ConfigFile | None:
    """What ``--config`` names: a run's config.toml, or some options by hand; a method's own in [method_options] or not.

    Raises:
        ValueError: not to be read, or unknown keys, wrong kinds and values out of range; naming the file and the key.
    """
    if name is None:
        return None
    path, alike = Path(name), ("preset", "method")
    values = config_file.read(path)
    table = values.pop(config_file.METHOD_OPTIONS, {})
    if not isinstance(table, dict):
        raise ValueError(f"{path}: {config_file.METHOD_OPTIONS} takes a table, got {table!r}")
    config_file.check_kinds(path, {key: values[key] for key in alike if key in values}, RunConfig)
    try:
        method = _layers(values, None)[0]["method"]
        module = methods.load(method)
        options = config_file.check_kinds(path, table, module.Config)
        values = config_file.check_kinds(path, values, RunConfig, module.Config)
        own = {f.name for f in dataclasses.fields(module.Config)}
        file = ConfigFile(
            path,
            {key: value for key, value in values.items() if key not in own},
            options | {key: value for key, value in values.items() if key in own},
            method,
        )
        budget = {} if any(name in values for name in BUDGETS) else {"budget_tokens": 1.0}
        resolve(budget | {name: values[name] for name in ("teacher",) if name in values}, file)
    except ValueError as error:
        raise ValueError(str(error) if str(error).startswith(f"{path}: ") else f"{path}: {error}") from error
    if file.folder is not None:
        file.run.pop("output_dir", None)
    return file


def _shared_of(file: ConfigFile | None, own: set[str]) -> dict[str, Any]:
    """What a file says for every row of a comparison: no method, budget or folder, and nothing that is ``own`` to it."""
    if file is None:
        return {}
    resolved = resolve({"budget_tokens": 1.0}, file)
    values = dataclasses.asdict(resolved.run) | dataclasses.asdict(resolved.method)
    named = resolved.explicit - own - {"method", "charge", "replay", *BUDGETS}
    return {name: values[name] for name in named}


def split_options(argv: Sequence[str], own: Any, prog: str) -> tuple[Any, dict[str, Any]]:
    """Read a command line that holds the options of ``own`` (a dataclass) beside those of runs and of all methods.

    Returns an ``own`` and the run's explicit options.

    Raises:
        ValueError: an unknown option, or a value of the wrong kind.
    """
    types: list[Any] = [RunConfig, *(methods.load(name).Config for name in methods.available()), own]
    given, unknown = _namespace(_parser(types, prog, conflict_handler="resolve"), argv)
    if unknown:
        raise ValueError(f"unknown option {unknown[0]!r}: --help lists them")
    names = {f.name for f in dataclasses.fields(own)}
    shared = _shared_of(read_config(given.pop("config", None)), names)
    return own(**{k: v for k, v in given.items() if k in names}), shared | {
        k: v for k, v in given.items() if k not in names
    }


def _without_teacher(values: dict[str, Any], explicit: dict[str, Any]) -> dict[str, Any]:
    """Scratch training reads no teacher but to start from it; the preset's lends its tokenizer alone."""
    if values.get("init_from_teacher"):
        return values
    if explicit.get("teacher"):
        raise ValueError(
            f"--method {values['method']} trains without a teacher: leave --teacher out, start from its layers with "
            "--init-from-teacher, or choose another method"
        )
    return values | {"tokenizer": values.get("tokenizer") or values.get("teacher"), "teacher": None}


def _choices(options: Any, changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """What options with some changes say of what is trained."""
    values = dataclasses.asdict(options) | (changes or {})
    return {name: value for name, value in values.items() if value is not None and name not in FREE_TO_CHANGE}


def _namespace(parser: argparse.ArgumentParser, argv: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The options given on the command line, and what the parser does not know."""
    for action in parser._actions:
        if action.dest != "help":
            action.default = argparse.SUPPRESS
    known, unknown = parser.parse_known_args(list(argv))
    return vars(known), unknown


def _parser(types: list[Any], prog: str, **options: Any) -> _Parser:
    """A parser of the dataclasses' options and of ``--config``."""
    parser = _Parser(types, prog=prog, allow_abbrev=False, **options)
    text = "options from a TOML file, such as a run's config.toml; those of the command line override them"
    parser.add_argument("--config", metavar="FILE", help=text)
    return parser


def _choose_preset(name: str) -> tuple[str, str]:
    if name != "auto":
        return name, "named by --preset"
    if torch.cuda.is_available():
        return "paper-6l", "a CUDA device is at hand"
    return "quickstart", "no CUDA device is at hand"


def read_preset(name: str) -> dict[str, Any]:
    """The values of a preset.

    Raises:
        ValueError: no such preset.
    """
    known = {path.stem: path for path in sorted(PRESETS.glob("*.toml"))}
    if name not in known:
        raise ValueError(f"unknown preset {name!r}: choose auto, {', '.join(known)}, or give a file with --config")
    return config_file.read(known[name])


def _fields(cls: Any, values: dict[str, Any]) -> dict[str, Any]:
    return {f.name: values[f.name] for f in dataclasses.fields(cls) if f.name in values}


def _explain_unknown(token: str, method: str) -> str:
    name = token.lstrip("-").split("=")[0].replace("-", "_")
    owners = [m for m in methods.available() if name in {f.name for f in dataclasses.fields(methods.load(m).Config)}]
    if token.startswith("-") and owners:
        return f"--method {method} does not read {token}; it is an option of {', '.join(owners)}"
    return f"unknown option {token!r}: --help lists them"
