"""A fused loss that is placed in the folder is checked, counted, benched, audited and called without another edit."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_new_method import FITNET

from fastkd.kernels import tiling

ROOT = Path(__file__).parents[1]
NAME = "hidden_l1"
pytestmark = pytest.mark.skipif(tiling.triton is None, reason="needs the package triton")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository with one more folder in kernels/, and its cases and audit in bench/."""
    folder = tmp_path_factory.mktemp("repository") / "fastkd"
    ignored = shutil.ignore_patterns("__pycache__", "results", ".*", "runs", "docs")
    shutil.copytree(ROOT, folder, symlinks=True, ignore=ignored)
    added = folder / "tests" / NAME
    (added / "cases.py").rename(folder / "bench" / "losses" / f"{NAME}.py")
    (added / "audited.py").rename(folder / "bench" / "audited" / f"{NAME}.py")
    added.rename(folder / "kernels" / NAME)
    method = FITNET.replace("hidden_mse", NAME).replace('{"projected": True}', "{}").replace(".square()", ".abs()")
    (folder / "fastkd" / "methods" / "fitnet.py").write_text(method.lstrip())
    (folder / "tests" / f"test_{NAME}.py").touch()
    return folder


def run(checkout: Path, *arguments: str) -> str:
    """The output of a Python process in the copy; it has to succeed."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(checkout), "TRITON_INTERPRET": str(int("pytest" in arguments))}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def tested(checkout: Path) -> list[str]:
    """The lines of the tests that know its name, or that of a method which calls it."""
    files = [f"tests/test_{file}.py" for file in ("fused_losses", "methods", "predictions", "flops", "throughput")]
    out = run(checkout, "-m", "pytest", "-v", "-p", "no:cacheprovider", *files, "-k", f"{NAME} or fitnet")
    return [line for line in out.splitlines() if "PASSED" in line]


TELL = """
import runpy, sys
from bench.device import correctness

for sys.argv in (["bench.roofline"], ["bench.predictions"], ["bench.audit", "--arch", "90", "--kernel", sys.argv[1]]):
    try:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        assert not end.code, sys.argv
print(correctness.files())
"""


@pytest.fixture(scope="module")
def told(checkout: Path) -> str:
    """What the commands of the benches say, one after another in one process."""
    return run(checkout, "-c", TELL, NAME)


def test_it_is_checked_and_its_flops_are_counted(tested: list[str]) -> None:
    lines = [line for line in tested if "test_fused_losses.py" in line and NAME in line]
    for test in ("value_and_gradients", "same_bits", "second_derivative", "flops", "audited"):
        assert any(test in line for line in lines), tested


@pytest.mark.exhaustive
def test_it_is_benched(checkout: Path, told: str) -> None:
    out = run(checkout, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--collect-only", "bench", "-k", NAME)
    for contender in ("fastkd", "reference", "reference compiled"):
        assert f"{NAME}: 512x64: {contender}]" in out
    assert f"| {NAME} | 512x64 |" in told


def test_it_is_audited(told: str) -> None:
    assert f"| {NAME} fp32 | sm_90 |" in told


def test_a_method_that_calls_it_is_tested_and_predicted(tested: list[str], told: str) -> None:
    for test in ("names_the_fused_losses", "every_method_and_size_has_a_prediction", "fastkd_s_loss_and_gradients"):
        assert any(test in line and "fitnet" in line for line in tested), tested
    assert re.search(r"\| `fitnet` \| \d", told)


def test_the_device_suite_tests_it(told: str) -> None:
    assert f"'{NAME}': (('{NAME}',), 1)" in told
