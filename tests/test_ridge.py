"""The ridge read-out is scikit-learn's, and what it leaves out changes nothing."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from fastkd.probes.ridge import Fit, Sums


def rows(count: int, width: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """States of unequal scales, far from the origin as LayerNorms with outliers leave them, and labels that they tell."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    centres = torch.randn(classes, width, generator=generator)
    noise = torch.randn(count, width, generator=generator) * torch.logspace(-2, 1, width)
    return (centres[labels] + noise + 5).float(), labels


@pytest.mark.parametrize("penalty", [1e-4, 1e-2, 1.0])
@pytest.mark.parametrize(("count", "width", "classes"), [(400, 24, 17), (30, 40, 5)])
def test_scores_are_those_of_scikit_learn(penalty: float, count: int, width: int, classes: int) -> None:
    x, labels = rows(count, width, classes)
    fit = Fit(Sums.of(x, labels, classes))
    ridge = fit.at(penalty)
    centred = x.double().numpy() - x.double().numpy().mean(0)
    assert fit.scale == pytest.approx((centred**2).sum() / width, rel=1e-9)
    theirs = Ridge(alpha=penalty * fit.scale, solver="cholesky" if count > width else "svd")
    theirs.fit(x.double().numpy(), np.eye(classes)[labels])
    ours = (x.double() - ridge.mean) @ ridge.weight + ridge.bias
    np.testing.assert_allclose(ridge.weight.T, theirs.coef_, rtol=0, atol=1e-6)
    np.testing.assert_allclose(ours, theirs.predict(x.double().numpy()), rtol=0, atol=1e-6)
    assert torch.equal(ridge.predict(x), ours.argmax(1))


def test_sums_of_parts_are_those_of_the_whole() -> None:
    x, labels = rows(200, 8, 6)
    whole, parts = Sums.of(x, labels, 6), Sums.of(x[:70], labels[:70], 6) + Sums.of(x[70:], labels[70:], 6)
    for name in ("count", "x", "xx", "xy", "y"):
        torch.testing.assert_close(torch.as_tensor(getattr(parts, name)), torch.as_tensor(getattr(whole, name)))


def test_a_class_without_rows_is_never_predicted() -> None:
    x, labels = rows(300, 12, 7)
    without, among = Fit(Sums.of(x, labels, 7)).at(1e-2), Fit(Sums.of(x, labels + 1, 30)).at(1e-2)
    scores = (x.double() - without.mean) @ without.weight + without.bias
    torch.testing.assert_close(scores.sum(1), torch.ones(300, dtype=torch.float64))
    assert torch.equal(without.predict(x) + 1, among.predict(x))


def test_equal_rows_give_the_most_frequent_class() -> None:
    labels = torch.tensor([2, 0, 2, 1])
    assert Fit(Sums.of(torch.ones(4, 3), labels, 3)).at(1e-4).predict(torch.randn(5, 3)).tolist() == [2] * 5
