"""SAM's two passes around a base optimizer: the protocol, which holds an arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from . import amp
from .arithmetic import GRAD_NORM, NORM, SHARPNESS, Readings
from .around import Around
from .batchnorm import FrozenStatistics
from .distributed import any_replica, unsynchronized
from .fused import Fused
from .geometry import radii
from .groups import only_ascending
from .parameters import trains
from .reference import Reference
from .warn import warn
from .watch import ADDED, Watch


class SAM(Around):
    """What :class:`FusedSAM` and :class:`ReferenceSAM` share; see :class:`FusedSAM` for the arguments."""

    way_back = "call second_step() to finish the step or restore() to drop it"
    kept = (*Around.kept, "scaler", "sync_perturbation", "lean_ascent", "_readings", "_warned_or_ascended")

    def __init__(
        self,
        params: Iterable[Any],
        base: type[Optimizer] = torch.optim.Adam,
        *,
        rho: float = 0.05,
        adaptive: bool = False,
        eta: float = 0.0,
        model: nn.Module | None = None,
        scaler: torch.amp.GradScaler | None = None,
        sync_perturbation: bool = False,
        lean_ascent: bool = False,
        **base_kwargs: Any,
    ) -> None:
        if lean_ascent and sync_perturbation:
            raise ValueError("lean_ascent: expected False with sync_perturbation=True, which averages every gradient")
        if scaler is not None and not isinstance(scaler, torch.amp.GradScaler):
            raise TypeError(f"scaler: expected a torch.amp.GradScaler, got {type(scaler).__name__}")
        self.scaler = scaler
        self.sync_perturbation = sync_perturbation
        self.lean_ascent = lean_ascent
        options = {"rho": rho, "adaptive": adaptive, "eta": eta}
        super().__init__(params, base, options, model, base_kwargs)
        self._readings = _no_readings(self._device())
        self._warned_or_ascended = False  # or has measured, which shows too that a step without SAM is meant

    def _set_up(self) -> None:
        super()._set_up()
        self._statistics = FrozenStatistics()
        self._watch: Watch | None = None

    # ---- steps ----

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimization step.

        Args:
            closure: zeroes the gradients, runs forward and backward and returns the loss. It is called twice, at the
                weights and at the perturbed weights; the first loss is returned. It is called once after
                :meth:`first_step`, for the second pass, and where every rho is 0, for the base's own step. If a call
                raises, the weights are what they were, bit for bit, and the exception goes on.

        Without a closure: restores the weights if :meth:`first_step` has perturbed them, then updates them by the base
        optimizer with the present gradients. Without ``first_step`` before it, this is the base optimizer's own step;
        it warns once if there was no ascent yet and a rho is not 0.

        With a GradScaler, call ``scaler.step(opt)`` in its place. With a closure and ``scaler=`` given, call this: it
        does so itself after the second call of the closure, which scales its loss. ``scaler.update()`` is yours.

        Raises:
            RuntimeError: for a sparse gradient; a closure that came through ``scaler.step``; gradients that ``scaler``
                has scaled, without ``scaler.step``; a DistributedDataParallel with a static graph; DTensors with
                ``lean_ascent``.
            ValueError: for a rho or eta that is no finite number >= 0; state of another shape than its parameter;
                parameters that share memory.
        """
        if closure is None:
            try:
                if not self._warned_or_ascended and any(g["rho"] > 0 and trains(g) for g in self.param_groups):
                    warn(
                        "step() was called without a closure and without first_step() before it: this is the step of "
                        f"{type(self.base_optimizer).__name__}, without SAM. If it is meant, set rho=0 or call "
                        "measure_sharpness() before it"
                    )
                    self._warned_or_ascended = True
                if self._end_watch():
                    warn(ADDED)
                self._descend()
            except BaseException:
                amp.forget(self)
                raise
            return None
        try:
            amp.check_no_closure(self, "construct with scaler=... and call step(closure) itself")
            one_pass = self.perturbed or not any(radii(self.param_groups))
            if not one_pass:
                alone = nullcontext() if self.sync_perturbation else unsynchronized(self.model)
                lean = only_ascending(self.param_groups) if self.lean_ascent else nullcontext()
                with torch.enable_grad(), alone, lean:
                    loss = closure()
                self.first_step()
            with torch.enable_grad():
                last_loss = closure()
            if self._end_watch():
                warn(ADDED)
            if self.scaler is None:
                self._descend()
            else:
                self.scaler.step(self)
        except BaseException:
            self.restore()
            raise
        return last_loss if one_pass else loss

    # torch.compile leaves these as they are, as it does torch.optim's own loading and adding of groups.

    @_disable_dynamo
    def _measure(self) -> Any:
        """Read norm and sharpness off the present gradients, which are returned as a direction."""
        device = self._device()
        held = self._readings.total
        if held.device != device:  # the parameters have moved, or had no memory when it was made
            moved = (t.to(device) for t in self._readings)
            self._readings = _no_readings(device) if held.is_meta else Readings(*moved)
        direction = self._arithmetic.gradients()
        scale = amp.scale_of_gradients(self.scaler, self, device)
        self._arithmetic.measure(direction, self._readings, scale)
        self._warned_or_ascended = True
        return direction

    @_disable_dynamo
    def _ascend(self) -> None:
        """The first half of a step."""
        direction = self._measure()
        self._arithmetic.perturb(direction, self._readings.values)
        amp.expect_another_pass(self.scaler, self)
        self._gather_again()
        self._moved()
        if self.model is not None:
            self._statistics.freeze(self.model)
        self._watch = Watch(self.param_groups)

    @_disable_dynamo
    def _end_watch(self) -> bool:
        """Whether the second pass has added its gradients to those of the first."""
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.end()
        return watch is not None and bool(watch.added)

    @_disable_dynamo
    def _descend(self) -> None:
        """The second half of a step."""
        amp.check_not_scaled(self.scaler, self)
        grad_scale, found_inf = amp.given(self, self._device())
        if found_inf is not None and self.perturbed:  # an overflow in the first pass counts too
            overflow = any_replica((~self._readings.values[NORM].isfinite()).to(found_inf), self.model)
            found_inf = found_inf + overflow
            if self.scaler is not None:
                amp.report_overflow(self.scaler, self, overflow)
        self._arithmetic.update(grad_scale, found_inf)
        self._moved()
        self._statistics.thaw()
        self._updated()

    @_disable_dynamo
    def _restore(self) -> None:
        super()._restore()
        self._statistics.thaw()
        self._end_watch()

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """Ascend: measure the sharpness from the present gradients and move the weights to w + eps.

        From here to :meth:`second_step` (or :meth:`step`, :meth:`restore`) :attr:`perturbed` is True and the BatchNorm
        statistics of ``model`` are frozen.

        Args:
            zero_grad: then zero the gradients.

        Raises:
            RuntimeError: if the weights are perturbed already; for a sparse gradient; where ``scaler`` has scaled
                nothing yet.
            ValueError: for a rho or eta that is no finite number >= 0, and parameters that share memory.
        """
        self._check_not_borrowed("first_step()")
        self._check_not_perturbed("first_step()")
        try:
            self._ascend()
            if zero_grad:
                self.zero_grad()
        except BaseException:
            self.restore()
            raise

    def second_step(self, zero_grad: bool = False) -> None:
        """:meth:`step` without a closure.

        Args:
            zero_grad: then zero the gradients.
        """
        self.step()
        if zero_grad:
            self.zero_grad()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As :meth:`torch.optim.Optimizer.zero_grad`."""
        super().zero_grad(set_to_none)
        self._end_watch()  # on a GPU zeros may be written without being counted

    @torch.no_grad()
    def measure_sharpness(self) -> None:
        """Measure :attr:`grad_norm` and :attr:`sharpness` from the present gradients, and perturb nothing.

        Raises:
            RuntimeError, ValueError: as :meth:`first_step`; gradients of perturbed weights do not belong to w.
        """
        self._check_not_borrowed("measure_sharpness()")
        self._check_not_perturbed("measure_sharpness()")
        self._measure()

    @property
    def perturbed(self) -> bool:
        """Whether the weights are at w + eps, or anything else that :meth:`restore` gives back is not back yet."""
        return super().perturbed or bool(self._statistics.modules)

    # ---- measurements ----

    @property
    def sharpness(self) -> Tensor:
        """First-order sharpness of the last ascent, sum_i rho_i ||T g_i||^2 / ||T g||: rho ||g|| (Proposition 1).

        Float64, 0-dim, on the parameters' device; NaN before the first measurement. Reading it copies nothing to the
        host.
        """
        return self._readings.values[SHARPNESS].clone()

    @property
    def grad_norm(self) -> Tensor:
        """||T g|| of the last ascent, as :attr:`sharpness`."""
        return self._readings.values[GRAD_NORM].clone()

    def mean_sharpness(self, reset: bool = True) -> Tensor:
        """Mean sharpness since the last reset, over the steps where it was finite: Algorithm 1's value of an epoch.

        The paper divides by the index of the last batch; this divides by the number of batches.

        Args:
            reset: start anew.

        Returns:
            Float64, 0-dim, on the parameters' device; NaN if nothing was measured.
        """
        total = self._readings.total
        mean = total[0] / total[1]
        if reset:
            total.zero_()
        return mean


def _no_readings(device: torch.device) -> Readings:
    """Written in place from now on: a CUDA graph may hold them."""
    with torch.inference_mode(False):  # or they could be written there alone
        values = torch.full((3,), math.nan, dtype=torch.float64, device=device)
        return Readings(values, torch.zeros(2, dtype=torch.float64, device=device))


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
            strides, mixed at will; arithmetic is in float32 (float64 for float64), and norms are summed in float64 (on
            a GPU, from float32 sums of 16 bytes each).
            DTensors (FSDP2) may be sharded or replicated: the norm is summed over their mesh.
        base: an optimizer class. Those of ``sam_fused.bases.NATIVE`` have native updates, fused with the restoring of
            the weights; any other class works by its own ``step()``.
        rho: radius of the neighbourhood, >= 0, in the units of the weights (for ASAM, relative to them).
        adaptive: ASAM, T = abs(w) + eta, element by element.
        eta: ASAM's offset, >= 0.
        model: the module whose BatchNorm running statistics are to move in the first pass only. If it is a
            DistributedDataParallel, :meth:`step` with a closure makes the first pass under its ``no_sync``: each
            process perturbs by its own gradient (m-sharpness).
        scaler: the ``torch.amp.GradScaler`` that scales the losses, if there is one: the sharpness is then reported
            unscaled, and an overflow in the first pass makes it back off too.
        sync_perturbation: average the first pass over the processes too: SAM on the whole batch.
        lean_ascent: in :meth:`step` with a closure, the first pass takes no gradients of groups with rho 0. With
            :func:`norm_only` it then costs about 0.7 of a whole pass.
        base_kwargs: the base's own options, ``lr`` and the like.

    Raises:
        ImportError: if the extension is not built.
        TypeError, ValueError: on arguments that are not as described, and for a base with an option called rho,
            adaptive or eta (Adadelta).
        RuntimeError: where the base's own constructor fails otherwise.

    Example::

        opt = FusedSAM(model.parameters(), torch.optim.Adam, lr=1e-3, rho=0.05, model=model)

        def closure():
            opt.zero_grad()
            loss = loss_fn(model(x), y)
            loss.backward()
            return loss

        loss = opt.step(closure)
    """

    arithmetic = Fused


class ReferenceSAM(SAM):
    """What :class:`FusedSAM` computes, with the same arguments, in plain PyTorch: slow, and meant to be read."""

    arithmetic = Reference
