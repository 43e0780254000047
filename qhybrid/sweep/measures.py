"""The metrics of a sweep, computed from the figures of each held-out row."""

from __future__ import annotations

import numpy as np

from qhybrid.recipe.sweep import Metric as MetricName
from qhybrid.sweep.outcome import RowFigures
from qhybrid.sweep.statistics import F1, RATIO, Metric, f1_features, macro_f1


def features_of(name: MetricName, rows: RowFigures, num_labels: int) -> tuple[Metric, np.ndarray]:
    """The metric, and what each row adds to its sums (rows, features)."""
    if name == "loss":
        return RATIO, np.stack([rows.losses, rows.tokens], axis=1).astype(np.float64)
    if name == "exact_match":
        asked = np.array([exact is not None for exact in rows.exact])
        right = np.array([bool(exact) for exact in rows.exact])
        return RATIO, np.stack([right, asked], axis=1).astype(np.float64)
    if name == "accuracy":
        right = np.equal(rows.expected, rows.predicted)
        return RATIO, np.stack([right, np.ones(len(right))], axis=1).astype(np.float64)
    if name == "f1":
        return F1, f1_features(rows.expected, rows.predicted, 0)
    parts = [f1_features(rows.expected, rows.predicted, label) for label in range(num_labels)]
    return macro_f1(num_labels), np.concatenate(parts, axis=1)


def value_of(name: MetricName, rows: RowFigures, num_labels: int) -> float:
    """The metric over all rows."""
    metric, features = features_of(name, rows, num_labels)
    return float(metric.value(features.sum(axis=0)))
