"""Running statistics of BatchNorm that move in the first of SAM's two passes only."""

from weakref import WeakKeyDictionary, WeakSet

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

# Which FrozenStatistics hold each module: two optimizers may share a network.
_holders: WeakKeyDictionary[nn.Module, WeakSet["FrozenStatistics"]] = WeakKeyDictionary()


class FrozenStatistics:
    """Keeps every BatchNorm of a model from moving its running statistics, from :meth:`freeze` to :meth:`thaw`.

    A module that does not track still normalises by the batch in training mode and by its buffers in eval mode, so
    only ``running_mean``, ``running_var`` and ``num_batches_tracked`` are frozen. Nothing is copied.
    """

    def __init__(self) -> None:
        self.modules: list[nn.Module] = []  # on record before the first is frozen, until the last is thawed

    def freeze(self, model: nn.Module) -> None:
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
