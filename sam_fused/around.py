"""What every protocol around a base optimizer has in common: the groups, the state, saving and copying."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from . import amp
from .arithmetic import Arithmetic
from .distributed import fsdp_modules
from .geometry import check_options
from .parameters import check_group, check_memory

_OPTIONS = ("rho", "adaptive", "eta")
_KEPT = (*_OPTIONS, "initial_rho")  # which LambdaRho sets


class Around(Optimizer):
    """A base optimizer and an arithmetic, and one list of groups, one state and one set of defaults for all.

    Attributes:
        base_optimizer: the base; a scheduler may be given either.
        model: as given.
    """

    #: Set by the subclass.
    arithmetic: type[Arithmetic]
    #: How to get out of the perturbed weights, for errors.
    way_back: str
    #: What a copy keeps.
    kept: tuple[str, ...] = ("base_optimizer", "model")

    #: torch.amp.GradScaler.step then leaves unscaling and skipping to step(), in grad_scale and found_inf.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[Any],
        base: type[Optimizer],
        options: dict[str, Any],
        model: nn.Module | None,
        base_kwargs: dict[str, Any],
    ) -> None:
        if not (isinstance(base, type) and issubclass(base, Optimizer)):
            raise TypeError(f"base: expected a class of torch.optim.Optimizer, such as torch.optim.Adam, got {base!r}")
        closure = inspect.signature(base.step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise TypeError(f"base: {base.__name__}.step needs a closure of its own and cannot be a base of SAM")
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        check_options(options)
        self.model = model
        self.base_optimizer = _make_base(base, params, base_kwargs)
        groups, state, defaults = (getattr(self.base_optimizer, name) for name in ("param_groups", "state", "defaults"))
        defaults.update(options)
        # Optimizer.__init__ empties the groups and the state, and adds the groups again.
        super().__init__(groups, defaults)
        self.state = state
        self._check_groups()
        self._set_up()

    def _set_up(self) -> None:
        """Make what is not copied: called by ``__init__``, and after copying and unpickling."""
        self._arithmetic = self.arithmetic(self.base_optimizer)
        self._fsdp: tuple[nn.Module | None, list[Any]] = None, []  # a model, and the modules in it that FSDP2 manages
        self.base_optimizer.register_load_state_dict_pre_hook(_adapted)

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
            if "_arithmetic" in self.__dict__:  # __init__ adds all groups, and then checks them together
                self._check_groups()
        except BaseException:
            self.param_groups.pop()
            raise

    def _check_groups(self) -> None:
        """Raise an error if the groups do not fit together, or ask for what SAM cannot do."""
        check_memory(self.param_groups)
        for i, group in enumerate(self.param_groups):
            if group.get("differentiable"):
                raise ValueError(
                    f"param_groups[{i}]: differentiable=True is not supported; nothing is differentiated through the "
                    "perturbation"
                )

    # ---- where the weights are ----

    @property
    def perturbed(self) -> bool:
        """Whether the weights are perturbed: whether :meth:`restore` has something to do."""
        return self._arithmetic.record is not None

    @torch.no_grad()
    def restore(self) -> None:
        """Give the unperturbed weights back, bit for bit; nothing to do if they are there."""
        self._check_not_borrowed("restore()")
        self._restore()

    @_disable_dynamo
    def _restore(self) -> None:
        perturbed = self._arithmetic.record is not None
        self._arithmetic.restore()
        if perturbed:
            self._gather_again()
        self._moved()
        amp.forget(self)

    def _moved(self) -> None:
        """The weights are elsewhere than they were; autocast's outermost context may hold casts of them."""
        torch.clear_autocast_cache()

    def _gather_again(self) -> None:
        """What FSDP2 holds of the other processes' weights is not theirs any more."""
        if self._fsdp[0] is not self.model:
            self._fsdp = self.model, [] if self.model is None else fsdp_modules(self.model)
        for module in self._fsdp[1]:
            module.reshard()

    def _updated(self) -> None:
        """The base's update is done; a scheduler that was given the base asks for this."""
        self.base_optimizer._opt_called = True  # type: ignore[attr-defined]

    def _device(self) -> torch.device:
        """Of the first parameter."""
        params = (p for group in self.param_groups for p in group["params"])
        return next((p.device for p in params), torch.device("cpu"))

    def _check_not_perturbed(self, what: str) -> None:
        if self.perturbed:
            raise RuntimeError(f"{what} was called while the weights are perturbed; {self.way_back}")

    def _check_not_borrowed(self, what: str) -> None:
        if "base_optimizer" not in self.__dict__:  # a subclass made around us, which looks up in us what it lacks
            raise RuntimeError(
                f"{what} was called on {type(self).__name__}, a wrapper that would keep what it sets to itself; "
                "call it on the optimizer inside, with Lightning opt.optimizer"
            )

    # ---- saving and copying ----

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's own, with rho, adaptive and eta in each group; never the backup.

        Raises:
            RuntimeError: if the weights are perturbed.
        """
        self._check_not_perturbed("state_dict()")
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        held = self.base_optimizer.state_dict()  # which may have more in it than torch.optim's
        for after in self._optimizer_state_dict_post_hooks.values():
            held = _or(after(self, held), held)
        return held

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this class or of the plain base optimizer, which leaves rho, adaptive and eta alone.

        Raises:
            RuntimeError: if the weights are perturbed.
            ValueError: if it does not fit, or is of another library's SAM.
        """
        self._check_not_perturbed("load_state_dict()")
        state_dict = state_dict.copy()  # hooks may change it
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = _or(before(self, state_dict), state_dict)
        self.base_optimizer.load_state_dict(_adapted(self, state_dict))  # a base may load without calling its hooks
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def __getstate__(self) -> dict[str, Any]:
        self._check_not_perturbed("copying or pickling")
        return {name: self.__dict__[name] for name in self.kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._set_up()


def _or(changed: dict[str, Any] | None, held: dict[str, Any]) -> dict[str, Any]:
    """What a hook has made of ``held``; None where it leaves that alone."""
    return held if changed is None else changed


def _adapted(opt: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint of the plain base, with the SAM options that ``opt`` has now.

    Raises:
        ValueError: for a checkpoint of davda54/sam or pytorch_optimizer's SAM.
    """
    if any(isinstance(held, dict) and "old_p" in held for held in state_dict.get("state", {}).values()):
        raise ValueError(
            "state_dict: another library's SAM left its backups of the weights in it, 'old_p', and perhaps no state of "
            "the base; load the model's weights alone, or, if the base's state is there, delete 'old_p' everywhere"
        )
    options = [{name: group[name] for name in _KEPT if name in group} for group in opt.param_groups]
    groups = state_dict.get("param_groups", [])
    if len(groups) != len(options):
        return state_dict  # which the base's own hooks change, or torch refuses with its own message
    return {**state_dict, "param_groups": [{**kept, **group} for kept, group in zip(options, groups, strict=True)]}


def _make_base(base: type[Optimizer], params: Iterable[Any], kwargs: dict[str, Any]) -> Optimizer:
    try:
        made = base(params, **kwargs)
    except (TypeError, ValueError) as error:  # which say what is wrong with an argument
        if "base_optimizer" in kwargs:
            raise TypeError("base_optimizer: give the class as base, as in base=torch.optim.SGD") from error
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
    if getattr(made, "maximize", False) is True and "maximize" not in made.defaults:
        raise ValueError(
            f"base: {base.__name__} keeps maximize=True outside its parameter groups, where SAM cannot see it; "
            "minimise the negative instead"
        )
    return made
