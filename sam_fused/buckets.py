"""Which parameters go into which operator call, and what is kept of it from step to step."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

from .bases import Update
from .distributed import local, local_like, placement
from .extension import _C
from .parameters import Group, name_of

if TYPE_CHECKING:
    from .distributed import Place


def place_of(p: Tensor) -> tuple[torch.device, Place | None]:
    """What the tensors of one operator call share: the device, and the placement on a mesh."""
    return p.device, placement(p)


class Bucket:
    """Parameters that go into one operator call, in runs of one group each, and what goes with them.

    All have one ``place``. Backups and state are held as this process's parts.
    """

    def __init__(self, place: tuple[torch.device, Place | None], update: Update | None, ascends: bool) -> None:
        self.device, self.placement = place
        self.update = update
        self.ascends = ascends  # whether its groups have a rho
        self.params: list[Tensor] = []
        self.positions: list[int] = []
        self.casts = False  # whether a gradient or moment has another dtype than its parameter
        self.groups: list[Group] = []  # of each run
        self.sizes: list[int] = []
        self.backups: list[Tensor | None] = []
        self.state: list[Tensor] = []
        self.steps: list[Tensor] = []
        self._packed: dict[Any, tuple[Any, Tensor]] = {}
        self._rows: dict[str, _C.Rows] = {}

    def append(self, position: int, p: Tensor, like: Tensor, group: Group) -> None:
        """``like`` has the dtype of the gradient or moment that will be at ``position`` among all of them."""
        self.params.append(p)
        self.positions.append(position)
        self.casts |= like.dtype != p.dtype
        if not self.groups or self.groups[-1] is not group:
            self.groups.append(group)
            self.sizes.append(0)
        self.sizes[-1] += 1

    def pick(self, grads: _C.Gradients) -> _C.Gradients | list[Tensor]:
        """Those of this bucket's parameters, as the operators want them."""
        mine = grads if len(grads) == len(self.positions) else grads.pick(self.positions)
        return self.fitted(mine.tensors()) if self.casts or self.placement is not None else mine

    def fitted(self, tensors: list[Tensor]) -> list[Tensor]:
        """Gradients or moments of this bucket's parameters, in their dtype, and of DTensors this process's parts."""
        if self.casts:
            tensors = [t.to(p.dtype) for t, p in zip(tensors, self.params, strict=True)]
        if self.placement is None:
            return tensors
        return [local_like(t, p) for t, p in zip(tensors, self.params, strict=True)]

    def _local_params(self) -> list[Tensor]:
        """What this process holds of the parameters."""
        return self.params if self.placement is None else [local(p) for p in self.params]

    def rows_for_perturb(self) -> _C.Rows:
        """For perturb_, which saves the parameters in the backups; for grad_sq_norm they may still be missing."""
        backups = cast("list[Tensor]", self.backups) or None
        return self._kept("perturb", lambda: _C.Rows(self._local_params(), self.sizes, backups=backups))

    def rows_for_restore_step(self) -> _C.Rows:
        """For restore_step_, which starts from the backup where there is one, and from the parameter elsewhere."""
        return self._kept(
            "restore_step", lambda: _C.Rows(self._local_params(), self.sizes, saved=self.backups, **self._state())
        )

    def rows_for_step_along(self) -> _C.Rows:
        """For step_along_, which updates the backups themselves; there is one for each parameter."""
        backups = cast("list[Tensor]", self.backups)
        return self._kept("step_along", lambda: _C.Rows(backups, self.sizes, **self._state()))

    def rows_for_perturb_from(self) -> _C.Rows:
        """For perturb_from_, which moves the parameters to where the backups are, and on by the perturbation."""
        return self._kept("perturb_from", lambda: _C.Rows(self._local_params(), self.sizes, saved=self.backups))

    def _state(self) -> dict[str, Any]:
        assert self.update is not None
        return {"base": self.update.name, "state": self.state, "steps": self.steps}

    def _kept(self, use: str, make: Callable[[], _C.Rows]) -> _C.Rows:
        """What is kept for ``use`` until :meth:`forget_rows`, or made anew."""
        rows = self._rows.get(use)
        if rows is None:
            rows = make()
            if rows.lasting and self.placement is None:  # a DTensor's part may lie elsewhere in each step
                self._rows[use] = rows
        return rows

    def forget_rows(self) -> None:
        """To be called when something that they point to lies elsewhere, or has changed its layout."""
        self._rows.clear()

    def mark_changed(self) -> None:
        """Count up the versions of DTensors; the operators do so for the tensors that they see."""
        if self.placement is not None:
            torch.autograd.graph.increment_version(self.params)

    def pack(self, row: Callable[[Group], tuple[float, ...]]) -> Tensor:
        """One row of float64 values for each run."""
        rows = [row(group) for group in self.groups]
        packed = self._packed.get(row)
        if packed is None or packed[0] != rows:
            packed = self._packed[row] = (rows, torch.tensor(rows, dtype=torch.float64, device="cpu"))
        return packed[1]

    def scalars(
        self, grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> tuple[list[Tensor | None], Tensor | None, Tensor | None]:
        """The last three arguments of an update."""
        return (
            self.lr(),
            None if grad_scale is None else grad_scale.to(self.device),
            None if found_inf is None else found_inf.to(self.device),
        )

    def lr(self) -> list[Tensor | None]:
        """For each run the tensor that the update reads the learning rate from, on the parameters' device, or None."""
        lrs: list[Tensor | None] = []
        for group in self.groups:
            lr = group["lr"]
            if isinstance(lr, Tensor) and (lr.device == self.device or not lr.is_cpu):
                lrs.append(lr.to(self.device, torch.float32 if lr.dtype == torch.float32 else torch.float64))
            else:
                lrs.append(None)
        return lrs


class Active(NamedTuple):
    """A parameter that has a gradient."""

    param: Tensor
    group: Group
    update: Update | None  # None: the base's own step
    name: str


def bucket_for(
    buckets: dict[Hashable, Bucket], p: Tensor, update: Update | None = None, ascends: bool = True
) -> Bucket:
    place = place_of(p)
    key = place, update, ascends
    if key not in buckets:
        buckets[key] = Bucket(place, update, ascends)
    return buckets[key]


class Plan:
    """The buckets of a step, for one choice of parameters that have a gradient.

    It holds what its key names by address, so that no address is used again while the plan is kept.
    """

    def __init__(self, groups: list[Group], updates: list[Update | None]) -> None:
        self.groups = list(groups)
        self.active: list[Active] = []  # the parameters that have a gradient
        self.ascent: list[Bucket] = []
        self.descent: list[Bucket] = []
        self.contents: int | None = None  # of the base's state that `descent` was made from; None: not made yet
        self.held: list[Any] = []  # that state
        self.leftover: list[tuple[Tensor, Tensor]] = []  # parameters that are perturbed and have no gradient now
        self.matched: list[Bucket] | None = None  # the perturbed buckets that `descent` and `leftover` know of
        self.advances = False  # whether `descent` can go from the backups of one perturbation to the next
        ascent: dict[Hashable, Bucket] = {}
        for g, (group, update) in enumerate(zip(groups, updates, strict=True)):
            for i, p in enumerate(group["params"]):
                if p.grad is None:
                    continue
                if group["rho"] > 0:
                    bucket_for(ascent, p).append(len(self.active), p, p.grad, group)
                native = update if p.grad.dtype == p.dtype else None
                self.active.append(Active(p, group, native, name_of(groups, g, i)))
        self.ascent = list(ascent.values())
        self.composed = any(a.update is None for a in self.active)

    def forget_rows(self) -> None:
        for bucket in [*self.ascent, *self.descent]:
            bucket.forget_rows()
