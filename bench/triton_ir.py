"""Triton IR on a CPU: a compiled kernel's operations, parsed from their text and run one by one on tensors.

This is the IR before the compiler decides which thread has what: names, loops, constants and folds are the compiler's,
layouts and shared memory come later. Loads and stores outside their tensor, and two stores to one place, raise.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# ---- Triton IR as text → operations ---------------------------------------------------------------------------

TYPES = {"i1": torch.bool, "i32": torch.int32, "i64": torch.int64, "f16": torch.float16, "bf16": torch.bfloat16}
TYPES |= {"f32": torch.float32, "f64": torch.float64}
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
# extui: of i1, for nothing else is unsigned.
_CASTS = ("arith.extsi", "arith.trunci", "arith.extf", "arith.truncf", "arith.sitofp", "arith.extui")
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
