"""What can be a parameter of SAM, and what an error calls it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .distributed import check_distributed, is_dtensor

Group = dict[str, Any]


def name_of(groups: Sequence[Group], group: int, i: int) -> str:
    """The name that the user gave, or the place in ``param_groups``."""
    names = groups[group].get("param_names")
    return names[i] if names and i < len(names) else f"param_groups[{group}]['params'][{i}]"


def trains(group: Group) -> bool:
    """Whether the learning rate is not 0, as far as is known without waiting for a GPU.

    torch.distributed.checkpoint makes a step with learning rate 0 to have the state there; that one is meant.
    """
    lr = group.get("lr")
    return (isinstance(lr, Tensor) and not lr.is_cpu) or bool(lr != 0)


def check_group(groups: Sequence[Group], group: int) -> None:
    """Raise ValueError if something in this group cannot be a parameter."""
    params = groups[group]["params"]
    for i, p in enumerate(params):
        check_distributed(p, name_of(groups, group, i))
        if p.is_complex():
            raise ValueError(
                f"{name_of(groups, group, i)}: complex parameters are not supported; "
                "hold torch.view_as_real of it as the parameter"
            )
    if len(set(params)) != len(params):
        raise ValueError(f"param_groups[{group}]['params']: a parameter appears twice")


def check_memory(groups: Sequence[Group]) -> None:
    """Raise ValueError if two elements of the parameters share memory.

    They would be perturbed one after the other, and restored to what the first perturbation made of them.
    """
    spans = []
    for g, group in enumerate(groups):
        for i, p in enumerate(group["params"]):
            begin = address(p)
            if begin:
                spans.append((str(p.device), begin, begin + _extent(p) * p.element_size(), g, i))
                if overlaps_itself(p):
                    raise ValueError(f"{name_of(groups, g, i)}: its elements share memory with each other; clone() it")
    spans.sort()
    open_spans: list[tuple[str, int, int, int, int]] = []  # that reach beyond where the next begins
    for span in spans:
        device, begin, _, g, i = span
        open_spans = [other for other in open_spans if other[0] == device and other[2] > begin]
        for *_, other_g, other_i in open_spans:
            if _share_memory(groups[other_g]["params"][other_i], groups[g]["params"][i]):
                first, second = sorted([(other_g, other_i), (g, i)])
                raise ValueError(
                    f"{name_of(groups, *first)} and {name_of(groups, *second)} share memory; "
                    "hold one parameter that both places use, or clone() one of them"
                )
        open_spans.append(span)


def address(p: Tensor) -> int:
    """Of the first element; 0 for what has no memory of its own: DTensors, wrappers, lazy, meta and fake tensors."""
    if is_dtensor(p) or is_lazy(p) or p.is_meta or p.numel() == 0:
        return 0
    try:
        return p.data_ptr()
    except RuntimeError:
        return 0


def _extent(p: Tensor) -> int:
    """Elements from the first to the last in memory."""
    return 1 + sum((size - 1) * stride for size, stride in zip(p.shape, p.stride(), strict=True))


def _places(p: Tensor, unit: int) -> Tensor:
    """The address of ``p``'s elements, or of each of their parts of ``unit`` bytes, over ``unit``."""
    elements = torch.arange(_extent(p), device="cpu").as_strided(p.shape, p.stride()).reshape(-1, 1)
    parts = p.element_size() // unit
    return (p.data_ptr() // unit + elements * parts + torch.arange(parts, device="cpu")).flatten()


def _dense(p: Tensor) -> bool:
    return _extent(p) == p.numel()


def share_memory(p: Tensor, q: Tensor) -> bool:
    """Whether an element of one lies where one of the other does; both have memory of their own on one device."""
    spans = [(t.data_ptr(), t.data_ptr() + _extent(t) * t.element_size()) for t in (p, q)]
    return max(begin for begin, _ in spans) < min(end for _, end in spans) and _share_memory(p, q)


def _share_memory(p: Tensor, q: Tensor) -> bool:
    """For two whose spans of memory overlap."""
    if p is q:  # which torch.optim and check_group look after
        return False
    if _dense(p) and _dense(q):
        return True
    unit = math.gcd(p.data_ptr(), q.data_ptr(), p.element_size(), q.element_size())
    return bool(torch.isin(_places(p, unit), _places(q, unit)).any())


def overlaps_itself(p: Tensor) -> bool:
    """Whether two of its elements share memory, as those of an expanded tensor do."""
    if p.layout != torch.strided:
        return False
    inner = 1
    for stride, size in sorted(zip(p.stride(), p.shape, strict=True)):
        if size > 1:
            if stride < inner:  # in nearly all cases it then does
                return len(_places(p, p.element_size()).unique()) < p.numel()
            inner += (size - 1) * stride
    return False
