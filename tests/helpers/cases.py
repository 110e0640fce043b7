"""Parameter lists, bases and comparisons that the tests share.

Does not import sam_fused: conftest.py, which imports this, chooses its backend.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor, nn

PLACE = os.environ.get("SAM_FUSED_TEST_DEVICE", "cpu")  # see conftest.py
DEVICE = torch.device("cuda:0" if PLACE == "cuda" else "cpu")
#: The test files that run on every device; the others are about what is around the arithmetic.
DEVICE_TESTS = [
    "optimizer/test_parity.py",
    "optimizer/test_checkpoints.py",
    "optimizer/test_ops.py",
    "optimizer/test_algorithm.py",
    "optimizer/test_restoring.py",
    "optimizer/test_protocol.py",
    "optimizer/test_changes.py",
    "optimizer/test_errors.py",
    "optimizer/test_devices.py",
    "optimizer/test_rounding.py",
    "optimizer/test_torch_optim.py",
    "optimizer/test_batchnorm.py",
    "integrations/test_grad_scaler.py",
    "integrations/test_schedulers.py",
    "cuda/test_capturable.py",
]
on_the_cpu = pytest.mark.skipif(PLACE != "cpu", reason="is about the CPU backend")
CHUNK = 1 << 14  # elements a chunk, as in csrc/cpu.cpp

#: name: (base class, its options). The last is composed: the extension has no update for it.
BASES = {
    "sgd": (torch.optim.SGD, {"lr": 0.1}),
    "sgd_momentum": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}),
    "sgd_nesterov": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True, "maximize": True}),
    "sgd_dampening": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.8, "dampening": 0.3, "weight_decay": 1e-2}),
    "adam": (torch.optim.Adam, {"lr": 1e-2}),
    "adam_coupled": (torch.optim.Adam, {"lr": 1e-2, "weight_decay": 1e-2, "betas": (0.4, 0.9), "eps": 1e-6}),
    "adam_amsgrad": (torch.optim.Adam, {"lr": 1e-2, "amsgrad": True, "maximize": True}),
    "adamw": (torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1}),
    "adamw_amsgrad": (torch.optim.AdamW, {"lr": 1e-2, "amsgrad": True}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 1e-2, "momentum": 0.5}),
}

#: Largest difference from the reference, relative to a value of 1 or more. The half types: one unit in the last place,
#: which is what one rounding that went the other way makes.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


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


def clones(params: list[nn.Parameter]) -> list[nn.Parameter]:
    """Equal parameters in other memory, with the same strides, gaps included."""
    out = []
    for p in params:
        size = 1 + sum((n - 1) * s for n, s in zip(p.shape, p.stride(), strict=True)) if p.numel() else 0
        copy = torch.zeros(size, dtype=p.dtype).as_strided(p.shape, p.stride())
        out.append(nn.Parameter(copy.copy_(p.detach())))
    return out


def set_grads(params: list[nn.Parameter], seed: int, skip: frozenset[int] = frozenset(), scale: float = 1.0) -> None:
    """Random gradients; None for the indices in ``skip``. Some are laid out otherwise than their parameter."""
    g = generator(seed)
    for i, p in enumerate(params):
        value = (torch.randn(p.shape, generator=g, dtype=torch.float64) * scale).to(p.dtype)
        # autograd's own contiguous layout on even seeds, the parameter's on odd ones
        laid_out = value if seed % 2 == 0 else torch.empty_like(p, requires_grad=False).copy_(value)
        p.grad = None if i in skip else laid_out


def assert_near(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    torch.testing.assert_close(
        actual, expected, rtol=tolerance, atol=tolerance, equal_nan=True, msg=lambda m: f"{what}: {m}"
    )


def assert_same_state(actual, expected, tolerance: float, what: str) -> None:
    """Compare the parameters, their state and its keys."""
    pairs = zip(
        (p for g in actual.param_groups for p in g["params"]),
        (p for g in expected.param_groups for p in g["params"]),
        strict=True,
    )
    for i, (a, b) in enumerate(pairs):
        assert_near(a.detach(), b.detach(), tolerance, f"{what}, params[{i}]")
        mine, theirs = actual.state.get(a, {}), expected.state.get(b, {})
        mine = {k: v for k, v in mine.items() if v is not None}
        theirs = {k: v for k, v in theirs.items() if v is not None}
        assert mine.keys() == theirs.keys(), f"{what}, state of params[{i}]"
        for key, value in theirs.items():
            if isinstance(value, Tensor):
                # torch.optim counts steps on the CPU, unless it is told otherwise
                assert_near(mine[key].to(value.device), value, tolerance, f"{what}, state of params[{i}], {key}")
            else:
                assert mine[key] == value
