"""SAM in plain PyTorch loops, to be read beside Algorithm 1 of the paper: the oracle of the tests.

Nothing here uses the extension. Arithmetic is in float32 or, for float64 parameters, in float64; what is stored is
rounded once to the parameter's dtype, to nearest; the perturbed weights of 16 bits by chance.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .distributed import is_dtensor
from .geometry import ascent_scale, wide
from .sam import SAM


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
    places.as_strided((places.numel(),), (1,)).copy_(torch.arange(places.numel()))
    seed = _hashed(torch.tensor(norm, dtype=torch.float32).view(torch.int32).long() & 0xFFFFFFFF)
    chance = (_hashed((seed + places) & 0xFFFFFFFF) >> 16).double() / 2**16
    nearest = x.to(like.dtype)
    low = torch.where(nearest.float().abs() > x.abs(), (nearest.view(torch.int16) - 1).view(like.dtype), nearest)
    high = (low.view(torch.int16) + 1).view(like.dtype)  # the next one away from 0
    fraction = (x.double() - low.double()) / (high.double() - low.double())
    return torch.where(nearest.isfinite(), torch.where(fraction + chance >= 1, high, low), nearest)


def sgd(w: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    """torch.optim.SGD: returns the new weight."""
    if group["maximize"]:
        g = -g
    g = g + group["weight_decay"] * w
    if group["momentum"]:
        fresh = state.get("momentum_buffer") is None
        buffer = g if fresh else group["momentum"] * wide(state["momentum_buffer"]) + (1 - group["dampening"]) * g
        if fresh:
            state["momentum_buffer"] = torch.empty_like(w, dtype=group["dtype"])
        state["momentum_buffer"].copy_(buffer)
        g = g + group["momentum"] * buffer if group["nesterov"] else buffer
    return w - group["lr"] * g


def adam(w: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    """torch.optim.Adam, and AdamW where the weight decay is decoupled: returns the new weight."""
    beta1, beta2 = group["betas"]
    keys = ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else [])]
    if not state:
        state["step"] = torch.tensor(0.0)
        state.update({key: torch.zeros_like(w, dtype=group["dtype"]) for key in keys})
    state["step"] += 1
    t = state["step"].item()
    if group["maximize"]:
        g = -g
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
    m_hat = m / (1 - beta1**t)
    v_hat = v / (1 - beta2**t)
    return w - group["lr"] * m_hat / (v_hat.sqrt() + group["eps"])


#: The update of each native base, by class, as ``bases.NATIVE`` has the extension's.
UPDATES = {torch.optim.SGD: sgd, torch.optim.Adam: adam, torch.optim.AdamW: adam}


class ReferenceSAM(SAM):
    """What :class:`FusedSAM` computes, with the same arguments, in plain PyTorch: slow, and meant to be read."""

    def _with_grad(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    if is_dtensor(p):
                        raise TypeError("ReferenceSAM does not take DTensors; FusedSAM does")
                    if p.grad.is_sparse:
                        raise RuntimeError("sparse gradients are not supported")
                    yield group, p

    def _ascend(self, perturb: bool) -> None:
        ascent = [(group, p) for group, p in self._with_grad() if group["rho"] > 0]
        squares = [
            (ascent_scale(wide(p), group) * wide(p.grad)).double().square().sum().to(self._total.device)
            for group, p in ascent
        ]
        zero = torch.zeros((), dtype=torch.float64, device=self._total.device)
        norm = torch.stack([zero, *squares]).sum().sqrt()
        sharpness = sum((group["rho"] * sq / norm for (group, _), sq in zip(ascent, squares, strict=True)), zero)
        sharpness = torch.where(norm == 0, zero, sharpness)
        raw, scale = norm, self._ascent_grad_scale()
        if scale is not None:
            norm, sharpness = norm / scale, sharpness / scale
        self._measured = torch.stack([norm, sharpness, raw])
        if sharpness.isfinite():
            self._total += torch.stack([sharpness, torch.ones_like(sharpness)])
        if not perturb:
            return
        self._backup = [(p, p.clone()) for _, p in ascent]
        if not raw.isfinite():
            return
        for group, p in ascent:
            w, g = wide(p), wide(p.grad)
            t = ascent_scale(w, group)
            perturbed = w + group["rho"] / (raw.item() + 1e-12) * t * t * g
            p.copy_(_round_randomly(perturbed, p, raw.item()) if p.element_size() == 2 else perturbed)

    def _restore(self) -> None:
        for p, backup in self._backup:
            p.copy_(backup)

    def _descend(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        if self.perturbed:
            self._restore()
        update = UPDATES.get(type(self.base_optimizer))
        if update is None:
            self._base_step(grad_scale, found_inf)
            return
        if found_inf is not None and found_inf.item():
            return
        scale = 1.0 if grad_scale is None else grad_scale.item()
        decoupled = isinstance(self.base_optimizer, torch.optim.AdamW)
        for group, p in self._with_grad():
            options = {"decoupled_weight_decay": decoupled, **group, "dtype": p.dtype}
            p.copy_(update(wide(p), wide(p.grad) / scale, self.state[p], options))
