"""What the operators return, by shape and dtype alone, for tracing: torch.compile, export and FakeTensor.

Registered in Python, because a fake from C++ may not mix devices, as every operator does that is given CUDA parameters
and their rows of ``ascent`` or ``hyper``, which stay on the CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import register_fake

from . import _C  # noqa: F401  (which defines the operators)


def _grad_sq_norm(params: list[Tensor], grads: list[Tensor], ascent: Tensor, run_sizes: list[int]) -> Tensor:
    return params[0].new_empty(len(run_sizes), dtype=torch.float64)


def _step_along_(
    base: str,
    params: list[Tensor],
    grads: list[Tensor],
    state: list[Tensor],
    steps: list[Tensor],
    hyper: Tensor,
    ascent: Tensor,
    moment: int,
    run_sizes: list[int],
    lr: list[Tensor | None],
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> Tensor:
    return _grad_sq_norm(params, grads, ascent, run_sizes)


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Of an operator that only writes to its arguments."""


register_fake("sam_fused::grad_sq_norm", _grad_sq_norm)
register_fake("sam_fused::step_along_", _step_along_)
for _name in ("sharpness_", "perturb_", "perturb_from_", "restore_", "restore_step_"):
    register_fake(f"sam_fused::{_name}", _nothing)
