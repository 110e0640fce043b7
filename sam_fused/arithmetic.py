"""What a protocol asks of an arithmetic."""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import Optimizer

from .distributed import local

#: Places in what :meth:`Arithmetic.measure` returns.
GRAD_NORM, SHARPNESS, NORM = range(3)

#: What :meth:`Arithmetic.marks` holds of one parameter.
MARK = "=QQ"


class Readings(NamedTuple):
    """What a measurement is written to, in place; both on one device.

    Attributes:
        values: float64 [3]; norm and sharpness divided by what a scaler has multiplied the gradients by, and the
            undivided norm.
        total: float64 [2]; the sum of the finite sharpnesses, and their count.
    """

    values: Tensor
    total: Tensor


class Arithmetic:
    """The numbers of SAM around ``base``, over the gradients that are there when a method is called.

    Attributes:
        record: what :meth:`restore` needs, or None where the weights are not perturbed. It is complete before anything
            moves, and goes when everything is back: whatever interrupts a call, :meth:`restore` undoes it.
    """

    def __init__(self, base: Optimizer) -> None:
        self.base = base
        self.record: list[Any] | None = None

    def gradients(self) -> Any:
        """The present gradients of the groups with a rho: a direction to measure and to perturb along, by +rho."""
        raise NotImplementedError

    def momenta(self) -> Any:
        """The base's first moments in the groups with a rho: a direction to perturb along, by -rho.

        Raises:
            ValueError: if the base keeps none.
        """
        raise NotImplementedError

    def measure(self, direction: Any, into: Readings | None = None, grad_scale: Tensor | None = None) -> Tensor:
        """The norm of a direction and, for gradients, the sharpness.

        Args:
            direction: what :meth:`gradients` or :meth:`momenta` has just returned.
            into: where to write them, and to add a finite sharpness.
            grad_scale: what a scaler has multiplied the gradients by: float32, one element.

        Returns:
            The ``values`` of ``into``, or a tensor like them.
        """
        raise NotImplementedError

    def perturb(self, direction: Any, measured: Tensor) -> None:
        """Move the weights along a direction, with what :meth:`measure` has just returned for it."""
        raise NotImplementedError

    def backups(self) -> list[tuple[Tensor, Tensor]]:
        """Each perturbed parameter and its backup (of a DTensor, of what this process holds)."""
        raise NotImplementedError

    def marks(self) -> bytes:
        """For each of :meth:`backups`, in ``MARK``: how often it was changed in place, and its address."""
        return b"".join(struct.pack(MARK, p._version, p.data_ptr()) for p, _ in self.backups())

    def restore(self) -> None:
        """Move the weights back, bit for bit; nothing to do where they are not perturbed."""
        raise NotImplementedError

    def update(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Update by the base from the restored weights, with the gradients divided by ``grad_scale``.

        Where ``found_inf`` is not 0, restore the weights and do no more. Both are float32, one element.
        """
        raise NotImplementedError

    def advance(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """:meth:`update`, then perturb along the momenta; where the update is skipped, to where the weights were."""
        self.update(grad_scale, found_inf)
        direction = self.momenta()
        if direction:
            self.perturb(direction, self.measure(direction))

    def update_composed(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """:meth:`update` by the base's own step. Whether to skip it only the device knows, so this waits for it."""
        self.restore()
        if found_inf is not None and found_inf.item():
            return
        if grad_scale is not None:
            for p in (p for group in self.base.param_groups for p in group["params"] if p.grad is not None):
                local(p.grad).div_(grad_scale.to(p.device))
        self.base.step()
