"""Embedding lookup whose gradient has the same bits in every run, inside a compiled graph too.

Inductor adds up the rows of such a gradient atomically, in an order that changes from run to run. PyTorch's own kernel sorts
the ids first. As a custom operator it stays one call in a graph; the lookup itself is fused as before.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def lookup(table: Tensor, ids: Tensor, padding: int = -1) -> Tensor:
    """Rows of a table [N, D] by ids [T] int64: [T, D]. Row ``padding`` gets no gradient."""
    return _Lookup.apply(table, ids, padding)


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, ids: Tensor, padding: int) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.rows, ctx.padding = len(table), padding
        return F.embedding(ids, table)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (ids,) = ctx.saved_tensors
        return _gradient(gradients[0], ids, ctx.rows, ctx.padding), None, None


@torch.library.custom_op("fastkd::lookup_gradient", mutates_args=())
def _gradient(gradient: Tensor, ids: Tensor, rows: int, padding: int) -> Tensor:
    return torch.ops.aten.embedding_dense_backward(gradient, ids, rows, padding, False)


@_gradient.register_fake
def _(gradient: Tensor, ids: Tensor, rows: int, padding: int) -> Tensor:
    return gradient.new_empty(rows, gradient.shape[1])
