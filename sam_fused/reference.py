"""SAM in plain PyTorch loops, to be read beside Algorithm 1 of the paper: the oracle of the tests.

Nothing here uses the extension. Arithmetic is in float32 or, for float64 parameters, in float64; what is stored is
rounded once to the parameter's dtype, to nearest; perturbed weights of 16 bits are stochastically rounded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .arithmetic import NORM, SHARPNESS, Arithmetic, Readings
from .bases import first_moments, native_update
from .distributed import is_dtensor
from .geometry import ascent_scale, radii, signed_radius
from .parameters import Group, address, check_memory, name_of


def wide(t: Tensor) -> Tensor:
    """``t`` in the dtype of the arithmetic: float32, or float64 where ``t`` is."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _hashed(x: Tensor) -> Tensor:
    """csrc/scalars.h, in int64 that holds 32 bits."""
    mask = 0xFFFFFFFF
    x = ((x ^ x >> 16) * 0x7FEB352D) & mask
    x = ((x ^ x >> 15) * 0x846CA68B) & mask
    return x ^ x >> 16


def _round_randomly(x: Tensor, like: Tensor, norm: float) -> Tensor:
    """Float32 ``x`` to a neighbour in the 16-bit dtype of ``like``, by a chance that makes x the mean.

    The chance comes from the norm and each element's place in memory, as in csrc/functors.h.
    """
    places = torch.empty_like(like, dtype=torch.int64)
    places.as_strided((places.numel(),), (1,)).copy_(torch.arange(places.numel(), device=like.device))
    seed = _hashed(torch.tensor(norm, dtype=torch.float32, device=like.device).view(torch.int32).long() & 0xFFFFFFFF)
    chance = (_hashed((seed + places) & 0xFFFFFFFF) >> 16).double() / 2**16
    nearest = x.to(like.dtype)
    low = torch.where(nearest.float().abs() > x.abs(), (nearest.view(torch.int16) - 1).view(like.dtype), nearest)
    high = (low.view(torch.int16) + 1).view(like.dtype)  # the next one away from 0
    fraction = (x.double() - low.double()) / (high.double() - low.double())
    return torch.where(nearest.isfinite(), torch.where(fraction + chance >= 1, high, low), nearest)


def sgd(w: Tensor, g: Tensor, state: dict[str, Any], group: Group, dtype: torch.dtype) -> Tensor:
    """torch.optim.SGD: returns the new weight."""
    if group["maximize"]:
        g = -g
    if group["weight_decay"]:  # or 0 * inf would be nan
        g = g + group["weight_decay"] * w
    if group["momentum"]:
        fresh = state.get("momentum_buffer") is None
        buffer = g if fresh else group["momentum"] * wide(state["momentum_buffer"]) + g
        if fresh:
            state["momentum_buffer"] = torch.empty_like(w, dtype=dtype)
        state["momentum_buffer"].copy_(buffer)
        g = g + group["momentum"] * buffer if group["nesterov"] else buffer
    lr: float | Tensor = group["lr"]
    return w - lr * g


def adam(w: Tensor, g: Tensor, state: dict[str, Any], group: Group, dtype: torch.dtype) -> Tensor:
    """torch.optim.Adam, and AdamW where the weight decay is decoupled: returns the new weight."""
    beta1, beta2 = group["betas"]
    keys = ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else [])]
    if not state:
        step = torch.tensor(0.0, dtype=torch.float32, device="cpu")
        state.update(step=step, **{key: torch.zeros_like(w, dtype=dtype) for key in keys})
    state["step"] += 1
    t = state["step"].item()
    if group["maximize"]:
        g = -g
    if group["weight_decay"]:
        if group["decoupled_weight_decay"]:
            w = w - group["lr"] * group["weight_decay"] * w
        else:
            g = g + group["weight_decay"] * w
    m = beta1 * wide(state["exp_avg"]) + (1 - beta1) * g
    v = beta2 * wide(state["exp_avg_sq"]) + (1 - beta2) * g * g
    state["exp_avg"].copy_(m)
    state["exp_avg_sq"].copy_(v)
    if group["amsgrad"]:
        v = torch.maximum(wide(state["max_exp_avg_sq"]), v)
        state["max_exp_avg_sq"].copy_(v)
    m_hat: Tensor = m / (1 - beta1**t)
    v_hat = v / (1 - beta2**t)
    denominator: Tensor = v_hat.sqrt() + group["eps"]
    lr: float | Tensor = group["lr"]
    return w - lr * m_hat / denominator


def rmsprop(w: Tensor, g: Tensor, state: dict[str, Any], group: Group, dtype: torch.dtype) -> Tensor:
    """torch.optim.RMSprop: returns the new weight."""
    keys = ["square_avg", *["momentum_buffer"] * (group["momentum"] > 0), *["grad_avg"] * group["centered"]]
    new = {key: torch.zeros_like(w, dtype=dtype) for key in keys if key not in state}
    state.update(new, step=state.get("step", torch.tensor(0.0, dtype=torch.float32, device="cpu")) + 1)
    if group["maximize"]:
        g = -g
    lr: float | Tensor = group["lr"]
    if group["weight_decay"]:
        g = g + group["weight_decay"] * w
    v = group["alpha"] * wide(state["square_avg"]) + (1 - group["alpha"]) * g * g
    state["square_avg"].copy_(v)
    if group["centered"]:
        mean = group["alpha"] * wide(state["grad_avg"]) + (1 - group["alpha"]) * g
        state["grad_avg"].copy_(mean)
        v = v - mean * mean
    denominator: Tensor = v.sqrt() + group["eps"]
    step = g / denominator
    if group["momentum"] > 0:
        step = group["momentum"] * wide(state["momentum_buffer"]) + step
        state["momentum_buffer"].copy_(step)
    return w - lr * step


#: The update of each class of ``bases.NATIVE``: w and g are wide, the state is kept in ``dtype``.
UPDATES = {torch.optim.SGD: sgd, torch.optim.Adam: adam, torch.optim.AdamW: adam, torch.optim.RMSprop: rmsprop}


class Reference(Arithmetic):
    """SAM's arithmetic in loops over the tensors: slow, and meant to be read."""

    def __init__(self, base: Optimizer) -> None:
        super().__init__(base)
        self._addresses: list[int] = []  # of the parameters, as last checked

    def _with_grad(self) -> Iterator[tuple[Group, Tensor, Tensor]]:
        groups = self.base.param_groups
        radii(groups)
        addresses = [address(p) for group in groups for p in group["params"]]
        if addresses != self._addresses:
            check_memory(groups)
            self._addresses = addresses
        for g, group in enumerate(groups):
            for i, p in enumerate(group["params"]):
                if p.grad is not None:
                    if is_dtensor(p):
                        raise TypeError(f"{name_of(groups, g, i)}: ReferenceSAM does not take DTensors; FusedSAM does")
                    if p.grad.is_sparse:
                        raise RuntimeError(f"{name_of(groups, g, i)}.grad: sparse gradients are not supported")
                    yield group, p, p.grad

    def gradients(self) -> Any:
        return [(signed_radius(group), group, p, grad) for group, p, grad in self._with_grad() if group["rho"] > 0]

    def momenta(self) -> Any:
        return [(-float(group["rho"]), group, p, moment) for group, p, moment in first_moments(self.base)]

    def measure(self, direction: Any, into: Readings | None = None, grad_scale: Tensor | None = None) -> Tensor:
        device = direction[0][2].device if direction else torch.device("cpu")
        device = device if into is None else into.total.device
        squares = [
            (ascent_scale(wide(p), group) * wide(d.to(p.dtype))).double().square().sum().to(device)
            for _, group, p, d in direction
        ]
        zero = torch.zeros((), dtype=torch.float64, device=device)
        norm = torch.stack([zero, *squares]).sum().sqrt()
        sharpness = sum((group["rho"] * sq / norm for (_, group, *_), sq in zip(direction, squares, strict=True)), zero)
        sharpness = torch.where(norm == 0, zero, sharpness)
        values = torch.stack([norm, sharpness, norm])
        if grad_scale is not None:
            values[:NORM] /= grad_scale
        if into is None:
            return values
        if sharpness.isfinite():
            into.total.add_(torch.stack([values[SHARPNESS], torch.ones_like(sharpness)]))
        return into.values.copy_(values)

    def perturb(self, direction: Any, measured: Tensor) -> None:
        norm = measured[NORM].item()
        self.record = [(p, p.clone()) for _, _, p, _ in direction]
        if not math.isfinite(norm):
            return
        for radius, group, p, d in direction:
            w, d = wide(p), wide(d.to(p.dtype))
            t = ascent_scale(w, group)
            perturbed = w + radius / (norm + 1e-12) * t * (t * d)
            p.copy_(_round_randomly(perturbed, p, norm) if p.element_size() == 2 else perturbed)

    def backups(self) -> list[tuple[Tensor, Tensor]]:
        return self.record or []

    def restore(self) -> None:
        for p, backup in self.record or []:
            p.copy_(backup)
        self.record = None

    def update(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        active = [(group, p, g, native_update(self.base, group)) for group, p, g in self._with_grad()]
        if any(native is None or g.dtype != p.dtype for _, p, g, native in active):
            self.update_composed(grad_scale, found_inf)
            return
        for p, backup in self.record or []:
            p.copy_(backup)
        if found_inf is None or not found_inf.item():
            scale = 1.0 if grad_scale is None else grad_scale.item()
            for group, p, g, native in active:
                assert native is not None  # or the base's own step was called
                step = UPDATES[type(self.base)]
                options = {**native.fixed, **group}
                p.copy_(step(wide(p), wide(g) / scale, self.base.state[p], options, p.dtype))
        self.record = None
