"""What a protocol asks of an arithmetic."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from .distributed import local

Group = dict[str, Any]

#: Places in what :meth:`Arithmetic.measure` returns.
GRAD_NORM, SHARPNESS, NORM = range(3)


class Arithmetic:
    """The numbers of SAM around ``base``, over the gradients that are there when a method is called.

    Attributes:
        record: what :meth:`restore` needs, or None where the weights are not perturbed. It is complete before anything
            moves, and goes when everything is back: whatever interrupts a call, :meth:`restore` undoes it.
    """

    def __init__(self, base: Optimizer) -> None:
        self.base = base
        self.record: list[Any] | None = None

    def measure(self, total: Tensor, grad_scale: Tensor | None) -> tuple[Tensor, Any]:
        """The gradient norm, the sharpness, and the norm of the gradients as they are.

        Args:
            total: float64 [2]; a finite sharpness is added to its sum and its count.
            grad_scale: what a scaler has multiplied the gradients by: float32, one element. Norm and sharpness are
                divided by it.

        Returns:
            The three numbers, float64 [3], and what :meth:`perturb` takes.
        """
        raise NotImplementedError

    def perturb(self, measured: tuple[Tensor, Any]) -> None:
        """Move the weights to w + eps, with what :meth:`measure` has just returned."""
        raise NotImplementedError

    def restore(self) -> None:
        """Move the weights back, bit for bit; nothing to do where they are not perturbed."""
        raise NotImplementedError

    def update(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Update by the base from the restored weights, with the gradients divided by ``grad_scale``.

        Where ``found_inf`` is not 0, restore the weights and do no more. Both are float32, one element.
        """
        raise NotImplementedError

    def update_composed(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """:meth:`update` by the base's own step. Whether to skip it only the device knows, so this waits for it."""
        self.restore()
        if found_inf is not None and found_inf.item():
            return
        if grad_scale is not None:
            for p in (p for group in self.base.param_groups for p in group["params"] if p.grad is not None):
                local(p.grad).div_(grad_scale.to(p.device))
        self.base.step()
