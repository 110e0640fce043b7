"""Parameters that processes share: the replicas of DistributedDataParallel and the shards of DTensors (FSDP2)."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:  # slow to import
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Placement

    Place = tuple[DeviceMesh, tuple[Placement, ...]]

# ---- replicas ----


def _replicas(model: nn.Module | None) -> DistributedDataParallel | None:
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    return model if isinstance(model, DistributedDataParallel) else None


def unsynchronized(model: nn.Module | None) -> AbstractContextManager[None]:
    """Where each process keeps its own gradient, if ``model`` is a DistributedDataParallel.

    Raises:
        RuntimeError: if that has a static graph, which a pass without communication is not part of.
    """
    replicas = _replicas(model)
    if replicas is None:
        return nullcontext()
    if replicas.static_graph:
        raise RuntimeError(
            "model: DistributedDataParallel with static_graph=True has no first pass without communication; "
            "construct the optimizer with sync_perturbation=True, or the model without static_graph"
        )
    return replicas.no_sync()


def any_replica(flag: Tensor, model: nn.Module | None) -> Tensor:
    """``flag``, 0 or 1, at its largest over the processes of ``model``, if that is a DistributedDataParallel."""
    replicas = _replicas(model)
    if replicas is not None:
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, group=replicas.process_group)
    return flag


def inner_modules(model: nn.Module) -> list[nn.Module]:
    """``model``, and what it is wrapped around: by torch.compile, by DistributedDataParallel."""
    modules = [model]
    for name in ("_orig_mod", "module"):
        inner = getattr(modules[-1], name, None)
        if isinstance(inner, nn.Module) and (name == "_orig_mod" or isinstance(modules[-1], DistributedDataParallel)):
            modules.append(inner)
    return modules


def without_ddp(model: nn.Module) -> nn.Module:
    """What a DistributedDataParallel wraps: each process's own forward and gradients."""
    replicas = _replicas(model)
    model = model if replicas is None else replicas.module
    for name, module in model.named_modules():
        if isinstance(module, DistributedDataParallel):
            raise ValueError(f"model: expected a DistributedDataParallel around all of it, got one inside, {name!r}")
    return model


# ---- shards ----


def is_dtensor(t: object) -> TypeGuard[DTensor]:
    module = sys.modules.get("torch.distributed.tensor")  # slow to import, and without it there is none
    return module is not None and isinstance(t, module.DTensor)


def local(t: Tensor) -> Tensor:
    """What this process holds of ``t``: a plain tensor. Call it under ``no_grad``."""
    return t.to_local() if is_dtensor(t) else t


def placement(t: Tensor) -> Place | None:
    """How a DTensor lies on its mesh; None for a plain tensor."""
    return (t.device_mesh, t.placements) if is_dtensor(t) else None


def local_like(t: Tensor, p: Tensor) -> Tensor:
    """What this process holds of ``t`` once that is placed as ``p`` is."""
    if is_dtensor(p) and placement(t) != placement(p):
        assert is_dtensor(t)  # as the gradients and the state of a DTensor are
        t = t.redistribute(p.device_mesh, p.placements)
    return local(t)


def check_distributed(p: Tensor, what: str) -> None:
    """Raise ValueError for a parameter of which this process holds what SAM cannot work on."""
    if is_dtensor(p) and any(part.is_partial() for part in p.placements):
        raise ValueError(f"{what}: expected a DTensor that is sharded or replicated, got placements {p.placements}")
    if getattr(p, "_fsdp_flattened", False):  # nothing says over which processes to sum its norm
        raise ValueError(
            f"{what}: parameters of FullyShardedDataParallel are not supported, as each process would perturb by the "
            "norm of its own shard; use torch.distributed.fsdp.fully_shard (FSDP2)"
        )


def sum_over_shards(squares: Tensor, place: Place | None) -> Tensor:
    """Sums of squares over the shards of this process to sums over all, for DTensors of one ``placement``."""
    if place is None:
        return squares
    mesh, parts = place
    there = squares.to(mesh.device_type)  # the shards may be elsewhere (FSDP2's CPU offload)
    for dim, part in enumerate(parts):
        if not part.is_replicate():
            torch.distributed.all_reduce(there, group=mesh.get_group(dim))
    return there.to(squares.device)


def fsdp_modules(model: nn.Module) -> list[Any]:
    """Those that FSDP2 (``fully_shard``) manages; raises on FSDP1's."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return []
    if any(isinstance(module, fsdp.FullyShardedDataParallel) for module in model.modules()):
        raise ValueError("model: FullyShardedDataParallel (FSDP1) is not supported; use fully_shard (FSDP2)")
    return [module for module in model.modules() if isinstance(module, fsdp.FSDPModule)]


# ---- values of several processes ----


def process_groups(model: nn.Module, params: Sequence[Tensor]) -> list[Any]:
    """Groups through which, one after the other, this process reaches all that share ``model`` or its largest mesh."""
    replicas = _replicas(model)
    if replicas is not None:
        return [replicas.process_group]
    meshes = [p.device_mesh for p in params if is_dtensor(p)]
    if not meshes:
        return []
    mesh = max(meshes, key=lambda mesh: mesh.size())
    return [mesh.get_group(dim) for dim in range(mesh.ndim)]


def mesh_device(params: Sequence[Tensor]) -> torch.device:
    """Where processes exchange what belongs to ``params``, which may be elsewhere (FSDP2's CPU offload)."""
    mesh = next((p.device_mesh for p in params if is_dtensor(p)), None)
    return params[0].device if mesh is None else torch.device(mesh.device_type)


def mean_over(t: Tensor, groups: list[Any]) -> Tensor:
    """Over the processes of ``groups``, in place."""
    for group in groups:
        torch.distributed.all_reduce(t, group=group)
        t /= group.size()
    return t


def drawn_by_the_first(t: Tensor, p: Tensor, groups: list[Any]) -> Tensor:
    """The first process's ``t``, of the shape of ``p``: the part of it that this process holds of ``p``."""
    if is_dtensor(p):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(t.to(p.device_mesh.device_type), p.device_mesh, p.placements).to_local().to(t.device)
    for group in groups:
        torch.distributed.broadcast(t, torch.distributed.get_global_rank(group, 0), group=group)
    return t


def whole(t: Tensor) -> Tensor:
    """All of ``t``, on every process."""
    return t.full_tensor() if is_dtensor(t) else t
