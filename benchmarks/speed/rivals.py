"""What FusedSAM is measured against."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from sam_fused import FusedSAM
from sam_fused.bases import Update, native_update

RHO = 0.05
BASES = {
    "adam": (torch.optim.Adam, {"lr": 1e-3}),
    "adamw": (torch.optim.AdamW, {"lr": 1e-3}),
    "sgd_momentum": (torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9}),
}


def update_of(base: str) -> Update:
    """The native update of one of BASES."""
    cls, options = BASES[base]
    opt = cls([torch.zeros(1)], **options)
    update = native_update(opt, opt.param_groups[0])
    assert update is not None
    return update


class ForeachSAM:
    """The best that torch's own multi-tensor operators can do: backups made once, no temporary but for ASAM's."""

    def __init__(self, params: list[nn.Parameter], base: type, adaptive: bool, **options: Any) -> None:
        self.params = params
        self.adaptive = adaptive
        self.base = base(params, fused=True, **options)
        self.backups = [torch.empty_like(p) for p in params]

    @torch.no_grad()
    def first_step(self) -> None:
        params, grads = self.params, [p.grad for p in self.params]
        scaled = torch._foreach_mul(torch._foreach_abs(params), grads) if self.adaptive else grads
        norm = torch.stack(torch._foreach_norm(scaled)).norm()
        torch._foreach_copy_(self.backups, params)
        ascent = torch._foreach_mul(torch._foreach_mul(params, params), grads) if self.adaptive else grads
        torch._foreach_add_(params, ascent, alpha=RHO / (norm.item() + 1e-12))

    @torch.no_grad()
    def second_step(self) -> None:
        torch._foreach_copy_(self.params, self.backups)
        self.base.step()


def pytorch_optimizer_sam(params: list[nn.Parameter], base: type, adaptive: bool, **options: Any) -> Any:
    import pytorch_optimizer  # which the checks on a GPU do without

    return pytorch_optimizer.SAM(params, base, rho=RHO, adaptive=adaptive, **options)


#: Those with first_step and second_step; label: make(params, base class, adaptive, options of the base)
RIVALS: dict[str, Callable[..., Any]] = {
    "pytorch_optimizer SAM": pytorch_optimizer_sam,
    "pytorch_optimizer SAM, fused=True": partial(pytorch_optimizer_sam, fused=True),
    "foreach + fused base": ForeachSAM,
    "FusedSAM": lambda p, b, a, **o: FusedSAM(p, b, rho=RHO, adaptive=a, **o),
}


def davda54_sam(path: Path) -> type:
    """The optimizer of a user's own copy of davda54/sam's sam.py, a repository that is on no index."""
    spec = importlib.util.spec_from_file_location("davda54_sam", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise SystemExit(f"--davda54: expected the path of davda54/sam's sam.py, got {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules["davda54_sam"] = module  # or its optimizers could not be pickled
    spec.loader.exec_module(module)
    return module.SAM


def heavyball() -> ModuleType | None:
    """HeavyBall, if it is installed."""
    return importlib.import_module("heavyball") if importlib.util.find_spec("heavyball") else None


def heavyball_step(theirs: ModuleType, params: list[nn.Parameter], passes: int, **options: Any) -> Callable[[], object]:
    """HeavyBall's SAM (two passes) or Momentum-SAM (one), whose step changes the gradients and takes them away.

    Its SAM perturbs in a way of its own, by rho w^2 g. The closure gives gradients, as a backward pass does.
    """
    grads = itertools.cycle([[torch.randn_like(p) for p in params] for _ in range(passes)])

    def closure() -> torch.Tensor:
        for p, g in zip(params, next(grads), strict=True):
            p.grad = g
        return torch.zeros(())

    if passes == 1:
        return partial(theirs.MSAMLaProp(params, sam_step_size=RHO, **options).step, closure)
    return partial(theirs.SAMWrapper(params, theirs.AdamW(params, **options), ball=RHO).step, closure)


def two_calls(opt: Any) -> Callable[[], None]:
    """The optimizer's part of a SAM step."""

    def step() -> None:
        opt.first_step()
        opt.second_step()

    return step
