"""Sharpness of a trained network: by the gradient, by the loss it rises to, and on average over directions."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .batchnorm import freeze_statistics, thaw_statistics
from .geometry import ascent_scale, check_options, wide

KINDS = ("first_order", "realised", "average")


class Sharpness(NamedTuple):
    """What :func:`measure_sharpness` returns, in the units of the loss."""

    value: float
    standard_error: float | None  # of the mean over directions; None for the kinds that draw none


def measure_sharpness(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    batches: Iterable[tuple[Any, Any]],
    rho: float,
    kind: str = "first_order",
    *,
    adaptive: bool = False,
    eta: float = 0.0,
    directions: int = 10,
    generator: torch.Generator | None = None,
) -> Sharpness:
    r"""Sharpness of the loss L over all of ``batches`` at the weights w of ``model``, which stay what they are.

    With T = 1 (SAM) or T = abs(w) + eta (ASAM), g the gradient of L and d = T^2 g / ||T g||:

    ===============  ==================================================================================================
    ``first_order``  rho ||T g||: Proposition 1 of Khalid, Ponraj and Mukherjee
    ``realised``     L(w + rho d) - L(w): how far the loss does rise where ``first_order`` expects it to rise most
    ``average``      E[L(w + rho T u) - L(w)], u uniform on the unit sphere of all parameters: what their conclusion
                     leaves open. Each direction is taken both ways, so that g, which averages to nothing, adds no noise
    ===============  ==================================================================================================

    L is the mean over all examples. For the value that training records, which is the mean over single batches, call
    this with one batch at a time. Parameters that do not require a gradient are left out.

    BatchNorm and dropout are as ``model.training`` says: normalised by the batch in training mode, which is the loss
    that training sees, and by the running statistics in eval mode, which is the loss of the network in use. The
    running statistics stand still in both. With dropout, use eval mode: the losses would not be comparable.

    Args:
        model: called with a batch's input.
        loss_fn: loss_fn(model(input), target), a 0-dim mean over the batch's examples.
        batches: pairs (input, target) on the model's device; a target's length is its number of examples. Read once
            and kept, so that every loss is of the same data.
        rho: radius, >= 0, in the units of the weights (ASAM: relative to them).
        kind: one of the three above.
        adaptive, eta: ASAM's geometry, as in :class:`FusedSAM`.
        directions: how many ``average`` draws, >= 2.
        generator: of the directions, on the device of the parameters.

    Returns:
        value, and for ``average`` the standard error of the mean over the directions.

    Raises:
        ValueError: on arguments that are not as described.

    An exception from the model or the loss goes on; weights, gradients and statistics are then what they were.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    if directions < 2:
        raise ValueError(f"directions: expected 2 or more, got {directions}")
    check_options({"rho": rho})
    with _Landscape(model, loss_fn, batches, adaptive, eta) as landscape:
        if kind == "first_order":
            return Sharpness(rho * landscape.ascent()[0], None)
        start = landscape.loss()
        if kind == "realised":
            return Sharpness(landscape.loss(landscape.ascent()[1], rho) - start, None)
        rises = []
        for _ in range(directions):
            direction = landscape.random_direction(generator)
            rises.append((landscape.loss(direction, rho) + landscape.loss(direction, -rho)) / 2 - start)
        mean = sum(rises) / directions
        variance = sum((rise - mean) ** 2 for rise in rises) / (directions - 1)
        return Sharpness(mean, math.sqrt(variance / directions))


def loss_slice(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    batches: Iterable[tuple[Any, Any]],
    radii: Sequence[float],
    *,
    adaptive: bool = False,
    eta: float = 0.0,
) -> list[float]:
    """The loss along the ascent direction: L(w + r d) for each r of ``radii``, which may be negative.

    Everything else is as in :func:`measure_sharpness`. At r = rho, less the value at 0, this is ``realised``.
    """
    if not all(math.isfinite(r) for r in radii):
        raise ValueError(f"radii: expected finite numbers, got {list(radii)}")
    with _Landscape(model, loss_fn, batches, adaptive, eta) as landscape:
        _, direction = landscape.ascent()
        return [landscape.loss(direction, r) for r in radii]


class _Landscape(contextlib.AbstractContextManager):
    """The loss around the weights of a model; BatchNorm's running statistics stand still while it is entered."""

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor],
        batches: Iterable[tuple[Any, Any]],
        adaptive: bool,
        eta: float,
    ) -> None:
        check_options({"eta": eta, "adaptive": adaptive})
        self.model, self.loss_fn, self.batches = model, loss_fn, list(batches)
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.options = {"adaptive": adaptive, "eta": eta}
        if not self.batches:
            raise ValueError("batches: expected at least one, got none")
        if not self.params:
            raise ValueError("model: expected a parameter that requires a gradient, got none")
        self.examples = sum(len(target) for _, target in self.batches)

    def __enter__(self) -> _Landscape:
        self.frozen = freeze_statistics(self.model)
        return self

    def __exit__(self, *_: object) -> None:
        thaw_statistics(self.frozen)

    def _losses(self) -> Iterator[Tensor]:
        """Of each batch, weighted so that they add up to the mean over all examples."""
        for x, target in self.batches:
            yield self.loss_fn(self.model(x), target) * (len(target) / self.examples)

    @torch.no_grad()
    def loss(self, direction: list[Tensor] | None = None, radius: float = 0.0) -> float:
        """At w + radius * direction."""
        kept = [p.detach().clone() for p in self.params]
        try:
            for p, w, d in zip(self.params, kept, direction or [], strict=direction is not None):
                p.copy_(wide(w) + radius * d)
            return sum(loss.double().item() for loss in self._losses())
        finally:
            for p, w in zip(self.params, kept, strict=True):
                p.copy_(w)

    def _scales(self) -> list[Tensor]:
        return [ascent_scale(wide(p.detach()), self.options) for p in self.params]

    def ascent(self) -> tuple[float, list[Tensor]]:
        """||T g|| and the direction T^2 g / ||T g||."""
        gradients = [torch.zeros_like(wide(p.detach())) for p in self.params]
        with torch.enable_grad():
            for loss in self._losses():
                of_batch = torch.autograd.grad(loss, self.params, allow_unused=True)
                for total, g in zip(gradients, of_batch, strict=True):
                    if g is not None:
                        total += g
        scales = self._scales()
        norm = _norm([t * g for t, g in zip(scales, gradients, strict=True)])
        return norm, [t * t * g / (norm + 1e-12) for t, g in zip(scales, gradients, strict=True)]

    def random_direction(self, generator: torch.Generator | None) -> list[Tensor]:
        """T u, u uniform on the unit sphere."""
        scales = self._scales()
        drawn = [torch.randn(t.shape, dtype=t.dtype, device=t.device, generator=generator) for t in scales]
        norm = _norm(drawn)
        return [t * u / norm for t, u in zip(scales, drawn, strict=True)]


def _norm(tensors: list[Tensor]) -> float:
    return math.sqrt(sum(t.double().square().sum().item() for t in tensors))
