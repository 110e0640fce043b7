"""SAM's geometry: what the optimizers and the functions that measure sharpness have in common."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def ascent_scale(w: Tensor, options: dict[str, Any]) -> Tensor:
    """T: 1, or |w| + eta for ASAM."""
    return w.abs() + options["eta"] if options["adaptive"] else torch.ones_like(w)


def check_options(options: dict[str, Any]) -> None:
    """Raise ValueError where rho, eta or adaptive, as far as they are given, are not as described.

    Numbers of other libraries, such as numpy's, become Python's: a checkpoint is to load with ``weights_only=True``.
    """
    for name in ("rho", "eta"):
        value = options.get(name, 0.0)
        if not _is_finite(value):
            raise ValueError(f"{name}: expected a finite number >= 0, got {value!r}")
        if name in options and type(value) not in (int, float):
            options[name] = float(value)
    if not isinstance(options.get("adaptive", False), bool):
        raise ValueError(f"adaptive: expected True or False, got {options['adaptive']!r}")


def _is_finite(value: Any) -> bool:
    """Whether it is a finite number >= 0."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return is_number and bool(0 <= value < math.inf)


def radii(groups: Iterable[dict[str, Any]]) -> list[float]:
    """rho of each group.

    Raises:
        ValueError: if a rho or an eta is no finite number >= 0.
    """
    out = []
    for i, group in enumerate(groups):
        for name in ("rho", "eta"):
            if not _is_finite(group[name]):
                raise ValueError(f"param_groups[{i}]['{name}']: expected a finite number >= 0, got {group[name]!r}")
        out.append(float(group["rho"]))
    return out


def signed_radius(group: dict[str, Any]) -> float:
    """rho, negative for a group that maximises its objective f: SAM ascends -f, as if -f were minimised."""
    return -float(group["rho"]) if group.get("maximize", False) else float(group["rho"])
