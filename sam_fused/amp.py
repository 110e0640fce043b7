"""What torch.amp.GradScaler asks of an optimizer and SAM asks of it; its private parts are used in here alone."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from .parameters import trains

#: What GradScaler.step sets on an optimizer before it calls its step, and deletes afterwards unless that raises.
ATTRIBUTES = ("grad_scale", "found_inf")


def forget(opt: Optimizer) -> None:
    """Remove what GradScaler.step leaves behind when it raises; the next one would multiply its own scale by it."""
    for name in ATTRIBUTES:
        opt.__dict__.pop(name, None)


def check_no_closure(opt: Optimizer, instead: str) -> None:
    """Raise RuntimeError if GradScaler.step has passed a closure on."""
    if hasattr(opt, "found_inf"):
        raise RuntimeError(
            f"a closure came through GradScaler.step, which looks for overflows before it is called; {instead}"
        )


def given(opt: Optimizer, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """grad_scale and found_inf, float32 with one element each; None without a scaler, or where it has unscaled."""
    scale, overflow = (getattr(opt, name, None) for name in ATTRIBUTES)
    if overflow is not None and not isinstance(overflow, Tensor):  # the sum over no gradients is the number 0
        overflow = torch.full((), float(overflow), dtype=torch.float32, device=device)
    return scale, overflow


def report_overflow(scaler: GradScaler, opt: Optimizer, overflow: Tensor) -> None:
    """Add ``overflow``, 0 or 1, to what the scaler has found, so that it backs off."""
    for flag in scaler._found_inf_per_device(opt).values():
        flag.add_(overflow.to(flag.device))


def _unscaled(scaler: GradScaler, opt: Optimizer) -> bool:
    """Whether ``scaler.unscale_(opt)`` was called since the last pass."""
    state = scaler._per_optimizer_states.get(id(opt))  # [] would make one
    return state is not None and bool(state["stage"].name == "UNSCALED")


def check_not_scaled(scaler: GradScaler | None, opt: Optimizer) -> None:
    """Raise RuntimeError where an update that does not come through ``scaler`` would take its scaled gradients."""
    if scaler is None or not scaler.is_enabled() or hasattr(opt, "found_inf"):
        return
    if scaler._get_scale_async() is None or _unscaled(scaler, opt):
        return
    if any(p.grad is not None for group in opt.param_groups if trains(group) for p in group["params"]):
        raise RuntimeError(
            "the gradients are still scaled; call scaler.step(opt) in the place of step() or second_step(), or "
            "scaler.unscale_(opt) before it"
        )


def scale_of_gradients(scaler: GradScaler | None, opt: Optimizer, device: torch.device) -> Tensor | None:
    """What the present gradients are still multiplied by: float32, one element, on ``device``; None for 1.

    Raises:
        RuntimeError: if the scaler has scaled nothing yet.
    """
    if scaler is None or not scaler.is_enabled() or _unscaled(scaler, opt):
        return None
    scale = scaler._get_scale_async()
    if scale is None:
        raise RuntimeError(
            "scaler: it has scaled nothing yet; call scaler.scale(loss).backward() before the ascent, or construct "
            "without scaler="
        )
    return scale.to(device)


def expect_another_pass(scaler: GradScaler | None, opt: Optimizer) -> None:
    """Where ``scaler`` has unscaled the gradients of the first pass, let it unscale those of the second."""
    if scaler is not None and scaler.is_enabled() and _unscaled(scaler, opt):
        del scaler._per_optimizer_states[id(opt)]
