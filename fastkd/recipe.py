"""A recipe: the methods that a run trains by, one after the other, each for a share of the budget: ``minilmv2:0.3>mlm``.

A part of the run with one method is a stage. One student goes through all of them, in one order of the data, under one budget
and one ledger. Which stage a step belongs to is a function of its progress alone. Imports no torch: ``--help`` reads it.
"""

from __future__ import annotations

import dataclasses
import functools
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_type_hints

from fastkd import methods

THEN = ">"  # between two methods; a comma means the same where no rows are listed


@dataclass(frozen=True)
class Stage:
    """A method for the steps whose progress is above ``start`` and at most ``end``."""

    method: str
    options: Any  # the method's Config
    start: float
    end: float
    goes_on: bool  # with the optimiser of the stage before, which is an earlier part of the same method

    @property
    def share(self) -> float:
        """Its share of the budget."""
        return self.end - self.start


def spelled(spec: str) -> str:
    """A recipe in its one spelling, which config.toml and folders have: no blanks, `THEN` between methods.

    Raises:
        ValueError: an unknown method, or shares that leave no budget for the last one.
    """
    return THEN.join(name if share is None else f"{name}:{share}" for name, share in _parse(spec))


def slug(spec: str) -> str:
    """A recipe as a part of a folder's name."""
    return spec.replace(":", "-").replace(THEN, "-")


def names(spec: str) -> list[str]:
    """The methods of a recipe, in order; one may come twice."""
    return [name for name, _ in _parse(spec)]


def uses_teacher(spec: str) -> bool:
    """Whether any of a recipe's methods distils from a teacher."""
    return any(methods.load(name).METHOD.uses_teacher for name in names(spec))


def default_rates(spec: str) -> list[float]:
    """The learning rate of each of a recipe's methods."""
    return [float(methods.load(name).METHOD.default_lr) for name in names(spec)]


def _parse(spec: str) -> list[tuple[str, float | None]]:
    """Methods and shares; the last has none: it takes what is left."""
    found: list[tuple[str, float | None]] = []
    *parts, last = spec.replace(",", THEN).split(THEN)
    for part in parts:
        name, colon, share = part.partition(":")
        if not colon:
            raise ValueError(
                f"--method {spec!r}: say for which share of the budget {name.strip()!r} trains, such as {name.strip()}:0.3"
            )
        found.append((name.strip(), _share(spec, share)))
    if ":" in last:
        raise ValueError(
            f"--method {spec!r}: the last method takes what is left of the budget: give it no share, or write "
            f"'{spec}{THEN}mlm', in quotes"
        )
    found.append((last.strip(), None))
    if sum(share or 0.0 for _, share in found) >= 1:
        raise ValueError(f"--method {spec!r}: the shares leave nothing of the budget for {last.strip()}: lower them")
    for name, _ in found:
        methods.load(name)
    return found


def _share(spec: str, text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise ValueError(f"--method {spec!r}: a share of the budget is a number between 0 and 1, got {text.strip()!r}")
    return share


# ---- options ------------------------------------------------------------------------------------------------


@functools.cache
def options_class(spec: str) -> Any:
    """The dataclass of a recipe's options: those of its methods together. One that several methods read has one value."""
    classes = list(dict.fromkeys(methods.load(name).Config for name in names(spec)))
    if len(classes) == 1:
        return classes[0]
    fields: dict[str, tuple[str, Any, Any]] = {}
    for cls in classes:
        kinds = get_type_hints(cls)
        for each in dataclasses.fields(cls):
            text = each.metadata["help"]
            if each.name in fields:
                if (fields[each.name][1], fields[each.name][2].default) != (kinds[each.name], each.default):
                    raise ValueError(
                        f"--method {spec!r}: its methods differ in the type or the default of --{each.name.replace('_', '-')}: "
                        "they cannot be stages of one run"
                    )
                text = f"{fields[each.name][2].metadata['help']}; {text}"
            fields[each.name] = (
                each.name, kinds[each.name], dataclasses.field(default=each.default, metadata={"help": text})
            )  # fmt: skip

    def check(self: Any) -> None:
        for cls in classes:
            _part(self, cls)

    return dataclasses.make_dataclass("Options", fields.values(), namespace={"__post_init__": check}, frozen=True)


def _part(options: Any, cls: Any) -> Any:
    """The options that one method reads."""
    return cls(**{each.name: getattr(options, each.name) for each in dataclasses.fields(cls)})


# ---- stages -------------------------------------------------------------------------------------------------


def stages(spec: str, options: Any) -> tuple[Stage, ...]:
    """The stages of a recipe, from progress 0 to 1.

    A method may itself divide its time (``Method.parts``): its parts share an optimiser.
    """
    found: list[Stage] = []
    start = 0.0
    for name, share in _parse(spec):
        end = 1.0 if share is None else start + share
        module = methods.load(name)
        own = _part(options, module.Config)
        opened = start
        for until, part in module.METHOD.parts(own):
            stop = end if until == 1 else opened + until * (end - opened)
            found.append(Stage(name, part, start, stop, goes_on=start > opened))
            start = stop
    return tuple(found)


def at(found: Sequence[Stage], progress: float) -> int:
    """The number of the stage that a step of this progress belongs to."""
    return min(bisect_left([stage.end for stage in found], progress), len(found) - 1)
