"""With SAM off, FusedSAM is the base optimizer: against torch.optim itself, and with each other's checkpoints."""

from __future__ import annotations

import inspect

import pytest
import torch

from sam_fused import FusedSAM
from tests.helpers.cases import BASES, TOLERANCE, assert_same_state, awkward, clones, set_grads
from tests.helpers.dtypes import FULL, HALF
from tests.helpers.sam import both

pytestmark = pytest.mark.filterwarnings("ignore:step.. was called without a closure")


@both
@pytest.mark.parametrize("dtype", FULL, ids=str)
@pytest.mark.parametrize("base", BASES)
def test_same_steps_as_torch(base, dtype, cls):
    base_cls, options = BASES[base]
    mine = awkward(dtype)
    theirs = clones(mine)
    opt, plain = cls(mine, base_cls, **options), base_cls(theirs, **options, foreach=False)
    for step in range(12):
        for params in (mine, theirs):
            set_grads(params, step, skip=frozenset({step % 5, 10}))
        opt.step()
        plain.step()
        assert_same_state(opt, plain, TOLERANCE[dtype] * (1 if dtype == torch.float64 else 10), f"step {step}")


@both
@pytest.mark.parametrize("base", ["SGD", "Adam", "AdamW", "RMSprop"])
def test_a_weight_that_has_overflowed(cls, base):
    """Without weight decay it is left out of the gradient: 0 * inf would be nan."""
    base_cls = getattr(torch.optim, base)
    mine, theirs = (torch.nn.Parameter(torch.tensor([torch.inf, 1.0])) for _ in range(2))
    opt, plain = cls([mine], base_cls, lr=0.1, weight_decay=0.0), base_cls([theirs], lr=0.1, weight_decay=0.0)
    for p, o in ((mine, opt), (theirs, plain)):
        p.grad = torch.ones(2)
        o.step()
    assert mine[0] == theirs[0] == torch.inf
    assert mine[1].item() == pytest.approx(theirs[1].item())


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("base", ["adam", "adamw"])
def test_same_steps_as_torch_fused_in_half_types(base, dtype):
    """torch's fused kernels compute in float32 and keep the state in the parameter's type, as the extension does.

    (Not SGD: its fused momentum in half types is wrong in torch 2.6.)
    """
    base_cls, options = BASES[base]
    mine = [p for p in awkward(dtype) if p.is_contiguous()]
    theirs = clones(mine)
    options = {**options, "eps": 1e-4}
    for step in range(5):
        opt, plain = FusedSAM(mine, base_cls, **options), base_cls(theirs, **options, fused=True)
        for params in (mine, theirs):
            set_grads(params, step)
        opt.step()
        plain.step()
        assert_same_state(opt, plain, TOLERANCE[dtype], f"step {step}")
        for p, q in zip(mine, theirs, strict=True):
            q.data.copy_(p.data)


@both
@pytest.mark.skipif("decoupled_weight_decay" not in inspect.signature(torch.optim.Adam).parameters, reason="torch 2.7")
def test_adam_with_decoupled_weight_decay(cls):
    mine, theirs = awkward(torch.float64), awkward(torch.float64)
    options = {"lr": 0.1, "weight_decay": 0.5, "decoupled_weight_decay": True}
    opt, plain = cls(mine, torch.optim.Adam, rho=0.0, **options), torch.optim.Adam(theirs, **options)
    for step in range(5):
        for params in (mine, theirs):
            set_grads(params, step)
        opt.step()
        plain.step()
    assert_same_state(opt, plain, 1e-12, "Adam")
