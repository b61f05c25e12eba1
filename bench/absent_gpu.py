"""An H100 that is not here, as far as torch's compiler asks about one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx
from torch._dynamo import device_interface
from torch._subclasses import fake_tensor
from torch.utils import _triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

CAPABILITY = (9, 0)
H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, gcnArchName="", multi_processor_count=132, warp_size=32,
    regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024,
    total_memory=80 << 30, L2_cache_size=50 << 20, shared_memory_per_block_optin=227 << 10,
)  # fmt: skip


def _answers() -> dict[str, Any]:
    """What torch.cuda would say beside an H100, and nothing where it would do something."""
    return {
        "is_available": lambda: True,
        "is_bf16_supported": lambda *_, **__: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda *_: H100,
        "get_device_capability": lambda *_: CAPABILITY,
        "get_device_name": lambda *_: H100.name,
        "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda *_: None,
        "set_device": lambda *_: None,
        "synchronize": lambda *_: None,
        "_exchange_device": lambda *_: 0,
        "_maybe_exchange_device": lambda *_: 0,
    }


@contextlib.contextmanager
def absent_h100() -> Iterator[None]:
    """Within it Inductor writes code for an H100, of a graph on ``cuda:0``; nothing can be traced or run on that.

    Raises:
        ValueError: this torch was built without CUDA.
    """
    if torch.version.cuda is None:
        raise ValueError("Inductor writes CUDA code with a CUDA build of torch only: install one (it needs no GPU)")
    interface = device_interface.CudaInterface
    with contextlib.ExitStack() as stack:
        for name, answer in _answers().items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
            if hasattr(interface, name):
                stack.enter_context(mock.patch.object(interface, name, staticmethod(answer)))
        stack.enter_context(mock.patch.object(fake_tensor, "init_gpu_context", lambda _: None))
        target = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32))
        stack.enter_context(mock.patch.object(driver, "_active", target))
        _ask_anew()
        stack.callback(_ask_anew)
        yield


def _ask_anew() -> None:
    """torch keeps what it has found out of Triton and the GPU."""
    for function in vars(_triton).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()


def moved(graph: fx.GraphModule, inputs: list[Any]) -> list[Any]:
    """The graph, traced on shapes of a CPU, put on ``cuda:0`` in place; and its inputs there, which are shapes too."""
    device = torch.device("cuda:0")

    def there(value: Any) -> Any:
        return device if isinstance(value, torch.device) else value

    for node in graph.graph.nodes:
        node.args = fx.node.map_aggregate(node.args, there)
        node.kwargs = fx.node.map_aggregate(node.kwargs, there)
    return [_shape_of(x, device) if isinstance(x, fake_tensor.FakeTensor) else x for x in inputs]


def _shape_of(x: fake_tensor.FakeTensor, device: torch.device) -> Tensor:
    with x.fake_mode:
        return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device=device)
