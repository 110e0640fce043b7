"""Memory beside the parameters: the base's state and the backups, laid out as the extension wants them."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor
from torch.optim import Optimizer

from .buckets import Active
from .distributed import is_dtensor, local, placement


def dense_strides(p: Tensor) -> tuple[int, ...]:
    """The strides that the extension wants beside ``p``: its own, unless it has gaps."""
    return torch.empty_like(p, device="meta").stride()


def fits(t: Tensor | None, p: Tensor) -> bool:
    """Whether the extension can use ``t`` beside ``p``: plain, of its dtype, device, shape and strides."""
    return (
        t is not None
        and t.dtype == p.dtype
        and t.device == p.device
        and t.shape == p.shape
        and t.stride() == dense_strides(p)
        and not t.is_neg()
    )


def pooled(params: list[Tensor], pool: int) -> list[Tensor]:
    """Zeros in the dtype, device and dense layout of each parameter (of what this process holds of it).

    They are views of one storage for each dtype and device.

    An operator call then walks through one run of memory: with a thousand small tensors, the misses of a thousand
    scattered ones cost more than the arithmetic. ``pool`` is a small number that differs among the pools that one
    call walks through together. It shifts their beginnings by 1 KiB: at equal offsets within a page they would push
    each other out of the cache.
    """
    sizes: dict[tuple[torch.dtype, torch.device], int] = defaultdict(int)
    offsets = []
    params = [local(p) for p in params]
    for p in params:
        key = (p.dtype, p.device)
        line = (64 if p.nbytes >= 4096 else 16) // p.itemsize  # a cache line, or what non-temporal stores need
        start = sizes[key] if key in sizes else 1024 * pool // p.itemsize
        offsets.append(-(-start // line) * line)
        sizes[key] = offsets[-1] + p.numel()
    pools = {(dtype, device): torch.zeros(n, dtype=dtype, device=device) for (dtype, device), n in sizes.items()}
    return [
        pools[p.dtype, p.device].as_strided(p.shape, dense_strides(p), offset)
        for p, offset in zip(params, offsets, strict=True)
    ]


def zeros_like(params: list[Tensor], pool: int) -> list[Tensor]:
    """As :func:`pooled`, but DTensors for DTensors, each by itself: torch can copy and save none with an offset."""
    plain = iter(pooled([p for p in params if not is_dtensor(p)], pool))
    return [torch.zeros_like(p) if is_dtensor(p) else next(plain) for p in params]


def capturing() -> bool:
    """Whether a CUDA graph is being captured."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def make_state(base: Optimizer, active: list[Active]) -> None:
    """Make what is missing of the base's state, and lay out what is there as the parameters are."""
    wanted: dict[str, list[Tensor]] = defaultdict(list)
    uncounted: list[Tensor] = []
    for p, _, update, name in active:
        assert update is not None
        state = base.state[p] if update.state else {}
        for key in update.state:
            old = state.get(key)
            if old is not None and old.shape != p.shape:
                raise ValueError(f"{name}, state {key!r}: expected shape {tuple(p.shape)}, got {tuple(old.shape)}")
            if old is None or placement(old) != placement(p) or not fits(local(old), local(p)):
                wanted[key].append(p)
        if update.counts_steps:
            step = state.get("step")
            if isinstance(step, Tensor) and step.numel() != 1:
                raise ValueError(f"{name}, state 'step': expected one element, got shape {tuple(step.shape)}")
            if not (
                isinstance(step, Tensor)
                and step.dtype == torch.float32
                and step.device == p.device
                and not step.is_neg()
            ):
                uncounted.append(p)
    if (wanted or uncounted) and capturing():
        raise RuntimeError("the base's state cannot be made in a CUDA graph: run a step before capturing one")
    for pool, (key, params) in enumerate(sorted(wanted.items()), start=2):
        for p, new in zip(params, zeros_like(params, pool), strict=True):
            old = base.state[p].get(key)
            if old is not None:
                new.copy_(old)
            base.state[p][key] = new
    # Steps are counted on the parameters' device, which alone knows whether an overflow skips the update.
    for device in {p.device for p in uncounted}:
        there = [p for p in uncounted if p.device == device]
        zeros = torch.zeros(len(there), dtype=torch.float32, device=device)
        for p, new in zip(there, zeros, strict=True):
            old = base.state[p].get("step")
            if old is not None:
                new.fill_(old.reshape(()) if isinstance(old, Tensor) else old)
            base.state[p]["step"] = new


def backups_of(params: list[Tensor], backups: dict[Tensor, Tensor]) -> list[Tensor]:
    """Buffers to save ``params`` in: those of ``backups``, to which the missing ones are added."""
    missing = [p for p in params if not fits(backups.get(p), local(p))]
    if missing and capturing():
        raise RuntimeError("the backup cannot be made in a CUDA graph: run a step before capturing one")
    backups.update(zip(missing, pooled(missing, pool=1), strict=True))
    return [backups[p] for p in params]
