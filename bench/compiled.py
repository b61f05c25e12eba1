"""Run compiled kernels on a CPU: the Triton IR that the compiler makes of them, operation by operation.

    python -m bench.compiled [--kernel relation_kl] [--case "ragged bfloat16"] [--arch 90]

Triton's interpreter runs the Python of a kernel. The compiler has rules of its own for names, loops and constants, and a
kernel can be right in the one and wrong in the other. Here the launch code launches as on a GPU of ``--arch``; each kernel
is compiled for that GPU and its IR, as it is before the compiler decides which thread has what, runs on the CPU's memory.
The table has the error of the loss and of each gradient against float64. Exits 1 where one is above its case's
tolerance; a load or store outside its tensor, or two stores to one place, raise. Needs Triton but no GPU.
What this cannot show: layouts, shared memory and everything else that comes after Triton IR.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench.contenders import Inputs, definition, step
from fastkd.kernels import tiling

KERNELS = ("linear_kd", "relation_kl", "score_mse", "hidden_mse")
LARGEST = 100_000  # scores, logits or numbers of a case that is run unless it is asked for by name

# ---- Triton IR as text → operations ---------------------------------------------------------------------------

TYPES = {"i1": torch.bool, "i32": torch.int32, "i64": torch.int64, "f16": torch.float16, "bf16": torch.bfloat16}
TYPES |= {"f32": torch.float32, "f64": torch.float64}
NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}
NAMES |= {torch.int32: "i32", torch.int64: "i64"}
_NAME = r"%[\w.$-]+"
_VALUE = re.compile(rf"{_NAME}(?:#\d+)?")
_LOCATION = re.compile(r"\s*loc\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)")
_LINE = re.compile(rf"(?:({_NAME})(?::\d+)? = )?\"?([a-z]+\.[a-z0-9_.]+)\"?(.*)$")


@dataclass
class Operation:
    """One line, and the lines inside its braces."""

    result: str | None
    kind: str
    text: str  # after the kind
    regions: list[list[Operation]] = field(default_factory=list)

    @property
    def operands(self) -> list[str]:
        return _VALUE.findall(self.text.rsplit(" : ", 1)[0])

    @property
    def type(self) -> tuple[tuple[int, ...], str]:
        """Shape and type of an entry of the result."""
        name = re.split(r" -> | to | : ", self.text)[-1].strip()
        match = re.fullmatch(r"tensor<((?:\d+x)*)(.+)>", name)
        return (tuple(int(n) for n in match[1].split("x")[:-1]), match[2]) if match else ((), name)

    def number(self, name: str) -> int:
        match = re.search(rf"\b{name} = (-?\d+)", self.text)
        assert match is not None, self.text
        return int(match[1])


def parsed(ir: str) -> list[Operation]:
    """The operations of a kernel's function."""
    lines = [re.sub(r"//.*", "", _LOCATION.sub("", line)).strip() for line in ir.splitlines()]
    start = next(i for i, line in enumerate(lines) if line.startswith("tt.func"))
    return _region(iter(line for line in lines[start + 1 :] if line))[0]


def _region(lines: Any) -> tuple[list[Operation], str]:
    """Operations up to a closing brace, and the line that has it."""
    operations: list[Operation] = []
    for line in lines:
        if line.startswith("}"):
            return operations, line
        if line.startswith("^"):
            operations.append(Operation(None, "block", line))
            continue
        match = _LINE.match(line)
        assert match is not None, line
        result, kind, text = match.groups()
        operation = Operation(result, kind, text)
        while line.endswith("{"):
            region, line = _region(lines)
            operation.regions.append(region)
        operations.append(operation)
    raise AssertionError("Triton IR ends inside a region")


# ---- operations on a CPU --------------------------------------------------------------------------------------


@dataclass
class Pointer:
    """Places in a tensor's storage."""

    storage: Tensor  # flat
    place: Tensor  # int64

    @classmethod
    def to(cls, x: Tensor) -> Pointer:
        bytes_, size = x.untyped_storage(), x.element_size()
        flat = torch.empty(0, dtype=x.dtype).set_(bytes_, 0, (bytes_.nbytes() // size,), (1,))
        return cls(flat, torch.tensor(x.storage_offset()))

    def load(self, mask: Tensor | None = None, other: Tensor | None = None) -> Tensor:
        inside = torch.ones_like(self.place, dtype=torch.bool) if mask is None else mask.expand(self.place.shape)
        out = (
            torch.zeros(self.place.shape, dtype=self.storage.dtype) if other is None else other.expand(self.place.shape)
        )
        return out.masked_scatter(inside, self.storage[self._inside(inside)])

    def store(self, value: Tensor, mask: Tensor | None = None) -> None:
        inside = torch.ones_like(self.place, dtype=torch.bool) if mask is None else mask.expand(self.place.shape)
        place = self._inside(inside)
        assert len(place.unique()) == len(place), "two stores of one operation to one place"
        self.storage[place] = value.expand(self.place.shape)[inside]

    def _inside(self, mask: Tensor) -> Tensor:
        place = self.place[mask]
        assert not len(place) or (int(place.min()) >= 0 and int(place.max()) < len(self.storage)), "outside the tensor"
        return place


def _moved(x: Any, move: Callable[[Tensor], Tensor]) -> Any:
    return Pointer(x.storage, move(x.place)) if isinstance(x, Pointer) else move(x)


_COMPARE = {"lt": torch.lt, "gt": torch.gt, "le": torch.le, "ge": torch.ge, "eq": torch.eq, "ne": torch.ne}
_SIMPLE: dict[str, Callable[..., Any]] = {
    "arith.addi": torch.add,
    "arith.subi": torch.sub,
    "arith.muli": torch.mul,
    "arith.andi": torch.bitwise_and,
    "arith.minsi": torch.minimum,
    "arith.maxsi": torch.maximum,
    "arith.addf": torch.add,
    "arith.subf": torch.sub,
    "arith.mulf": torch.mul,
    "arith.divf": torch.div,
    "arith.negf": torch.neg,
    "arith.minnumf": torch.fmin,
    "arith.maxnumf": torch.fmax,
    "arith.select": torch.where,
    "math.exp2": torch.exp2,
    "math.log2": torch.log2,
    "tt.addptr": lambda pointer, offset: Pointer(pointer.storage, pointer.place + offset.long()),
    "tt.dot": lambda a, b, c: a.float() @ b.float() + c,
    "tt.join": lambda a, b: torch.stack((a, b), -1),
    "tt.load": lambda pointer, *rest: pointer.load(*rest),
    "tt.store": lambda pointer, *rest: pointer.store(*rest),
}
_CASTS = ("arith.extsi", "arith.trunci", "arith.extf", "arith.truncf", "arith.sitofp")
_ENDS = ("scf.yield", "tt.reduce.return", "tt.return")


@dataclass(frozen=True)
class Program:
    """One program of a launch."""

    number: tuple[int, ...]  # x, y, z
    grid: tuple[int, ...]

    def run(self, operations: list[Operation], values: dict[str, Any]) -> list[Any]:
        """What the last operation hands on."""
        blocks = {op.text.split(":")[0].split("(")[0]: i for i, op in enumerate(operations) if op.kind == "block"}
        i = 0
        while i < len(operations):
            op = operations[i]
            i += 1
            if op.kind in _ENDS:
                return [values[name] for name in op.operands]
            if op.kind in ("cf.br", "cf.cond_br"):
                targets = re.findall(r"\^\w+", op.text)
                i = blocks[targets[0] if op.kind == "cf.br" or values[op.operands[0]] else targets[1]]
            elif op.kind != "block":
                results = self._results(op, values)
                if op.result is not None:
                    values[op.result] = results[0]
                    values.update((f"{op.result}#{n}", x) for n, x in enumerate(results))
        return []

    def _results(self, op: Operation, values: dict[str, Any]) -> list[Any]:
        control = {"scf.if": self._if, "scf.for": self._for, "tt.reduce": self._reduce}.get(op.kind)
        if control is not None:
            return control(op, values)
        operands = [values[name] for name in op.operands]
        return [_SIMPLE[op.kind](*operands) if op.kind in _SIMPLE else self._other(op, operands)]

    def _other(self, op: Operation, operands: list[Any]) -> Any:
        """Operations with more to read than operands."""
        shape, entry = op.type
        if op.kind in ("arith.cmpi", "arith.cmpf"):
            return _COMPARE[op.text.split(",")[0].strip()[-2:]](*operands)
        if op.kind in _CASTS:
            return operands[0].to(TYPES[entry])
        if op.kind == "arith.constant":
            return _constant(op)
        if op.kind in ("tt.splat", "tt.broadcast"):
            return _moved(operands[0], lambda x: x.expand(shape))
        if op.kind == "tt.expand_dims":
            return _moved(operands[0], lambda x: x.unsqueeze(op.number("axis")))
        if op.kind == "tt.make_range":
            return torch.arange(op.number("start"), op.number("end"), dtype=torch.int32)
        if op.kind == "tt.trans":
            order = re.search(r"array<i32: ([\d, ]+)>", op.text)
            assert order is not None, op.text
            return operands[0].permute([int(n) for n in order[1].split(",")])
        if op.kind == "tt.reshape":
            return operands[0].reshape(shape)
        if op.kind in ("tt.get_program_id", "tt.get_num_programs"):
            of = self.number if op.kind == "tt.get_program_id" else self.grid
            return torch.tensor(of["xyz".index(op.text.strip()[0])], dtype=torch.int32)
        raise NotImplementedError(f"{op.kind}{op.text}")

    def _if(self, op: Operation, values: dict[str, Any]) -> list[Any]:
        chosen = 0 if values[op.operands[0]] else 1
        return self.run(op.regions[chosen], values) if chosen < len(op.regions) else []

    def _for(self, op: Operation, values: dict[str, Any]) -> list[Any]:
        head = _VALUE.findall(op.text.split("iter_args")[0])
        counter, bounds = head[0], [values[name] for name in head[1:]]
        carried = (
            re.findall(rf"({_NAME}) = ({_VALUE.pattern})", op.text.split("iter_args")[-1])
            if "iter_args" in op.text
            else []
        )
        now = [values[start] for _, start in carried]
        for step_ in range(*map(int, bounds)):
            values[counter] = torch.tensor(step_, dtype=bounds[0].dtype)
            values.update(zip((name for name, _ in carried), now, strict=True))
            now = self.run(op.regions[0], values)
        return now

    def _reduce(self, op: Operation, values: dict[str, Any]) -> list[Any]:
        """A fold of halves."""
        rest = [values[name].movedim(op.number("axis"), 0) for name in _VALUE.findall(op.text.split(")")[0])]
        block, *fold = op.regions[0]
        names = re.findall(rf"({_NAME}):", block.text)
        while (half := len(rest[0]) // 2) > 0:
            pairs = [*(x[:half] for x in rest), *(x[half:] for x in rest)]
            rest = self.run(fold, dict(zip(names, pairs, strict=True)))
        return [x[0] for x in rest]


def _constant(op: Operation) -> Tensor:
    shape, entry = op.type
    text = op.text.rsplit(" : ", 1)[0].strip().removeprefix("dense<").removesuffix(">")
    if text.startswith("0x"):  # infinities and NaN, by their bits
        bits = {"f32": torch.int32, "f64": torch.int64}.get(entry, torch.int16)
        size = 8 * bits.itemsize
        number = int(text, 16)
        return torch.tensor(number - (number >> size - 1 << size), dtype=bits).view(TYPES[entry]).expand(shape)
    value = {"true": True, "false": False}.get(text)
    return torch.full(shape, float(text) if value is None else value, dtype=torch.float64).to(TYPES[entry])


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
        import triton
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
            self.compiled[key] = parsed(triton.compile(source, GPUTarget("cuda", self.arch, 32), options).asm["ttir"])
        return self.compiled[key], runtime


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
    """From now on the Triton backend of every kernel file takes CPU tensors, and runs as it would on ``arch``."""
    for name in KERNELS:
        module = importlib.import_module(f"fastkd.kernels.{name}")
        for attribute, kernel in list(vars(module).items()):
            if attribute.endswith("_kernel"):
                setattr(module, attribute, Launcher(kernel, arch))
    tiling.backend = lambda name, x: name or "triton"
    tiling.architecture = lambda device: arch
    torch.use_deterministic_algorithms(True)  # new memory holds NaN: what nobody wrote shows when it is read


def errors(kernel: str, case: Any) -> list[float]:
    """‖out − ref‖/‖ref‖ of the loss and of every gradient, or ‖out‖ where the reference is 0."""
    inputs: Inputs = case.inputs()
    function = getattr(importlib.import_module(f"fastkd.kernels.{kernel}"), kernel)
    exact = {
        name: x.double().detach().requires_grad_(x.requires_grad)
        if isinstance(x, Tensor) and x.is_floating_point()
        else x
        for name, x in inputs.items()
    }

    def loss(arguments: Inputs) -> Tensor:
        out = function(**arguments, backend="triton")
        return out if isinstance(out, Tensor) else out.loss

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
    parser.add_argument(
        "--kernel", nargs="+", choices=KERNELS, default=KERNELS, help="files of kernels/ (default: all)"
    )
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
        for case in importlib.import_module(f"fastkd.kernels.{kernel}").CASES:
            if case.name in arguments.case if arguments.case else _size(case) <= LARGEST:
                found = errors(kernel, case)
                verdict = "ok" if all(error <= case.tolerance for error in found) else "WRONG"
                failed += verdict != "ok"
                print(f"| {kernel} | {case.name} | {', '.join(f'{x:.1e}' for x in found)} | {verdict} |", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
