"""The extension and the reference in lock-step: parameters, state, norm and sharpness at every step."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sam_fused import FusedSAM, ReferenceSAM
from tests.helpers.cases import BASES, TOLERANCE, assert_near, assert_same_state, awkward, clones, generator, set_grads

STEPS = 30
HALF = (torch.bfloat16, torch.float16)


def copy_over(to: ReferenceSAM, source: FusedSAM) -> None:
    """Make the reference go on from the extension's parameters and state."""
    for mine, theirs in zip(to.param_groups, source.param_groups, strict=True):
        for p, q in zip(mine["params"], theirs["params"], strict=True):
            p.data.copy_(q.data)
            for key, value in source.state.get(q, {}).items():
                if isinstance(value, torch.Tensor):
                    to.state[p][key].copy_(value)


def lockstep(groups, base, options, steps=STEPS, skips=(), **sam):
    """Run both over the same gradients; ``skips`` holds, in turn, the indices without a gradient in either pass."""
    flat = [p for g in groups for p in g["params"]]
    twins = iter(clones(flat))
    twin_groups = [{**g, "params": [next(twins) for _ in g["params"]]} for g in groups]
    fused = FusedSAM(groups, base, **options, **sam)
    reference = ReferenceSAM(twin_groups, base, **options, **sam)
    others = [p for g in twin_groups for p in g["params"]]
    dtypes = {p.dtype for p in flat}
    tolerance = max(TOLERANCE[d] for d in dtypes)
    for step in range(steps):
        first, second = skips[step % len(skips)] if skips else (frozenset(), frozenset())
        where = f"step {step}"
        before = [p.detach().clone() for p in flat]
        for params in (flat, others):
            set_grads(params, 2 * step + (step // 2) % 2, first)
        fused.first_step()
        reference.first_step()
        norm = max(tolerance if tolerance < 1e-6 else 1e-6, 1e-12)
        assert_near(fused.grad_norm / reference.grad_norm, torch.ones((), dtype=torch.float64), norm, where)
        assert_near(fused.sharpness / reference.sharpness, torch.ones((), dtype=torch.float64), norm, where)
        for i, (p, q) in enumerate(zip(flat, others, strict=True)):
            assert_near(p.detach(), q.detach(), tolerance, f"{where}, perturbed params[{i}]")
            if i in first:
                assert torch.equal(p, before[i]), f"{where}: params[{i}] has no gradient and moved"
        for params in (flat, others):
            set_grads(params, 1000 + step, second)
        fused.second_step()
        reference.second_step()
        assert_same_state(fused, reference, tolerance, where)
        for i in second:
            assert torch.equal(flat[i], before[i]), f"{where}: params[{i}] was not restored"
        if dtypes != {torch.float64}:  # in float64 all steps accumulate; elsewhere each is compared by itself
            copy_over(reference, fused)
    assert_near(fused.mean_sharpness(), reference.mean_sharpness(), 1e-6, "mean sharpness")
    return fused


@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_awkward_lists(dtype, base, adaptive):
    cls, options = BASES[base]
    params = awkward(dtype)
    skips = [
        (frozenset(), frozenset()),
        (frozenset({0, 5}), frozenset({6})),
        (frozenset(), frozenset({3, 6, 10})),
        (frozenset({2, 10}), frozenset({2, 10})),
    ]
    groups = [
        {"params": params[:5]},
        {"params": params[5:8], "rho": 0.0, "lr": 0.02},
        {"params": params[8:11], "rho": 0.2, "eta": 0.1},
        {"params": params[11:]},
    ]
    lockstep(groups, cls, options, skips=skips, rho=0.05, adaptive=adaptive, eta=0.01 if adaptive else 0.0)


@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
@pytest.mark.parametrize("base", ["sgd", "sgd_dampening", "adam", "adamw", "adamw_amsgrad"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_types_to_one_rounding(dtype, base, adaptive):
    cls, options = BASES[base]
    lockstep(
        [{"params": awkward(dtype)}],
        cls,
        {**options, "eps": 1e-4} if "adam" in base else options,
        rho=0.05,
        adaptive=adaptive,
    )


@pytest.mark.parametrize("base", ["sgd_momentum", "adam", "rmsprop"])
def test_mixed_dtypes(base):
    cls, options = BASES[base]
    dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
    params = [p for i, dtype in enumerate(dtypes) for p in awkward(dtype, seed=i)[:9]]
    order = torch.randperm(len(params), generator=generator(0)).tolist()
    options = {**options, "eps": 1e-4} if base != "sgd_momentum" else options
    lockstep([{"params": [params[i] for i in order]}], cls, options, steps=8, rho=0.1)


@pytest.mark.parametrize("base", ["sgd_momentum", "adam"])
def test_more_tensors_than_a_launch_takes(base):
    """Of csrc/cuda.cu: 499 or more tensors of one type, and 16 groups."""
    cls, options = BASES[base]
    g = generator(0)
    params = [nn.Parameter(torch.randn(1 + i % 7, generator=g, dtype=torch.float64)) for i in range(1300)]
    groups = [{"params": params[i::20], "lr": 0.01 / (i + 1)} for i in range(20)]
    lockstep(groups, cls, options, steps=2, skips=[(frozenset({3, 700}), frozenset({1299}))])


@given(data=st.data())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_drawn_lists(data):
    """Any number of groups and tensors, options and gaps in the gradients."""
    draw = data.draw
    cls, options = BASES[draw(st.sampled_from(sorted(BASES)))]
    dtype = draw(st.sampled_from([torch.float64, torch.float32]))
    shape = st.lists(st.integers(0, 9), min_size=0, max_size=4)
    g = generator(draw(st.integers(0, 99)))
    groups, n = [], 0
    for _ in range(draw(st.integers(1, 3))):
        params = []
        for sizes in draw(st.lists(shape, min_size=1, max_size=5)):
            t = torch.randn(sizes, generator=g, dtype=torch.float64).to(dtype)
            if draw(st.booleans()):
                t = t.permute(draw(st.permutations(range(t.dim()))))
            params.append(nn.Parameter(t))
        n += len(params)
        groups.append(
            {"params": params, "rho": draw(st.sampled_from([0.0, 0.05, 0.5])), "adaptive": draw(st.booleans())}
        )
    groups[0]["rho"] = 0.05
    groups[0]["params"].append(nn.Parameter(torch.ones(3, dtype=dtype)))  # so that the norm is not 0
    keep = len(groups[0]["params"]) - 1
    subset = st.frozensets(st.integers(0, n).filter(lambda i: i != keep), max_size=n)
    skips = draw(st.lists(st.tuples(subset, subset), max_size=3))
    lockstep(groups, cls, options, steps=6, skips=skips, eta=draw(st.sampled_from([0.0, 0.1])))
