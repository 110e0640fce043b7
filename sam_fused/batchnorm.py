"""Running statistics of BatchNorm that move in the first of SAM's two passes only."""

import warnings

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def freeze_statistics(model: nn.Module) -> list[_BatchNorm]:
    """Keep every BatchNorm of ``model`` from moving its running statistics; returns the modules to give back.

    A module that does not track still normalises by the batch in training mode and by its buffers in eval mode, so
    only ``running_mean``, ``running_var`` and ``num_batches_tracked`` stand still. Nothing is copied.

    Other buffers that a forward moves do so in both passes: InstanceNorm's statistics, which no switch stops,
    spectral_norm's vectors, and BatchNorm's in a torch.jit module, where the switch is a constant, with a warning.
    """
    if any(isinstance(m, torch.jit.ScriptModule) and m.training and _counts_batches(m) for m in model.modules()):
        warnings.warn(
            "model: BatchNorm inside a torch.jit module cannot be frozen, so its statistics move in both passes; "
            "keep BatchNorm out of what torch.jit compiles",
            stacklevel=2,
        )
    frozen = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    for module in frozen:
        module.track_running_stats = False
    return frozen


def _counts_batches(module: nn.Module) -> bool:
    return any(name == "num_batches_tracked" for name, _ in module.named_buffers(recurse=False))


def thaw_statistics(frozen: list[_BatchNorm]) -> None:
    """Undo :func:`freeze_statistics`."""
    for module in frozen:
        module.track_running_stats = True
