"""Algorithm 1 and Proposition 1 on quadratics, against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.helpers.sam import both


def parameter(*values: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=torch.float64))


def step(opt, params, curvature) -> None:
    """One step on L(w) = 1/2 sum c w^2, whose gradient is c w."""

    def closure():
        opt.zero_grad()
        w = torch.cat([p.flatten() for p in params])
        loss = 0.5 * (torch.tensor(curvature, dtype=torch.float64) * w * w).sum()
        loss.backward()
        return loss

    return opt.step(closure)


def near(p, *values: float) -> None:
    torch.testing.assert_close(p.detach(), torch.tensor(values, dtype=torch.float64), rtol=1e-11, atol=0)


@both
def test_sam_with_sgd(cls):
    w = parameter(1, 1)
    opt = cls([w], torch.optim.SGD, lr=0.1, rho=0.5)
    loss = step(opt, [w], [3, 4])
    # g = (3, 4), ||g|| = 5, eps = 0.5 (3, 4) / 5 = (0.3, 0.4), g at (1.3, 1.4) = (3.9, 5.6)
    near(w, 1 - 0.39, 1 - 0.56)
    assert loss.item() == 3.5
    assert opt.grad_norm.item() == pytest.approx(5, rel=1e-12)
    assert opt.sharpness.item() == pytest.approx(2.5, rel=1e-12)  # rho ||g||


@both
def test_asam_with_sgd(cls):
    w = parameter(1, -2)
    opt = cls([w], torch.optim.SGD, lr=0.1, rho=0.5, adaptive=True)
    step(opt, [w], [3, 1])
    # g = (3, -2), T g = (3, -4), ||T g|| = 5, eps = 0.5 (1 * 3, 4 * -2) / 5 = (0.3, -0.8), g' = (3.9, -2.8)
    near(w, 1 - 0.39, -2 + 0.28)
    assert opt.grad_norm.item() == pytest.approx(5, rel=1e-12)
    assert opt.sharpness.item() == pytest.approx(2.5, rel=1e-12)


@both
def test_asam_with_eta(cls):
    w = parameter(1, -1)
    opt = cls([w], torch.optim.SGD, lr=0.1, rho=1.0, adaptive=True, eta=1.0)
    step(opt, [w], [1.5, 2])
    # T = 2, g = (1.5, -2), T g = (3, -4), eps = (4 * 1.5, 4 * -2) / 5 = (1.2, -1.6), g' = (3.3, -5.2)
    near(w, 1 - 0.33, -1 + 0.52)


@both
def test_sam_with_adam(cls):
    w = parameter(1, 1)
    opt = cls([w], torch.optim.Adam, lr=0.1, rho=0.5)
    step(opt, [w], [3, 4])
    # The first step of Adam moves by lr g' / (|g'| + eps), with g' = (3.9, 5.6).
    near(w, 1 - 0.1 * 3.9 / (3.9 + 1e-8), 1 - 0.1 * 5.6 / (5.6 + 1e-8))


@both
def test_adam_second_step(cls):
    w = parameter(1)
    opt = cls([w], torch.optim.Adam, lr=0.1, rho=0.5, betas=(0.5, 0.5), eps=0.0)
    for g in (2.0, 4.0):
        w.grad = torch.tensor([g], dtype=torch.float64)
        opt.first_step()
        opt.second_step()
    # m = 0.5 * 1 + 0.5 * 4 = 2.5, v = 0.5 * 2 + 0.5 * 16 = 9; both corrected by 1 - 0.25
    near(w, 0.9 - 0.1 * (2.5 / 0.75) / (9 / 0.75) ** 0.5)


@both
def test_momentum_starts_from_the_whole_gradient(cls):
    w = parameter(0)
    opt = cls([w], torch.optim.SGD, rho=0.0, lr=1.0, momentum=0.5, dampening=0.5)
    for g in (2.0, 4.0):
        w.grad = torch.tensor([g], dtype=torch.float64)
        opt.step()
    # buffers 2, then 0.5 * 2 + 0.5 * 4 = 3
    near(w, -5)


@both
def test_groups_with_their_own_rho(cls):
    a, b = parameter(1), parameter(1)
    opt = cls([{"params": [a]}, {"params": [b], "rho": 1.0}], torch.optim.SGD, lr=0.1, rho=0.5)
    step(opt, [a, b], [3, 4])
    # one norm, 5, over both; eps = (0.5 * 3, 1 * 4) / 5 = (0.3, 0.8)
    near(a, 1 - 0.1 * 3 * 1.3)
    near(b, 1 - 0.1 * 4 * 1.8)
    assert opt.sharpness.item() == pytest.approx((0.5 * 9 + 1.0 * 16) / 5, rel=1e-12)


@both
def test_a_group_with_rho_0_is_neither_perturbed_nor_counted(cls):
    a, b = parameter(1), parameter(1)
    opt = cls([{"params": [a]}, {"params": [b], "rho": 0.0}], torch.optim.SGD, lr=0.1, rho=0.5)
    step(opt, [a, b], [3, 4])
    assert opt.grad_norm.item() == pytest.approx(3, rel=1e-12)
    near(a, 1 - 0.1 * 3 * 1.5)
    near(b, 1 - 0.1 * 4)


@both
def test_weight_decay_is_no_part_of_the_ascent(cls):
    w = parameter(1, 1)
    opt = cls([w], torch.optim.SGD, lr=0.1, rho=0.5, weight_decay=1.0)
    step(opt, [w], [3, 4])
    assert opt.grad_norm.item() == pytest.approx(5, rel=1e-12)
    near(w, 1 - 0.1 * (3.9 + 1), 1 - 0.1 * (5.6 + 1))


@both
def test_mean_sharpness_is_over_the_batches(cls):
    w = parameter(0)
    opt = cls([w], torch.optim.SGD, lr=0.0, rho=0.5)
    assert opt.sharpness.isnan()
    assert opt.mean_sharpness().isnan()
    for g in (2.0, 4.0, 9.0):
        w.grad = torch.tensor([g], dtype=torch.float64)
        opt.measure_sharpness()
    assert opt.sharpness.item() == 4.5
    assert opt.mean_sharpness(reset=False).item() == pytest.approx(2.5, rel=1e-12)
    assert opt.mean_sharpness().item() == pytest.approx(2.5, rel=1e-12)
    assert opt.mean_sharpness().isnan()
    assert w.item() == 0
