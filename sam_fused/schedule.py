"""Schedules of rho: late SAM, SAM after a warm-up, SAM in some steps. Where every rho is 0, a step takes one pass."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from .around import Around


class LambdaRho:
    """Sets each group's rho to its initial value times a factor, as ``torch.optim.lr_scheduler.LambdaLR`` does for lr.

    The initial value stays in the group as ``initial_rho``, and so in the optimizer's checkpoints. A later schedule of
    the same optimizer begins from it too.

    Args:
        optimizer: FusedSAM, FusedMSAM or one of their references.
        factor: from the number of calls of :meth:`step` so far, 0 at construction, to a number >= 0: :func:`late`,
            :func:`warm_up`, :func:`at_random` or one of your own. Whether it counts batches or epochs is what the calls
            of :meth:`step` say.

    Example::

        schedule = LambdaRho(opt, late(0.5 * epochs))  # SAM in the second half of the training
        for epoch in range(epochs):
            ...
            schedule.step()
    """

    def __init__(self, optimizer: Around, factor: Callable[[int], float]) -> None:
        if not isinstance(optimizer, Around):
            raise TypeError(f"optimizer: expected one of sam_fused's, got {type(optimizer).__name__}")
        if not callable(factor):
            raise TypeError(f"factor: expected a function of the number of steps, got {factor!r}")
        self.optimizer = optimizer
        self.factor = factor
        # initial_rho: of an earlier schedule, perhaps from a checkpoint
        self.base_rhos = [float(group.get("initial_rho", group["rho"])) for group in optimizer.param_groups]
        self._set(0, self.base_rhos)

    def _set(self, epoch: int, rhos: list[float]) -> None:
        """Be at ``epoch``, with these initial values; nothing changes where that raises."""
        groups = self.optimizer.param_groups
        if len(groups) != len(self.base_rhos):
            raise RuntimeError(
                f"optimizer: expected the {len(self.base_rhos)} groups that it had, got {len(groups)}; construct the "
                "schedule after the last add_param_group"
            )
        factor = float(self.factor(epoch))
        for group, rho in zip(groups, rhos, strict=True):
            group["rho"], group["initial_rho"] = rho * factor, rho
        self.last_epoch, self.base_rhos = epoch, rhos

    def step(self) -> None:
        """Count up, and set the groups' rho."""
        self._set(self.last_epoch + 1, self.base_rhos)

    def get_last_rho(self) -> list[float]:
        """rho of each group."""
        return [group["rho"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` takes: the count and the initial values, not the factor."""
        return {"last_epoch": self.last_epoch, "base_rhos": list(self.base_rhos)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there, and set the groups' rho; before or after the optimizer has loaded its own.

        Raises:
            ValueError: for the state of another number of groups.
        """
        rhos = [float(rho) for rho in state_dict["base_rhos"]]
        if len(rhos) != len(self.base_rhos):
            raise ValueError(f"state_dict: expected base_rhos of {len(self.base_rhos)} groups, got {len(rhos)}")
        self._set(int(state_dict["last_epoch"]), rhos)


def late(start: float) -> Callable[[int], float]:
    """No SAM before ``start``, all of it from then on (Zhou et al., https://arxiv.org/abs/2410.10373)."""
    return lambda t: float(t >= start)


def warm_up(steps: int) -> Callable[[int], float]:
    """From 0 to the whole rho in ``steps``, along a line."""
    if steps <= 0:
        raise ValueError(f"steps: expected a number > 0, got {steps!r}")
    return lambda t: min(1.0, t / steps)


def at_random(share: float, seed: int = 0) -> Callable[[int], float]:
    """SAM in a random ``share`` of the steps, which depends on ``seed`` and on the step's number alone."""
    if not 0 <= share <= 1:
        raise ValueError(f"share: expected a number from 0 to 1, got {share!r}")
    return lambda t: float(random.Random(f"{seed} {t}").random() < share)
