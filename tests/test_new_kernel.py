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
    return folder


def run(checkout: Path, *arguments: str) -> str:
    """The output of a Python process in the copy; it has to succeed."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(checkout), "TRITON_INTERPRET": str(int("pytest" in arguments))}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_it_is_checked_and_its_flops_are_counted(checkout: Path) -> None:
    out = run(checkout, "-m", "pytest", "-v", "-p", "no:cacheprovider", "tests/test_fused_losses.py", "-k", NAME)
    for test in ("value_and_gradients", "same_bits", "second_derivative", "flops", "audited"):
        assert any(test in line and "PASSED" in line for line in out.splitlines()), out


def test_it_is_benched(checkout: Path) -> None:
    out = run(checkout, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--collect-only", "bench", "-k", NAME)
    for contender in ("fastkd", "reference", "reference compiled"):
        assert f"{NAME}: 512x64: {contender}]" in out
    assert f"| {NAME} | 512x64 |" in run(checkout, "-m", "bench.roofline")


def test_it_is_audited(checkout: Path) -> None:
    assert f"| {NAME} fp32 | sm_90 |" in run(checkout, "-m", "bench.audit", "--arch", "90", "--kernel", NAME)


def test_a_method_that_calls_it_is_tested_and_predicted(checkout: Path) -> None:
    method = FITNET.replace("hidden_mse", NAME).replace('{"projected": True}', "{}").replace(".square()", ".abs()")
    (checkout / "fastkd" / "methods" / "fitnet.py").write_text(method.lstrip())
    files = [f"tests/test_{file}.py" for file in ("methods", "predictions", "flops", "throughput")]
    out = run(checkout, "-m", "pytest", "-v", "-p", "no:cacheprovider", *files, "-k", "fitnet")
    for test in ("names_the_fused_losses", "every_method_and_size_has_a_prediction", "fastkd_s_loss_and_gradients"):
        assert any(test in line and "PASSED" in line for line in out.splitlines()), out
    assert re.search(r"\| `fitnet` \| \d", run(checkout, "-m", "bench.predictions"))


def test_the_device_suite_tests_it(checkout: Path) -> None:
    (checkout / "tests" / f"test_{NAME}.py").touch()
    script = "from bench.device import correctness; print(correctness.files())"
    assert f"'{NAME}': (('{NAME}',), 1)" in run(checkout, "-c", script)
