"""The weights come back bit for bit, in place, whatever happens between the passes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.helpers.cases import assert_near, awkward, set_grads
from tests.helpers.dtypes import DTYPES
from tests.helpers.sam import assert_untouched, both, snapshot


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_restore_is_bit_exact_and_in_place(cls, dtype):
    params = awkward(dtype)
    opt = cls(params, rho=30.0)
    before = snapshot(params)
    set_grads(params, 0)
    opt.first_step()
    assert opt.perturbed
    assert all(not torch.equal(p, b[0]) for p, b in zip(params, before, strict=True) if p.numel())
    opt.restore()
    assert not opt.perturbed
    assert_untouched(params, before)
    opt.restore()  # nothing to do
    assert_untouched(params, before)


@both
def test_restore_is_keyed_to_what_was_perturbed(cls):
    params = awkward(torch.float32)
    opt = cls(params, torch.optim.Adam, lr=0.1)
    before = snapshot(params)
    set_grads(params, 0, skip=frozenset({1, 4}))
    opt.first_step(zero_grad=True)  # no gradient is left
    assert all(p.grad is None for p in params)
    opt.second_step()
    assert_untouched(params, before)
    assert not opt.state


@both
@pytest.mark.parametrize("when", [1, 2])
def test_a_closure_that_raises_leaves_the_weights(cls, when):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    params = list(model.parameters())
    opt = cls(params, torch.optim.Adam, lr=0.1, model=model)
    x = torch.randn(16, 5)
    calls = 0

    def closure():
        nonlocal calls
        calls += 1
        opt.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        if calls == when:
            raise KeyboardInterrupt
        return loss

    before = snapshot(params)
    with pytest.raises(KeyboardInterrupt):
        opt.step(closure)
    assert_untouched(params, before)
    assert not opt.perturbed
    assert calls == when
    opt.step(closure)  # and it goes on
    assert not torch.equal(params[0], before[0][0])


@both
def test_gradients_that_cannot_be_used_leave_the_weights(cls):
    """An error inside the second half of step(closure), after the closure."""
    w = nn.Parameter(torch.ones(4))
    v = nn.Parameter(torch.ones(3))
    opt = cls([w, v], torch.optim.Adam)
    calls = 0

    def closure():
        nonlocal calls
        calls += 1
        w.grad = torch.ones(4).to_sparse() if calls == 2 else torch.ones(4)
        v.grad = torch.ones(3)

    with pytest.raises(RuntimeError, match="sparse gradients are not supported"):
        opt.step(closure)
    assert torch.equal(w, torch.ones(4))
    assert torch.equal(v, torch.ones(3))
    assert not opt.perturbed


@both
def test_zero_norm(cls):
    params = awkward(torch.float32)
    opt = cls(params)
    before = snapshot(params)
    for p in params:
        p.grad = torch.zeros_like(p)
    opt.first_step()
    assert_untouched(params, before)
    assert opt.sharpness.item() == 0
    opt.second_step()


@both
def test_no_gradient_at_all(cls):
    params = awkward(torch.float32)
    opt = cls(params)
    before = snapshot(params)
    opt.first_step()
    assert opt.perturbed
    assert opt.sharpness.item() == 0
    opt.second_step()
    assert_untouched(params, before)


@both
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_norm_not_finite(cls, bad):
    params, twins = awkward(torch.float32), awkward(torch.float32)
    opt = cls(params, torch.optim.Adam, lr=0.1)
    plain = torch.optim.Adam(twins, lr=0.1)
    before = snapshot(params)
    set_grads(params, 0)
    params[0].grad[3, 2] = bad
    opt.first_step()
    assert_untouched(params, before)  # nothing perturbed
    assert opt.perturbed
    assert not opt.sharpness.isfinite()
    for p in (params, twins):
        set_grads(p, 1)
    opt.second_step()
    plain.step()
    for p, q in zip(params, twins, strict=True):
        assert_near(p.detach(), q.detach(), 1e-6, "the second gradient decides")
    set_grads(params, 2)
    opt.measure_sharpness()
    assert torch.equal(opt.mean_sharpness(), opt.sharpness)  # the mean leaves the other step out
