"""The arithmetic in the extension: one operator call for all the tensors of a device."""

from __future__ import annotations

from collections.abc import Hashable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .arithmetic import NORM, Arithmetic, Readings
from .bases import first_moments, moment_of, native_update
from .buckets import Bucket, Plan, bucket_for
from .buffers import backups_of, capturing, fits, make_state
from .distributed import is_dtensor, local, sum_over_shards
from .extension import _C, extension
from .geometry import radii, signed_radius
from .parameters import Group, check_memory


class Fused(Arithmetic):
    """SAM's arithmetic in one operator call for all the tensors of a device."""

    def __init__(self, base: Optimizer) -> None:
        extension()
        super().__init__(base)
        self._plans: dict[Hashable, Plan] = {}
        self._memory: int | None = None  # where the parameters lie, as last checked
        self._backups: dict[Tensor, Tensor] = {}

    # ---- the plan of a step ----

    def _gather(self) -> tuple[Plan, _C.Gradients]:
        """The present gradients, and the buckets that fit them."""
        groups = self.base.param_groups
        rhos = radii(groups)
        grads, layout, memory = _C.gather([group["params"] for group in groups])
        if memory != self._memory:
            check_memory(groups)
            for plan in self._plans.values():
                plan.forget_rows()
            self._memory = memory
        updates = [native_update(self.base, group) for group in groups]
        key = (layout, tuple(map(id, groups)), tuple(updates), tuple(rho > 0 for rho in rhos))
        found = self._plans.get(key)
        if found is None:
            self._forget_replaced(groups)
            found = self._plans[key] = Plan(groups, updates)
        return found, grads

    def _forget_replaced(self, groups: list[Group]) -> None:
        """Let go of what was cached for parameters and groups that are not there any more, and of all if it is much."""
        params = {id(p) for group in groups for p in group["params"]}
        present = set(map(id, groups))
        kept = {
            key: plan
            for key, plan in self._plans.items()
            if present.issuperset(map(id, plan.groups)) and all(id(a.param) in params for a in plan.active)
        }
        self._plans = kept if len(kept) < 8 else {}
        self._backups = {p: backup for p, backup in self._backups.items() if id(p) in params}

    def _make_descent(self, plan: Plan) -> None:
        """The buckets of the update, with the base's state made or moved to the parameters' layout where need be."""
        make_state(self.base, plan.active)
        state = self.base.state
        buckets: dict[Hashable, Bucket] = {}
        plan.held = []
        for position, (p, group, update, _) in enumerate(plan.active):
            to = bucket_for(buckets, p, update, group["rho"] > 0)
            to.append(position, p, p, group)  # a gradient of another dtype is left to the base
            assert update is not None  # or the plan is composed
            if update.counts_steps:
                to.steps.append(state[p]["step"])
            if update.state:
                plan.held.append(list(state[p].values()))
        for to in buckets.values():
            assert to.update is not None
            to.state = [local(state[p][key]) for key in to.update.state for p in to.params]
        plan.matched = None
        plan.descent = list(buckets.values())
        plan.contents = _C.contents(state)

    def _match(self, plan: Plan) -> None:
        """Give each parameter of the update its backup, and find the perturbed ones that have no gradient now."""
        plan.matched = None  # until all of it is done
        perturbed = self.backups()
        backup_of = {id(p): backup for p, backup in perturbed}
        for bucket in plan.descent:
            bucket.forget_rows()
            bucket.backups = [backup_of.pop(id(p), None) for p in bucket.params]
        plan.leftover = [(p, backup) for p, backup in perturbed if id(p) in backup_of]
        plan.advances = self._can_advance(plan)
        plan.matched = list(self.record or [])

    def _can_advance(self, plan: Plan) -> bool:
        """Whether all that is to be perturbed next is updated, and is perturbed now, and nothing else is."""
        moving = [bucket for bucket in plan.descent if bucket.ascends]
        places = {(bucket.device, bucket.placement) for bucket in moving}
        updated = {id(p) for bucket in moving for p in bucket.params}
        ascending = (p for group in self.base.param_groups if group["rho"] > 0 for p in group["params"])
        wanted = {
            id(p)
            for p in ascending
            if p.requires_grad and (id(p) in updated or moment_of(self.base.state.get(p, {})) is not None)
        }
        return (
            bool(moving)
            and not plan.leftover
            and wanted == updated
            and len(places) == len(moving)  # or the norm would be summed in another order than in `measure`
            and all(bucket.update is not None and bucket.update.moment is not None for bucket in moving)
            and all(
                fits(backup, local(p)) if bucket.ascends else backup is None
                for bucket in plan.descent
                for p, backup in zip(bucket.params, bucket.backups, strict=True)
            )
        )

    # ---- the arithmetic; hooks without bytecode, which no interrupt can part from their operator (module.cpp) ----

    def gradients(self) -> Any:
        plan, grads = self._gather()
        return [(bucket, bucket.pick(grads), bucket.pack(_gradient_row)) for bucket in plan.ascent]

    def momenta(self) -> Any:
        buckets: dict[Hashable, Bucket] = {}
        found = first_moments(self.base)
        for position, (group, p, moment) in enumerate(found):
            bucket_for(buckets, p).append(position, p, moment, group)
        return [
            (bucket, bucket.fitted([found[i][2] for i in bucket.positions]), bucket.pack(_moment_row))
            for bucket in buckets.values()
        ]

    def measure(self, direction: Any, into: Readings | None = None, grad_scale: Tensor | None = None) -> Tensor:
        squares = [
            sum_over_shards(_C.grad_sq_norm(bucket.rows_for_perturb(), tensors, ascent), bucket.placement)
            for bucket, tensors, ascent in direction
        ]
        return _measured(squares, [ascent for *_, ascent in direction], into, grad_scale)

    def perturb(self, direction: Any, measured: Tensor) -> None:
        record = self.record = []
        for bucket, tensors, ascent in direction:
            if not bucket.backups:
                bucket.forget_rows()
                bucket.backups = backups_of(bucket.params, self._backups)
            norm = measured[NORM].to(bucket.device)
            on_record = partial(record.append, bucket)
            _C.perturb_(bucket.rows_for_perturb(), tensors, norm, ascent, hook=on_record)
            bucket.mark_changed()

    def backups(self) -> list[tuple[Tensor, Tensor]]:
        return [pair for bucket in self.record or [] for pair in zip(bucket.params, bucket.backups, strict=True)]

    def marks(self) -> bytes:
        return _C.marks([bucket.params for bucket in self.record or []])

    def restore(self) -> None:
        for bucket in self.record or []:
            _restore(list(zip(bucket.params, bucket.backups, strict=True)))
        self.record = None

    def _descent(self) -> tuple[Plan, _C.Gradients]:
        """The plan of an update and the gradients."""
        plan, grads = self._gather()
        if plan.composed:
            return plan, grads
        if capturing():
            for i, group in enumerate(self.base.param_groups):
                if group.get("capturable") is False:
                    raise RuntimeError(
                        f"param_groups[{i}]: a CUDA graph is capturing this step, for which the optimizer must be "
                        "constructed with capturable=True"
                    )
        if plan.contents != _C.contents(self.base.state):
            self._make_descent(plan)
        if plan.matched != (self.record or []):
            self._match(plan)
        return plan, grads

    def update(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        plan, grads = self._descent()
        if plan.composed:
            self.update_composed(grad_scale, found_inf)
            return
        _restore(plan.leftover)
        off_record = None if self.record is None else self.record.clear
        for bucket in plan.descent:
            assert bucket.update is not None
            _C.restore_step_(
                bucket.rows_for_restore_step(),
                bucket.pick(grads),
                bucket.pack(bucket.update.row),
                *bucket.scalars(grad_scale, found_inf),
                hook=off_record if bucket is plan.descent[-1] else None,
            )
            bucket.mark_changed()
        self.record = None

    def advance(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """As usual, or where all that moves was perturbed before: from backup to backup, in fewer passes over memory.

        The backups are updated themselves, the norm is summed meanwhile, and the parameters are only written.
        """
        plan, grads = self._descent()
        if plan.composed or not plan.advances:
            super().advance(grad_scale, found_inf)
            return
        squares, ascents, moves = [], [], []
        for bucket in plan.descent:
            assert bucket.update is not None
            row = bucket.pack(bucket.update.row)
            scalars = bucket.scalars(grad_scale, found_inf)
            mine = bucket.pick(grads)
            if not bucket.ascends:
                _C.restore_step_(bucket.rows_for_restore_step(), mine, row, *scalars)
                bucket.mark_changed()
                continue
            k = bucket.update.moment
            assert k is not None  # or the plan does not advance
            ascent = bucket.pack(_moment_row)
            n = len(bucket.params)
            sq_norms = _C.step_along_(bucket.rows_for_step_along(), mine, row, ascent, k, *scalars)
            squares.append(sum_over_shards(sq_norms, bucket.placement))
            ascents.append(ascent)
            moves.append((bucket, bucket.state[k * n : (k + 1) * n]))
        norm = _measured(squares, ascents)[NORM]
        for (bucket, moments), ascent in zip(moves, ascents, strict=True):
            _C.perturb_from_(bucket.rows_for_perturb_from(), moments, norm.to(bucket.device), ascent)
            bucket.mark_changed()


def _measured(
    squares: list[Tensor], ascents: list[Tensor], into: Readings | None = None, grad_scale: Tensor | None = None
) -> Tensor:
    """What :meth:`Arithmetic.measure` returns, from the squared norms of each call and the rows that they belong to."""
    device = into.total.device if into is not None else squares[0].device if squares else torch.device("cpu")
    if len(squares) == 1 and squares[0].device == device:
        [sq_norms], [ascent] = squares, ascents
    else:
        sq_norms = torch.cat([torch.empty(0, dtype=torch.float64, device=device), *(sq.to(device) for sq in squares)])
        ascent = torch.cat([torch.empty(0, 3, dtype=torch.float64, device="cpu"), *ascents])
    values, total = (torch.empty(3, dtype=torch.float64, device=device), None) if into is None else into
    _C.sharpness_(sq_norms, ascent, values, total, grad_scale)
    return values


def _gradient_row(group: Group) -> tuple[float, ...]:
    return signed_radius(group), float(group["eta"]), float(group["adaptive"])


def _moment_row(group: Group) -> tuple[float, ...]:
    return -float(group["rho"]), float(group["eta"]), float(group["adaptive"])


def _restore(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Copy each backup to its parameter, which may have moved to another device since."""
    for device in {p.device for p, _ in pairs}:
        there = [(p, backup) for p, backup in pairs if p.device == device]
        _C.restore_(_C.Rows([local(p) for p, _ in there], [len(there)], saved=[backup for _, backup in there]))
        torch.autograd.graph.increment_version([p for p, _ in there if is_dtensor(p)])
