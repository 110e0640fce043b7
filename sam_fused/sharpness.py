"""Sharpness of a trained network: by the gradient, by the loss it rises to, and on average over directions."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from .distributed import (
    drawn_by_the_first,
    fsdp_modules,
    is_dtensor,
    local,
    local_like,
    mean_over,
    mesh_device,
    placement,
    process_groups,
    sum_over_shards,
    whole,
    without_ddp,
)
from .geometry import ascent_scale, check_options
from .hooks import clean_weights
from .parameters import check_group, check_memory, overlaps_itself, share_memory

T = TypeVar("T")

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
    that training sees, and by the running statistics in eval mode, which is the loss of the network in use. Every
    forward starts from the same buffers, so that running statistics and spectral_norm's vectors do not move. With
    dropout, use eval mode: the losses would not be comparable.

    A model with 16-bit weights is evaluated in float32, its buffers and batches too: w + eps cannot be told from w in
    16 bits. Where float32 weights are cast as they are used (autocast, FSDP2's MixedPrecisionPolicy), L includes the
    cast, and ``realised`` and ``average`` at a small rho see little but its rounding.

    In several processes, with a DistributedDataParallel or an FSDP2 model (``fully_shard``), each brings batches of its
    own, as many as the others: L is the mean over the examples of all, and all return the same. (For a replica's own
    sharpness give ``ddp.module``.) A process that raises alone leaves the others waiting, as in training.

    Args:
        model: called with a batch's input; for ``realised`` and ``average`` without gradients: if it or the loss takes
            some itself, it must do so under ``torch.enable_grad()``. Not FSDP1; no DistributedDataParallel inside
            another module.
        loss_fn: loss_fn(model(input), target), a 0-dim mean over the batch's examples.
        batches: pairs (input, target) on the model's device; a target's length is its number of examples, so it is a
            tensor or a list, not a dict or a tuple. Read once and kept, so that every loss is of the same data.
        rho: radius, >= 0, in the units of the weights (ASAM: relative to them).
        kind: one of the three above.
        adaptive, eta: ASAM's geometry, as in :class:`FusedSAM`.
        directions: how many ``average`` draws, >= 2.
        generator: of the directions, on any device. In several processes the first one's counts.

    Returns:
        value, and for ``average`` the standard error of the mean over the directions. Both are inf or NaN where a loss
        or a gradient that they are made of is not finite.

    Raises:
        ValueError: on arguments that are not as described, and on parameters that are complex, that share memory, that
            were made in inference mode, or that are 16-bit DTensors; it names them.
        RuntimeError: if FSDP2 has been told not to reduce gradients.

    An exception from the model or the loss, or an interrupt, goes on; the weights, every ``.grad`` and the buffers are
    then what they were, bit for bit. Hooks that run after a gradient is accumulated are not called.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    if not isinstance(directions, numbers.Integral) or directions < 2:
        raise ValueError(f"directions: expected 2 or more, got {directions}")
    options = {"rho": rho, "adaptive": adaptive, "eta": eta}
    check_options(options)
    rho = options["rho"]
    landscape = _Landscape(model, loss_fn, batches, options)

    def measure() -> Sharpness:
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
        variance = sum((rise - mean) * (rise - mean) for rise in rises) / (directions - 1)
        return Sharpness(mean, math.sqrt(variance / directions))

    return landscape.explore(measure)


def loss_slice(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    batches: Iterable[tuple[Any, Any]],
    radii: Iterable[float],
    *,
    adaptive: bool = False,
    eta: float = 0.0,
) -> list[float]:
    """The loss along the ascent direction: L(w + r d) for each r of ``radii``, which may be negative.

    Everything else is as in :func:`measure_sharpness`. At r = rho, less the value at 0, this is ``realised``.
    """
    radii = list(radii)
    if not all(isinstance(r, numbers.Real) and math.isfinite(r) for r in radii):
        raise ValueError(f"radii: expected finite numbers, got {radii}")
    options = {"adaptive": adaptive, "eta": eta}
    check_options(options)
    landscape = _Landscape(model, loss_fn, batches, options)

    def measure() -> list[float]:
        _, direction = landscape.ascent()
        return [landscape.loss(direction, float(r)) for r in radii]

    return landscape.explore(measure)


class _Landscape:
    """The loss around the weights of a model. ``explore`` gives the model back as it was."""

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor],
        batches: Iterable[tuple[Any, Any]],
        options: dict[str, Any],
    ) -> None:
        self.loss_fn, self.options = loss_fn, options
        # DistributedDataParallel's own forward would copy buffers between the processes and expect a backward
        self.model = without_ddp(model)
        self.replicas = self.model is not model
        self.sharded = fsdp_modules(self.model)
        for module in self.sharded:
            module.reshard()  # a forward without a backward leaves the root's parameters whole
        named: list[tuple[str, Tensor]] = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        if not named:
            raise ValueError("model: expected a parameter that requires a gradient, got none")
        _check_parameters(named)
        self.params = [p for _, p in named]
        self.groups = process_groups(model, self.params)
        self.batches = self._weighted(list(batches))
        # Between w and w + eps lie a few of 16 bits' numbers or none: to nearest, most of eps is lost, and rounded
        # stochastically it drowns in noise. So a model with 16-bit weights is evaluated in float32.
        self.widens = any(_is_half(p) for p in self.params)
        self.hooks: list[tuple[dict[int, Any], dict[int, Any]]] = []
        self.grads: dict[Tensor, Tensor | None] = {}
        self.buckets: list[tuple[Tensor, Tensor]] = []
        self.halves: list[tuple[Tensor, Tensor]] = []
        self.weights: list[Tensor] = []
        self.registered: list[tuple[nn.Module, dict[str, Tensor | None]]] = []
        self.buffers: list[tuple[Tensor, Tensor]] = []  # and frozen parameters that a forward pass may change

    def _weighted(self, batches: list[Any]) -> list[tuple[Any, Any, float]]:
        """With each batch's weight in the mean over all examples of all processes."""
        sizes = [_size(batch, f"batches[{i}]") for i, batch in enumerate(batches)]
        counts = self._mean([sum(sizes), len(sizes), len(sizes) ** 2])
        if counts[1] ** 2 != counts[2]:
            raise ValueError("batches: expected as many in every process: each forward of one waits for the others'")
        if not batches:
            raise ValueError("batches: expected at least one, got none")
        return [(x, target, n / counts[0]) for (x, target), n in zip(batches, sizes, strict=True)]

    def _mean(self, numbers: list[float]) -> list[float]:
        """Over the processes."""
        device = mesh_device(self.params)
        return mean_over(torch.tensor(numbers, dtype=torch.float64, device=device), self.groups).tolist()

    # ---- what is moved, and put back ----

    def explore(self, measure: Callable[[], T]) -> T:
        """``measure()``; afterwards the model is as it was, also where an exception or an interrupt ends it."""
        with torch.inference_mode(False), clean_weights(self.model):
            try:
                try:
                    self._enter()
                    return measure()
                finally:
                    self._leave()
            finally:
                self._leave()  # an interrupt may have ended the first

    @torch.no_grad()
    def _enter(self) -> None:
        """Nothing is changed before it is noted how it was."""
        params = list(self.model.parameters())
        self.hooks = [(hooks, dict(hooks)) for p in params if (hooks := p._post_accumulate_grad_hooks)]
        self.grads = {p: p.grad for p in params}
        if self.replicas:  # a forward that waits for its backward would have ours written to its buckets
            self.buckets = [(p.grad, p.grad.clone()) for p in params if p.grad is not None]
        if self.widens:
            self.halves = [(t, t.data) for t in (*params, *self.model.buffers()) if _is_half(t)]
        for hooks, _ in self.hooks:
            hooks.clear()  # which may take an optimizer's step
        for p in params:
            p.grad = None
        for t, data in self.halves:
            t.data = data.float()
        self.weights = [local(p).clone() for p in self.params]  # a forward pass may change them, as max_norm does
        in_memory: dict[int, list[Tensor]] = {}
        for p in params:
            if storage := _storage(p):
                in_memory.setdefault(storage, []).append(local(p))
        for module in self.model.modules():
            if not isinstance(module, torch.jit.ScriptModule):  # which cannot register others in a forward pass
                self.registered.append((module, dict(module._buffers)))
            frozen = [p for p in module.parameters(recurse=False) if not p.requires_grad]
            changed = frozen if getattr(module, "max_norm", None) is not None else []
            for t in (*module.buffers(recurse=False), *changed):
                beside = in_memory.get(_storage(t) or 0, [])
                moves = any(p is not t and share_memory(p, local(t)) for p in beside)
                if not (moves or overlaps_itself(local(t))):  # no forward pass can write to an expanded one
                    self.buffers.append((t, local(t).clone()))

    @torch.no_grad()
    def _leave(self) -> None:
        self._restore_weights()
        self._restore_buffers()
        for t, data in self.halves:
            t.data = data
        for leaf, grad in self.grads.items():
            if leaf.grad is not grad:
                leaf.grad = grad
        for grad, value in self.buckets:
            grad.copy_(value)
        for hooks, kept in self.hooks:
            hooks.update(kept)

    def _restore_weights(self) -> None:
        for p, w in zip(self.params, self.weights, strict=bool(self.weights)):
            local(p).copy_(w)
        torch.clear_autocast_cache()  # it would go on with the weights as they were when it cast them

    def _restore_buffers(self) -> None:
        for module, kept in self.registered:
            held = module._buffers
            if held.keys() != kept.keys() or any(held[name] is not buffer for name, buffer in kept.items()):
                held.clear()
                held.update(kept)
                module._non_persistent_buffers_set.intersection_update(kept)
        for t, value in self.buffers:
            local(t).copy_(value)
        for module in self.sharded:
            module.reshard()

    # ---- losses, gradients, directions ----

    def _losses(self) -> Iterator[tuple[Tensor, float]]:
        """Of each batch, with its weight in the mean over all examples; all from the same buffers."""
        for x, target, weight in self.batches:
            if self.widens:
                x, target = tree_map_only(Tensor, lambda t: t.float() if _is_half(t) else t, (x, target))
            loss = self.loss_fn(self.model(x), target)
            if not isinstance(loss, Tensor) or loss.dim() or not loss.is_floating_point():
                got = f"{loss.dtype} of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
                raise ValueError(f"loss_fn: expected a real 0-dim tensor, the mean over the batch, got {got}")
            yield loss, weight
            with torch.no_grad():
                self._restore_buffers()

    @torch.no_grad()
    def loss(self, direction: list[Tensor] | None = None, radius: float = 0.0) -> float:
        """At w + radius * direction."""
        if direction is not None:
            for p, w, d in zip(self.params, self.weights, direction, strict=True):
                local(p).copy_(w + radius * d)
            torch.clear_autocast_cache()
        total = sum(weight * whole(loss).double().item() for loss, weight in self._losses())
        self._restore_weights()
        return self._mean([total])[0]

    def ascent(self) -> tuple[float, list[Tensor]]:
        """||T g|| and the direction T^2 g / ||T g||."""
        with torch.no_grad():
            totals = [torch.zeros_like(local(p)) for p in self.params]
        with torch.enable_grad():
            share = 1 / len(self.batches)
            for loss, weight in self._losses():
                for leaf in _leaves(loss):
                    if leaf not in self.grads:
                        self.grads[leaf] = leaf.grad
                        leaf.grad = None
                        if hooks := leaf._post_accumulate_grad_hooks:
                            self.hooks.append((hooks, dict(hooks)))
                            hooks.clear()
                # About 1, or in float16 the gradients of many batches would underflow. FSDP2 averages those of
                # processes whose batches weigh more or less. Through FSDP2 and reentrant checkpoints autograd.grad
                # sees nothing.
                (loss * (weight / share)).backward()
                self._collect(totals, share)
        with torch.no_grad():
            for p, total in zip(self.params, totals, strict=True):
                if not is_dtensor(p):  # whose gradients are means already
                    mean_over(total, self.groups)
            scales = self._scales()
            scaled = [t * g for t, g in zip(scales, totals, strict=True)]
            norm = self._norm(scaled)
            return norm, [t * (x / (norm + 1e-12)) for t, x in zip(scales, scaled, strict=True)]

    @torch.no_grad()
    def _collect(self, totals: list[Tensor], share: float) -> None:
        """Move ``share`` of the gradients into ``totals``."""
        if self.sharded and all(p.grad is None for p in self.params):
            raise RuntimeError(
                "model: FSDP2 gave no parameter a gradient; call set_requires_gradient_sync(True) on it first"
            )
        for p, total in zip(self.params, totals, strict=True):
            if p.grad is not None:
                g = p.grad if p.grad.layout == torch.strided else p.grad.to_dense()
                total.add_(local_like(g, p), alpha=share)
                p.grad = None

    @torch.no_grad()
    def random_direction(self, generator: torch.Generator | None) -> list[Tensor]:
        """T u, u uniform on the unit sphere."""
        scales, drawn = self._scales(), []
        for p, t in zip(self.params, scales, strict=True):
            device = t.device if generator is None else generator.device
            u = torch.randn(p.shape, dtype=t.dtype, device=device, generator=generator)
            drawn.append(drawn_by_the_first(u.to(t.device), p, self.groups))
        norm = self._norm(drawn)
        return [t * u / norm for t, u in zip(scales, drawn, strict=True)]

    def _scales(self) -> list[Tensor]:
        return [ascent_scale(local(p), self.options) for p in self.params]

    def _norm(self, tensors: list[Tensor]) -> float:
        """Over the shards of all processes."""
        squares: dict[Any, Tensor] = {}
        for p, t in zip(self.params, tensors, strict=True):
            square = t.double().square().sum().to(mesh_device([p]))
            place = (placement(p), square.device)
            squares[place] = squares[place] + square if place in squares else square
        return math.sqrt(sum(sum_over_shards(square, place).item() for (place, _), square in squares.items()))


def _storage(t: Tensor) -> int | None:
    """The address of the memory that ``t`` is a part of; None for a wrapper around other tensors."""
    try:
        return local(t).untyped_storage().data_ptr()
    except RuntimeError:
        return None


def _is_half(t: Tensor) -> bool:
    return t.is_floating_point() and t.element_size() == 2


def _size(batch: Any, what: str) -> int:
    """The number of examples of a batch."""
    try:
        _, target = batch
    except (TypeError, ValueError):
        raise ValueError(f"{what}: expected a pair (input, target), got {type(batch).__name__}") from None
    if isinstance(target, (Mapping, tuple, str)):  # whose lengths are not numbers of examples
        size = -1
    else:
        try:
            size = len(target)
        except TypeError:
            size = -1
    if size < 0:
        raise ValueError(
            f"{what}: expected a target whose len() is its number of examples, such as a tensor of one dimension or "
            f"more, got {f'a tensor of {target.dim()}' if isinstance(target, Tensor) else type(target).__name__}"
        )
    if size == 0:
        raise ValueError(f"{what}: expected at least one example, got an empty target")
    return size


def _leaves(loss: Tensor) -> Iterator[Tensor]:
    """The leaf tensors that a backward of ``loss`` gives a gradient to, but those inside reentrant checkpoints."""
    seen, open_nodes = set(), [loss.grad_fn]
    while open_nodes:
        node = open_nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            if hasattr(node, "variable"):
                yield node.variable
            open_nodes += [after for after, _ in node.next_functions]


def _check_parameters(named: list[tuple[str, Tensor]]) -> None:
    groups = [{"params": [p for _, p in named], "param_names": [f"model: {name}" for name, _ in named]}]
    check_group(groups, 0)
    check_memory(groups)
    for name, p in named:
        if p.is_inference():
            raise ValueError(f"model: {name}: made in inference mode, it cannot have a gradient")
        if is_dtensor(p) and _is_half(p):
            raise ValueError(f"model: {name}: expected a DTensor of float32 or float64, got {p.dtype}")
