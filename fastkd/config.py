"""How a command line becomes the options of a run.

Values come from the dataclass's defaults, the preset (``presets/*.toml``), the file that ``--config`` names and the command
line; the later ones override the earlier ones.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
import tomllib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from fastkd import config_file, methods, quickstart, recipe
from fastkd.cli import Parser, unknown_option
from fastkd.data import corpus
from fastkd.run_config import BUDGETS, FREE_TO_CHANGE, PRESENTATION, RunConfig

# One of them is there if CUDA (also under Windows and on Jetson) or ROCm can work.
GPU_FILES = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg", "/dev/nvmap", "/dev/kfd")
AUTO = {"paper-6l": "a CUDA device is at hand", "quickstart": "no CUDA device is at hand"}  # what --preset auto means
T = TypeVar("T")


@dataclass(frozen=True)
class ConfigFile:
    """The file that ``--config`` names: options of a run, and those of its method."""

    path: Path
    run: dict[str, Any]
    method_options: dict[str, Any]
    method: str

    @property
    def folder(self) -> Path | None:
        """The run folder that the file is in, None if no run wrote the file."""
        written = self.path.name == "config.toml" and (self.path.parent / "environment.json").is_file()
        return self.path.parent if written else None


@dataclass(frozen=True)
class Resolved:
    """What a command line means: the run, its methods' options, and how the preset was chosen."""

    run: RunConfig
    method: Any  # `recipe.options_class` of the run's method or methods
    preset_reason: str
    explicit: frozenset[str]
    folder: Path | None = None  # of the run whose config.toml was read, if this is the same run

    @property
    def output_dir(self) -> Path:
        """The run folder."""
        return Path(self.run.output_dir or self.default_output_dir())

    def default_output_dir(self) -> Path:
        """``runs/PRESET-METHOD-BUDGET[-HASH]``, with a hash of all other options that were given."""
        if self.folder is not None:
            return self.folder
        budget = self.run.budget
        amount = {
            "gpu-seconds": f"{budget.amount / 3600:g}h",
            "flops": f"{budget.amount:g}flop",
            "tokens": f"{budget.amount:g}tok",
        }
        name = f"{self.run.preset}-{recipe.slug(self.run.method)}-{amount[budget.unit]}".replace("+", "")
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
        """The text of config.toml: all options, but those that are None."""
        return config_file.to_toml(dataclasses.asdict(self.run), dataclasses.asdict(self.method))

    def continues(self, toml: str) -> bool:
        """Whether a config.toml means this run."""
        return not self.changes(toml)

    def require_same(self, toml: str, folder: Path) -> None:
        """Refuse to go on in a folder whose config.toml is of other options.

        Raises:
            ValueError: naming each option that has changed, with its old and its new value.
        """
        if changes := self.changes(toml):
            raise ValueError(
                f"{folder} holds a run of another configuration ({'; '.join(changes)}): give its own options to go on with it, "
                "or another --output-dir"
            )

    def changes(self, toml: str) -> list[str]:
        """The options that decide what is trained and are others than in a config.toml, as ``config_file.differences`` writes
        them. An older one may lack options: these had their defaults.
        """
        try:
            run = tomllib.loads(toml)
        except tomllib.TOMLDecodeError as error:
            return [f"it is no TOML: {error}"]
        method = run.pop(config_file.METHOD_OPTIONS, {})
        changed = config_file.differences(_choices(RunConfig(), run), _choices(self.run))
        other = run.get("method", RunConfig.method) != self.run.method  # its options are others too
        if other or not isinstance(method, dict):
            return changed or [f"{config_file.METHOD_OPTIONS}: {method!r}"]
        return changed + config_file.differences(_choices(type(self.method)(), method), _choices(self.method))


@dataclass(frozen=True)
class _Nothing:
    """No options besides those of a run."""


def parse(argv: Sequence[str], prog: str = "python -m fastkd.run") -> Resolved:
    """Read a command line.

    Raises:
        ValueError: an unknown preset, method or option, a value of the wrong kind, or one out of range.
    """
    return parse_with(_Nothing, argv, prog)[1]


def parse_with(own: Any, argv: Sequence[str], prog: str, *, needs_budget: bool = True) -> tuple[Any, Resolved]:
    """Read a command line that holds the options of ``own`` (a dataclass) besides those of one run: an ``own``, the run.

    Raises:
        ValueError: an unknown preset, method or option, a value of the wrong kind, or one out of range.
    """
    chosen, _ = _parser([RunConfig], prog, add_help=False).given(argv)
    file = read_config(chosen.pop("config", None))
    method = _settled(chosen, file, lambda preset: _layers(chosen, file, preset)["method"])
    epilog = "--method NAME --help lists another method's options."
    explicit, unknown = _parser([RunConfig, recipe.options_class(method), own], prog, epilog=epilog).given(argv)
    if unknown:
        raise _unknown(unknown[0], method)
    explicit.pop("config", None)
    mine, explicit = _divided(own, explicit)
    return mine, resolve(explicit, file, needs_budget=needs_budget)


def split_options(
    argv: Sequence[str], own: Any, prog: str, check: Callable[[Any, dict[str, Any], Collection[str]], None]
) -> tuple[Any, dict[str, Any]]:
    """Read a command line that holds the options of ``own`` (a dataclass) besides those of runs and of all methods.

    Returns an ``own`` and the runs' explicit options, once ``check`` has seen both, and which of these are not from a file.

    Raises:
        ValueError: an unknown option, a value of the wrong kind, or what ``check`` raises.
    """
    classes = [RunConfig, *(methods.load(name).Config for name in methods.available()), own]
    given, unknown = _parser(classes, prog, conflict_handler="resolve").given(argv)
    if unknown:
        raise unknown_option(unknown[0])
    file = read_config(given.pop("config", None))
    mine, explicit = _divided(own, given)

    def with_file(preset: str) -> dict[str, Any]:
        shared = _shared_of(file, preset, {f.name for f in dataclasses.fields(own)}) | explicit
        check(mine, {"preset": preset} | shared, explicit)
        return shared

    return mine, _settled({}, file, with_file)


def _parser(classes: Sequence[Any], prog: str, **settings: Any) -> Parser:
    """A parser of the dataclasses' options and of ``--config``."""
    parser = Parser(classes, prog, **settings)
    text = "options from a TOML file, such as a run's config.toml; those of the command line override them"
    parser.add_argument("--config", metavar="FILE", help=text)
    return parser


def _divided(own: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Options given on a command line: those of ``own`` as an ``own``, and the others."""
    names = {f.name for f in dataclasses.fields(own)}
    mine = own(**{name: value for name, value in given.items() if name in names})
    return mine, {name: value for name, value in given.items() if name not in names}


def _unknown(word: str, method: str) -> ValueError:
    """The error for a word that a run does not know. It may be an option of another method."""
    name = word.lstrip("-").split("=")[0].replace("-", "_")
    owners = [m for m in methods.available() if name in {f.name for f in dataclasses.fields(methods.load(m).Config)}]
    if word.startswith("-") and owners:
        return ValueError(f"--method {method} does not read {word}; it is an option of {', '.join(owners)}")
    return unknown_option(word)


def require_inputs(run: RunConfig) -> None:
    """Refuse what a run names on this machine and lacks: the packages of the quickstart preset, and text files.

    Raises:
        ValueError: naming it and the remedy.
    """
    quickstart.require_named((run.teacher, run.tokenizer), run.corpus)
    if corpus.shard_folder(run.corpus) is None:
        corpus.sources(run.corpus)


# ---- layers -----------------------------------------------------------------------------------------------------


def resolve(explicit: dict[str, Any], file: ConfigFile | None = None, *, needs_budget: bool = True) -> Resolved:
    """The run that explicit options mean, on top of a file, their preset and the defaults.

    Raises:
        ValueError: an unknown preset or method, or a value out of range.
    """
    return _settled(explicit, file, lambda preset: _resolved(explicit, file, preset, needs_budget))


def _settled(explicit: dict[str, Any], file: ConfigFile | None, work: Callable[[str], T]) -> T:
    """The result of ``work`` with the preset that is meant.

    ``auto`` means one of two presets, by whether PyTorch finds a CUDA device. PyTorch takes seconds to load, so it is asked
    only on a machine with a driver, and only if the two presets come to different results or mistakes.
    """
    name = _preset_named(explicit, file)
    if name != "auto":
        return work(name)
    answers = {preset: _tried(work, preset) for preset in AUTO}
    answer, mistake = answers["quickstart"]
    has_driver = sys.platform != "linux" or any(map(os.path.exists, GPU_FILES))
    if has_driver and answers["paper-6l"] != answers["quickstart"]:
        import torch

        answer, mistake = answers["paper-6l" if torch.cuda.is_available() else "quickstart"]
    if mistake is not None:
        raise ValueError(mistake)
    return cast(T, answer)


def _tried(work: Callable[[str], T], preset: str) -> tuple[T | None, str | None]:
    """The result of ``work`` and None, or None and the message of the ValueError that it raises."""
    try:
        return work(preset), None
    except ValueError as error:
        return None, str(error)


def _preset_named(explicit: dict[str, Any], file: ConfigFile | None) -> str:
    """The preset that the command line or else the file names; ``auto`` if none does."""
    return str(explicit.get("preset", file.run.get("preset", "auto") if file else "auto"))


def _resolved(explicit: dict[str, Any], file: ConfigFile | None, preset: str, needs_budget: bool) -> Resolved:
    """``resolve`` with a preset in place of ``auto``."""
    values = _layers(explicit, file, preset)
    if not recipe.uses_teacher(values["method"]):
        values = _without_teacher(values, explicit)
    run = RunConfig(**_fields(RunConfig, values))
    run.check(needs_budget=needs_budget)
    if _preset_named(explicit, file) == "auto":
        reason = AUTO[preset]
    else:
        reason = f"named by {'--preset' if file is None or 'preset' in explicit else file.path}"
    options = recipe.options_class(run.method)
    resolved = Resolved(run, options(**_fields(options, values)), reason, frozenset(explicit))
    return resolved if file is None else _of_file(resolved, file)


def _layers(explicit: dict[str, Any], file: ConfigFile | None, preset: str) -> dict[str, Any]:
    """All values that are given: preset, file, command line. Each layer overrides the one before.

    A preset that the command line names overrides the file. A layer with a budget drops the budgets of those before it.
    """
    given, chosen = dict(file.run) if file else {}, config_file.read_preset(preset)
    layers = [given, chosen, explicit] if "preset" in explicit else [chosen, given, explicit]
    named = next(layer["method"] for layer in (*reversed(layers), {"method": RunConfig.method}) if "method" in layer)
    method = recipe.spelled(named)
    if file and method == file.method:
        given |= file.method_options
    values: dict[str, Any] = {}
    for layer in layers:
        if any(budget in layer for budget in BUDGETS):
            values = {key: value for key, value in values.items() if key not in BUDGETS}
        values |= layer
    return values | {"preset": preset, "method": method}


def _of_file(resolved: Resolved, file: ConfigFile) -> Resolved:
    """A run read from a file: its explicit options are those that differ from its preset and the defaults."""
    values, plain = (
        dataclasses.asdict(each.run) | dataclasses.asdict(each.method) for each in (resolved, _plain(resolved))
    )
    given = (file.run.keys() | file.method_options) & values.keys()
    explicit = resolved.explicit | {"preset", "method"} | {name for name in given if values[name] != plain[name]}
    explicit |= {"init_from_teacher"} if resolved.run.init_from_teacher else set()
    resolved = dataclasses.replace(resolved, explicit=frozenset(explicit))
    same = file.folder is not None and resolved.continues(config_file.text(file.path))
    return dataclasses.replace(resolved, folder=file.folder if same else None)


def _plain(resolved: Resolved) -> Resolved:
    """The run with the same preset, method and start, and no other option given."""
    run = resolved.run
    alike = {"preset": run.preset, "method": run.method, "init_from_teacher": run.init_from_teacher}
    return resolve(alike, needs_budget=False)


def _without_teacher(values: dict[str, Any], explicit: dict[str, Any]) -> dict[str, Any]:
    """Values without a teacher, which scratch training reads only to start from. Its tokenizer is kept."""
    if values.get("init_from_teacher"):
        return values
    if explicit.get("teacher"):
        raise ValueError(
            f"--method {values['method']} trains without a teacher: leave --teacher out, start from its layers with "
            "--init-from-teacher, or choose another method"
        )
    return values | {"tokenizer": values.get("tokenizer") or values.get("teacher"), "teacher": None}


def _fields(cls: Any, values: dict[str, Any]) -> dict[str, Any]:
    return {f.name: values[f.name] for f in dataclasses.fields(cls) if f.name in values}


def _choices(options: Any, changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """The options that decide what is trained, with some changes."""
    values = dataclasses.asdict(options) | (changes or {})
    return {name: value for name, value in values.items() if value is not None and name not in FREE_TO_CHANGE}


# ---- files ------------------------------------------------------------------------------------------------------


def read_config(name: str | None) -> ConfigFile | None:
    """Read the file that ``--config`` names: a run's config.toml, or one written by hand.

    Options of a method may be in the table [method_options] or beside the others.

    Raises:
        ValueError: a file that cannot be read, an unknown key, a wrong type or a value out of range; names file and key.
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
        file = _settled(values, None, lambda preset: _config_of(path, values, table, preset))
    except ValueError as error:
        raise ValueError(str(error) if str(error).startswith(f"{path}: ") else f"{path}: {error}") from error
    if file.folder is not None:
        file.run.pop("output_dir", None)
    return file


def _config_of(path: Path, values: dict[str, Any], table: dict[str, Any], preset: str) -> ConfigFile:
    """The file of these values and this table of method options, checked with a preset."""
    method = _layers(values, None, preset)["method"]
    read = recipe.options_class(method)
    options = config_file.check_kinds(path, table, read)
    values = config_file.check_kinds(path, values, RunConfig, read)
    own = {f.name for f in dataclasses.fields(read)}
    run = {key: value for key, value in values.items() if key not in own}
    options |= {key: value for key, value in values.items() if key in own}
    file = ConfigFile(path, run, options, method)
    _resolved({key: run[key] for key in ("teacher",) if key in run}, file, preset, needs_budget=False)
    return file


def _shared_of(file: ConfigFile | None, preset: str, own: set[str]) -> dict[str, Any]:
    """The options in a file that hold for every row of a comparison: no method, no budget, none of the comparison's ``own``."""
    if file is None:
        return {}
    resolved = _resolved({}, file, preset, needs_budget=False)
    values = dataclasses.asdict(resolved.run) | dataclasses.asdict(resolved.method)
    named = resolved.explicit - own - {"method", "charge", "replay", *BUDGETS}
    return {name: values[name] for name in named}
