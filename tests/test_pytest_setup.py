"""This project's pytest set-up, in processes of its own: what is marked, what warns, who runs what."""

import re
import shutil
import subprocess
from pathlib import Path

import processes
import pytest

ROOT = Path(__file__).parents[1]


def run_pytest(folder: Path, text: str, *options: str) -> subprocess.CompletedProcess[str]:
    """One test file under this project's conftest.py and configuration."""
    for name in ("conftest.py", "made_model.py"):
        shutil.copy(ROOT / "tests" / name, folder)
    (folder / "test_it.py").write_text(text)
    argv = ["-c", ROOT / "pyproject.toml", "--rootdir", folder, "-p", "no:cacheprovider", "-rA", *options, folder]
    argv += ["-W", "ignore:Module already imported"]  # a plugin of a package that transformers imports
    return processes.run("pytest", *argv)


WARNS = """
import warnings
from torch._inductor import compile_fx

def text():
    plain = getattr(compile_fx._warn_tf32_disabled, "__wrapped__", compile_fx._warn_tf32_disabled)
    return next(value for value in plain.__code__.co_consts if isinstance(value, str) and "TensorFloat32" in value)

def test_advice():
    warnings.warn(text())

def test_any_other():
    warnings.warn("float32 is slow")
"""


def test_inductors_advice_is_no_failure(tmp_path: Path) -> None:
    """The words are those of PyTorch's own function, which speaks on a GPU only."""
    done = run_pytest(tmp_path, WARNS)
    assert re.search(r"PASSED \S*test_advice$", done.stdout, re.MULTILINE), done.stdout
    assert re.search(r"FAILED \S*test_any_other", done.stdout) and "UserWarning: float32 is slow" in done.stdout


MARKED = """
import pytest
DEVICE = "cuda"

@pytest.mark.parametrize("case", [1, 2])
def test_value(case):
    pass
"""


@pytest.mark.exhaustive
def test_what_computes_on_a_gpu_is_marked_so(tmp_path: Path) -> None:
    """So that ``-m gpu`` takes the cases of every kernel where there is one, and no test runs twice for it."""
    done = run_pytest(tmp_path, MARKED, "-m", "gpu", "--collect-only", "-q")
    assert "test_value[1]" in done.stdout and "test_value[2]" in done.stdout, done.stdout
    done = run_pytest(tmp_path, MARKED.replace("cuda", "cpu"), "-m", "gpu")
    assert done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED, done.stdout


SHAPES = """
import pathlib, pytest

@pytest.mark.parametrize("case", range(6))
def test_bench_shapes_on_a_gpu(case):
    with (pathlib.Path(__file__).parent / "log").open("a") as log:
        print("begin", file=log, flush=True)
        sum(range(3_000_000))
        print("end", file=log, flush=True)
"""


@pytest.mark.exhaustive
def test_one_worker_at_a_time_takes_shapes_of_the_benches(tmp_path: Path) -> None:
    pytest.importorskip("xdist")
    done = run_pytest(tmp_path, SHAPES, "-n", "2", "--dist", "load")
    assert done.returncode == 0, done.stdout
    assert (tmp_path / "log").read_text().split() == ["begin", "end"] * 6
