"""SAM around a base optimizer: everything but the arithmetic, which a subclass brings."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .batchnorm import freeze_statistics, thaw_statistics
from .distributed import any_replica, check_placement, local, unsynchronized
from .geometry import check_options

_OPTIONS = ("rho", "adaptive", "eta")


class SAM(Optimizer):
    """Common part of :class:`FusedSAM` and :class:`ReferenceSAM`; see :class:`FusedSAM` for the arguments.

    A subclass has ``_ascend``, ``_restore`` and ``_descend``. While the weights are perturbed, ``_backup`` holds what
    ``_restore`` needs; otherwise it is None.
    """

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
        self._prepare()
        self._backup: Any = None
        self._frozen: list[nn.Module] = []
        self._ascended = False  # once, or warned that it has not
        self.model = model
        self.scaler = scaler
        self.sync_perturbation = sync_perturbation
        options = {"rho": rho, "adaptive": adaptive, "eta": eta}
        check_options(options)
        self.base_optimizer = base(params, **base_kwargs)
        clash = [name for name in _OPTIONS if name in self.base_optimizer.defaults]
        if clash:
            raise ValueError(
                f"base: {base.__name__} has an option {clash[0]!r} of its own, which cannot be told from SAM's; "
                "this base is not supported"
            )
        self.base_optimizer.register_load_state_dict_pre_hook(_keep_options)
        # Optimizer.__init__ empties param_groups and fills it again through add_param_group. Both attributes are the
        # base's own (see below), so there is one list and one state.
        super().__init__(self.base_optimizer.param_groups, {**self.base_optimizer.defaults, **options})
        device = self.param_groups[0]["params"][0].device if self.param_groups[0]["params"] else torch.device("cpu")
        self._measured = torch.full((3,), math.nan, dtype=torch.float64, device=device)
        self._total = torch.zeros(2, dtype=torch.float64, device=device)

    # ---- what a subclass brings ----

    def _prepare(self) -> None:
        """Set up the subclass; called before anything else, and again after unpickling."""

    def _ascend(self, perturb: bool) -> None:
        """Measure (``_measured``, ``_total``) and, if asked, perturb the weights.

        ``_measured`` is the gradient norm, the sharpness, and the norm of the gradients as they are, which a scaler may
        have multiplied.
        """
        raise NotImplementedError

    def _restore(self) -> None:
        """Copy the backup to the weights."""
        raise NotImplementedError

    def _descend(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Update by the base from the restored weights, with the present gradients over ``grad_scale``.

        Where ``found_inf`` is not 0, restore the weights and do no more.
        """
        raise NotImplementedError

    # ---- one parameter-group list and one state, the base's ----

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

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As :meth:`torch.optim.Optimizer.add_param_group`; the group may have its own rho, adaptive and eta."""
        if isinstance(param_group, dict):
            check_options(param_group)
        self.base_optimizer.add_param_group(param_group)
        try:
            _check_params(param_group["params"], len(self.param_groups) - 1)
        except Exception:
            self.param_groups.pop()
            raise
        for name in _OPTIONS:
            param_group.setdefault(name, self.defaults[name])

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
            if not self._ascended and any(g["rho"] > 0 and g.get("lr") != 0 for g in self.param_groups):
                warnings.warn(
                    "step() was called without a closure and without first_step() before it: this is the step of "
                    f"{type(self.base_optimizer).__name__}, without SAM. If it is meant, set rho=0 or call "
                    "measure_sharpness() before it",
                    stacklevel=4,  # above the two wrappers that torch puts around step
                )
                self._ascended = True
            self._finish()
            return None
        if hasattr(self, "found_inf"):
            self.restore()
            raise RuntimeError(
                "a closure came through GradScaler.step, which looks for overflows before it is called; "
                "construct with scaler=... and call step(closure) itself"
            )
        second_only = self.perturbed
        if not second_only:
            with torch.enable_grad(), nullcontext() if self.sync_perturbation else unsynchronized(self.model):
                loss = closure()
            self.first_step()
        try:
            with torch.enable_grad():
                second_loss = closure()
            if self.scaler is None:
                self._finish()
            else:
                self.scaler.step(self)
        except BaseException:
            self.restore()
            raise
        return second_loss if second_only else loss

    def _finish(self) -> None:
        """The second half of a step; a GradScaler has set grad_scale and found_inf on this object."""
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if found_inf is not None and self.perturbed:  # an overflow in the first pass counts too
            overflow = any_replica((~self._measured[2].isfinite()).to(found_inf), self.model)
            found_inf = found_inf + overflow
            if self.scaler is not None:
                for flag in self.scaler._found_inf_per_device(self).values():
                    flag.add_(overflow.to(flag.device))
        self._descend(grad_scale, found_inf)
        self._settle()
        self.base_optimizer._opt_called = True  # what a scheduler that was given the base asks for

    def _base_step(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """The base's own step. Whether to skip it is known on the device alone, so this has to wait for it."""
        if found_inf is not None and found_inf.item():
            return
        if grad_scale is not None:
            for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
                local(p.grad).div_(grad_scale.to(p.device))
        self.base_optimizer.step()

    def _ascent_grad_scale(self) -> Tensor | None:
        """What the scaler has multiplied the present gradients by: float32, one element, on the device."""
        if self.scaler is None or not self.scaler.is_enabled():
            return None
        if self.scaler._per_optimizer_states[id(self)]["stage"].name == "UNSCALED":
            raise RuntimeError(
                "scaler.unscale_(opt) was called before the ascent, which needs none: its direction does not depend on "
                "the scale. Call it between first_step() and scaler.step(opt)"
            )
        return self.scaler._get_scale_async().to(self._total.device)

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """Ascend: measure the sharpness from the present gradients and move the weights to w + eps.

        From here to :meth:`second_step` (or :meth:`step`, :meth:`restore`) :attr:`perturbed` is True and the BatchNorm
        statistics of ``model`` stand still.

        Args:
            zero_grad: then zero the gradients.

        Raises:
            RuntimeError: if the weights are perturbed already.
        """
        self._check_not_borrowed("first_step()")
        self._check_not_perturbed("first_step()")
        self._ascended = True
        try:
            self._ascend(perturb=True)
        except BaseException:
            self.restore()
            raise
        if self.model is not None:
            self._frozen = freeze_statistics(self.model)
        if zero_grad:
            self.zero_grad()

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
        self._ascended = True
        self._ascend(perturb=False)

    @torch.no_grad()
    def restore(self) -> None:
        """Give the weights back as they were before :meth:`first_step`, bit for bit; nothing to do if not perturbed."""
        self._check_not_borrowed("restore()")
        if self.perturbed:
            self._restore()
        self._settle()
        for name in ("grad_scale", "found_inf"):  # GradScaler.step leaves them behind where it raises
            self.__dict__.pop(name, None)

    @property
    def perturbed(self) -> bool:
        """Whether the weights are at w + eps."""
        return self._backup is not None

    def _settle(self) -> None:
        self._backup = None
        thaw_statistics(self._frozen)
        self._frozen = []

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
        return self._measured[1]

    @property
    def grad_norm(self) -> Tensor:
        """||T g|| of the last ascent, as :attr:`sharpness`."""
        return self._measured[0]

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
        options = ("model", "scaler", "sync_perturbation", "defaults")
        names = ("base_optimizer", *options, "_measured", "_total", "_ascended")
        return {name: self.__dict__[name] for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "base_optimizer" in state:  # unpickled, or a deep copy
            self._prepare()
            self._backup = None
            self._frozen = []
            super().__setstate__(state)
            self.base_optimizer.register_load_state_dict_pre_hook(_keep_options)
        else:  # from Optimizer.load_state_dict; the base fills in what older checkpoints lack
            self.base_optimizer.__setstate__(_keep_options(self, state))


def _keep_options(opt: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint of the plain base, with the SAM options that ``opt`` has now."""
    options = [{name: group[name] for name in _OPTIONS} for group in opt.param_groups]
    groups = state_dict["param_groups"]
    if len(groups) != len(options):
        return state_dict  # which torch refuses with its own message
    return {**state_dict, "param_groups": [{**kept, **group} for kept, group in zip(options, groups, strict=True)]}


def _check_params(params: list[Tensor], group: int) -> None:
    for i, p in enumerate(params):
        check_placement(p, f"param_groups[{group}]['params'][{i}]")
        if p.is_complex():
            raise ValueError(
                f"param_groups[{group}]['params'][{i}]: complex parameters are not supported; "
                "hold torch.view_as_real of it as the parameter"
            )
    if len(set(params)) != len(params):
        raise ValueError(f"param_groups[{group}]['params']: a parameter appears twice")
