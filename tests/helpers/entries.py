"""The entries of sam_fused/bases.py for programs in C++."""

from __future__ import annotations

from sam_fused.bases import UPDATE_BY_NAME


def entries() -> str:
    """A line a base: name, for each state whether it is a mean of squares, largest error, row of hyper-parameters."""
    lines = []
    for name, update in UPDATE_BY_NAME.items():
        squares = "".join(str(int("sq" in key)) for key in update.state) or "-"
        lines.append(" ".join([name, squares, *map(repr, (update.error, *update.hyper.values()))]))
    return "\n".join(lines)
