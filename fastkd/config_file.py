"""Options in a TOML file: a run's config.toml, what ``--config`` names, and the presets."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import tomli_w

from fastkd.begun import begun_with

PRESETS = Path(__file__).parent / "presets"
METHOD_OPTIONS = "method_options"
KINDS = {str: "text in quotes", int: "a whole number", float: "a number", bool: "true or false"}


def to_toml(values: dict[str, Any], method_options: dict[str, Any]) -> str:
    """The text of config.toml: options, and a table of their method's options. None is left out: TOML has no null."""
    given, table = ({k: v for k, v in each.items() if v is not None} for each in (values, method_options))
    return tomli_w.dumps(given | {METHOD_OPTIONS: table})


def read(path: Path) -> dict[str, Any]:
    """The file's values.

    Raises:
        ValueError: the file cannot be read or is not TOML; names the file and the line.
    """
    return tomllib.loads(text(path))


def text(path: Path) -> str:
    """The file's text; of a run's config.toml that is damaged, the text that the run began with. Raises as ``read``."""
    try:
        found = path.read_text(encoding="utf-8")
        tomllib.loads(found)
        return found
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        if copy := begun_with(path.parent).get(path.name):
            return copy
        if isinstance(error, UnicodeDecodeError):
            raise ValueError(f"{path} cannot be read: it is no UTF-8 text") from error
        raise ValueError(f"{path} is no TOML: {error}") from error


def read_preset(name: str) -> dict[str, Any]:
    """The values of a preset.

    Raises:
        ValueError: no such preset.
    """
    known = {path.stem: path for path in sorted(PRESETS.glob("*.toml"))}
    if name not in known:
        raise ValueError(f"unknown preset {name!r}: choose auto, {', '.join(known)}, or give a file with --config")
    return read(known[name])


def check_kinds(path: Path, values: dict[str, Any], *classes: Any) -> dict[str, Any]:
    """The values, whole numbers as floats where a field is a float. Each must be a field of a dataclass, and of its type.

    Raises:
        ValueError: naming the file and the key.
    """
    known = kinds(*classes)
    for key, value in values.items():
        if key not in known:
            raise ValueError(f"{path}: unknown key {key!r}: `fastkd run --help` lists the options")
        if not fits(value, known[key]):
            raise ValueError(f"{path}: {key} takes {in_words(known[key])}, got {value!r}")
    return {key: float(value) if is_number(known[key]) else value for key, value in values.items()}


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The options that differ, each with its old and its new value: ``lr: 0.0005 → 0.001``."""
    names = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    return [f"{name}: {_shown(before.get(name))} → {_shown(after.get(name))}" for name in names]


def _shown(value: Any) -> str:
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return "not set" if value is None else text if text.isprintable() and text else repr(value)


def kinds(*classes: Any) -> dict[str, Any]:
    """The fields of dataclasses and their types."""
    return {f.name: get_type_hints(cls)[f.name] for cls in classes for f in dataclasses.fields(cls)}


def fits(value: Any, kind: Any) -> bool:
    """Whether a value of a TOML file has a field's type. A float may be written as a whole number."""
    origin, choices = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(fits(value, choice) for choice in choices)
    if origin is Literal:
        return value in choices
    if origin is list:
        return isinstance(value, list) and all(fits(item, choices[0]) for item in value)
    if kind is float:
        return type(value) in (int, float)
    return type(value) is kind


def is_number(kind: Any) -> bool:
    """Whether a type is float or ``float | None``."""
    return kind is float or float in get_args(kind)


def in_words(kind: Any) -> str:
    """A type in words."""
    origin, choices = get_origin(kind), [choice for choice in get_args(kind) if choice is not NoneType]
    if origin is Literal:
        return ", ".join(repr(choice) for choice in choices[:-1]) + f" or {choices[-1]!r}"
    if origin is list:
        return f"a list of {in_words(choices[0])}"
    return KINDS[kind] if kind in KINDS else " or ".join(in_words(choice) for choice in choices)
