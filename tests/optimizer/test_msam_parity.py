"""FusedMSAM and ReferenceMSAM in lock-step: perturbed weights, clean weights and state; and by hand on a quadratic."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sam_fused import FusedMSAM, ReferenceMSAM
from sam_fused.bases import MOMENTS
from tests.helpers.cases import BASES, awkward, awkward_groups, drawn_groups, mixed_dtypes, set_grads
from tests.helpers.dtypes import FULL, HALF
from tests.helpers.sam import lockstep_in_one_pass

both = pytest.mark.parametrize("cls", [FusedMSAM, ReferenceMSAM])


def keeps_a_moment(name: str) -> bool:
    cls, options = BASES[name]
    p = nn.Parameter(torch.ones(1))
    p.grad = torch.ones(1)
    base = cls([p], **options)
    base.step()
    return any(base.state[p].get(key) is not None for key in MOMENTS)


WITH_MOMENT = {name: BASES[name] for name in BASES if keeps_a_moment(name)}
WITH_MOMENT["nadam"] = (torch.optim.NAdam, {"lr": 1e-2})  # composed
adaptive = pytest.mark.parametrize("adaptive", [False, True], ids=["msam", "adaptive"])


@adaptive
@pytest.mark.parametrize("base", WITH_MOMENT)
@pytest.mark.parametrize("dtype", FULL, ids=str)
def test_awkward_lists(dtype, base, adaptive):
    cls, options = WITH_MOMENT[base]
    skips = [frozenset()] * 4 + [frozenset({0, 6}), frozenset({3, 10})]
    lockstep_in_one_pass(
        awkward_groups(dtype), cls, options, skips=skips, rho=0.5, adaptive=adaptive, eta=0.01 if adaptive else 0.0
    )


@adaptive
@pytest.mark.parametrize("base", ["sgd_momentum", "sgd_dampening", "adam", "adamw"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_types_to_one_rounding(dtype, base, adaptive):
    cls, options = WITH_MOMENT[base]
    options = {**options, "eps": 1e-4} if "adam" in base else options
    lockstep_in_one_pass([{"params": awkward(dtype)}], cls, options, rho=0.5, adaptive=adaptive)


@pytest.mark.parametrize("base", ["sgd_momentum", "adam"])
def test_mixed_dtypes(base):
    cls, options = WITH_MOMENT[base]
    options = {**options, "eps": 1e-4} if base == "adam" else options
    lockstep_in_one_pass([{"params": mixed_dtypes()}], cls, options, steps=6, rho=0.5)


@given(data=st.data())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_drawn_lists(data):
    """Any number of groups and tensors, options and gaps in the gradients."""
    draw = data.draw
    cls, options = WITH_MOMENT[draw(st.sampled_from(sorted(WITH_MOMENT)))]
    groups = drawn_groups(draw, [0.0, 0.5, 2.0])
    n = sum(len(group["params"]) for group in groups)
    skips = draw(st.lists(st.frozensets(st.integers(0, n - 1), max_size=n), max_size=3))
    lockstep_in_one_pass(groups, cls, options, steps=7, skips=skips, rho=0.5, eta=draw(st.sampled_from([0.0, 0.1])))


@both
@adaptive
def test_by_hand(cls, adaptive):
    """SGD with momentum on (a^2 + 4 b^2) / 2, in Python's own numbers."""
    lr, mu, rho, eta = 0.1, 0.9, 0.5, 0.25
    w, m, at = [1.0, -2.0], [0.0, 0.0], [1.0, -2.0]
    p = nn.Parameter(torch.tensor(w, dtype=torch.float64))
    opt = cls([p], torch.optim.SGD, lr=lr, momentum=mu, rho=rho, adaptive=adaptive, eta=eta)
    for _ in range(10):
        (0.5 * p[0] ** 2 + 2 * p[1] ** 2).backward()
        opt.step()
        opt.zero_grad()
        m = [mu * m[0] + at[0], mu * m[1] + 4 * at[1]]
        w = [w[0] - lr * m[0], w[1] - lr * m[1]]
        t = [abs(x) + eta if adaptive else 1.0 for x in w]
        norm = math.hypot(t[0] * m[0], t[1] * m[1])
        at = [w[i] - rho * t[i] ** 2 * m[i] / (norm + 1e-12) for i in range(2)]
        assert p.tolist() == pytest.approx(at, abs=1e-12)
    opt.eval()
    assert p.tolist() == pytest.approx(w, abs=1e-12)


@pytest.mark.parametrize("base", ["sgd_momentum", "adam", "adamw", "rmsprop_momentum"])
def test_steps_go_from_backup_to_backup(base):
    """From the second step on; also with a group that stays at its weights."""
    cls, options = WITH_MOMENT[base]
    params = awkward(torch.float32)
    opt = FusedMSAM([{"params": params[:9]}, {"params": params[9:], "rho": 0.0}], cls, rho=0.5, **options)
    for step in range(3):
        set_grads(params, step)
        opt.step()
        [plan] = opt._arithmetic._plans.values()
        assert plan.advances == (step > 0)


def test_a_maximising_base_is_perturbed_against_its_moment():
    """Which is that of the negative objective."""
    values = []
    for maximize in (False, True):
        p = nn.Parameter(torch.ones(3, dtype=torch.float64))
        opt = FusedMSAM([p], torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.5, maximize=maximize)
        for step in range(4):
            p.grad = (-1.0 if maximize else 1.0) * torch.arange(3.0, dtype=torch.float64) * (step + 1)
            opt.step()
        values.append(p.detach().clone())
    assert torch.equal(*values)
