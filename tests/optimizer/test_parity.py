"""The extension and the reference in lock-step: parameters, state, norm and sharpness at every step."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.helpers.cases import BASES, awkward, awkward_groups, drawn_groups, generator, mixed_dtypes
from tests.helpers.dtypes import FULL, HALF
from tests.helpers.sam import lockstep


@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtype", FULL, ids=str)
def test_awkward_lists(dtype, base, adaptive):
    cls, options = BASES[base]
    skips = [
        (frozenset(), frozenset()),
        (frozenset({0, 5}), frozenset({6})),
        (frozenset(), frozenset({3, 6, 10})),
        (frozenset({2, 10}), frozenset({2, 10})),
    ]
    lockstep(
        awkward_groups(dtype), cls, options, skips=skips, rho=0.05, adaptive=adaptive, eta=0.01 if adaptive else 0.0
    )


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
    options = {**options, "eps": 1e-4} if base != "sgd_momentum" else options
    lockstep([{"params": mixed_dtypes()}], cls, options, steps=8, rho=0.1)


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
    groups = drawn_groups(draw, [0.0, 0.05, 0.5])
    n = sum(len(group["params"]) for group in groups)
    groups[0]["rho"] = 0.05
    groups[0]["params"].append(nn.Parameter(torch.ones(3).to(groups[0]["params"][0])))  # so that the norm is not 0
    keep = len(groups[0]["params"]) - 1
    subset = st.frozensets(st.integers(0, n).filter(lambda i: i != keep), max_size=n)
    skips = draw(st.lists(st.tuples(subset, subset), max_size=3))
    lockstep(groups, cls, options, steps=6, skips=skips, eta=draw(st.sampled_from([0.0, 0.1])))
