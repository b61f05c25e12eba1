"""A narrower or shallower student cut out of its teacher: which neurons it keeps, and the weights between them.

Weight subcloning (Samragh et al. 2023, arXiv 2312.09299), with one choice of residual channels for the whole model. Shapes: D
width, H heads, d = D/H, I intermediate width; _s student, _t teacher.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fastkd.models.encoder import EncoderConfig
    from fastkd.models.importance import Importance

# What a student may have less of than its teacher, in the words of a plan.
CUT = {
    "num_layers": "layers",
    "hidden_size": "channels",
    "num_heads": "heads",
    "head_width": "dimensions of a head",
    "intermediate_size": "intermediate neurons",
}
LAYER = re.compile(r"(?<=^layers\.)\d+")


@dataclass(frozen=True)
class Kept:
    """The teacher's neurons that a student has, as indices in the student's order. Lists are over the student's layers."""

    width: Tensor  # [D_s]: channels of the residual stream, the same everywhere
    query_key: list[Tensor]  # [D_s]: rows of the queries' product, the same of the keys'
    value: list[Tensor]  # [D_s]: rows of the values' product, and columns of the attention's output
    intermediate: list[Tensor]  # [I_s]: rows of the up-projection, and columns of the down-projection

    def along(self, axis: str, layer: int, teacher_width: int) -> Tensor:
        """The indices along an axis, as ``Family.axes`` names it, of a parameter of a student's layer (from 0)."""
        if axis in ("width", "decoded"):
            return self.width
        if axis == "qkv":
            rows = (self.query_key[layer], self.query_key[layer], self.value[layer])
            return torch.cat([part * teacher_width + each for part, each in enumerate(rows)])
        return self.value[layer] if axis == "context" else self.intermediate[layer]


def choose(importance: Importance, student: EncoderConfig, teacher: EncoderConfig) -> Kept:
    """The most important neurons, in the teacher's order: residual channels of the whole model, and in each layer H_s heads,
    d_s query–key and d_s value dimensions of each of these, and I_s intermediate neurons."""
    layers = [source_layer(number, student, teacher) for number in range(student.num_layers)]
    heads = [_largest(importance.heads[layer], student.num_heads) for layer in layers]

    def within_heads(scores: Tensor) -> list[Tensor]:
        """Rows of the product in each layer, [D_s], from scores [Lt, Ht, d_t]."""
        kept = [_largest(scores[layer][mine], student.head_width) for layer, mine in zip(layers, heads, strict=True)]
        return [(mine[:, None] * teacher.head_width + each).flatten() for mine, each in zip(heads, kept, strict=True)]

    return Kept(
        width=_largest(importance.width, student.hidden_size),
        query_key=within_heads(importance.query_key),
        value=within_heads(importance.value),
        intermediate=[_largest(importance.intermediate[layer], student.intermediate_size) for layer in layers],
    )


def _largest(scores: Tensor, count: int) -> Tensor:
    """Indices of the largest along the last dimension, ascending; of equals the first."""
    return scores.argsort(dim=-1, descending=True, stable=True)[..., :count].sort(dim=-1).values


def cut(state: Mapping[str, Tensor], kept: Kept, student: EncoderConfig, teacher: EncoderConfig) -> dict[str, Tensor]:
    """The student's parameters, by its names, from those of the teacher's layers under the same names (see ``source``).

    Sums over fewer neurons shrink: over n_s of n_t independent terms of one size to √(n_s/n_t) of their scale, over the largest
    terms not so far. Logits are multiplied by √(D_t/D_s), in the head's LayerNorm, since the decoder is the word embeddings.
    Other products are not scaled: most are added to the residual stream, and a LayerNorm follows. Scores of queries and keys
    need no factor, since they are divided by √d_s, where the teacher's are by √d_t. Equal sizes have the factor 1.

    Measured before the first step, in one to four students of one teacher: 1 or D_t/D_s for the logits, √(n_t/n_s) or n_t/n_s
    for the other products gave a higher loss, (n_t/n_s)^¼ for these one 0.2 lower to 0.04 higher.
    """
    axes, larger = student.family.axes(student), teacher.hidden_size / student.hidden_size
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        number = LAYER.search(name)
        for dim, axis in enumerate(axes[name]):
            if axis != "rows":
                indices = kept.along(axis, int(number[0]) if number else 0, teacher.hidden_size)
                tensor = tensor.index_select(dim, indices.to(tensor.device))
        found[name] = tensor * math.sqrt(larger) if axes[name] == ("decoded",) else tensor
    return found


def source(name: str, student: EncoderConfig, teacher: EncoderConfig) -> str:
    """The teacher's name of what a parameter of the student starts from."""
    return LAYER.sub(lambda number: str(source_layer(int(number[0]), student, teacher)), name)


def source_layer(number: int, student: EncoderConfig, teacher: EncoderConfig) -> int:
    """The teacher's layer that a student's starts from, ⌊i·Lt/Ls⌋ (both from 0)."""
    return number * teacher.num_layers // student.num_layers


def is_cut(student: EncoderConfig, teacher: EncoderConfig) -> bool:
    """Whether a student is narrower than its teacher, so that neurons must be chosen; a shallower one has whole layers."""
    return any(getattr(student, name) != getattr(teacher, name) for name in CUT if name != "num_layers")


def remark(student: EncoderConfig, teacher: EncoderConfig) -> str | None:
    """What of its teacher a student starts from, in words; None if it is all of it."""
    sizes = [(getattr(student, name), getattr(teacher, name), word) for name, word in CUT.items()]
    return ", ".join(f"{mine:,} of {theirs:,} {word}" for mine, theirs, word in sizes if mine != theirs) or None


def check(student: EncoderConfig, teacher: EncoderConfig) -> None:
    """Refuse a student that cannot be cut out of its teacher.

    Raises:
        ValueError: naming what does not fit, and what does.
    """
    largest = f"{teacher.num_layers}L-{teacher.hidden_size}H-{teacher.num_heads}A-{teacher.intermediate_size}I"
    mine = f"{student.num_layers}L-{student.hidden_size}H-{student.num_heads}A-{student.intermediate_size}I"
    for name in ("num_layers", "hidden_size", "intermediate_size"):
        if getattr(student, name) > getattr(teacher, name):
            raise ValueError(
                f"--init-from-teacher takes a student no larger than its teacher: at most {largest}, not {mine}; change --student"
            )
    _check_heads(student, teacher)
    if is_cut(student, teacher) and not teacher.family.axes(teacher):
        raise ValueError(
            f"--init-from-teacher needs the widths of a {teacher.model_type} teacher ({largest}), not {mine}; change --student"
        )


def _check_heads(student: EncoderConfig, teacher: EncoderConfig) -> None:
    """A head of the student is a part of one of the teacher's."""
    D, H, d = student.hidden_size, teacher.num_heads, teacher.head_width
    if student.num_heads <= H and student.head_width <= d:
        return
    fitting = [f"{D}H-{heads}A" for heads in range(1, H + 1) if D % heads == 0 and D // heads <= d]
    remedy = (
        f"give --student {' or '.join(fitting)}" if fitting else f"give --student a width that is a multiple of {d}"
    )
    raise ValueError(
        f"--init-from-teacher cuts the teacher's {H} heads of width {d}, from which {student.num_heads} heads of width "
        f"{student.head_width} cannot be made; {remedy}"
    )
