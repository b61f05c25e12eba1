"""What the compiler makes of the Triton kernels, for GPUs that are not here: no spills, matrix instructions."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import audit
from fastkd.kernels import tiling

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(tiling.triton is None, reason="needs the package triton")


def run(*arguments: str, interpret: bool = False) -> subprocess.CompletedProcess[str]:
    """A Python process that compiles kernels, or interprets them."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_every_kernel_compiles_for_sm_80_and_sm_90_without_spills() -> None:
    done = run("-m", "bench.audit", "--arch", "80", "90")
    assert done.returncode == 0, done.stdout.splitlines()[-5:] + done.stderr.splitlines()[-5:]
    rows = [[cell.strip() for cell in line.split("|")[1:]] for line in done.stdout.splitlines() if "| sm_" in line]
    names = {build.name for build in audit.builds()}
    assert {(row[0], row[1]) for row in rows} == {(name, arch) for name in names for arch in ("sm_80", "sm_90")}
    multiplies = {build.name for build in audit.builds() if build.matrix}
    for name, _, _, registers, spilled, _, matrix, _, verdict, *_ in rows:
        assert int(registers) <= 255 and int(spilled) == 0 and verdict == "ok"
        assert int(matrix) > 0 or name not in multiplies


SPILLS = """
from bench import audit
from fastkd.kernels import tiling
tiling.TABLE = {**tiling.TABLE, "score_mse.rows": {"any": (tiling.Row(tiling.Tile(128, 64, 0, 1, 1)),)}}
build = next(build for build in audit.builds() if build.name == "score_mse.rows 16/16")
(hopper,) = (arch for arch in audit.ARCHITECTURES if arch.name == 90)
print(audit.audit(build, hopper).problems)
"""


def test_a_tile_that_spills_is_found() -> None:
    done = run("-c", SPILLS)
    assert done.stdout.startswith("('spills "), done.stdout + done.stderr


def test_a_row_of_the_table_that_nothing_compiles_is_found() -> None:
    hopper = [arch for arch in audit.ARCHITECTURES if arch.name == 90]
    assert audit.uncompiled_rows(audit.builds(), hopper) == []
    rest = [build for build in audit.builds() if build.tile != "score_mse.rows"]
    (missing, *_) = audit.uncompiled_rows(rest, hopper)
    assert missing.startswith("score_mse.rows on any: ")


def test_interpreted_kernels_are_refused() -> None:
    done = run("-m", "bench.audit", "--arch", "90", interpret=True)
    assert done.returncode == 2
    assert "TRITON_INTERPRET unset" in done.stdout


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "expected"),
    [
        (32, 0, 8, 1.0),  # 2,048 threads of 32 registers fill the file
        (128, 0, 8, 0.25),  # 512 threads of 128 do
        (255, 0, 8, 0.125),
        (32, 100 << 10, 8, 0.25),  # two blocks' shared memory fit, of 8 warps each
        (32, 200 << 10, 4, 0.0625),
    ],
)
def test_occupancy_on_hopper(registers: int, shared: int, warps: int, expected: float) -> None:
    (hopper,) = (arch for arch in audit.ARCHITECTURES if arch.name == 90)
    assert audit.occupancy(hopper, registers, shared, warps) == expected
