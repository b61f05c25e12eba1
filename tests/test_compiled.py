"""Compiled kernels, run on a CPU: what the interpreter cannot show, since it runs the Python and not what the compiler made."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastkd.kernels import tiling

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(tiling.triton is None, reason="needs the package triton")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A Python process that compiles kernels."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("kernel", "cases"),
    [
        ("linear_kd", ("one-row", "tiny-vocabulary", "half-kl-ce")),
        pytest.param(
            "linear_kd", ("mse", "half-mse", "reverse-tempered", "half-reverse"), marks=pytest.mark.exhaustive
        ),
        ("relation_kl", ("ragged bfloat16", "ragged cross bfloat16", "one token", "wide heads", "near")),
        ("score_mse", ("ragged bfloat16", "one token", "head width 24")),
        ("hidden_mse", ("one number", "many blocks", "bfloat16 student")),
    ],
)
def test_what_the_compiler_made_computes_the_definition(kernel: str, cases: tuple[str, ...]) -> None:
    """Halves of a tile, one after the other, among them: a loop that loses the first half is right in the interpreter."""
    done = run("-m", "bench.compiled", "--kernel", kernel, "--case", *cases)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.count("| ok |") == len(cases), done.stdout


LOST_HALF = """
import torch, triton, triton.language as tl
from bench.compiled import Launcher

@triton.jit
def sum_of_halves(x_ptr, out_ptr, TWICE: tl.constexpr):
    first = tl.zeros([16], tl.float32)
    second = tl.zeros([16], tl.float32) if TWICE else first
    for i in range(0, 32, 16):
        first = second
        second = tl.load(x_ptr + i + tl.arange(0, 16))
    tl.store(out_ptr + tl.arange(0, 16), first + second)

x, out = torch.arange(32.0), torch.empty(16)
for twice in (True, False):
    Launcher(sum_of_halves, 90)[(1,)](x, out, TWICE=twice)
    print(torch.equal(out, x[:16] + x[16:]))
try:
    Launcher(sum_of_halves, 90)[(1,)](x[1:17].clone(), out, TWICE=True)
except AssertionError as error:
    print(error)
"""


def test_it_runs_what_is_compiled_and_not_the_python(tmp_path: Path) -> None:
    """A name that is another's value before a loop is lost in it, where Python keeps it; places outside a tensor are found."""
    script = tmp_path / "halves.py"
    script.write_text(LOST_HALF)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = f"{ROOT}:{environment.get('PYTHONPATH', '')}"
    done = subprocess.run([sys.executable, script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["True", "False", "outside", "the", "tensor"], done.stdout + done.stderr
