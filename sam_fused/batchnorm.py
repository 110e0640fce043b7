"""Running statistics of BatchNorm that move in the first of SAM's two passes only."""

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def freeze_statistics(model: nn.Module) -> list[_BatchNorm]:
    """Keep every BatchNorm of ``model`` from moving its running statistics; returns the modules to give back.

    A module that does not track still normalises by the batch in training mode and by its buffers in eval mode, so
    only ``running_mean``, ``running_var`` and ``num_batches_tracked`` stand still. Nothing is copied.
    """
    frozen = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    for module in frozen:
        module.track_running_stats = False
    return frozen


def thaw_statistics(frozen: list[_BatchNorm]) -> None:
    """Undo :func:`freeze_statistics`."""
    for module in frozen:
        module.track_running_stats = True
