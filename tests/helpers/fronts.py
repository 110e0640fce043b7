"""The two front ends of the operators, with the same arguments: those of torch.ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sam_fused import _C

OPS = torch.ops.sam_fused
Tensors = list[Tensor]


class Kept:
    """sam_fused._C, whose operators take rows in the place of lists."""

    @staticmethod
    def grad_sq_norm(params: Tensors, grads: Tensors, ascent: Tensor, run_sizes: list[int]) -> Tensor:
        return _C.grad_sq_norm(_C.Rows(params, run_sizes), grads, ascent)

    sharpness_ = staticmethod(_C.sharpness_)

    @staticmethod
    def perturb_(
        params: Tensors, grads: Tensors, backups: Tensors, grad_norm: Tensor, ascent: Tensor, run_sizes: list[int]
    ) -> None:
        _C.perturb_(_C.Rows(params, run_sizes, backups=backups), grads, grad_norm, ascent)

    @staticmethod
    def perturb_from_(
        params: Tensors, directions: Tensors, saved: Tensors, norm: Tensor, ascent: Tensor, run_sizes: list[int]
    ) -> None:
        _C.perturb_from_(_C.Rows(params, run_sizes, saved=saved), directions, norm, ascent)

    @staticmethod
    def restore_(params: Tensors, backups: Tensors) -> None:
        _C.restore_(_C.Rows(params, [len(params)], saved=backups))

    @staticmethod
    def restore_step_(
        base: str,
        params: Tensors,
        grads: Tensors,
        backups: list[Tensor | None],
        state: Tensors,
        steps: Tensors,
        hyper: Tensor,
        run_sizes: list[int],
        lr: list[Tensor | None],
        **scalars: Any,
    ) -> None:
        rows = _C.Rows(params, run_sizes, saved=backups, base=base, state=state, steps=steps)
        _C.restore_step_(rows, grads, hyper, lr, **scalars)

    @staticmethod
    def step_along_(
        base: str,
        params: Tensors,
        grads: Tensors,
        state: Tensors,
        steps: Tensors,
        hyper: Tensor,
        ascent: Tensor,
        moment: int,
        run_sizes: list[int],
        lr: list[Tensor | None],
        **scalars: Any,
    ) -> Tensor:
        rows = _C.Rows(params, run_sizes, base=base, state=state, steps=steps)
        return _C.step_along_(rows, grads, hyper, ascent, moment, lr, **scalars)
