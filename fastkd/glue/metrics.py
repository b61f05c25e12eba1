"""The metrics of GLUE, from scikit-learn and scipy. All are shares: 1 is perfect; tables show them times 100."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import numpy as np

Metric = Callable[[np.ndarray, np.ndarray], float]


def accuracy(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Share of rows [N] whose predicted class is the label."""
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(labels, predictions))


def f1(labels: np.ndarray, predictions: np.ndarray) -> float:
    """2·precision·recall / (precision + recall) of class 1; 0 where it is neither there nor predicted."""
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predictions, average="binary", zero_division=0))


def macro_f1(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Mean over the classes that are there or predicted of each one's F1."""
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predictions, average="macro", zero_division=0))


def matthews(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Matthews correlation of classes; 0 where labels or predictions hold one class only."""
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(labels, predictions))


def pearson(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Pearson correlation of scores; nan where labels or predictions are constant."""
    from scipy.stats import pearsonr

    return float(pearsonr(labels, predictions).statistic)


def spearman(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Spearman rank correlation of scores; nan where labels or predictions are constant."""
    from scipy.stats import spearmanr

    return float(spearmanr(labels, predictions).statistic)


CLASS_METRICS: dict[str, Metric] = {"accuracy": accuracy, "f1": f1, "macro_f1": macro_f1, "matthews": matthews}
SCORE_METRICS: dict[str, Metric] = {"pearson": pearson, "spearman": spearman}
METRICS = CLASS_METRICS | SCORE_METRICS


def score(metrics: Sequence[str], labels: np.ndarray, predictions: np.ndarray) -> dict[str, float]:
    """Each metric of ``predictions`` [N] against ``labels`` [N], times 100.

    A correlation that is not defined, for a model that answers every row alike, counts as 0: it ranks nothing.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # degenerate predictions are an answer here, not a mistake
        values = {name: METRICS[name](labels, predictions) for name in metrics}
    return {name: 100 * float(np.nan_to_num(value)) for name, value in values.items()}
