"""Compile every Triton kernel for GPUs that are not here, and read what the compiler made of it.

    python -m bench.audit [--arch 80 90 100 120 gfx942] [--kernel linear_kd]

``bench/audited/`` lists the variants of each kernel that its launch code can choose; each is compiled with the tile that
``tiling.tile`` gives it. The table shows, per variant and architecture, registers a
thread, bytes spilled, shared memory, matrix instructions, the widest and the narrowest access to global memory (bytes a
thread, loads and copies to shared memory, then stores; NVIDIA), and how many programs a multiprocessor holds, with its
theoretical occupancy. Exits 1 when a kernel spills, needs more shared memory than a block may have, lacks the matrix
instruction of its architecture, the 16-byte accesses or the resident programs that its ``Build`` asks for, or when a rule
of ``tiling.TABLE`` is compiled by no variant. Needs Triton but no GPU.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.audited import Build, builds
from fastkd.kernels import tiling


@dataclass(frozen=True)
class Architecture:
    """What a multiprocessor (NVIDIA) or compute unit (AMD) has, for the occupancy."""

    name: int | str
    backend: str
    warp: int
    matrix: str  # pattern of the matrix instructions in the assembly
    assembly: str
    shared_block: int  # bytes of shared memory a block may use
    shared: int  # and all resident blocks together
    reserved: int  # and the driver takes a block
    warps: int  # resident
    registers: int  # 32-bit, of all lanes


# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; AMD CDNA 3 ISA guide, section 3.6
# and HIP's "Hardware features": 512 registers a lane and 8 waves on each of 4 SIMDs, 64 KiB of LDS.
ARCHITECTURES = (
    Architecture(80, "cuda", 32, r"\bmma\.sync", "ptx", 163 << 10, 164 << 10, 1024, 64, 65536),
    Architecture(90, "cuda", 32, r"\bwgmma\.mma_async", "ptx", 227 << 10, 228 << 10, 1024, 64, 65536),
    Architecture(100, "cuda", 32, r"\btcgen05\.mma", "ptx", 227 << 10, 228 << 10, 1024, 64, 65536),
    Architecture(120, "cuda", 32, r"\bmma\.sync", "ptx", 99 << 10, 100 << 10, 1024, 48, 65536),
    Architecture("gfx942", "hip", 64, r"\bv_mfma", "amdgcn", 64 << 10, 64 << 10, 0, 32, 512 * 64 * 4),
)


@dataclass(frozen=True)
class Report:
    """What the compiler made of one variant on one architecture."""

    build: str
    architecture: int | str
    tile: tiling.Tile
    registers: int
    spilled: int  # bytes of local memory a thread
    shared: int  # bytes a block
    matrix: int  # instructions
    loads: tuple[int, ...]  # sizes of global loads and asynchronous copies, bytes, ascending; () where unknown
    stores: tuple[int, ...]
    programs: int  # a multiprocessor holds
    occupancy: float  # resident warps / the most there can be
    problems: tuple[str, ...]


def audit(build: Build, arch: Architecture) -> Report:
    """Compile one variant for one architecture and read the result."""
    tile = tiling.tile(build.tile, width=build.width, length=build.length, arch=arch.name)
    compiled = _compile(build, tile, arch)
    registers, spilled = _amd_usage(compiled) if arch.backend == "hip" else _nvidia_usage(compiled)
    shared = compiled.metadata.shared
    small = arch.backend == "cuda" and 0 < tile.block_m < 64  # rows, the least of wgmma and tcgen05
    matrix = len(re.findall(r"\bmma\.sync" if small else arch.matrix, compiled.asm[arch.assembly]))
    loads, stores = accesses(compiled.asm["ptx"]) if arch.backend == "cuda" else ((), ())
    programs = resident(arch, registers, shared, tile.num_warps)
    problems = []
    if spilled:
        problems.append(f"spills {spilled} bytes")
    if shared > arch.shared_block:
        problems.append(f"needs {shared} of {arch.shared_block} bytes of shared memory")
    if build.matrix and not matrix:
        problems.append("has no matrix instruction")
    if build.wide and arch.backend == "cuda" and not (16 in loads and 16 in stores):
        problems.append(f"loads at most {max(loads)} and stores at most {max(stores)} bytes at a time, not 16")
    if programs < (least := dict(build.resident).get(arch.name, 0)):
        problems.append(f"lets {programs} of {least} programs share a multiprocessor")
    occupied = programs * tile.num_warps / arch.warps
    return Report(
        build.name,
        arch.name,
        tile,
        registers,
        spilled,
        shared,
        matrix,
        loads,
        stores,
        programs,
        occupied,
        tuple(problems),
    )


def _compile(build: Build, tile: tiling.Tile, arch: Architecture) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    blocks = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k}
    constants = {**build.constants, **{name: blocks[name] for name in build.blocks}}
    names = build.kernel.arg_names
    signature = {name: build.signature.get(name, "constexpr") for name in names}
    aligned = [name for name, kind in build.signature.items() if kind.startswith("*") or name in build.divisible]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(build.kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget(arch.backend, arch.name, arch.warp), options=tile.options)


def _nvidia_usage(compiled: Any) -> tuple[int, int]:
    """Registers a thread and bytes spilled, from the cubin by the cuobjdump that Triton ships."""
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__path__[0]) / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    fields = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage))
    return int(fields["REG"]), int(fields["STACK"]) + int(fields["LOCAL"])


def _amd_usage(compiled: Any) -> tuple[int, int]:
    """Vector registers a lane (accumulators included) and bytes of scratch, from the assembly's metadata."""
    text = compiled.asm["amdgcn"]
    fields = dict(re.findall(r"\.(vgpr_count|agpr_count|private_segment_fixed_size):\s*(\d+)", text))
    return int(fields["vgpr_count"]), int(fields["private_segment_fixed_size"])


_ACCESS = re.compile(r"\b(ld|st)\.global(?:\.[\w:]+)*?(?:\.v(\d))?\.[bfsu](\d+)\b")
_COPY = re.compile(r"\bcp\.async\.c[ag]\.shared\.global(?:\.[\w:]+)* \[[^]]*\], \[[^]]*\], (\w+)")


def accesses(ptx: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes in bytes, ascending, of a thread's loads from global memory (copies to shared memory too) and of its stores."""
    sizes: dict[str, set[int]] = {"ld": {int(size, 0) for size in _COPY.findall(ptx)}, "st": set()}
    for kind, vector, bits in _ACCESS.findall(ptx):
        sizes[kind].add(int(vector or 1) * int(bits) // 8)
    return tuple(sorted(sizes["ld"])), tuple(sorted(sizes["st"]))


def resident(arch: Architecture, registers: int, shared: int, num_warps: int) -> int:
    """Programs that registers, shared memory and the scheduler let one multiprocessor hold."""
    per_warp = -(-registers * arch.warp // 256) * 256
    by_registers = arch.registers // (per_warp * num_warps)
    by_shared = arch.shared // (shared + arch.reserved) if shared + arch.reserved else arch.warps
    return min(by_registers, by_shared, arch.warps // num_warps, 32)


def uncompiled_rules(compiled: Iterable[Build], architectures: Iterable[Architecture]) -> list[str]:
    """Rules of the table that no variant was compiled with: a tile that nobody audits."""
    seen = {
        (build.tile, tiling.tile(build.tile, width=build.width, length=build.length, arch=arch.name))
        for build in compiled
        for arch in architectures
    }
    names = {arch.name for arch in architectures}

    def wanted(arch: int | str, by_arch: tiling.Rules) -> bool:
        return arch in names or (arch == "any" and not names <= set(by_arch))

    return [
        f"{kernel} on {arch}: {rule.tile} is compiled by no AUDIT entry"
        for kernel, by_arch in tiling.TABLE.items()
        for arch, rules in by_arch.items()
        for rule in rules
        if wanted(arch, by_arch) and (kernel, rule.tile) not in seen
    ]


def table(reports: Sequence[Report]) -> str:
    """The reports as a Markdown table."""
    lines = [
        "| kernel | arch | blocks, warps, stages | registers | spilled | shared KiB | matrix | loads | stores | programs "
        "| occupancy | |",
        "| --- | --- | --- |" + " ---: |" * 8 + " --- |",
    ]
    for r in reports:
        blocks = "×".join(str(block) for block in r.tile[:3] if block)
        arch = f"sm_{r.architecture}" if isinstance(r.architecture, int) else r.architecture
        cells = (
            r.build, arch, f"{blocks}, {r.tile.num_warps}, {r.tile.num_stages}", r.registers, r.spilled,
            f"{r.shared / 1024:.1f}", r.matrix, _sizes(r.loads), _sizes(r.stores), r.programs, f"{r.occupancy:.0%}",
            "; ".join(r.problems) or "ok",
        )  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def _sizes(accesses: tuple[int, ...]) -> str:
    """The widest and the narrowest."""
    return f"{accesses[-1]}…{accesses[0]}" if accesses else ""


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.audit", description=(__doc__ or "").split("\n\n")[0])
    names = [str(arch.name) for arch in ARCHITECTURES]
    parser.add_argument("--arch", nargs="+", choices=names, default=names, help="architectures (default: all)")
    parser.add_argument("--kernel", help="a file of bench/audited/ without .py (default: all)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _arguments(argv)
    if tiling.triton is None or tiling.INTERPRETED:
        print("bench.audit needs triton, and TRITON_INTERPRET unset: an interpreted kernel cannot be compiled")
        return 2
    architectures = [arch for arch in ARCHITECTURES if str(arch.name) in arguments.arch]
    chosen = builds(arguments.kernel)
    pairs = [(build.name, arch.name) for build in chosen for arch in architectures]
    with ProcessPoolExecutor() as pool:
        reports = list(pool.map(_audit_named, *zip(*pairs, strict=True)))
    print(f"triton {tiling.triton.__version__}\n\n{table(reports)}\n")
    missing = uncompiled_rules(chosen, architectures) if arguments.kernel is None else []
    failures = [f"{r.build} on {r.architecture} {problem}" for r in reports for problem in r.problems] + missing
    print("\n".join(failures) or f"{len(reports)} kernels compiled, no spills")
    return 1 if failures else 0


def _audit_named(build: str, arch: int | str) -> Report:
    """``audit`` by name: a compiled kernel's function does not travel between processes."""
    return audit(
        next(candidate for candidate in builds() if candidate.name == build),
        next(candidate for candidate in ARCHITECTURES if candidate.name == arch),
    )


if __name__ == "__main__":
    sys.exit(main())
