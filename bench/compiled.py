"""Run compiled kernels on a CPU: the Triton IR that the compiler makes of them, operation by operation.

    python -m bench.compiled [--kernel relation_kl] [--case "ragged bfloat16"] [--arch 90]

Triton's interpreter runs the Python of a kernel. The compiler has rules of its own for names, loops and constants, and a
kernel can be right in the one and wrong in the other. Here the launch code launches as on a GPU of ``--arch``; each kernel
is compiled for that GPU, and its IR from before the compiler decides which thread has what runs on the CPU's memory.
The table has the error of the loss and of each gradient against float64. Exits 1 where one is above its case's
tolerance; a load or store outside its tensor, or two stores to one place, raise. Needs Triton but no GPU.
What this cannot show: layouts, shared memory and everything else that comes after Triton IR.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bench import losses
from bench.contenders import Inputs, definition, scalar, step
from bench.triton_ir import TYPES, Operation, Pointer, Program, parsed
from fastkd.kernels import tiling

KERNELS = tuple(losses.available())
LARGEST = 100_000  # scores, logits or numbers of a case that is run unless it is asked for by name
NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}
NAMES |= {torch.int32: "i32", torch.int64: "i64"}

# ---- launches -------------------------------------------------------------------------------------------------


class Launcher:
    """Stands in a kernel's place: ``kernel[grid](…)`` compiles it, and runs its programs one after another."""

    def __init__(self, kernel: Any, arch: int) -> None:
        self.kernel, self.arch = kernel, arch
        self.compiled: dict[str, list[Operation]] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            names = self.kernel.arg_names
            given = {**dict(zip(names, arguments, strict=False)), **options}
            operations, runtime = self._compile({name: given.pop(name) for name in names}, given)
            whole = (*grid, 1, 1)[:3]
            for number in itertools.product(*map(range, whole)):
                values = {f"%{name}": x for name, x in runtime.items()}
                Program(number, whole).run(operations, values)

        return launch

    def _compile(self, given: dict[str, Any], options: dict[str, Any]) -> tuple[list[Operation], dict[str, Any]]:
        """The operations, and the values of the arguments that are none of its constants; specialised as Triton does."""
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        constants = {p.name for p in self.kernel.params if p.is_constexpr}
        constants |= {name for name, x in given.items() if x is None or (isinstance(x, int) and x == 1)}
        runtime = {name: _argument(x) for name, x in given.items() if name not in constants}
        signature = {name: "constexpr" if name in constants else _type(given[name]) for name in given}
        aligned = [name for name in runtime if _aligned(given[name])]
        fixed = {name: given[name] for name in constants}
        key = repr((signature, fixed, aligned, options))
        if key not in self.compiled:
            attributes = {(list(given).index(name),): [["tt.divisibility", 16]] for name in aligned}
            source = ASTSource(self.kernel, signature, fixed, attributes)
            self.compiled[key] = parsed(_triton_ir(source, GPUTarget("cuda", self.arch, 32), options))
        return self.compiled[key], runtime


def _triton_ir(source: Any, target: Any, options: dict[str, Any]) -> str:
    """The beginning of ``triton.compile``: the rest, which makes machine code, takes five times as long and is not read."""
    from triton._C.libtriton import ir
    from triton.compiler import make_backend

    backend = make_backend(target)
    given = backend.parse_options(options | source.parse_options())
    context, stages = ir.context(), dict[str, Callable[[Any, dict[str, Any]], Any]]()
    ir.load_dialects(context)
    backend.load_dialects(context)
    backend.add_stages(stages, given, source.language)
    functions, modules = backend.get_codegen_implementation(given), backend.get_module_map()
    module = source.make_ir(target, given, functions, modules, context)
    return str(stages["ttir"](module, dict(vars(given))))


def _argument(x: Any) -> Any:
    if isinstance(x, Tensor):
        return Pointer.to(x.detach())
    return torch.tensor(x, dtype=TYPES[_type(x)] if isinstance(x, int) else torch.float32)


def _type(x: Any) -> str:
    if isinstance(x, Tensor):
        return f"*{NAMES[x.dtype]}"
    return "fp32" if isinstance(x, float) else "i32" if -(2**31) <= x < 2**31 else "i64"


def _aligned(x: Any) -> bool:
    return not isinstance(x, float) and (x.data_ptr() if isinstance(x, Tensor) else x) % 16 == 0


# ---- cases ----------------------------------------------------------------------------------------------------


def launch_compiled(arch: int) -> None:
    """From now on the Triton backend of every loss takes CPU tensors, and runs as it would on ``arch``."""
    for name in KERNELS:
        losses.definition(name)
    for module in [module for name, module in sys.modules.items() if name.startswith("fastkd.kernels.")]:
        for attribute, kernel in list(vars(module).items()):
            if attribute.endswith("_kernel"):
                setattr(module, attribute, Launcher(kernel, arch))
    tiling.backend = lambda name, x: name or "triton"
    tiling.architecture = lambda device: arch
    torch.use_deterministic_algorithms(True)  # new memory holds NaN: what nobody wrote shows when it is read


def errors(kernel: str, case: Any) -> list[float]:
    """‖out − ref‖/‖ref‖ of the loss and of every gradient, or ‖out‖ where the reference is 0."""
    inputs: Inputs = case.inputs()
    function = getattr(losses.definition(kernel), kernel)
    exact = {
        name: x.double().detach().requires_grad_(x.requires_grad)
        if isinstance(x, Tensor) and x.is_floating_point()
        else x
        for name, x in inputs.items()
    }

    def loss(arguments: Inputs) -> Tensor:
        return scalar(function(**arguments, backend="triton"))

    value, gradients = step(loss, inputs)()
    expected, expected_gradients = step(definition(kernel), exact)()
    pairs = zip((value, *gradients), (expected, *expected_gradients), strict=True)
    return [float((out.double() - ref).norm() / (ref.norm() if ref.norm() > 1e-12 else 1)) for out, ref in pairs]


def _size(case: Any) -> int:
    return (
        case.scores if hasattr(case, "scores") else case.rows * getattr(case, "vocabulary", getattr(case, "width", 1))
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compiled", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, default=KERNELS, help="fused losses (default: all)")
    parser.add_argument("--case", nargs="+", help="names of cases (default: all that are not too large)")
    parser.add_argument(
        "--arch", type=int, default=90, help="an NVIDIA architecture whose tiles are taken (default: 90)"
    )
    arguments = parser.parse_args(argv)
    if tiling.triton is None or tiling.INTERPRETED:
        print("bench.compiled needs triton, and TRITON_INTERPRET unset: an interpreted kernel cannot be compiled")
        return 2
    launch_compiled(arguments.arch)
    failed = 0
    for kernel in arguments.kernel:
        for case in losses.load(kernel).CASES:
            if case.name in arguments.case if arguments.case else _size(case) <= LARGEST:
                found = errors(kernel, case)
                verdict = "ok" if all(error <= case.tolerance for error in found) else "WRONG"
                failed += verdict != "ok"
                print(f"| {kernel} | {case.name} | {', '.join(f'{x:.1e}' for x in found)} | {verdict} |", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
