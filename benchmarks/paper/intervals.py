"""The 95 % t interval of differences that are paired by seed."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from scipy.stats import t as student


def t_interval(differences: Sequence[float]) -> tuple[float, float]:
    """Of their mean; there must be two or more."""
    n, mean = len(differences), statistics.mean(differences)
    half = float(student.ppf(0.975, n - 1)) * statistics.stdev(differences) / n**0.5
    return mean - half, mean + half
