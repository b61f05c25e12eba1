"""How a command line becomes the options of a run.

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from fastkd import config_file, methods
from fastkd.run_config import BUDGETS, FREE_TO_CHANGE, PRESENTATION, RunConfig

PRESETS = Path(__file__).parent / "presets"


@dataclass(frozen=True)
class ConfigFile:
    """What ``--config`` read: options of a run, and those of its method."""

    path: Path
    run: dict[str, Any]
    method_options: dict[str, Any]
    method: str

    @property
    def folder(self) -> Path | None:
        """The run folder that the file is in, where a run wrote it."""
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
    """argparse says usage and error over many lines; a user's mistake here is one line. A switch without a value means true."""

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
    """Scratch training reads no teacher but to start from it; the preset's lends only its tokenizer."""
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
