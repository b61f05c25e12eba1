"""Ridge regression onto one-hot targets, in closed form and float64.

W = (XᵀX + λI)⁻¹ XᵀY minimises ‖XW + b − Y‖² + λ‖W‖², with X and Y centred so that the bias b is not penalised (Hoerl and
Kennard 1970). Y is one-hot, so XᵀY is the sum of the rows of each class and no [rows, classes] matrix is made.

Shapes: n rows, D features, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

ROWS = 1024  # that are scored at once, [ROWS, K]


@dataclass(frozen=True)
class Sums:
    """All that a regression needs of its rows; sums of two sets of rows are the sums of both."""

    count: int
    x: Tensor  # [D] float64, Σ x
    xx: Tensor  # [D, D] float64, Σ x xᵀ
    xy: Tensor  # [K, D] float64, Σ x of each class
    y: Tensor  # [K] float64, rows of each class

    @classmethod
    def of(cls, x: Tensor, labels: Tensor, classes: int) -> Sums:
        """From states [n, D] and labels [n] int64 below ``classes``."""
        x = x.double()
        xy = torch.zeros(classes, x.shape[1], dtype=torch.float64).index_add_(0, labels, x)
        return cls(len(x), x.sum(0), x.t() @ x, xy, torch.bincount(labels, minlength=classes).double())

    def __add__(self, other: Sums) -> Sums:
        return Sums(
            self.count + other.count, self.x + other.x, self.xx + other.xx, self.xy + other.xy, self.y + other.y
        )


class Ridge(NamedTuple):
    """A fitted regression: scores are (x − mean) W + b. Their sum over the classes is 1."""

    mean: Tensor  # [D] float64
    weight: Tensor  # [D, K] float64
    bias: Tensor  # [K] float64

    def predict(self, x: Tensor) -> Tensor:
        """The class with the largest score of each row of [n, D]: [n] int64."""
        parts = (torch.addmm(self.bias, part.double() - self.mean, self.weight).argmax(1) for part in x.split(ROWS))
        return torch.cat(list(parts))


class Fit:
    """The regressions of some sums, one for each penalty: they share an eigendecomposition."""

    def __init__(self, sums: Sums) -> None:
        n = sums.count
        self.mean, self.share = sums.x / n, sums.y / n
        values, self._vectors = torch.linalg.eigh(sums.xx - n * torch.outer(self.mean, self.mean))
        self._values = values.clamp_(min=0)  # a sum of squares, up to rounding
        self._rotated = self._vectors.t() @ (sums.xy - torch.outer(sums.y, self.mean)).t()  # Qᵀ XᵀY, [D, K]
        self.scale = max(float(values.mean()), torch.finfo(torch.float64).tiny)

    def at(self, penalty: float) -> Ridge:
        """With λ = ``penalty`` · trace(XᵀX) / D, X centred: the penalty does not depend on the states' size or number."""
        damped = self._rotated / (self._values + penalty * self.scale)[:, None]
        return Ridge(self.mean, self._vectors @ damped, self.share)
