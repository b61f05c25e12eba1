"""The results of ``bench_kernels.py``: collected through the session, written at its end."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bench.contenders import entries
from bench.kernel_results import KernelResults


@pytest.fixture(scope="session")
def results(request: pytest.FixtureRequest) -> Iterator[KernelResults]:
    """Rows to add to. At the end they are printed, and written for each kernel of which no bench was left out."""
    collected = KernelResults()
    yield collected
    terminal = request.config.pluginmanager.getplugin("terminalreporter")
    benches = [item for item in request.session.items if item.path.name == "bench_kernels.py"]
    selected = [str(item.callspec.params["kernel"]) for item in benches if isinstance(item, pytest.Function)]
    every = [kernel for kernel, _, _ in entries()]
    for kernel in dict.fromkeys(selected):
        terminal.write_line(f"\n\n{collected.markdown(kernel)}\n")
        if selected.count(kernel) == every.count(kernel):
            terminal.write_line(f"written to {collected.write(kernel)}")
        else:
            terminal.write_line(f"not written: {selected.count(kernel)} of {every.count(kernel)} benches were selected")
