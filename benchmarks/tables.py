"""Tables in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence


def row(cells: Iterable[object]) -> str:
    return "|" + "".join(f" {cell} |" if cell != "" else " |" for cell in cells)


def table(header: Sequence[str], rows: Iterable[Iterable[object]]) -> list[str]:
    """The lines of a table."""
    return [row(header), "|" + "---|" * len(header), *map(row, rows)]


def percent(shares: Iterable[float]) -> str:
    """Mean and, over two or more, sample standard deviation in %."""
    numbers = [100 * x for x in shares]
    if not numbers:
        return "-"
    return f"{statistics.mean(numbers):.1f}" + (f" ± {statistics.stdev(numbers):.1f}" if len(numbers) > 1 else "")
