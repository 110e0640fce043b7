"""Running statistics of BatchNorm that move in the first of SAM's two passes only."""

from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .warn import warn

# Which FrozenStatistics hold each module: two optimizers may share a network.
_holders: WeakKeyDictionary[nn.Module, WeakSet["FrozenStatistics"]] = WeakKeyDictionary()


class FrozenStatistics:
    """Keeps every BatchNorm of a model from moving its running statistics, from :meth:`freeze` to :meth:`thaw`.

    A module that does not track still normalises by the batch in training mode and by its buffers in eval mode, so
    only ``running_mean``, ``running_var`` and ``num_batches_tracked`` are frozen. Nothing is copied.

    Other buffers that a forward moves do so in both passes: InstanceNorm's statistics, which no switch stops,
    spectral_norm's vectors, and BatchNorm's in a torch.jit module, where the switch is a constant, with a warning.
    """

    def __init__(self) -> None:
        self.modules: list[_BatchNorm] = []  # on record before the first is frozen, until the last is thawed

    def freeze(self, model: nn.Module) -> None:
        if any(isinstance(m, torch.jit.ScriptModule) and m.training and _counts_batches(m) for m in model.modules()):
            warn(
                "model: BatchNorm inside a torch.jit module cannot be frozen, so its statistics move in both passes; "
                "keep BatchNorm out of what torch.jit compiles"
            )
        self.modules = [
            m for m in model.modules() if isinstance(m, _BatchNorm) and (m.track_running_stats or m in _holders)
        ]
        for module in self.modules:
            _holders.setdefault(module, WeakSet()).add(self)
            module.track_running_stats = False

    def thaw(self) -> None:
        for module in self.modules:
            others = _holders.get(module, WeakSet())
            others.discard(self)
            if not others:
                module.track_running_stats = True
                _holders.pop(module, None)
        self.modules = []


def _counts_batches(module: nn.Module) -> bool:
    return any(name == "num_batches_tracked" for name, _ in module.named_buffers(recurse=False))
