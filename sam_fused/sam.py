"""SAM's two passes around a base optimizer: the protocol, which holds an arithmetic."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from . import amp
from .arithmetic import GRAD_NORM, NORM, SHARPNESS, Arithmetic
from .batchnorm import FrozenStatistics
from .distributed import any_replica, unsynchronized
from .fused import Fused
from .geometry import check_options
from .parameters import check_group, check_memory
from .reference import Reference

_OPTIONS = ("rho", "adaptive", "eta")


class SAM(Optimizer):
    """What :class:`FusedSAM` and :class:`ReferenceSAM` share; see :class:`FusedSAM` for the arguments."""

    #: A subclass's.
    arithmetic: type[Arithmetic]

    #: torch.amp.GradScaler.step then leaves unscaling and skipping to step(), in grad_scale and found_inf.
    _step_supports_amp_scaling = True

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
        **base_kwargs: Any,
    ) -> None:
        if not (isinstance(base, type) and issubclass(base, Optimizer)):
            raise TypeError(f"base: expected a class of torch.optim.Optimizer, such as torch.optim.Adam, got {base!r}")
        closure = inspect.signature(base.step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise TypeError(f"base: {base.__name__}.step needs a closure of its own and cannot be a base of SAM")
        if scaler is not None and not isinstance(scaler, torch.amp.GradScaler):
            raise TypeError(f"scaler: expected a torch.amp.GradScaler, got {type(scaler).__name__}")
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        options = {"rho": rho, "adaptive": adaptive, "eta": eta}
        check_options(options)
        self.model = model
        self.scaler = scaler
        self.sync_perturbation = sync_perturbation
        self.base_optimizer = _make_base(base, params, base_kwargs)
        groups, state, defaults = (getattr(self.base_optimizer, name) for name in ("param_groups", "state", "defaults"))
        check_memory(groups)
        defaults.update(options)
        # Optimizer.__init__ empties the groups and the state, and adds the groups again.
        super().__init__(groups, defaults)
        self.state = state
        self._set_up()
        self._measured = torch.full((3,), math.nan, dtype=torch.float64, device=self._device())
        self._total = torch.zeros(2, dtype=torch.float64, device=self._device())
        self._without_sam_is_meant = False  # an ascent or a measurement was made, or the warning was given

    def _set_up(self) -> None:
        """What a copy makes anew."""
        self._arithmetic = self.arithmetic(self.base_optimizer)
        self._statistics = FrozenStatistics()
        self.base_optimizer.register_load_state_dict_pre_hook(_keep_options)

    # ---- one list of parameter groups, one state and one set of defaults, the base's ----

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.base_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base_optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        return self.base_optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.base_optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        return self.base_optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.base_optimizer.defaults = defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As :meth:`torch.optim.Optimizer.add_param_group`; the group may have its own rho, adaptive and eta."""
        if isinstance(param_group, dict):
            check_options(param_group)
        self.base_optimizer.add_param_group(param_group)
        try:
            check_group(self.param_groups, len(self.param_groups) - 1)
            if "_statistics" in self.__dict__:  # __init__ has checked it for all groups together
                check_memory(self.param_groups)
        except BaseException:
            self.param_groups.pop()
            raise

    # ---- steps ----

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimization step.

        Args:
            closure: zeroes the gradients, runs forward and backward and returns the loss. It is called twice, at the
                weights and at the perturbed weights; the first loss is returned. After :meth:`first_step` it is called
                once, for the second pass. If a call raises, the weights are what they were, bit for bit, and the
                exception goes on.

        Without a closure: restores the weights if :meth:`first_step` has perturbed them, then updates them by the base
        optimizer with the present gradients. Without ``first_step`` before it, this is the base optimizer's own step;
        it warns once if there was no ascent yet and a rho is not 0.

        With a GradScaler, call ``scaler.step(opt)`` in its place. With a closure and ``scaler=`` given, call this: it
        does so itself after the second call of the closure, which scales its loss. ``scaler.update()`` is yours.
        """
        if closure is None:
            # torch.distributed.checkpoint makes the state by a step with lr 0, which trains nothing
            if not self._without_sam_is_meant and any(g["rho"] > 0 and g.get("lr") != 0 for g in self.param_groups):
                warnings.warn(
                    "step() was called without a closure and without first_step() before it: this is the step of "
                    f"{type(self.base_optimizer).__name__}, without SAM. If it is meant, set rho=0 or call "
                    "measure_sharpness() before it",
                    stacklevel=4,  # above the two wrappers that torch puts around step
                )
                self._without_sam_is_meant = True
            self._descend()
            return None
        if amp.through_scaler(self):
            self.restore()
            raise RuntimeError(
                "a closure came through GradScaler.step, which looks for overflows before it is called; "
                "construct with scaler=... and call step(closure) itself"
            )
        second_only = self.perturbed
        if not second_only:
            with torch.enable_grad(), nullcontext() if self.sync_perturbation else unsynchronized(self.model):
                loss = closure()
        try:
            if not second_only:
                self.first_step()
            with torch.enable_grad():
                second_loss = closure()
            if self.scaler is None:
                self._descend()
            else:
                self.scaler.step(self)
        except BaseException:
            self.restore()
            raise
        return second_loss if second_only else loss

    # torch.compile leaves these three as they are, as it does torch.optim's own loading and adding of groups. Where the
    # weights move, autocast is to forget its casts of them: its outermost context may lie around both passes.

    @_disable_dynamo
    def _ascend(self, perturb: bool) -> None:
        device = self._device()
        if self._total.device != device:  # the parameters have moved, or had no memory when it was made
            self._total = (
                torch.zeros_like(self._total, device=device) if self._total.is_meta else self._total.to(device)
            )
        scale = amp.ascent_scale(self.scaler, self, device)
        measured = self._arithmetic.measure(self._total, scale)
        self._measured = measured[0]
        self._without_sam_is_meant = True
        if perturb:
            self._arithmetic.perturb(measured)
            torch.clear_autocast_cache()
            if self.model is not None:
                self._statistics.freeze(self.model)

    @_disable_dynamo
    def _descend(self) -> None:
        """The second half of a step."""
        grad_scale, found_inf = amp.given(self, self._device())
        if found_inf is not None and self.perturbed:  # an overflow in the first pass counts too
            overflow = any_replica((~self._measured[NORM].isfinite()).to(found_inf), self.model)
            found_inf = found_inf + overflow
            if self.scaler is not None:
                amp.report_overflow(self.scaler, self, overflow)
        self._arithmetic.update(grad_scale, found_inf)
        torch.clear_autocast_cache()
        self._statistics.thaw()
        # what a scheduler that was given the base asks for
        self.base_optimizer._opt_called = True  # type: ignore[attr-defined]

    @_disable_dynamo
    def _restore(self) -> None:
        self._arithmetic.restore()
        torch.clear_autocast_cache()
        self._statistics.thaw()
        amp.forget(self)

    def _device(self) -> torch.device:
        """Of the first parameter: where the sharpness is."""
        params = (p for group in self.param_groups for p in group["params"])
        return next((p.device for p in params), torch.device("cpu"))

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """Ascend: measure the sharpness from the present gradients and move the weights to w + eps.

        From here to :meth:`second_step` (or :meth:`step`, :meth:`restore`) :attr:`perturbed` is True and the BatchNorm
        statistics of ``model`` are frozen.

        Args:
            zero_grad: then zero the gradients.

        Raises:
            RuntimeError: if the weights are perturbed already.
        """
        self._check_not_borrowed("first_step()")
        self._check_not_perturbed("first_step()")
        try:
            self._ascend(perturb=True)
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

    @torch.no_grad()
    def measure_sharpness(self) -> None:
        """Measure :attr:`grad_norm` and :attr:`sharpness` from the present gradients, and perturb nothing.

        Raises:
            RuntimeError: if the weights are perturbed: their gradients do not belong to w.
        """
        self._check_not_borrowed("measure_sharpness()")
        self._check_not_perturbed("measure_sharpness()")
        self._ascend(perturb=False)

    @torch.no_grad()
    def restore(self) -> None:
        """Give the weights back as they were before :meth:`first_step`, bit for bit; nothing to do if not perturbed."""
        self._check_not_borrowed("restore()")
        self._restore()

    @property
    def perturbed(self) -> bool:
        """Whether the weights are at w + eps, or anything else that :meth:`restore` gives back is not back yet."""
        return self._arithmetic.record is not None or bool(self._statistics.modules)

    def _check_not_perturbed(self, what: str) -> None:
        if self.perturbed:
            raise RuntimeError(
                f"{what} was called while the weights are perturbed; call second_step() to finish the step or "
                "restore() to drop it"
            )

    def _check_not_borrowed(self, what: str) -> None:
        if "base_optimizer" not in self.__dict__:  # a subclass made around us, which looks up in us what it lacks
            raise RuntimeError(
                f"{what} was called on {type(self).__name__}, a wrapper that would keep what it sets to itself; "
                "call it on the optimizer inside, with Lightning opt.optimizer"
            )

    # ---- measurements ----

    @property
    def sharpness(self) -> Tensor:
        """First-order sharpness of the last ascent, sum_i rho_i ||T g_i||^2 / ||T g||: rho ||g|| (Proposition 1).

        Float64, 0-dim, on the parameters' device; NaN before the first measurement. Reading it copies nothing to the
        host.
        """
        return self._measured[SHARPNESS]

    @property
    def grad_norm(self) -> Tensor:
        """||T g|| of the last ascent, as :attr:`sharpness`."""
        return self._measured[GRAD_NORM]

    def mean_sharpness(self, reset: bool = True) -> Tensor:
        """Mean sharpness since the last reset, over the steps where it was finite: Algorithm 1's value of an epoch.

        The paper divides by the index of the last batch; this divides by the number of batches.

        Args:
            reset: start anew.

        Returns:
            Float64, 0-dim, on the parameters' device; NaN if nothing was measured.
        """
        mean = self._total[0] / self._total[1]
        if reset:
            self._total.zero_()  # in place: a CUDA graph may hold it
        return mean

    # ---- saving and copying ----

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state and groups, with rho, adaptive and eta in each group; never the backup.

        Raises:
            RuntimeError: if the weights are perturbed.
        """
        self._check_not_perturbed("state_dict()")
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this class or of the plain base optimizer, which leaves rho, adaptive and eta alone.

        Raises:
            RuntimeError: if the weights are perturbed.
        """
        self._check_not_perturbed("load_state_dict()")
        super().load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        self._check_not_perturbed("copying or pickling")
        options = ("model", "scaler", "sync_perturbation")
        names = ("base_optimizer", *options, "_measured", "_total", "_without_sam_is_meant")
        return {name: self.__dict__[name] for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "base_optimizer" in state:  # unpickled, or a deep copy
            super().__setstate__(state)
            self._set_up()
        else:  # from Optimizer.load_state_dict; the base fills in what older checkpoints lack
            self.base_optimizer.__setstate__(_keep_options(self, state))


def _keep_options(opt: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint of the plain base, with the SAM options that ``opt`` has now."""
    options = [{name: group[name] for name in _OPTIONS} for group in opt.param_groups]
    groups = state_dict["param_groups"]
    if len(groups) != len(options):
        return state_dict  # which torch refuses with its own message
    return {**state_dict, "param_groups": [{**kept, **group} for kept, group in zip(options, groups, strict=True)]}


def _make_base(base: type[Optimizer], params: Iterable[Any], kwargs: dict[str, Any]) -> Optimizer:
    try:
        made = base(params, **kwargs)
    except (TypeError, ValueError):  # which say what is wrong with an argument
        raise
    except Exception as error:
        raise RuntimeError(
            f"base: {base.__name__} could not be constructed: {type(error).__name__}: {error}"
        ) from error
    clash = [name for name in _OPTIONS if name in made.defaults]
    if clash:
        raise ValueError(
            f"base: {base.__name__} has an option {clash[0]!r} of its own, which cannot be told from SAM's; "
            "this base is not supported"
        )
    return made


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

    arithmetic = Fused


class ReferenceSAM(SAM):
    """What :class:`FusedSAM` computes, with the same arguments, in plain PyTorch: slow, and meant to be read."""

    arithmetic = Reference
