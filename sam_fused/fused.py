"""The arithmetic in the extension: one operator call for all the tensors of a device."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from .arithmetic import NORM, Arithmetic, Group
from .bases import Update, check_moments, moment_of, native_update
from .distributed import is_dtensor, local, local_like, placed_like, placement, sum_over_shards
from .geometry import radii, signed_radius
from .parameters import check_memory, name_of

if TYPE_CHECKING:
    from .distributed import Place

_import_error: ImportError | None = None
try:
    from . import _C, fakes  # noqa: F401  (the operators, and what they are in a trace)
except ImportError as error:  # FusedSAM raises it where it is constructed
    _import_error = error

BUILD_COMMAND = "pip install --no-build-isolation -e ."


def extension() -> ModuleType:
    """sam_fused._C. Raises ImportError, with what to do, where it could not be imported."""
    if _import_error is None:
        return _C
    here = Path(__file__).parent
    where = "from the source tree"
    if (here.parent / "setup.py").exists() and not list(here.glob("_C.*.so")):
        where = f"in {here.parent}, the source tree, which Python takes here instead of an installed sam_fused,"
    raise ImportError(
        f"sam_fused's extension could not be imported: {_import_error}. Build it {where} with: {BUILD_COMMAND}"
    ) from _import_error


def _place(p: Tensor) -> tuple[torch.device, Place | None]:
    """What the tensors of one operator call share: the device, and the placement on a mesh."""
    return p.device, placement(p)


class _Batch:
    """Parameters that go into one operator call, in runs of one group each, and what goes with them.

    All have one ``place``. Backups and state are held as this process's parts.
    """

    def __init__(self, place: tuple[torch.device, Place | None], update: Update | None, perturbed: bool) -> None:
        self.device, self.placement = place
        self.update = update
        self.perturbed = perturbed  # whether its groups have a rho
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
        """Those of this batch's parameters, as the operators want them."""
        mine = grads if len(grads) == len(self.positions) else grads.pick(self.positions)
        return self.fitted(mine.tensors()) if self.casts or self.placement is not None else mine

    def fitted(self, tensors: list[Tensor]) -> list[Tensor]:
        """Gradients or moments of this batch's parameters, in their dtype, and of DTensors this process's parts."""
        if self.casts:
            tensors = [t.to(p.dtype) for t, p in zip(tensors, self.params, strict=True)]
        if self.placement is None:
            return tensors
        return [local_like(t, p) for t, p in zip(tensors, self.params, strict=True)]

    def _local_params(self) -> list[Tensor]:
        """What this process holds of the parameters."""
        return self.params if self.placement is None else [local(p) for p in self.params]

    def rows_to_perturb(self) -> _C.Rows:
        """To save and to move, or with no backups yet to measure."""
        backups = cast("list[Tensor]", self.backups) or None
        return self._kept("perturb", lambda: _C.Rows(self._local_params(), self.sizes, backups=backups))

    def rows_to_update(self) -> _C.Rows:
        """From the backup where there is one."""
        return self._kept(
            "update", lambda: _C.Rows(self._local_params(), self.sizes, saved=self.backups, **self._state())
        )

    def rows_to_advance(self) -> _C.Rows:
        """The backups themselves, of which there is one for each parameter."""
        backups = cast("list[Tensor]", self.backups)
        return self._kept("advance", lambda: _C.Rows(backups, self.sizes, **self._state()))

    def rows_to_follow(self) -> _C.Rows:
        """From the backups."""
        return self._kept("follow", lambda: _C.Rows(self._local_params(), self.sizes, saved=self.backups))

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


class _Active(NamedTuple):
    """A parameter that has a gradient."""

    param: Tensor
    group: Group
    update: Update | None  # None: the base's own step
    name: str


def _batch_for(
    batches: dict[Hashable, _Batch], p: Tensor, update: Update | None = None, perturbed: bool = True
) -> _Batch:
    place = _place(p)
    key = place, update, perturbed
    if key not in batches:
        batches[key] = _Batch(place, update, perturbed)
    return batches[key]


def _dense_strides(p: Tensor) -> tuple[int, ...]:
    """The strides that the extension wants beside ``p``: its own, unless it has gaps."""
    return torch.empty_like(p, device="meta").stride()


def _fits(t: Tensor | None, p: Tensor) -> bool:
    """Whether the extension can use ``t`` beside ``p``: plain, of its dtype, device, shape and strides."""
    return (
        t is not None
        and t.dtype == p.dtype
        and t.device == p.device
        and t.shape == p.shape
        and t.stride() == _dense_strides(p)
        and not t.is_neg()
    )


def _pooled(params: list[Tensor], pool: int) -> list[Tensor]:
    """Zeros in the dtype, device and dense layout of each parameter (of what this process holds of it).

    They are views of one storage for each dtype and device.

    An operator call then walks through one run of memory: with a thousand small tensors, the misses of a thousand
    scattered ones cost more than the arithmetic. ``pool`` is a small number that differs among the pools that one
    call walks through together. It shifts their beginnings by 1 KiB: at equal offsets within a page they would push
    each other out of the cache (24 x 4 M, Adam's update with one thread: 90 ms against 60).
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
        pools[p.dtype, p.device].as_strided(p.shape, _dense_strides(p), offset)
        for p, offset in zip(params, offsets, strict=True)
    ]


class _Plan:
    """The batches of a step, for one choice of parameters that have a gradient.

    It holds what its key names by address, so that no address is used again while the plan is kept.
    """

    def __init__(self, groups: list[Group], updates: list[Update | None]) -> None:
        self.groups = list(groups)
        self.active: list[_Active] = []  # the parameters that have a gradient
        self.ascent: list[_Batch] = []
        self.descent: list[_Batch] | None = None
        self.contents = 0  # of the base's state that `descent` was made from
        self.held: list[Any] = []  # that state
        self.leftover: list[tuple[Tensor, Tensor]] = []  # parameters that are perturbed and have no gradient now
        self.matched: list[_Batch] | None = None  # the perturbed batches that `descent` and `leftover` know of
        self.advances = False  # whether `descent` can go from the backups of one perturbation to the next
        ascent: dict[Hashable, _Batch] = {}
        for g, (group, update) in enumerate(zip(groups, updates, strict=True)):
            for i, p in enumerate(group["params"]):
                if p.grad is None:
                    continue
                if group["rho"] > 0:
                    _batch_for(ascent, p).append(len(self.active), p, p.grad, group)
                native = update if p.grad.dtype == p.dtype else None
                self.active.append(_Active(p, group, native, name_of(groups, g, i)))
        self.ascent = list(ascent.values())
        self.composed = any(a.update is None for a in self.active)

    def forget_rows(self) -> None:
        for batch in [*self.ascent, *(self.descent or [])]:
            batch.forget_rows()


class Fused(Arithmetic):
    """SAM's arithmetic in one operator call for all the tensors of a device."""

    def __init__(self, base: Optimizer) -> None:
        extension()
        super().__init__(base)
        self._plans: dict[Hashable, _Plan] = {}
        self._memory: int | None = None  # where the parameters lie, as last checked
        self._backups: dict[Tensor, Tensor] = {}

    # ---- the cached batches ----

    def _gather(self) -> tuple[_Plan, _C.Gradients]:
        """The present gradients, and the batches that fit them."""
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
            found = self._plans[key] = _Plan(groups, updates)
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

    def _make_descent(self, plan: _Plan) -> None:
        """The batches of the update, with the base's state made or moved to the parameters' layout where need be."""
        self._make_state(plan)
        state = self.base.state
        batches: dict[Hashable, _Batch] = {}
        plan.held = []
        for position, (p, group, update, _) in enumerate(plan.active):
            to = _batch_for(batches, p, update, group["rho"] > 0)
            to.append(position, p, p, group)  # a gradient of another dtype is left to the base
            assert update is not None  # or the plan is composed
            if update.counts_steps:
                to.steps.append(state[p]["step"])
            if update.state:
                plan.held.append(list(state[p].values()))
        for to in batches.values():
            assert to.update is not None
            to.state = [local(state[p][key]) for key in to.update.state for p in to.params]
        plan.matched = None
        plan.descent = list(batches.values())
        plan.contents = _C.contents(state)

    def _make_state(self, plan: _Plan) -> None:
        """Make what is missing of the base's state, and lay out what is there as the parameters are."""
        wanted: dict[str, list[Tensor]] = defaultdict(list)
        uncounted: list[Tensor] = []
        for p, _, update, name in plan.active:
            assert update is not None
            state = self.base.state[p] if update.state else {}
            for key in update.state:
                old = state.get(key)
                if old is not None and old.shape != p.shape:
                    raise ValueError(f"{name}, state {key!r}: expected shape {tuple(p.shape)}, got {tuple(old.shape)}")
                if old is None or placement(old) != placement(p) or not _fits(local(old), local(p)):
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
        if (wanted or uncounted) and _capturing():
            raise RuntimeError("the base's state cannot be made in a CUDA graph: run a step before capturing one")
        for pool, (key, params) in enumerate(sorted(wanted.items()), start=2):
            for p, new in zip(params, _pooled(params, pool), strict=True):
                old, new = self.base.state[p].get(key), placed_like(new, p)
                if old is not None:
                    new.copy_(old)
                self.base.state[p][key] = new
        # Steps are counted on the parameters' device, which alone knows whether an overflow skips the update.
        for device in {p.device for p in uncounted}:
            there = [p for p in uncounted if p.device == device]
            zeros = torch.zeros(len(there), dtype=torch.float32, device=device)
            for p, new in zip(there, zeros, strict=True):
                old = self.base.state[p].get("step")
                if old is not None:
                    new.fill_(old.reshape(()) if isinstance(old, Tensor) else old)
                self.base.state[p]["step"] = new

    def _match(self, plan: _Plan) -> None:
        """Give each parameter of the update its backup, and find the perturbed ones that have no gradient now."""
        plan.matched = None  # until all of it is done
        perturbed = [pair for batch in self.record or [] for pair in zip(batch.params, batch.backups, strict=True)]
        backup_of = {id(p): backup for p, backup in perturbed}
        for batch in plan.descent or []:
            batch.forget_rows()
            batch.backups = [backup_of.pop(id(p), None) for p in batch.params]
        plan.leftover = [(p, backup) for p, backup in perturbed if id(p) in backup_of]
        plan.advances = self._can_advance(plan)
        plan.matched = list(self.record or [])

    def _can_advance(self, plan: _Plan) -> bool:
        """Whether all that the update perturbs next, and nothing else, is perturbed now."""
        descent = plan.descent or []
        moving = [batch for batch in descent if batch.perturbed]
        places = {(batch.device, batch.placement) for batch in moving}
        return (
            bool(moving)
            and not plan.leftover
            and len(places) == len(moving)  # or the norm would be summed in another order than in `measure`
            and all(batch.update is not None and batch.update.moment is not None for batch in moving)
            and all(
                _fits(backup, local(p)) if batch.perturbed else backup is None
                for batch in descent
                for p, backup in zip(batch.params, batch.backups, strict=True)
            )
        )

    def _backups_of(self, params: list[Tensor]) -> list[Tensor]:
        """Buffers to save ``params`` in, kept from step to step."""
        missing = [p for p in params if not _fits(self._backups.get(p), local(p))]
        if missing and _capturing():
            raise RuntimeError("the backup cannot be made in a CUDA graph: run a step before capturing one")
        for p, new in zip(missing, _pooled(missing, pool=1), strict=True):
            self._backups[p] = new
        return [self._backups[p] for p in params]

    # ---- the arithmetic; hooks without bytecode, which no interrupt can part from their operator (module.cpp) ----

    def gradients(self) -> Any:
        plan, grads = self._gather()
        return [(batch, batch.pick(grads), batch.pack(_gradient_row)) for batch in plan.ascent]

    def momenta(self) -> Any:
        check_moments(self.base)
        groups = self.base.param_groups
        batches: dict[Hashable, _Batch] = {}
        moments: list[Tensor] = []
        for group, rho in zip(groups, radii(groups), strict=True):
            for p in group["params"] if rho > 0 else ():
                moment = moment_of(self.base.state.get(p, {}))
                if moment is not None:
                    _batch_for(batches, p).append(len(moments), p, moment, group)
                    moments.append(moment)
        return [
            (batch, batch.fitted([moments[i] for i in batch.positions]), batch.pack(_moment_row))
            for batch in batches.values()
        ]

    def measure(
        self, direction: Any, total: Tensor | None = None, grad_scale: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        squares = [
            sum_over_shards(_C.grad_sq_norm(batch.rows_to_perturb(), tensors, ascent), batch.placement)
            for batch, tensors, ascent in direction
        ]
        return _norm(squares, [ascent for *_, ascent in direction], total, grad_scale), direction

    def perturb(self, measured: tuple[Tensor, Any]) -> None:
        values, direction = measured
        record = self.record = []
        for batch, tensors, ascent in direction:
            if not batch.backups:
                batch.forget_rows()
                batch.backups = self._backups_of(batch.params)
            norm = values[NORM].to(batch.device)
            on_record = partial(record.append, batch)
            _C.perturb_(batch.rows_to_perturb(), tensors, norm, ascent, hook=on_record)
            batch.mark_changed()

    def _perturbed(self) -> list[list[Tensor]]:
        return [batch.params for batch in self.record or []]

    def versions(self) -> list[int]:
        return _C.versions(self._perturbed())

    def restore(self) -> None:
        for batch in self.record or []:
            _restore(list(zip(batch.params, batch.backups, strict=True)))
        self.record = None

    def _descent(self) -> tuple[_Plan, _C.Gradients]:
        """The plan of an update and the gradients."""
        plan, grads = self._gather()
        if plan.composed:
            return plan, grads
        if _capturing():
            for i, group in enumerate(self.base.param_groups):
                if group.get("capturable") is False:
                    raise RuntimeError(
                        f"param_groups[{i}]: a CUDA graph is capturing this step, for which the optimizer must be "
                        "constructed with capturable=True"
                    )
        if plan.descent is None or plan.contents != _C.contents(self.base.state):
            self._make_descent(plan)
        if plan.matched is None or plan.matched != (self.record or []):
            self._match(plan)
        return plan, grads

    def update(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        plan, grads = self._descent()
        if plan.composed:
            self.update_composed(grad_scale, found_inf)
            return
        _restore(plan.leftover)
        off_record = None if self.record is None else self.record.clear
        descent = plan.descent or []
        for batch in descent:
            assert batch.update is not None
            _C.restore_step_(
                batch.rows_to_update(),
                batch.pick(grads),
                batch.pack(batch.update.row),
                *batch.scalars(grad_scale, found_inf),
                hook=off_record if batch is descent[-1] else None,
            )
            batch.mark_changed()
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
        for batch in plan.descent or []:
            assert batch.update is not None
            row = batch.pack(batch.update.row)
            scalars = batch.scalars(grad_scale, found_inf)
            mine = batch.pick(grads)
            if not batch.perturbed:
                _C.restore_step_(batch.rows_to_update(), mine, row, *scalars)
                batch.mark_changed()
                continue
            k = batch.update.moment
            assert k is not None  # or the plan does not advance
            ascent = batch.pack(_moment_row)
            n = len(batch.params)
            sq_norms = _C.step_along_(batch.rows_to_advance(), mine, row, ascent, k, *scalars)
            squares.append(sum_over_shards(sq_norms, batch.placement))
            ascents.append(ascent)
            moves.append((batch, batch.state[k * n : (k + 1) * n]))
        norm = _norm(squares, ascents)[NORM]
        for (batch, moments), ascent in zip(moves, ascents, strict=True):
            _C.perturb_from_(batch.rows_to_follow(), moments, norm.to(batch.device), ascent)
            batch.mark_changed()


def _norm(
    squares: list[Tensor], ascents: list[Tensor], total: Tensor | None = None, grad_scale: Tensor | None = None
) -> Tensor:
    """What :meth:`Arithmetic.measure` returns, from the squared norms of each call and the rows that they belong to."""
    if len(squares) == 1 and (total is None or squares[0].device == total.device):
        return _C.sharpness_(squares[0], ascents[0], total, grad_scale)
    device = total.device if total is not None else squares[0].device if squares else torch.device("cpu")
    sq_norms = torch.cat([torch.empty(0, dtype=torch.float64, device=device), *(sq.to(device) for sq in squares)])
    ascent = torch.cat([torch.empty(0, 3, dtype=torch.float64, device="cpu"), *ascents])
    return _C.sharpness_(sq_norms, ascent, total, grad_scale)


def _gradient_row(group: Group) -> tuple[float, ...]:
    return signed_radius(group), float(group["eta"]), float(group["adaptive"])


def _moment_row(group: Group) -> tuple[float, ...]:
    return -float(group["rho"]), float(group["eta"]), float(group["adaptive"])


def _capturing() -> bool:
    """Whether a CUDA graph is being captured."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _restore(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Copy each backup to its parameter, which may have moved to another device since."""
    for device in {p.device for p, _ in pairs}:
        there = [(p, backup) for p, backup in pairs if p.device == device]
        _C.restore_(_C.Rows([local(p) for p, _ in there], [len(there)], saved=[backup for _, backup in there]))
        torch.autograd.graph.increment_version([p for p, _ in there if is_dtensor(p)])
