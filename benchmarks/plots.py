"""Figures."""

from __future__ import annotations

import io
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter

import train


@contextmanager
def figure(
    path: Path, rows: int, columns: int, *, size: tuple[float, float], dpi: int, **options: Any
) -> Iterator[tuple[plt.Figure, Any]]:
    """A figure of ``size`` inches and its panels, as of plt.subplots; it is saved to ``path`` in the end, whole."""
    drawn, panels = plt.subplots(rows, columns, figsize=size, layout="constrained", **options)
    try:
        yield drawn, panels
        image = io.BytesIO()
        drawn.savefig(image, format=path.suffix[1:], dpi=dpi)
        train.save(path, image.getvalue())
    finally:
        plt.close(drawn)


def band(
    axes: plt.Axes, curves: list[list[float]], style: str, label: str, epochs: Sequence[int] | None = None
) -> None:
    """Mean and, over two or more, sample standard deviation by epoch."""
    by_epoch = list(zip(*curves, strict=False))
    epochs = epochs or range(1, len(by_epoch) + 1)
    means = [statistics.mean(values) for values in by_epoch]
    axes.plot(epochs, means, style, linewidth=1.3, label=label)
    if len(curves) > 1:
        deviations = [statistics.stdev(values) for values in by_epoch]
        low = [m - d for m, d in zip(means, deviations, strict=True)]
        high = [m + d for m, d in zip(means, deviations, strict=True)]
        axes.fill_between(epochs, low, high, color=style[:2], alpha=0.15, linewidth=0)


def log_scale(axes: plt.Axes) -> None:
    """Of the values axis, with plain numbers: 0.1, 0.2, 0.3, 0.5, 1; more where what is drawn spans little."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(
        LogLocator(subs=(1, 2, 3, 5) if high / low > 4 else (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8))
    )
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def legend_above(figure: plt.Figure) -> None:
    """One for all panels, where it hides no curve."""
    by_label = {
        label: line for axes in figure.axes for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    if by_label:
        columns = min(len(by_label), int(figure.get_figwidth() / 2.7))
        figure.legend(by_label.values(), by_label.keys(), loc="outside upper center", ncols=columns)


def bars(axes: plt.Axes, names: list[str], values: list[float], words: list[str], colours: list[str]) -> None:
    """A horizontal bar a name, the first on top, with ``words`` behind it."""
    drawn = axes.barh(range(len(names)), values, color=colours)
    axes.bar_label(drawn, words, padding=3, fontsize=9)
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.set_xlim(0, 1.55 * max(values))
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.yaxis.set_inverted(True)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
