"""Parameter lists, bases and comparisons that the tests share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from sam_fused.bases import NATIVE
from tests.helpers.dtypes import FULL
from tests.helpers.place import DEVICE, PLACE

CHUNK = 1 << 14 if PLACE == "cpu" else 1 << 11  # elements a chunk, as in csrc/cpu.cpp, or of short lists in cuda.cu

#: name: (base class, its options): the samples of every native base, and two that are composed.
BASES = {name: (cls, options) for cls, native in NATIVE.items() for name, options in native.samples.items()}
BASES["sgd_dampening"] = (torch.optim.SGD, {"lr": 0.05, "momentum": 0.8, "dampening": 0.3, "weight_decay": 1e-2})
BASES["adagrad"] = (torch.optim.Adagrad, {"lr": 1e-2})

#: Largest difference from the reference, relative to a value of 1 or more. The half types: one unit in the last place,
#: which is what one rounding that went the other way makes.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
#: In lists of several dtypes: the norm that all share has the others' roundings in it.
MIXED_TOLERANCE = {**TOLERANCE, torch.float64: 1e-6}


def generator(seed: int) -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(seed)


def awkward(dtype: torch.dtype, seed: int = 0) -> list[nn.Parameter]:
    """Every shape and layout that has gone wrong somewhere; the empty tensor comes last."""
    g = generator(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    tensors = [
        randn(7, 5),
        randn(1),
        randn(1).reshape(()),
        randn(CHUNK - 1),
        randn(CHUNK),
        randn(CHUNK + 1),
        randn(4, 3, 5, 5).to(memory_format=torch.channels_last),
        randn(8, 1, 3, 3).to(memory_format=torch.channels_last),  # ambiguous strides: one channel
        randn(6, 9).t(),
        randn(102)[1:],  # odd storage offset: not aligned to vectors
        randn(40)[::2],  # has gaps
        randn(6, 8)[:, :5],  # has gaps
        randn(3, 1, 4).as_strided((3, 1, 4), (4, 99, 1)),  # the stride of a size-1 dimension says nothing
        randn(2 * CHUNK + 33).view(-1, 1),
        randn(33),
        randn(65),
        randn(0, 3),
    ]
    return [nn.Parameter(t) for t in tensors]


def awkward_groups(dtype: torch.dtype) -> list[dict[str, Any]]:
    """The same in four groups, the second of which rests."""
    params = awkward(dtype)
    return [
        {"params": params[:5]},
        {"params": params[5:8], "rho": 0.0, "lr": 0.02},
        {"params": params[8:11], "rho": 0.2, "eta": 0.1},
        {"params": params[11:]},
    ]


def mixed_dtypes() -> list[nn.Parameter]:
    """Parameters of all dtypes in a random order."""
    dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
    params = [p for i, dtype in enumerate(dtypes) for p in awkward(dtype, seed=i)[:9]]
    return [params[i] for i in torch.randperm(len(params), generator=generator(0)).tolist()]


def drawn_groups(draw: Callable[..., Any], rhos: Sequence[float]) -> list[dict[str, Any]]:
    """Any number of groups and tensors of one dtype, by hypothesis."""
    dtype = draw(st.sampled_from(FULL))
    shape = st.lists(st.integers(0, 9), min_size=0, max_size=4)
    g = generator(draw(st.integers(0, 99)))
    groups = []
    for _ in range(draw(st.integers(1, 3))):
        params = []
        for sizes in draw(st.lists(shape, min_size=1, max_size=5)):
            t = torch.randn(sizes, generator=g, dtype=torch.float64).to(dtype)
            if draw(st.booleans()):
                t = t.permute(draw(st.permutations(range(t.dim()))))
            params.append(nn.Parameter(t))
        groups.append({"params": params, "rho": draw(st.sampled_from(rhos)), "adaptive": draw(st.booleans())})
    return groups


def zeros_with_gaps(t: Tensor) -> Tensor:
    """In the strides of ``t``, gaps included."""
    size = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
    return torch.zeros(size, dtype=t.dtype).as_strided(t.shape, t.stride())


def clones(params: list[nn.Parameter]) -> list[nn.Parameter]:
    """Equal parameters in other memory, with the same strides."""
    return [nn.Parameter(zeros_with_gaps(p).copy_(p.detach())) for p in params]


def set_grads(params: list[nn.Parameter], seed: int, skip: frozenset[int] = frozenset(), scale: float = 1.0) -> None:
    """Random gradients; None for the indices in ``skip``. Some are laid out otherwise than their parameter."""
    g = generator(seed)
    for i, p in enumerate(params):
        value = (torch.rand(p.shape, generator=g, dtype=torch.float64).sub_(0.5).mul_(4 * scale)).to(p.dtype)
        # in turn contiguous, as from autograd; laid out as the parameter, without its gaps; with them
        layouts = value, torch.empty_like(p, requires_grad=False), zeros_with_gaps(p)
        p.grad = None if i in skip else layouts[seed % 3].copy_(value)


def assert_near(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    bounds = {"rtol": tolerance, "atol": tolerance, "equal_nan": True}
    alike = (actual.shape, actual.dtype, actual.device) == (expected.shape, expected.dtype, expected.device)
    if not (alike and torch.allclose(actual, expected, **bounds)):  # which takes a tenth of the time
        torch.testing.assert_close(actual, expected, msg=lambda m: f"{what}: {m}", **bounds)


def assert_same_state(actual, expected, tolerance: float | dict[torch.dtype, float], what: str) -> None:
    """Compare the parameters, their state and its keys; ``tolerance`` may be by the parameter's dtype."""
    pairs = zip(
        (p for g in actual.param_groups for p in g["params"]),
        (p for g in expected.param_groups for p in g["params"]),
        strict=True,
    )
    for i, (a, b) in enumerate(pairs):
        bound = tolerance if isinstance(tolerance, float) else tolerance[a.dtype]
        assert_near(a.detach(), b.detach(), bound, f"{what}, params[{i}]")
        mine, theirs = actual.state.get(a, {}), expected.state.get(b, {})
        mine = {k: v for k, v in mine.items() if v is not None}
        theirs = {k: v for k, v in theirs.items() if v is not None}
        assert mine.keys() == theirs.keys(), f"{what}, state of params[{i}]"
        for key, value in theirs.items():
            if isinstance(value, Tensor):
                # torch.optim counts steps on the CPU, unless it is told otherwise
                assert_near(mine[key].to(value.device), value, bound, f"{what}, state of params[{i}], {key}")
            else:
                assert mine[key] == value


class Wrapper(torch.Tensor):
    """A subclass that holds its values in another tensor."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return Wrapper(torch.zeros(3)) if function is torch.ops.aten.detach.default else NotImplemented
