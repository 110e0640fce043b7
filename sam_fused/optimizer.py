"""FusedSAM: SAM's arithmetic in one operator call for all the tensors of a device."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .bases import Update, native_update
from .distributed import local, local_like, placed_like, placement, sum_over_shards
from .sam import SAM

try:
    from . import _C
except ImportError as error:  # FusedSAM raises it where it is constructed
    _C = None
    _import_error = error

BUILD_COMMAND = "pip install --no-build-isolation -e ."


def extension() -> ModuleType:
    """sam_fused._C. Raises ImportError, with what to do, where it could not be imported."""
    if _C is not None:
        return _C
    here = Path(__file__).parent
    where = "from the source tree"
    if (here.parent / "setup.py").exists() and not list(here.glob("_C.*")):
        where = f"in {here.parent}, the source tree, which Python takes here instead of an installed sam_fused,"
    raise ImportError(
        f"sam_fused's extension could not be imported: {_import_error}. Build it {where} with: {BUILD_COMMAND}"
    ) from _import_error


_Place = tuple[torch.device, Hashable]


def _place(p: Tensor) -> _Place:
    """What the tensors of one operator call share: the device, and the placement on a mesh."""
    return p.device, placement(p)


class _Lists:
    """Parameters that go into one operator call, in runs of one group each, and what goes with them.

    All have one ``place``. The operators see :meth:`local_params`; backups and state are held as this process's parts.
    """

    def __init__(self, place: _Place, update: Update | None) -> None:
        self.device, self.placement = place
        self.update = update
        self.params: list[Tensor] = []
        self.positions: list[int] = []
        self.runs: list[tuple[dict[str, Any], bool]] = []  # (group, whether its state was made for the coming step)
        self.sizes: list[int] = []
        self.backups: list[Tensor | None] = []
        self.state: list[Tensor] = []
        self.steps: list[Tensor] = []
        self._packed: tuple[Any, Tensor] | None = None

    def append(self, position: int, p: Tensor, group: dict[str, Any], fresh: bool = False) -> None:
        self.params.append(p)
        self.positions.append(position)
        if not self.runs or self.runs[-1][0] is not group or self.runs[-1][1] != fresh:
            self.runs.append((group, fresh))
            self.sizes.append(0)
        self.sizes[-1] += 1

    def pick(self, grads: list[Tensor]) -> list[Tensor]:
        mine = grads if len(grads) == len(self.positions) else [grads[i] for i in self.positions]
        if self.placement is None:
            return mine
        return [local_like(g, p) for g, p in zip(mine, self.params, strict=True)]

    def local_params(self) -> list[Tensor]:
        """What this process holds of the parameters; it may lie elsewhere in each step."""
        return self.params if self.placement is None else [local(p) for p in self.params]

    def mark_changed(self) -> None:
        """Count up the versions of DTensors; the operators do so for the tensors that they see."""
        if self.placement is not None:
            torch.autograd.graph.increment_version(self.params)

    def pack(self, row: Callable[[dict[str, Any], bool], tuple[float, ...]]) -> Tensor:
        """One row of float64 values for each run."""
        rows = [row(*run) for run in self.runs]
        if self._packed is None or self._packed[0] != rows:
            self._packed = (rows, torch.tensor(rows, dtype=torch.float64, device="cpu"))
        return self._packed[1]

    def lr(self) -> Tensor | None:
        """The learning rate of each run, float64 on the parameters' device, if that is where they are kept."""
        lrs = [group["lr"] for group, _ in self.runs]
        kept = [isinstance(lr, Tensor) and (lr.device == self.device or not lr.is_cpu) for lr in lrs]
        if not any(kept):
            return None
        options = {"dtype": torch.float64, "device": self.device}
        return torch.stack(
            [
                lr.to(**options).reshape(()) if k else torch.full((), float(lr), **options)
                for lr, k in zip(lrs, kept, strict=True)
            ]
        )


class _Plan:
    """The lists of a step, for one choice of parameters that have a gradient."""

    def __init__(self, active: list[tuple[dict[str, Any], Tensor]], updates: list[Update | None]) -> None:
        self.active = active
        self.updates = updates  # of each active parameter
        self.ascent: list[_Lists] = []
        self.descent: list[_Lists] | None = None
        self.states = 0  # entries of the optimizer's state when `descent` was made
        self.leftover: tuple[list[Tensor], list[Tensor]] = ([], [])  # perturbed, and now without a gradient
        self.matched: Any = None  # the perturbed lists that `descent` and `leftover` know of


def _ascent_row(group: dict[str, Any], fresh: bool) -> tuple[float, ...]:
    return float(group["rho"]), float(group["eta"]), float(group["adaptive"])


def _lists_for(lists: dict[Hashable, _Lists], p: Tensor, update: Update | None = None) -> _Lists:
    place = _place(p)
    key = place, update
    if key not in lists:
        lists[key] = _Lists(place, update)
    return lists[key]


def _dense_strides(p: Tensor) -> tuple[int, ...]:
    """The strides that the extension wants beside ``p``: its own, unless it has gaps."""
    return torch.empty_like(p, device="meta").stride()


def _laid_out_like(t: Tensor | None, p: Tensor) -> bool:
    """Whether the extension can use ``t`` as it is beside ``p``: same dtype, device, shape and dense strides."""
    if t is None:
        return False
    t, p = local(t), local(p)
    return t.dtype == p.dtype and t.device == p.device and t.shape == p.shape and t.stride() == _dense_strides(p)


def _pooled(params: list[Tensor], stream: int) -> list[Tensor]:
    """Zeros in the dtype, device and dense layout of each parameter (of what this process holds of it).

    They are views of one storage for each dtype and device.

    An operator call then walks through one run of memory: with a thousand small tensors, the misses of a thousand
    scattered ones cost more than the arithmetic. ``stream`` is a small number that differs among the pools that one
    call walks through together. It shifts their beginnings by 1 KiB: at equal offsets within a page they would push
    each other out of the cache (24 x 4 M, Adam's update with one thread: 90 ms against 60).
    """
    sizes: dict[Hashable, int] = defaultdict(int)
    offsets = []
    params = [local(p) for p in params]
    for p in params:
        key = (p.dtype, p.device)
        line = (64 if p.nbytes >= 4096 else 16) // p.itemsize  # a cache line, or what non-temporal stores need
        start = sizes[key] if key in sizes else 1024 * stream // p.itemsize
        offsets.append(-(-start // line) * line)
        sizes[key] = offsets[-1] + p.numel()
    pools = {(dtype, device): torch.zeros(n, dtype=dtype, device=device) for (dtype, device), n in sizes.items()}
    return [
        pools[p.dtype, p.device].as_strided(p.shape, _dense_strides(p), offset)
        for p, offset in zip(params, offsets, strict=True)
    ]


class FusedSAM(SAM):
    r"""Sharpness-Aware Minimization around a base optimizer, fused over all parameter tensors.

    Implements Algorithm 1 and Proposition 1 of "Study on Loss Landscape Geometry for Improving Generalization in
    Adaptive Optimization Methods" (Khalid, Ponraj, Mukherjee), which puts the SAM of Foret et al.
    (https://arxiv.org/abs/2010.01412) around any base, and the ASAM of Kwon et al.
    (https://arxiv.org/abs/2102.11600):

    .. math::
        \epsilon_i = \rho_i\, T^2 g_i / (\|T g\|_2 + 10^{-12}), \qquad
        w \leftarrow \mathrm{base}(w, \nabla L(w + \epsilon))

    with T = 1, or T = abs(w) + eta if ``adaptive``. The norm is taken over all groups whose rho > 0; a group with
    rho = 0 is neither perturbed nor counted. Weight decay is no part of the ascent gradient.

    Args:
        params: parameters, named parameters or parameter groups, as for any ``torch.optim`` optimizer. Groups may have
            their own ``rho``, ``adaptive`` and ``eta``. Float32, float64, bfloat16 or float16 tensors of any shape and
            strides, mixed at will; arithmetic is in float32 (float64 for float64) and norms are summed in float64.
            DTensors (FSDP2) may be sharded or replicated: the norm is summed over their mesh.
        base: an optimizer class. SGD, Adam and AdamW of ``torch.optim`` have native updates, fused with the restoring
            of the weights; any other class works by its own ``step()``.
        rho: radius of the neighbourhood, >= 0, in the units of the weights (for ASAM, relative to them).
        adaptive: ASAM, T = abs(w) + eta, element by element.
        eta: ASAM's offset, >= 0.
        model: the module whose BatchNorm running statistics are to move in the first pass only. If it is a
            DistributedDataParallel, :meth:`step` with a closure makes the first pass under its ``no_sync``: each
            process perturbs by its own gradient (m-sharpness).
        scaler: the ``torch.amp.GradScaler`` that scales the losses, if there is one: the sharpness is then reported
            unscaled, and an overflow in the first pass makes it back off too.
        sync_perturbation: average the first pass over the processes too: SAM on the whole batch.
        base_kwargs: the base's own options, ``lr`` and the like.

    Raises:
        ImportError: if the extension is not built.
        TypeError, ValueError: on arguments that are not as described, and for a base with an option called rho,
            adaptive or eta (Adadelta).

    Example::

        opt = FusedSAM(model.parameters(), torch.optim.Adam, lr=1e-3, rho=0.05, model=model)

        def closure():
            opt.zero_grad()
            loss = loss_fn(model(x), y)
            loss.backward()
            return loss

        loss = opt.step(closure)
    """

    def _prepare(self) -> None:
        extension()
        self._plans: dict[Hashable, _Plan] = {}
        self._planned_for: Any = None
        self._backups: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    # ---- the cached lists ----

    def _gather(self) -> tuple[_Plan, list[Tensor]]:
        """The present gradients, and the lists that fit them."""
        groups = self.param_groups
        if self._planned_for is not self.state:  # a checkpoint was loaded
            self._plans.clear()
            self._planned_for = self.state
        grads, layout = _C.gather([group["params"] for group in groups])
        updates = tuple(native_update(self.base_optimizer, group) for group in groups)
        key = (layout, updates, tuple(group["rho"] > 0 for group in groups))
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) >= 8:
                self._plans.clear()
            plan = self._plans[key] = self._make_plan(updates)
        return plan, grads

    def _make_plan(self, updates: tuple[Update | None, ...]) -> _Plan:
        pairs = list(zip(self.param_groups, updates, strict=True))
        active = [(group, p, update) for group, update in pairs for p in group["params"] if p.grad is not None]
        plan = _Plan([(group, p) for group, p, _ in active], [update for *_, update in active])
        lists: dict[Hashable, _Lists] = {}
        for position, (group, p) in enumerate(plan.active):
            if group["rho"] > 0:
                _lists_for(lists, p).append(position, p, group)
        plan.ascent = list(lists.values())
        return plan

    def _make_descent(self, plan: _Plan) -> list[_Lists]:
        """The lists of the update, with the base's state made or moved to the parameters' layout where need be."""
        fresh = self._make_state(plan)
        lists: dict[Hashable, _Lists] = {}
        for position, ((group, p), update) in enumerate(zip(plan.active, plan.updates, strict=True)):
            to = _lists_for(lists, p, update)
            to.append(position, p, group, id(p) in fresh)
            if update.counts_steps:
                to.steps.append(self.state[p]["step"])
        for to in lists.values():
            to.state = [local(self.state[p][key]) for key in to.update.state for p in to.params]
        return list(lists.values())

    def _make_state(self, plan: _Plan) -> set[int]:
        """Make what is missing of the base's state; returns the ids of the parameters that had none."""
        wanted: dict[str, list[Tensor]] = defaultdict(list)
        uncounted: list[Tensor] = []
        for (_, p), update in zip(plan.active, plan.updates, strict=True):
            state = self.state[p] if update.state else {}
            for key in update.state:
                if not _laid_out_like(state.get(key), p) or placement(state[key]) != placement(p):
                    wanted[key].append(p)
            step = state.get("step")
            if update.counts_steps and not (
                isinstance(step, Tensor) and step.dtype == torch.float32 and step.device == p.device
            ):
                uncounted.append(p)
        if (wanted or uncounted) and _capturing():
            raise RuntimeError("the base's state cannot be made in a CUDA graph: run a step before capturing one")
        fresh, replaced = set(), False
        for stream, (key, params) in enumerate(sorted(wanted.items()), start=2):
            for p, new in zip(params, _pooled(params, stream), strict=True):
                old, new = self.state[p].get(key), placed_like(new, p)
                if old is None:
                    fresh.add(id(p))
                else:
                    new.copy_(old)
                    replaced = True
                self.state[p][key] = new
        # Steps are counted on the parameters' device, which alone knows whether an overflow skips the update.
        for device in {p.device for p in uncounted}:
            there = [p for p in uncounted if p.device == device]
            for p, new in zip(there, torch.zeros(len(there), device=device), strict=True):
                old = self.state[p].get("step")
                if old is not None:
                    new.fill_(old.reshape(()) if isinstance(old, Tensor) else old)
                    replaced = True
                self.state[p]["step"] = new
        if replaced:  # other plans hold the old tensors
            for other in self._plans.values():
                other.descent = None
        return fresh

    def _match(self, plan: _Plan) -> None:
        """Give each parameter of the update its backup, and find the perturbed ones that have no gradient now."""
        perturbed = [pair for lists in self._backup or [] for pair in zip(lists.params, lists.backups, strict=True)]
        backup_of = {id(p): backup for p, backup in perturbed}
        for lists in plan.descent:
            lists.backups = [backup_of.pop(id(p), None) for p in lists.params]
        left = [(p, backup) for p, backup in perturbed if id(p) in backup_of]
        plan.leftover = ([p for p, _ in left], [backup for _, backup in left])
        plan.matched = self._backup

    def _backups_of(self, params: list[Tensor]) -> list[Tensor]:
        """Buffers to save ``params`` in, kept from step to step."""
        missing = [p for p in params if not _laid_out_like(self._backups.get(p), p)]
        for p, new in zip(missing, _pooled(missing, stream=1), strict=True):
            self._backups[p] = new
        return [self._backups[p] for p in params]

    # ---- the arithmetic; torch.compile leaves it as it is, as it does torch.optim's own loading and adding ----

    @torch._disable_dynamo
    def _ascend(self, perturb: bool) -> None:
        plan, grads = self._gather()
        calls = [(lists, lists.pick(grads), lists.pack(_ascent_row)) for lists in plan.ascent]
        squares = [
            sum_over_shards(_C.grad_sq_norm(lists.local_params(), g, ascent, lists.sizes), lists.placement)
            for lists, g, ascent in calls
        ]
        if len(calls) == 1:
            sq_norms, ascents = squares[0], calls[0][2]
        else:
            sq_norms = torch.cat([self._total.new_empty(0), *(sq.to(self._total.device) for sq in squares)])
            none = torch.empty(0, 3, dtype=torch.float64, device="cpu")
            ascents = torch.cat([none, *(ascent for *_, ascent in calls)])
        self._total = self._total.to(sq_norms.device)
        self._measured = _C.sharpness_(sq_norms, ascents, self._total, self._ascent_grad_scale())
        if not perturb:
            return
        self._backup = []
        for lists, g, ascent in calls:
            if not lists.backups:
                lists.backups = self._backups_of(lists.params)
            norm = self._measured[2].to(lists.device)
            _C.perturb_(lists.local_params(), g, lists.backups, norm, ascent, lists.sizes)
            lists.mark_changed()
            self._backup.append(lists)
        self._backup = plan.ascent  # the same lists; one object a plan, for _match

    @torch._disable_dynamo
    def _restore(self) -> None:
        for lists in self._backup:
            _C.restore_(lists.local_params(), lists.backups)
            lists.mark_changed()

    @torch._disable_dynamo
    def _descend(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        plan, grads = self._gather()
        if None in plan.updates:
            if self.perturbed:
                self._restore()
            self._base_step(grad_scale, found_inf)
            return
        if _capturing():
            for i, group in enumerate(self.param_groups):
                if group.get("capturable") is False:
                    raise RuntimeError(
                        f"param_groups[{i}]: a CUDA graph is capturing this step, for which the optimizer must be "
                        "constructed with capturable=True"
                    )
        if plan.descent is None or plan.states != len(self.state):
            plan.descent = self._make_descent(plan)
            plan.states = len(self.state)
            self._match(plan)
        elif plan.matched is not self._backup:
            self._match(plan)
        if plan.leftover[0]:
            _restore_by_device(*plan.leftover)
        for lists in plan.descent:
            hyper = lists.pack(lists.update.hyper)
            _C.restore_step_(
                lists.update.name,
                lists.local_params(),
                lists.pick(grads),
                lists.backups,
                lists.state,
                lists.steps,
                hyper,
                lists.sizes,
                lists.lr(),
                None if grad_scale is None else grad_scale.to(lists.device),
                None if found_inf is None else found_inf.to(lists.device),
            )
            lists.mark_changed()
        if any(fresh for lists in plan.descent for _, fresh in lists.runs):
            plan.descent = None


def _capturing() -> bool:
    """Whether a CUDA graph is being captured."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _restore_by_device(params: list[Tensor], backups: list[Tensor]) -> None:
    pairs = [(local(p), b) for p, b in zip(params, backups, strict=True)]
    for device in {p.device for p, _ in pairs}:
        _C.restore_(*map(list, zip(*(pair for pair in pairs if pair[0].device == device), strict=True)))
