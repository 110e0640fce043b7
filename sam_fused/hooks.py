"""Momentum-SAM's hooks on the model: whoever uses it sees the weights that they need."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._compile import _disable_dynamo
from torch.utils.hooks import RemovableHandle

from .distributed import inner_modules

if TYPE_CHECKING:
    from .msam import MSAM


def attach(opt: MSAM, model: nn.Module) -> Hooks:
    """Until they are removed ``model`` shows its clean weights or its perturbed ones, as :class:`FusedMSAM` says.

    Raises:
        ValueError: for a model with a ScriptModule, which takes no hooks.
    """
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            what = f"the ScriptModule {name!r} in it" if name else "a ScriptModule"
            raise ValueError(f"model: {what} takes no hooks; leave model= out, and call eval() and train() yourself")
    whole = inner_modules(model)
    hooks = Hooks(opt, whole[-1])
    for module in whole:
        for earlier in Hooks.of(module):
            earlier.give_way(opt)
    try:
        for module in model.modules():  # a part may be called or saved alone
            hooks.register(module, hooks.before_forward if module in whole else hooks.before_part)
    except BaseException:
        hooks.remove()
        raise
    return hooks


@contextmanager
def clean_weights(model: nn.Module) -> Iterator[None]:
    """Within it ``model`` has its clean weights, whatever passes are made; afterwards those that it had before."""
    opts = [hooks.opt for module in model.modules() for hooks in Hooks.of(module) if hooks.opt is not None]
    before = [(opt, opt._training, opt.perturbed) for opt in dict.fromkeys(opts)]
    try:
        for opt, *_ in before:
            opt.eval()
        yield
    finally:
        for opt, training, perturbed in before:
            opt._training = training
            if perturbed:
                opt.train()


class Hooks:
    """One optimizer's. A copy of the module has nothing to do with it."""

    def __init__(self, opt: MSAM | None = None, model: nn.Module | None = None) -> None:
        self.opt = opt
        self.model = model
        self.handles: list[RemovableHandle] = []

    def __reduce__(self) -> tuple[Any, ...]:
        return Hooks, ()

    @staticmethod
    def of(module: nn.Module) -> list[Hooks]:
        """Those that earlier optimizers have put on ``module``."""
        owners = [getattr(hook, "__self__", None) for hook in module._forward_pre_hooks.values()]
        return [owner for owner in owners if isinstance(owner, Hooks)]

    def give_way(self, to: MSAM) -> None:
        """To a new optimizer of the same parameters, as where a notebook's cell runs again."""
        opt = self.opt
        if opt is None or opt._params().isdisjoint(to._params()):
            return
        if opt._changed() is None:  # or what they were changed to is what is wanted
            opt.eval()
        self.remove()

    def register(self, module: nn.Module, before: Callable[[nn.Module, Any], None]) -> None:
        """On ``module``, ``before`` its forward pass."""
        self.handles.append(module.register_forward_pre_hook(before, prepend=True))  # FSDP2's gathers the weights
        self.handles.append(module.register_state_dict_pre_hook(self.before_state_dict))
        self.handles.append(module.register_load_state_dict_pre_hook(self.before_loading))

    def remove(self) -> None:
        """From the model, which then knows nothing of the optimizer."""
        for handle in self.handles:
            handle.remove()
        self.opt, self.model, self.handles = None, None, []

    @_disable_dynamo
    def before_forward(self, module: nn.Module, args: Any) -> None:
        """Clean also in training mode where no gradients are wanted, as in torch.optim.swa_utils.update_bn."""
        if self.opt is None:
            return
        trains = torch.is_grad_enabled() and self.opt._training
        if trains:
            self.opt._passes.add("train" if module.training else "eval")
        if trains and module.training:
            self.opt._perturb()
        else:
            self.opt._clean("a forward pass")

    def before_part(self, module: nn.Module, args: Any) -> None:
        """As before a forward pass of the model, which a trainer may never call: Lightning calls its parts.

        The model's mode decides: a layer in eval mode may be a frozen one, and a part of a training pass may run
        without gradients.
        """
        if torch.compiler.is_compiling() or self.opt is None or self.model is None:
            return
        if not self.model.training or (torch.is_grad_enabled() and not self.opt.perturbed):
            self.before_forward(self.model, args)

    def before_state_dict(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        if self.opt is not None:
            self.opt._clean("state_dict()")

    def before_loading(self, module: nn.Module, *args: Any) -> None:
        if self.opt is not None:
            self.opt._clean("load_state_dict()")
