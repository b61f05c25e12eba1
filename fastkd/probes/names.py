"""The probes by name, and which of them a ``--probes`` asks for."""

from __future__ import annotations

PROBES = ("tokens", "pos", "blimp")
NONE = "none"  # at a run's end and in a comparison


def chosen(probes: str | None) -> tuple[str, ...] | None:
    """The probes that were asked for, in their order; None: those that there are data for.

    Raises:
        ValueError: an unknown one.
    """
    if probes is None:
        return None
    named = [name.strip() for name in probes.split(",")]
    for name in named:
        if name not in PROBES:
            raise ValueError(f"unknown probe {name!r}: choose from {', '.join(PROBES)}")
    return tuple(name for name in PROBES if name in named)


def check(probes: str | None) -> None:
    """Refuse an unknown probe where `NONE` is allowed.

    Raises:
        ValueError: naming it.
    """
    if probes != NONE:
        chosen(probes)
