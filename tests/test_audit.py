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


@pytest.mark.parametrize("arch", [pytest.param("80", marks=pytest.mark.exhaustive), "90"])
def test_every_kernel_compiles_without_spills(arch: str) -> None:
    done = run("-m", "bench.audit", "--arch", arch)
    assert done.returncode == 0, done.stdout.splitlines()[-5:] + done.stderr.splitlines()[-5:]
    rows = [[cell.strip() for cell in line.split("|")[1:]] for line in done.stdout.splitlines() if "| sm_" in line]
    names = {build.name for build in audit.builds()}
    assert {(row[0], row[1]) for row in rows} == {(name, f"sm_{arch}") for name in names}
    multiplies = {build.name for build in audit.builds() if build.matrix}
    for name, _, _, registers, spilled, _, matrix, _, _, _, _, verdict, *_ in rows:
        assert int(registers) <= 255 and int(spilled) == 0 and verdict == "ok"
        assert int(matrix) > 0 or name not in multiplies


SPILLS = """
from bench import audit
from fastkd.kernels import tiling
build = next(build for build in audit.builds() if build.name == "score_mse.rows 16/16")
(hopper,) = (arch for arch in audit.ARCHITECTURES if arch.name == 90)
with tiling.using("score_mse.rows", tiling.Tile(128, 64, 0, 1, 1)):
    print(audit.audit(build, hopper).problems)
"""


def test_a_tile_that_spills_is_found() -> None:
    done = run("-c", SPILLS)
    assert done.stdout.startswith("('spills "), done.stdout + done.stderr


def test_a_rule_of_the_table_that_nothing_compiles_is_found() -> None:
    hopper = [arch for arch in audit.ARCHITECTURES if arch.name == 90]
    assert audit.uncompiled_rules(audit.builds(), hopper) == []
    rest = [build for build in audit.builds() if build.tile != "score_mse.rows"]
    (missing, *_) = audit.uncompiled_rules(rest, hopper)
    assert missing.startswith("score_mse.rows on any: ")


def test_interpreted_kernels_are_refused() -> None:
    done = run("-m", "bench.audit", "--arch", "90", interpret=True)
    assert done.returncode == 2
    assert "TRITON_INTERPRET unset" in done.stdout


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "expected"),
    [
        (32, 0, 8, 8),  # 2,048 threads of 32 registers fill the file
        (128, 0, 8, 2),  # 512 threads of 128 do
        (129, 0, 8, 1),
        (255, 0, 8, 1),
        (32, 100 << 10, 8, 2),  # by shared memory
        (32, 200 << 10, 4, 1),
    ],
)
def test_programs_on_a_hopper_multiprocessor(registers: int, shared: int, warps: int, expected: int) -> None:
    (hopper,) = (arch for arch in audit.ARCHITECTURES if arch.name == 90)
    assert audit.resident(hopper, registers, shared, warps) == expected


def test_sizes_of_accesses_are_read_from_the_assembly() -> None:
    ptx = """
    @%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
    ld.global.b16 { %rs1 }, [ %rd2 + 0 ];
    @!%p1 ld.global.L1::evict_last.v2.b64 { %rd5, %rd6 }, [ %rd4 + 0 ];
    cp.async.ca.shared.global [ %r5 + 0 ], [ %rd3 + 0 ], 0x4, 0x4;
    cp.async.cg.shared.global [ %r5 + 0 ], [ %rd3 + 0 ], 0x10, %r6;
    st.global.v2.b32 [ %rd7 + 0 ], { %r1, %r2 };
    st.shared.v4.b32 [ %r7 + 0 ], { %r1, %r2, %r3, %r4 };
    """
    assert audit.accesses(ptx) == ((2, 4, 16), (8,))


FAILS = """
import dataclasses
from bench import audit
from fastkd.kernels import tiling
build = next(build for build in audit.builds() if build.name == "hidden_mse fp32/bf16")
(hopper,) = (arch for arch in audit.ARCHITECTURES if arch.name == 90)
print(audit.audit(build, hopper).problems)
print(audit.audit(dataclasses.replace(build, divisible=()), hopper).problems)
print(audit.audit(dataclasses.replace(build, resident=((90, 33),)), hopper).problems)
"""


def test_narrow_accesses_and_too_few_programs_are_found() -> None:
    """Without a size that 16 divides, the compiler cannot know that a mask is the same for four entries."""
    done = run("-c", FAILS)
    sound, narrow, few = done.stdout.splitlines() or [done.stderr] * 3
    assert sound == "()"
    assert "bytes at a time, not 16" in narrow
    assert "of 33 programs share a multiprocessor" in few
