"""The extension and the reference in lock-step: parameters, state, norm and sharpness at every step."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.helpers.cases import BASES, awkward, generator
from tests.helpers.dtypes import FULL, HALF
from tests.helpers.sam import lockstep


@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtype", FULL, ids=str)
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


@pytest.mark.parametrize("base", ["sgd_momentum", "adam", "adagrad"])
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
    dtype = draw(st.sampled_from(FULL))
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
