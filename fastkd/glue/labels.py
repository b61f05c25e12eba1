"""What the label of a row means: a class by its name, as a number or by its index, or a score."""

from __future__ import annotations

import functools
import math
import re
from decimal import Decimal

from fastkd.glue.tasks import SCORE_RANGE, Task

NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,4})?")


def read_label(task: Task, value: object, place: str) -> int | float:
    """A class id from a class name, a number or an index, or a finite score.

    Raises:
        ValueError: it means none of the task's, naming ``place``, its file and line.
    """
    found = _score(task, value) if task.is_regression else _class(task.labels, value)
    if found is not None:
        return found
    if task.is_regression:
        low, high = SCORE_RANGE
        kind = f"a number from {low:g} to {high:g}" if task.official else "a number"
        raise ValueError(f"{place}: label {value!r} is not {kind}; mend the row")
    index = "" if _numbers(task.labels) else " nor its index"
    kind = f"is {'neither ' if index else 'not '}one of {', '.join(task.labels)}{index}"
    raise ValueError(f"{place}: label {value!r} {kind}; mend the row")


def _score(task: Task, value: object) -> float | None:
    number = _number(value)
    score = math.nan if number is None else float(number)
    low, high = SCORE_RANGE if task.official else (-math.inf, math.inf)
    return score if math.isfinite(score) and low <= score <= high else None


def _class(names: tuple[str, ...], value: object) -> int | None:
    """The id of a class, None where ``value`` means none, or more than one.

    A name means itself. Any other number is compared with the names that are numbers: files of one task write 1, 1.0 and
    "01". Only where no name is a number may it be an index. A boolean is the name that it spells, in any case of letters.
    """
    if isinstance(value, str) and value in names:
        return names.index(value)
    if isinstance(value, bool):
        alike = [i for i, name in enumerate(names) if name.lower() == str(value).lower()]
        return alike[0] if len(alike) == 1 else None
    wanted, numbers = _number(value), _numbers(names)
    if wanted is None:
        return None
    if not numbers:
        return int(wanted) if wanted in range(len(names)) else None
    alike = [i for i, found in numbers.items() if found == wanted]
    return alike[0] if len(alike) == 1 else None


@functools.lru_cache(maxsize=16)
def _numbers(names: tuple[str, ...]) -> dict[int, Decimal]:
    """The names that are numbers, by class id."""
    found = {i: _number(name) for i, name in enumerate(names)}
    return {i: number for i, number in found.items() if number is not None}


def _number(value: object) -> Decimal | None:
    """A finite number as it is written, None for anything else: true and null are none, nor is "1_000"."""
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal | str):
        return None
    if isinstance(value, str) and not NUMBER.fullmatch(value.strip()):
        return None
    number = Decimal(str(value).strip())
    return number if number.is_finite() else None
