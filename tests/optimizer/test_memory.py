"""Memory: lazily negated, overlapping, expanded, of another dtype than expected; and how much of it is taken."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from sam_fused import FusedMSAM, FusedSAM
from tests.helpers.cases import BASES, assert_near, assert_same_state, awkward, clones, generator, set_grads
from tests.helpers.fronts import OPS
from tests.helpers.place import on_the_cpu
from tests.helpers.sam import both


def negated(t: torch.Tensor) -> torch.Tensor:
    """``t``, held as the negative of what lies in memory."""
    lazy = torch.complex(torch.zeros_like(t), -t).conj().imag
    assert lazy.is_neg()
    assert torch.equal(lazy, t)
    return lazy


# ---- the negative bit ----


@both
def test_gradients_with_the_negative_bit(cls):
    """Autograd makes them: the imaginary part of a conjugate."""
    a, b = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.tensor(0.25))
    torch.complex(a, b).conj().abs().backward()
    assert b.grad.is_neg()
    twins = clones([a, b])
    for p, q in zip((a, b), twins, strict=True):
        q.grad = p.grad.clone().resolve_neg()
    opt, plain = (cls(params, torch.optim.SGD, lr=1.0, rho=0.1) for params in ([a, b], twins))
    for o in (opt, plain):
        o.first_step()
        o.second_step()
    assert_near(opt.grad_norm, plain.grad_norm, 1e-12, "norm")
    for p, q in zip((a, b), twins, strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("base", ["adam_amsgrad", "sgd_momentum"])
@pytest.mark.parametrize("cls", [FusedSAM, FusedMSAM])
def test_everything_with_the_negative_bit(cls, base):
    """Parameters, gradients and state."""
    base_cls, options = BASES[base]
    g = generator(0)
    values = [torch.randn(5, 3, generator=g), torch.randn(4, generator=g)]
    mine = [nn.Parameter(negated(v)) for v in values]
    assert all(p.is_neg() for p in mine)
    theirs = [nn.Parameter(v.clone()) for v in values]
    opt, plain = (cls(params, base_cls, rho=0.05, **options) for params in (mine, theirs))
    passes = ["first_step", "second_step"] if cls is FusedSAM else ["step"]
    for step in range(4):
        for o, params in ((opt, mine), (plain, theirs)):
            for i, name in enumerate(passes):
                set_grads(params, len(passes) * step + i)
                if o is opt:
                    for p in params:
                        p.grad = negated(p.grad)
                getattr(o, name)()
        assert_same_state(opt, plain, 0.0, f"step {step}")
        for p in mine:
            for key, value in opt.state[p].items():
                if key != "step":
                    opt.state[p][key] = negated(value)


# ---- memory that is shared ----


def overlapping() -> dict[str, list[torch.Tensor]]:
    w = torch.arange(12.0)
    return {
        "the same": [w, w],
        "views that overlap": [w[:7], w[6:]],
        "a view with gaps inside a dense one": [w.view(4, 3)[:, 1], w[3:5]],
        "views with gaps that meet": [w[::2], w[::3]],
    }


@both
@pytest.mark.parametrize("name", overlapping())
def test_parameters_that_share_memory(cls, name):
    """Each would be perturbed twice, and restored to what the first perturbation made."""
    first, second = overlapping()[name]
    params = [nn.Parameter(torch.zeros(2)), nn.Parameter(first), nn.Parameter(second)]
    with pytest.raises(ValueError, match=r"\['params'\]\[1\] and param_groups\[1\]\['params'\]\[0\] share memory"):
        cls([{"params": params[:2]}, {"params": params[2:]}])
    named = [("head", params[0]), ("left", params[1]), ("right", params[2])]
    with pytest.raises(ValueError, match="left and right share memory"):
        cls(named)
    opt = cls(params[:2])
    with pytest.raises(ValueError, match="share memory"):
        opt.add_param_group({"params": params[2:]})
    assert len(opt.param_groups) == 1


@both
def test_memory_that_comes_to_be_shared(cls):
    a, b = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.ones(3))
    opt = cls([a, b], torch.optim.SGD, lr=0.1, rho=0.5)
    for p in (a, b):
        p.grad = torch.ones(3)
    opt.first_step()
    opt.second_step()
    a.data = b.data
    before = b.detach().clone()
    with pytest.raises(ValueError, match="share memory"):
        opt.first_step()
    assert not opt.perturbed
    assert torch.equal(b, before)


@both
def test_views_that_do_not_overlap(cls):
    """Slices of one flat buffer, and the two interleaved halves of another."""
    flat, woven = torch.zeros(10), torch.zeros(4, 6)
    views = [flat[:5], flat[5:], woven[:, ::2], woven[:, 1::2], torch.zeros(0), torch.zeros(0)]
    params = [nn.Parameter(v) for v in views]
    opt = cls(params, torch.optim.SGD, lr=1.0, rho=0.5)
    for p in params:
        p.grad = torch.ones_like(p)
    opt.first_step()
    opt.second_step()
    assert torch.equal(flat, torch.full((10,), -1.0))
    assert torch.equal(woven, torch.full((4, 6), -1.0))


@both
def test_an_expanded_parameter(cls):
    """Writing to it is an error in torch too; here it comes before anything has moved."""
    a, b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1).expand(2))
    for p in (a, b):
        p.grad = torch.ones(2)
    with pytest.raises(ValueError, match=r"param_groups\[0\]\['params'\]\[1\]: .*share memory with each other"):
        cls([a, b], torch.optim.SGD)
    opt = cls([a], torch.optim.SGD, lr=0.1)
    a.data = torch.zeros(1).expand(2)
    with pytest.raises(ValueError, match="share memory with each other"):
        opt.first_step()
    assert not opt.perturbed
    assert a.data[0] == 0


# ---- other dtypes ----


@both
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Rprop])
def test_gradients_of_another_dtype(cls, base):
    """p.grad_dtype: bfloat16 weights, float32 gradients. The update is the base's own; the ascent rounds them."""
    w = nn.Parameter(torch.tensor([1.0, -2.0, 3.0], dtype=torch.bfloat16))
    if not hasattr(w, "grad_dtype"):
        pytest.skip("this torch has no grad_dtype")
    twin = nn.Parameter(w.detach().clone())
    opt, plain = cls([w], base, lr=0.01, rho=0.5), base([twin], lr=0.01)
    for p in (w, twin):
        p.grad_dtype = torch.float32
        p.grad = torch.tensor([0.1, 0.2, -0.3])
    opt.first_step()
    assert not torch.equal(w, twin)
    opt.second_step()
    plain.step()
    assert torch.equal(w, twin)


@both
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_default_dtype(cls, dtype):
    torch.set_default_dtype(dtype)
    try:
        params = [nn.Parameter(torch.ones(3, dtype=torch.float32)), nn.Parameter(torch.ones(2, dtype=torch.float64))]
        twins = clones(params)
        opt = cls(params, torch.optim.Adam, lr=0.1, rho=0.0)
        torch.set_default_dtype(torch.float32)
        plain = torch.optim.Adam(twins, lr=0.1)
        torch.set_default_dtype(dtype)
        for step in range(300):  # more than bfloat16 counts to
            for o, ps in ((opt, params), (plain, twins)):
                for p in ps:
                    p.grad = torch.full_like(p, 1.0 + step % 3)
                o.step()
        opt.load_state_dict(opt.state_dict())
        opt.first_step()
        opt.restore()
    finally:
        torch.set_default_dtype(torch.float32)
    assert {opt.state[p]["step"].item() for p in params} == {300}
    for p, q in zip(params, twins, strict=True):
        assert_near(p.detach(), q.detach(), 1e-6, "params")


@both
def test_default_device(cls):
    params = awkward(torch.bfloat16)
    opt = cls(params, torch.optim.Adam, rho=0.5)
    before = [p.detach().clone() for p in params]
    set_grads(params, 0)
    with torch.device("meta"):
        opt.first_step()
        assert not all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
        opt.second_step()
    assert all(v.device == p.device for p in params for v in opt.state[p].values())


# ---- how much of it ----


@on_the_cpu
def test_a_step_allocates_nothing_but_the_backup():
    params = [nn.Parameter(torch.randn(1 << 18)) for _ in range(8)]
    size = sum(p.numel() * 4 for p in params)
    opt = FusedSAM(params, torch.optim.SGD, lr=0.1)
    for expected in (size, 0):  # the backup is kept
        set_grads(params, 0)
        with torch.profiler.profile(profile_memory=True) as profile:
            opt.first_step()
            opt.second_step()
        got = sum(max(0, e.nbytes()) for e in profile.profiler.kineto_results.events() if e.name() == "[memory]")
        assert expected <= got < expected + 4096


@pytest.mark.slow
@on_the_cpu
def test_more_than_2_to_the_31_elements():
    """Offsets past 32 bits; zeros that NumPy has not touched and that are only read cost no memory."""
    n = (1 << 31) + 5
    available = next(
        int(x.split()[1]) for x in Path("/proc/meminfo").read_text().splitlines() if x.startswith("MemAvailable")
    )
    if available < 7 << 20:
        pytest.skip(f"needs 7 GiB of memory, {available >> 20} GiB available")
    g, backup = (torch.from_numpy(np.zeros(n, np.int16)).view(torch.bfloat16) for _ in range(2))
    w = torch.empty(n, dtype=torch.bfloat16)
    g[-3:] = 1
    backup[-3:] = 5
    ascent = torch.tensor([[1.0, 0, 0]], dtype=torch.float64)
    assert OPS.grad_sq_norm([g], [g], ascent, [1]).item() == 3
    hyper = torch.tensor([[1.0, 0, 0, 0, 0]], dtype=torch.float64)
    OPS.restore_step_("sgd", [w], [g], [backup], [], [], hyper, [1], [])
    assert w[-4:].tolist() == [0, 4, 4, 4]
    assert w[: 1 << 20].count_nonzero() == 0
