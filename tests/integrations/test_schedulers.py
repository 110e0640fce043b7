"""Schedules and averages of torch.optim: on the optimizer or on its base, as on the plain base, without a warning."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler, swa_utils

from tests.helpers.cases import assert_near, awkward, clones, set_grads
from tests.helpers.sam import both

STEPS = 12

#: name in torch.optim.lr_scheduler: its arguments after the optimizer. Values that a step changes come as a function.
ARGUMENTS = {
    "LambdaLR": {"lr_lambda": lambda n: 0.9**n},
    "MultiplicativeLR": {"lr_lambda": lambda n: 0.9},
    "StepLR": {"step_size": 3},
    "MultiStepLR": {"milestones": [2, 5]},
    "ConstantLR": {"total_iters": 4},
    "LinearLR": {},
    "ExponentialLR": {"gamma": 0.8},
    "PolynomialLR": {"total_iters": 8, "power": 2.0},
    "CosineAnnealingLR": {"T_max": 6},
    "CosineAnnealingWarmRestarts": {"T_0": 3, "T_mult": 2},
    "CyclicLR": {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 3},
    "OneCycleLR": {"max_lr": 0.1, "total_steps": STEPS + 1},
    "ReduceLROnPlateau": {"patience": 1},
}


def sequential(opt):
    parts = [lr_scheduler.LinearLR(opt, total_iters=3), lr_scheduler.CosineAnnealingLR(opt, T_max=5)]
    return lr_scheduler.SequentialLR(opt, parts, milestones=[3])


def chained(opt):
    return lr_scheduler.ChainedScheduler([lr_scheduler.StepLR(opt, 2), lr_scheduler.ExponentialLR(opt, 0.9)], opt)


def swa(opt):
    return swa_utils.SWALR(opt, swa_lr=0.5, anneal_epochs=4)


COMPOSED = {"SequentialLR": sequential, "ChainedScheduler": chained, "SWALR": swa}
NAMES = sorted({*lr_scheduler.__all__, "SWALR"} - {"LRScheduler"})  # a new one has no arguments here, and fails


def schedule(name: str, opt: torch.optim.Optimizer):
    if name in COMPOSED:
        return COMPOSED[name](opt)
    return getattr(lr_scheduler, name)(opt, **ARGUMENTS[name])


@pytest.mark.filterwarnings("error")
@both
@pytest.mark.parametrize("which", ["itself", "base_optimizer"])
@pytest.mark.parametrize("base", ["SGD", "AdamW"])
@pytest.mark.parametrize("name", NAMES)
def test_schedulers(name, base, which, cls):
    """Two groups; momentum and betas are cycled too. Scheduler and optimizer go through a checkpoint on the way."""
    base_cls = getattr(torch.optim, base)
    options = {"lr": 0.1, **({"momentum": 0.9} if base == "SGD" else {"betas": (0.9, 0.99)})}
    mine = awkward(torch.float64)[:4]
    theirs = clones(mine)
    opt = cls([{"params": mine[:2]}, {"params": mine[2:], "lr": 0.3}], base_cls, **options)
    plain = base_cls([{"params": theirs[:2]}, {"params": theirs[2:], "lr": 0.3}], foreach=False, **options)
    scheduler = schedule(name, opt if which == "itself" else opt.base_optimizer)
    expected = schedule(name, plain)
    rates = set()
    for step in range(STEPS):
        set_grads(mine, step)
        opt.first_step()
        for params in (mine, theirs):
            set_grads(params, 100 + step)
        opt.second_step()
        plain.step()
        metric = [abs(step - 3.0)] if name == "ReduceLROnPlateau" else []
        scheduler.step(*metric)
        expected.step(*metric)
        for group, wanted in zip(opt.param_groups, plain.param_groups, strict=True):
            for key in ("lr", "initial_lr", "momentum", "betas", "max_lr", "min_lr"):
                assert group.get(key) == wanted.get(key), f"step {step}, {key}"
        for p, q in zip(mine, theirs, strict=True):
            assert_near(p.detach(), q.detach(), 1e-12, f"step {step}")
        rates.add(plain.param_groups[0]["lr"])
        if step == 5:
            opt.load_state_dict(opt.state_dict())
            scheduler.load_state_dict(scheduler.state_dict())
    assert len(rates) > 1


@both
@pytest.mark.parametrize("average", [swa_utils.get_swa_multi_avg_fn(), swa_utils.get_ema_multi_avg_fn(0.5)])
def test_averaged_model(cls, average):
    """It averages the weights between steps, never w + eps, and update_bn finds BatchNorm tracking."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).double()
    opt = cls(model.parameters(), torch.optim.SGD, lr=0.1, rho=0.5, model=model)
    averaged = swa_utils.AveragedModel(model, multi_avg_fn=average)
    loader = [torch.randn(8, 4, dtype=torch.float64) for _ in range(4)]
    history = []

    def closure(x):
        opt.zero_grad()
        loss = (model(x) - 1).square().mean()
        loss.backward()
        return loss

    for x in loader:
        opt.step(partial(closure, x))
        averaged.update_parameters(model)
        history.append([p.detach().clone() for p in model.parameters()])
    swa_utils.update_bn(loader, averaged)
    for i, p in enumerate(averaged.module.parameters()):
        trail = [weights[i] for weights in history]
        expected = trail[0]
        for n, w in enumerate(trail[1:], start=1):
            expected = expected.lerp(w, 0.5 if average.__name__ == "ema_update" else 1 / (n + 1))
        assert_near(p.detach(), expected, 1e-7, f"params[{i}]")  # torch rounds 1 / n to float32
    inputs = torch.cat([averaged.module[0](x) for x in loader])
    assert_near(averaged.module[1].running_mean, inputs.mean(0).detach(), 1e-12, "running mean")


@both
@pytest.mark.parametrize("which", ["itself", "base_optimizer"])
def test_schedulers_take_either(cls, which, recwarn):
    params = awkward(torch.float64)[:3]
    opt = cls(params, torch.optim.SGD, lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(opt if which == "itself" else opt.base_optimizer, 1, 0.5)
    for step in range(2):
        before = params[0].detach().clone()
        set_grads(params, step)
        opt.first_step()
        opt.second_step()
        torch.testing.assert_close(params[0].detach(), before - 0.5**step * params[0].grad)
        scheduler.step()
    assert not [w for w in recwarn if "lr_scheduler" in str(w.message)]
