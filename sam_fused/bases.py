"""Which base optimizers have a native update, and what it needs from a parameter group.

A native update is a functor of ``csrc/functors.h``; an entry here says by which ``torch.optim`` class it is used,
which ``torch.optim`` state keys it moves, and in which order its hyper-parameters come.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

Group = dict[str, Any]


@dataclass(frozen=True)
class Update:
    """A functor of the extension.

    Attributes:
        name: the functor's name.
        state: ``torch.optim``'s keys of the state tensors, in the functor's order.
        hyper: a group's hyper-parameters as floats, in the functor's order, the learning rate first.
        counts_steps: whether the state has a ``step``.
    """

    name: str
    state: tuple[str, ...]
    hyper: Callable[[Group], tuple[float, ...]]
    counts_steps: bool = False


def _lr(group: Group) -> float:
    """The learning rate; NaN for a tensor on a device, where the update reads it itself."""
    lr = group["lr"]
    return math.nan if isinstance(lr, Tensor) and not lr.is_cpu else float(lr)


def _sgd_hyper(group: Group) -> tuple[float, ...]:
    keys = ("weight_decay", "maximize", "momentum")
    return (_lr(group), *(float(group[key]) for key in keys), 0.0, float(group["nesterov"]))


def _adam_hyper(decoupled: bool) -> Callable[[Group], tuple[float, ...]]:
    def hyper(group: Group) -> tuple[float, ...]:
        decay = group.get("decoupled_weight_decay", decoupled)
        values = (group["weight_decay"], group["maximize"], *group["betas"], group["eps"], decay)
        return (_lr(group), *map(float, values))

    return hyper


_SGD = Update("sgd", (), _sgd_hyper)
_SGD_MOMENTUM = Update("sgd_momentum", ("momentum_buffer",), _sgd_hyper)


def _adams(decoupled: bool) -> tuple[Update, Update]:
    hyper = _adam_hyper(decoupled)
    state = ("exp_avg", "exp_avg_sq")
    return (
        Update("adam", state, hyper, counts_steps=True),
        Update("adam_amsgrad", (*state, "max_exp_avg_sq"), hyper, counts_steps=True),
    )


_ADAM, _ADAMW = _adams(decoupled=False), _adams(decoupled=True)

#: From a base class to the native update of one of its groups.
NATIVE: dict[type[Optimizer], Callable[[Group], Update]] = {
    torch.optim.SGD: lambda group: _SGD_MOMENTUM if group["momentum"] else _SGD,
    torch.optim.Adam: lambda group: _ADAM[bool(group["amsgrad"])],
    torch.optim.AdamW: lambda group: _ADAMW[bool(group["amsgrad"])],
}


def native_update(base: Optimizer, group: Group) -> Update | None:
    """The native update of ``group``, or None where ``base`` has none and its own ``step`` must be called.

    Only the classes of :data:`NATIVE` themselves count: a subclass may compute something else. ``foreach`` and
    ``fused`` choose among equal implementations and are not looked at. Left to the base are betas that are tensors, and
    SGD's dampening, which its first step leaves out.
    """
    choose = NATIVE.get(type(base))
    if (
        choose is None
        or group.get("differentiable")
        or (group.get("momentum") and group.get("dampening"))
        or any(isinstance(b, Tensor) for b in group.get("betas", ()))
    ):
        return None
    return choose(group)
