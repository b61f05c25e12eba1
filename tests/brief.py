"""Runs without what takes their seconds and few tests are about: no file operation and no line of a run is left out.

Three steps are timed before a plan instead of up to twenty, no matrix product, a report's drawings are empty, and a run is probed
only if it names its ``--probes``. A module whose tests are about plans or drawings asks for the fixture ``in_full``. In the
environment of a process, `CHUNK` is how many characters are enough for a worker that tokenises, and `PATIENCE` how many seconds it
is waited for.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

IN_FULL, CHUNK, PATIENCE = (f"FASTKD_TEST_{name}" for name in ("IN_FULL", "CHUNK", "PATIENCE"))


def shorten(put: Callable[[Any, str, Any], object]) -> None:
    """In this process, from now on; ``put`` is `setattr`, or the one that a test takes back."""
    from matplotlib.figure import Figure

    from fastkd import planning
    from fastkd.data import tokenise
    from fastkd.probes import at_end

    probe = at_end.probe_student
    named = "probe_student", lambda folder, run, console: probe(folder, run, console) if run.probes else None

    put(at_end, *named)
    put(planning, "MEASURED_STEPS", 3)
    put(planning, "measured_matmul_flops", lambda device, dtype: 1e11)
    put(Figure, "savefig", lambda self, file, **given: file.write("<svg ></svg>"))
    put(tokenise, "CHUNK_CHARACTERS", int(os.environ.get(CHUNK, tokenise.CHUNK_CHARACTERS)))
    put(tokenise, "PATIENCE", float(os.environ.get(PATIENCE, tokenise.PATIENCE)))
