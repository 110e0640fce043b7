"""Which base optimizers have a native update, and what it needs from a parameter group.

A base has three places: its functor in ``csrc/functors.h``, its entry here, and its function in ``reference.py``.
Tests, benchmarks and the cost model take what they need from the entry.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .geometry import radii
from .parameters import Group

#: What a base may call its first moment.
MOMENTS = ("exp_avg", "momentum_buffer")


def moment_of(state: Mapping[str, Any]) -> Tensor | None:
    """The first moment in a parameter's state."""
    return next((state[key] for key in MOMENTS if state.get(key) is not None), None)


@dataclass(frozen=True, eq=False)
class Update:
    """A functor of the extension.

    Attributes:
        name: the functor's name.
        state: ``torch.optim``'s keys of the state tensors, in the functor's order.
        hyper: the hyper-parameters in the order of the functor's Hyper, the learning rate first, each with the value
            that the operators are tested with: sums of few powers of two, so that no rounding hides a wrong number.
        counts_steps: whether the state has a ``step``.
        fixed: hyper-parameters that a group may lack.
        error: the largest that tests allow the functor, in units in the last place of what it adds up.
    """

    name: str
    state: tuple[str, ...]
    hyper: Mapping[str, float]
    counts_steps: bool = False
    fixed: Mapping[str, float] = field(default_factory=dict)
    error: float = 1.5

    @property
    def moment(self) -> int | None:
        """Which of ``state`` is the first moment, if one is."""
        return next((i for i, key in enumerate(self.state) if key in MOMENTS), None)

    def row(self, group: Group) -> tuple[float, ...]:
        """A group's hyper-parameters."""
        return tuple(self._value(group, name) for name in self.hyper)

    def _value(self, group: Group, name: str) -> float:
        if name == "lr":  # NaN for a tensor on a device, where the update reads it itself
            lr = group["lr"]
            return math.nan if isinstance(lr, Tensor) and not lr.is_cpu else float(lr)
        if name in ("beta1", "beta2"):
            return float(group["betas"][name == "beta2"])
        return float(group[name] if name in group else self.fixed[name])


@dataclass(frozen=True)
class Native:
    """A class of ``torch.optim`` whose updates the extension has.

    Attributes:
        updates: all of them.
        choose: the one for a group's options, or None where the base's own step must be called.
        samples: options that tests and benchmarks run it with, by name.
    """

    updates: tuple[Update, ...]
    choose: Callable[[Group], Update | None]
    samples: Mapping[str, dict[str, Any]]


_SGD_HYPER = {"lr": 0.125, "weight_decay": 2**-7, "maximize": 0.0, "momentum": 0.5, "nesterov": 1.0}
_SGD = (Update("sgd", (), _SGD_HYPER), Update("sgd_momentum", ("momentum_buffer",), _SGD_HYPER))


def _choose_sgd(group: Group) -> Update | None:
    if group["momentum"] and group["dampening"]:  # which the base's first step leaves out
        return None
    return _SGD[bool(group["momentum"])]


_ADAM_HYPER = {
    "lr": 0.125,
    "weight_decay": 2**-7,
    "maximize": 1.0,
    "beta1": 0.875,
    "beta2": 1 - 2**-6,
    "eps": 2**-13,
    "decoupled_weight_decay": 1.0,
}


def _adams(decoupled: bool) -> tuple[Update, Update]:
    moments = ("exp_avg", "exp_avg_sq")
    fixed = {"decoupled_weight_decay": float(decoupled)}  # AdamW's groups have it since torch 2.7
    return (
        Update("adam", moments, _ADAM_HYPER, counts_steps=True, fixed=fixed),
        Update("adam_amsgrad", (*moments, "max_exp_avg_sq"), _ADAM_HYPER, counts_steps=True, fixed=fixed),
    )


_ADAM, _ADAMW = _adams(decoupled=False), _adams(decoupled=True)

_RMSPROP_HYPER = {
    "lr": 0.125,
    "weight_decay": 2**-7,
    "maximize": 1.0,
    "alpha": 1 - 2**-6,
    "eps": 2**-13,
    "momentum": 0.5,
}


def _rmsprop(momentum: bool, centered: bool) -> Update:
    name = "rmsprop" + "_momentum" * momentum + "_centered" * centered
    state = ("square_avg", *["momentum_buffer"] * momentum, *["grad_avg"] * centered)
    return Update(name, state, _RMSPROP_HYPER, counts_steps=True, error=3.0)  # a quotient by a root of a sum


_RMSPROP = {flags: _rmsprop(*flags) for flags in itertools.product((False, True), repeat=2)}

NATIVE: dict[type[Optimizer], Native] = {
    torch.optim.SGD: Native(
        _SGD,
        _choose_sgd,
        {
            "sgd": {"lr": 0.1},
            "sgd_momentum": {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4},
            "sgd_nesterov": {"lr": 0.05, "momentum": 0.9, "nesterov": True, "maximize": True},
        },
    ),
    torch.optim.Adam: Native(
        _ADAM,
        lambda group: _ADAM[bool(group["amsgrad"])],
        {
            "adam": {"lr": 1e-2},
            "adam_coupled": {"lr": 1e-2, "weight_decay": 1e-2, "betas": (0.4, 0.9), "eps": 1e-6},
            "adam_amsgrad": {"lr": 1e-2, "amsgrad": True, "maximize": True},
        },
    ),
    torch.optim.AdamW: Native(
        _ADAMW,
        lambda group: _ADAMW[bool(group["amsgrad"])],
        {
            "adamw": {"lr": 1e-2, "weight_decay": 0.1},
            "adamw_amsgrad": {"lr": 1e-2, "amsgrad": True},
        },
    ),
    torch.optim.RMSprop: Native(
        tuple(_RMSPROP.values()),
        lambda group: _RMSPROP[group["momentum"] > 0, bool(group["centered"])],
        {
            "rmsprop": {"lr": 1e-2},
            "rmsprop_momentum": {"lr": 1e-2, "momentum": 0.5, "weight_decay": 1e-2, "alpha": 0.9},
            "rmsprop_centered": {"lr": 1e-2, "centered": True, "maximize": True, "eps": 1e-4},
            "rmsprop_momentum_centered": {"lr": 1e-2, "momentum": 0.5, "centered": True, "alpha": 0.8},
        },
    ),
}

#: By the functor's name; Adam's and AdamW's differ in ``fixed`` alone.
UPDATE_BY_NAME = {update.name: update for native in NATIVE.values() for update in native.updates}


def check_moments(base: Optimizer) -> None:
    """Raise where a group with a rho can have no first moment, as far as ``base`` lets it be known by now."""
    for group in base.param_groups:
        update = native_update(base, group)
        states = (base.state.get(p) for p in group["params"])
        without = any(state and moment_of(state) is None for state in states)
        if group["rho"] > 0 and (without if update is None else update.moment is None):
            momentum = " with momentum=0" if group.get("momentum") == 0 else ""
            raise ValueError(
                f"base: {type(base).__name__}{momentum} keeps no first moment to perturb along: expected a base whose "
                f"state has {' or '.join(MOMENTS)}, such as Adam, AdamW, or SGD with momentum"
            )


def first_moments(base: Optimizer) -> list[tuple[Group, Tensor, Tensor]]:
    """Each parameter that has a first moment, in a group with a rho: the group, the parameter and the moment.

    Frozen ones are left out: they would stay perturbed along a moment that does not change any more.

    Raises:
        ValueError: if one of these groups can have none.
    """
    rhos = radii(base.param_groups)
    check_moments(base)
    params = (
        (group, p) for group, rho in zip(base.param_groups, rhos, strict=True) if rho > 0 for p in group["params"]
    )
    found = ((group, p, moment_of(base.state.get(p, {}))) for group, p in params if p.requires_grad)
    return [(group, p, moment) for group, p, moment in found if moment is not None]


def native_update(base: Optimizer, group: Group) -> Update | None:
    """The native update of ``group``, or None where ``base`` has none and its own ``step`` must be called.

    Only the classes of :data:`NATIVE` themselves count: a subclass may compute something else. ``foreach`` and
    ``fused`` choose among equal implementations and are not looked at. Betas that are tensors are left to the base.
    """
    native = NATIVE.get(type(base))
    if native is None or group.get("differentiable") or any(isinstance(b, Tensor) for b in group.get("betas", ())):
        return None
    return native.choose(group)
