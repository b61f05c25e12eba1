"""What both paths of linear_kd take and give: a model's output head, the loss's terms, gradients and sums."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

IGNORED = -100  # label of a row that does not count
LOG2E = math.log2(math.e)
DIVERGENCES = ("kl", "reverse_kl", "mse")


class Head(NamedTuple):
    """One model's side of the loss.

    In full precision the mean row of the weight is subtracted from every row. That adds one number to all logits of a row, which
    the softmax does not see, and as Σ dz = 0 it does not change dx. Otherwise large logits are rounded (a float32 logit of 130 is
    known to 1e-5), and large parts of dz·W cancel.
    """

    hidden: Tensor  # [M, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]; not centred: one entry of −1e10, which masks a word, would dominate the mean
    centre: Tensor | None = None  # [D]: the mean row, which ``columns`` subtracts

    def centred(self, dtype: torch.dtype) -> Head:
        """The head with the mean row of its weight as centre, unless ``dtype`` rounds to half precision."""
        return self if dtype.itemsize < 4 else self._replace(centre=self.weight.to(dtype).mean(0))

    def columns(self, chosen: slice | Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of the weight [C, D], which make columns of the logits, less the centre."""
        weight = self.weight[chosen].to(dtype)
        return weight if self.centre is None else weight - self.centre

    def rows(self, rows: slice | Tensor, dtype: torch.dtype | None = None) -> Head:
        return self._replace(hidden=self.hidden[rows].to(dtype or self.hidden.dtype))

    def cast(self, dtype: torch.dtype, columns: int, rows: int) -> Head:
        """Contiguous operands in ``dtype``: the weight with zeros from V up to ``rows``, and a float32 bias for ``columns``,
        −∞ from V on and 0 if there was none."""
        vocabulary = len(self.weight)
        bias = self.weight.new_full((columns,), -math.inf, dtype=torch.float32)
        bias[:vocabulary] = 0.0 if self.bias is None else self.bias
        if rows == vocabulary:
            return Head(self.hidden.to(dtype).contiguous(), self.columns(slice(None), dtype).contiguous(), bias)
        weight = self.weight.new_empty((rows, self.weight.shape[1]), dtype=dtype)
        if self.centre is None:
            weight[:vocabulary] = self.weight  # the copy casts
        else:
            torch.sub(self.weight.to(dtype), self.centre, out=weight[:vocabulary])
        weight[vocabulary:] = 0.0
        return Head(self.hidden.to(dtype).contiguous(), weight, bias)


class Terms(NamedTuple):
    kl_weight: float
    ce_weight: float
    temperature: float  # 1 for mse, which has none
    divergence: str = "kl"

    @property
    def two_softmaxes(self) -> bool:
        """Whether the cross-entropy's softmax is not the divergence's."""
        return self.ce_weight != 0 and self.temperature != 1

    def value_factor(self, vocabulary: int) -> float:
        """What a row's sum over the vocabulary is multiplied by: τ² of the divergences of softmaxes, 1/V of a mean square."""
        return 1 / vocabulary if self.divergence == "mse" else float(self.temperature**2)

    def gradient_factor(self, vocabulary: int) -> float:
        """What the divergence's dz has before it, without the share of a row."""
        return self.kl_weight * 2 / vocabulary if self.divergence == "mse" else self.kl_weight * self.temperature


class Gradients(NamedTuple):
    """The gradients, in float32 (float64 for float64); the weight's as the operator's ``_weight_dtype`` says. None: not wanted."""

    hidden: Tensor | None
    weight: Tensor | None  # [V, D], on the Triton path with rows up to a multiple of ``launch.ALIGNED``
    bias: Tensor | None

    @property
    def wanted(self) -> list[Tensor]:
        return [x for x in self if x is not None]


class Sums(NamedTuple):
    """Sums over the rows that are not ignored. From the Triton path: parts that add up to them, the divergence without its
    ``value_factor``."""

    kl: Tensor
    ce: Tensor


def check_labels(labels: Tensor, vocabulary: int) -> None:
    """ValueError for an id outside the vocabulary; on a GPU, which the host does not wait for, a failed assertion there."""
    wrong = (labels != IGNORED) & (labels != labels.clamp(0, vocabulary - 1))
    if labels.device.type != "cpu":
        torch._assert_async(~wrong.any())
    elif wrong.any():
        label = int(labels[wrong][0])
        raise ValueError(
            f"linear_kd: label {label} is outside the vocabulary of {vocabulary:,}, and {IGNORED} ignores a row"
        )
