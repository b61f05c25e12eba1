"""Inductor's code for an H100, made without a GPU: what one training step of a student runs and moves.

    python -m bench.inductor                                            paper-6l's student, mlm, 131,072 tokens
    python -m bench.inductor --method minilmv2 --residual bfloat16 --code out.py

The student's forward and backward are traced on tensors that have shapes and no memory, and Inductor schedules and
writes its kernels as it would beside an H100; none is loaded or run. Bytes are Inductor's own count: what each kernel
reads and writes of the buffers among its arguments. Operations outside of a graph count what they read and write, views
excepted. Matrix products and attention are counted apart, as calls: they are not Inductor's. Needs a CUDA build of torch.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx
from torch._inductor import compile_fx
from torch._inductor import config as inductor_config
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.graph import GraphLowering
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.absent_gpu import absent_h100, moved
from fastkd import methods
from fastkd.models import encoder as encoder_module
from fastkd.models.encoder import Encoder, EncoderConfig
from fastkd.models.needs import Needs, Outputs

_compile = compile_fx._compile_fx_inner
_aten = torch.ops.aten
FREE = (_aten.detach.default, _aten.empty_like.default, _aten._unsafe_view.default)  # operations that launch nothing
SEQ_LENGTH, MASK_RATE, VOCABULARY = 128, 0.15, 30522


@dataclass
class Work:
    """What a direction of a step does on the device."""

    graphs: int = 0  # runs of compiled graphs
    kernels: int = 0  # launches of Inductor's own Triton kernels
    kernel_bytes: int = 0
    calls: Counter[str] = field(default_factory=Counter)  # within graphs: matrix products, attention, fallbacks
    eager: Counter[str] = field(default_factory=Counter)  # operations outside of graphs
    eager_bytes: int = 0
    fills: int = 0  # whole [T, 3D] tensors of zeros, which only an unread projection needs
    saved_bytes: int = 0  # what the forward's graphs keep for the backward, inputs left out


class Reading(TorchDispatchMode):
    """Adds up a step's work: graphs as they were scheduled, and what runs outside of them."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.fill_shape = (rows, 3 * width)
        self.work = Work()
        self.codes: list[str] = []
        self.seconds = 0.0  # of the CPU that Inductor took
        self.within = False  # a graph, whose operations are not run one by one

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = isinstance(out, Tensor | tuple | list) and not func.is_view
        if made and not self.within and func not in FREE:
            tensors = {id(x): x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)}
            self.work.eager[str(func).removesuffix(".default")] += 1
            self.work.eager_bytes += sum(_held(x) for x in tensors.values())
            self.work.fills += _is_fill(func, out, self.fill_shape)
        return out

    def compile(self, graph: fx.GraphModule, inputs: list[Any], **options: Any) -> Any:
        """In the place of Inductor's own: schedules and writes the code; what it returns gives tensors of the right
        shapes, and adds the graph's work each time."""
        traced, mine, started = copy.deepcopy(graph), Work(graphs=1), time.process_time()
        with absent_h100(), mock.patch.object(GraphLowering, "compile_to_module", lambda g: self._schedule(g, mine)):
            _compile(graph, moved(graph, inputs), **options)
        self.seconds += time.process_time() - started
        return Graph(traced, self, mine)

    def _schedule(self, graph: GraphLowering, work: Work) -> SimpleNamespace:
        code, _ = graph.codegen()
        self.codes.append(code.value)
        for node in graph.scheduler.nodes:
            _count_node(node, work)
        return SimpleNamespace(call=lambda inputs: None, __file__="")


class Graph:
    """A compiled graph that computes shapes."""

    def __init__(self, traced: fx.GraphModule, reading: Reading, work: Work) -> None:
        self.traced, self.reading, self.work = traced, reading, work
        self._boxed_call = True  # it takes a list, and empties it

    def __call__(self, inputs: list[Any]) -> Any:
        reading, total = self.reading, self.reading.work
        for name, value in vars(self.work).items():
            setattr(total, name, getattr(total, name) + value)
        known = {id(x) for x in inputs}
        reading.within = True
        try:
            out = fx.Interpreter(self.traced).run(*inputs)
        finally:
            reading.within = False
        inputs.clear()
        total.saved_bytes += sum(_held(x) for x in tree_leaves(out) if isinstance(x, Tensor) and id(x) not in known)
        return out


def _held(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _is_fill(function: Any, out: Any, shape: tuple[int, int]) -> bool:
    name = str(function)
    made = any(word in name for word in ("aten.zeros", "aten.full", "aten.new_zeros", "aten.zeros_like"))
    return made and isinstance(out, Tensor) and tuple(out.shape) == shape


def _count_node(node: Any, work: Work) -> None:
    """A scheduled node: one kernel of Inductor's, or a call of something else."""
    kind = type(node.node).__name__
    if node.is_extern() and kind != "MultiOutput":  # which names one of a call's outputs
        name = str(getattr(node.node, "python_kernel_name", None) or kind).removesuffix(".default")
        work.calls[name.split(".")[-1]] += 1
    elif not node.is_extern() and type(node).__name__ != "NopKernelSchedulerNode":
        work.kernels += 1
        work.kernel_bytes += node.get_read_write_buffers_sizes()


@dataclass(frozen=True)
class Text:
    """The fields of a batch that the encoder reads, of full sequences."""

    ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    predicted: Tensor
    max_seqlen: int = SEQ_LENGTH

    @classmethod
    def of(cls, tokens: int) -> Text:
        def empty(count: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(count, dtype=dtype)

        sequences = tokens // SEQ_LENGTH
        return cls(
            empty(tokens, torch.int64), empty(tokens, torch.int64), empty(sequences + 1, torch.int32),
            empty(round(MASK_RATE * tokens), torch.int64),
        )  # fmt: skip


def needs_of(method: str, config: EncoderConfig) -> Needs:
    """What the loss of a method reads of its student, under a teacher of the same shape."""
    module = methods.load(method)
    needs: Needs = module.METHOD(module.Config(), config, config).student_needs
    return needs


def student(config: EncoderConfig, residual: str, layerwise: bool) -> Encoder:
    """The student as ``train.py`` compiles it."""
    encoder = Encoder(config, mlm_head=True, residual=getattr(torch, residual))
    encoder.compile_graphs(layerwise=layerwise)
    return encoder


def outputs(out: Outputs) -> list[Tensor]:
    """The tensors that the loss gives gradients."""
    rows = [x for x in (out.head_rows, out.last_rows) if x is not None]
    return [*rows, *out.hidden.values(), *(x for parts in out.qkv.values() for x in parts)]


def step(encoder: Encoder, text: Text, needs: Needs, reading: Reading) -> dict[str, Work]:
    """A forward and a backward, and what each did."""
    found = {}
    reading.work = found["forward"] = Work()
    with torch.autocast("cpu", torch.bfloat16):
        out = outputs(encoder(text.ids, text, needs))
    gradients = [torch.empty_like(x) for x in out]
    reading.work = found["backward"] = Work()
    torch.autograd.backward(out, gradients)
    found["forward"].saved_bytes -= sum(_held(x) for x in out)
    found["backward"].saved_bytes = 0
    for parameter in encoder.parameters():
        parameter.grad = None
    return found


def read(config: EncoderConfig, tokens: int, method: str, residual: str, layerwise: bool) -> tuple[dict[str, Any], str]:
    """A step's work by direction with the CPU seconds that tracing, scheduling and writing code took, and that code."""
    torch._dynamo.reset()
    reading, needs = Reading(tokens, config.hidden_size), needs_of(method, config)
    with (
        FakeTensorMode(),
        inductor_config.patch(fx_graph_cache=False, fx_graph_remote_cache=False),
        mock.patch.object(compile_fx, "_compile_fx_inner", reading.compile),
        mock.patch.object(AsyncCompile, "triton", lambda *_, **__: None),  # which loads a kernel ahead of its first run
        mock.patch.object(encoder_module, "choose_backend", lambda *_: "triton"),  # what a GPU takes
    ):
        encoder, text = student(config, residual, layerwise), Text.of(tokens)
        started = time.process_time()
        step(encoder, text, needs, reading)
        seconds = time.process_time() - started
        with reading:
            found = step(encoder, text, needs, reading)
    works = {name: vars(work) for name, work in found.items()}
    return works | {"seconds": seconds, "inductor_seconds": reading.seconds}, "\n\n".join(reading.codes)


def line(name: str, work: dict[str, Any]) -> str:
    """A direction in words."""
    calls = ", ".join(f"{count} {call}" for call, count in work["calls"].items())
    eager = ", ".join(f"{count} {call}" for call, count in work["eager"].items()) or "none"
    return (
        f"{name:9}{work['graphs']} graphs, {work['kernels']} Triton kernels moving {work['kernel_bytes'] / 1e9:.2f} GB, "
        f"calls: {calls}\n         outside of graphs {work['eager_bytes'] / 1e9:.2f} GB: {eager}; "
        f"{work['fills']} zero fills of [T, 3D]; saved for the backward {work['saved_bytes'] / 1e9:.2f} GB"
    )


def main(argv: list[str] | None = None) -> None:
    """Print what a step does, and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=methods.available(), default="mlm", help="whose outputs are read")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=131072, help=f"of a micro-batch, in sequences of {SEQ_LENGTH}")
    parser.add_argument("--residual", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--layerwise", action="store_true", help="one graph a layer, as with several ranks")
    parser.add_argument("--code", type=Path, help="write Inductor's code there")
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args(argv)
    config = EncoderConfig(
        "bert", VOCABULARY, options.width, options.layers, options.heads, 4 * options.width, SEQ_LENGTH * 4
    )
    found, code = read(config, options.tokens, options.method, options.residual, options.layerwise)
    for name in ("forward", "backward"):
        print(line(name, found[name]))
    print(
        f"traced, scheduled and written in {found['seconds']:.1f} s of one core, {found['inductor_seconds']:.1f} of them Inductor's"
    )
    if options.code:
        options.code.write_text(code)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
