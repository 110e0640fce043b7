"""Steps under a GradScaler that the tests and gpu_check.py share."""

from __future__ import annotations

import torch
from torch import nn

from sam_fused import FusedMSAM, FusedSAM


def ready_scaler(params: list[nn.Parameter]) -> torch.amp.GradScaler:
    """One whose scale is on the device already."""
    scaler = torch.amp.GradScaler(params[0].device.type)
    scaler.scale(torch.zeros((), device=params[0].device))
    return scaler


def with_scaler(params: list[nn.Parameter], base: type[torch.optim.Optimizer]) -> tuple[FusedSAM, torch.amp.GradScaler]:
    scaler = ready_scaler(params)
    return FusedSAM(params, base, lr=1e-3, scaler=scaler), scaler


def one_pass_with_scaler(params: list[nn.Parameter]) -> tuple[FusedMSAM, torch.amp.GradScaler]:
    return FusedMSAM(params, torch.optim.Adam, lr=1e-3, rho=0.5), ready_scaler(params)


def steps_of_every_kind(opt: FusedSAM | FusedMSAM, scaler: torch.amp.GradScaler) -> None:
    """With SAM and without, through the GradScaler and without; the first ones too, which make the state."""
    for _ in range(3):
        if isinstance(opt, FusedMSAM):
            scaler.step(opt)
            scaler.update()
            opt.step()
            opt.eval()
            opt.train()
            continue
        opt.first_step()
        scaler.step(opt)
        scaler.update()
        opt.measure_sharpness()
        opt.mean_sharpness()
        opt.scaler = None  # or scaled gradients would be an error
        opt.step()
        opt.scaler = scaler
