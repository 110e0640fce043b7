"""16-bit parameters: eps is smaller than their rounding, and has to get through all the same."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sam_fused import FusedSAM, ReferenceSAM
from tests.helpers.cases import awkward, clones, generator, set_grads
from tests.helpers.dtypes import HALF
from tests.helpers.sam import both

halves = pytest.mark.parametrize("dtype", HALF, ids=str)


@halves
@pytest.mark.parametrize("adaptive", [False, True])
def test_the_reference_rounds_the_same_way(dtype, adaptive):
    """Bit for bit, but for elements whose unrounded values differ in the last place.

    The chance is a hash of the norm in float32, which another order of the sum may round another way. Such steps are
    left out.
    """
    mine = awkward(dtype)
    theirs = clones(mine)
    opt, expected = (cls(p, rho=0.01, adaptive=adaptive) for cls, p in ((FusedSAM, mine), (ReferenceSAM, theirs)))
    differing = total = 0
    for step in range(8):
        for o, params in ((opt, mine), (expected, theirs)):
            set_grads(params, step)
            o.first_step()
        if opt.grad_norm.float() == expected.grad_norm.float():
            differing += sum((p != q).sum().item() for p, q in zip(mine, theirs, strict=True))
            total += sum(p.numel() for p in mine)
        opt.restore()
        expected.restore()
    assert total > 0
    assert differing < total / 1000


@both
@halves
@pytest.mark.parametrize("size", [1.0, 2.0**-16], ids=["normal", "subnormal"])
def test_eps_gets_through_on_average(cls, dtype, size):
    """eps is 1/40 to 1/10 of the weights' last place: to nearest, not one of them would move."""
    g = generator(0)
    ulp = torch.finfo(dtype).eps if size == 1.0 else 2.0**-24
    if size != 1.0 and dtype == torch.bfloat16:
        pytest.skip("bfloat16 has float32's exponents")
    magnitudes, signs = torch.rand(2, 100_000, generator=g), torch.randn(2, 100_000, generator=g).sign()
    w = nn.Parameter(((1 + magnitudes[0]) * signs[0] * size).to(dtype))
    start = w.detach().double()
    w.grad = ((1 + 3 * magnitudes[1]) * signs[1]).to(dtype)
    norm = w.grad.double().norm()
    opt = cls([w], rho=(ulp / 40 * norm).item())
    eps = ulp / 40 * w.grad.double()
    opt.first_step()
    moved = w.detach().double() - start
    assert 0.03 < (moved != 0).double().mean() < 0.12
    assert moved.abs().max() <= 2 * ulp  # a neighbour; below 2, the next one is as far, above it twice as far
    kept = (moved @ eps / (eps @ eps)).item()
    assert kept == pytest.approx(1, abs=0.05)


@both
@halves
def test_the_chance_differs_from_step_to_step_and_repeats_itself(cls, dtype):
    def run():
        params = awkward(dtype)
        opt = cls(params, torch.optim.SGD, lr=0.0, rho=0.01)
        out = []
        for _ in range(2):
            set_grads(params, 0, scale=1 + len(out))  # the same direction, another norm
            opt.first_step()
            out.append(params[4].detach().clone())
            opt.restore()
        return out

    first, again = run(), run()
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(*first)


@both
@halves
def test_what_needs_no_rounding_is_left_alone(cls, dtype):
    w = nn.Parameter(torch.tensor([1.0, -2.0, 0.0, 3e-5, torch.finfo(dtype).max]).to(dtype))
    before = w.detach().clone()
    w.grad = torch.zeros_like(w)
    w.grad[2] = 1.0
    opt = cls([w], rho=0.5)
    opt.first_step()
    assert w[2] == 0.5
    assert torch.equal(w[[0, 1, 3, 4]], before[[0, 1, 3, 4]])


@both
def test_subnormals_that_need_no_rounding_are_left_alone(cls):
    """Also by the largest chances, of which there is one in 65,536."""
    w = nn.Parameter((torch.arange(2**20) % 1024 * 2.0**-24).to(torch.float16))
    before = w.detach().clone()
    w.grad = torch.zeros_like(w)
    w.grad[0] = 1.0
    cls([w], rho=0.5).first_step()
    assert w[0] == 0.5
    assert torch.equal(w[1:], before[1:])


@both
@halves
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_numbers_stay_finite_as_to_nearest(cls, dtype, sign):
    largest = torch.finfo(dtype).max
    half_a_place = largest * torch.finfo(dtype).eps / 4
    w = nn.Parameter(torch.full((4096,), sign * largest, dtype=dtype))
    w.grad = torch.full_like(w, sign)
    for share, expected in ((0.5, sign * largest), (1.5, sign * float("inf"))):
        opt = cls([w], rho=share * half_a_place * 64)  # 64: the norm
        opt.first_step()
        assert w.eq(expected).all()
        opt.restore()
