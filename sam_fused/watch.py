"""Whether the second pass adds its gradients to those of the first."""

from __future__ import annotations

from torch import Tensor

from .distributed import is_dtensor
from .parameters import Group

ADDED = (
    "the second pass added its gradients to the first pass's, which were not zeroed, so the update gets their sum. "
    "Call zero_grad() in the closure, or first_step(zero_grad=True). To accumulate gradients over batches, let the "
    "closure zero them once and go through all the batches"
)


class Watch:
    """Looks at one gradient, from the ascent to the update.

    If it was zeroed in between, the next backward pass puts another tensor in its place, or writes to it for the second
    time.

    Attributes:
        added: whether that pass added to the first gradient.
    """

    LARGEST = 2**16  # elements: the gradient is kept alive

    def __init__(self, groups: list[Group]) -> None:
        self.added: bool | None = None
        params = (p for group in groups for p in group["params"])
        small = (p for p in params if p.requires_grad and p.numel() <= self.LARGEST and not is_dtensor(p))
        found = ((p, grad) for p in small if (grad := p.grad) is not None and not grad.is_inference())
        self._watched: tuple[Tensor, Tensor, int] | None = None
        for p, grad in found:
            self._watched = p, grad, grad._version
            self._handle = p.register_post_accumulate_grad_hook(self._look)
            break

    def _look(self, p: Tensor) -> None:
        if self._watched is not None and self.added is None:
            _, grad, version = self._watched
            self.added = p.grad is grad and grad._version == version + 1

    def end(self) -> None:
        """Stop looking."""
        if self._watched is not None:
            self._handle.remove()
