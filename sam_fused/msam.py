"""Momentum-SAM: one pass a step, with the weights perturbed from one step to the next."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from . import amp
from .arithmetic import MARK
from .around import Around
from .bases import check_moments
from .buffers import fits
from .distributed import local
from .fused import Fused
from .hooks import Hooks, attach
from .parameters import name_of, trains
from .reference import Reference
from .warn import warn


class MSAM(Around):
    """What :class:`FusedMSAM` and :class:`ReferenceMSAM` share; see :class:`FusedMSAM` for the arguments."""

    way_back = "call eval() first, and train() to go on"
    kept = ("base_optimizer", "_model", "_training")

    def __init__(
        self,
        params: Iterable[Any],
        base: type[Optimizer] = torch.optim.Adam,
        *,
        rho: float,
        adaptive: bool = False,
        eta: float = 0.0,
        model: nn.Module | None = None,
        **base_kwargs: Any,
    ) -> None:
        self._training = True
        super().__init__(params, base, {"rho": rho, "adaptive": adaptive, "eta": eta}, model, base_kwargs)

    def _set_up(self) -> None:
        super()._set_up()
        self._loaded = False  # a checkpoint, since when the weights were not perturbed
        self._passes: set[str] = set()  # in which modes the model was used since the last step
        self._marks: bytes | None = None  # of the perturbed weights; None: not known
        self._hooks: Hooks | None = None
        self.model = self.model  # which puts the hooks on it

    @property
    def model(self) -> nn.Module | None:
        """The model that shows its clean or perturbed weights by itself; may be set later. None takes that back."""
        return self._model

    @model.setter
    def model(self, model: nn.Module | None) -> None:
        if "_hooks" in self.__dict__:  # or the constructor has yet to make the rest
            if self._hooks is not None:
                self._hooks.remove()
            self._hooks = self._model = None
            if model is not None:
                self._hooks = attach(self, model)
        self._model = model

    def _check_groups(self) -> None:
        super()._check_groups()
        check_moments(self.base_optimizer)

    # ---- steps ----

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimization step: the base's, from the clean weights; then the weights are perturbed for the next pass.

        Args:
            closure: zeroes the gradients, runs forward and backward and returns the loss, which is returned. It is
                called once, at the perturbed weights. If it raises, they stay as they were.

        With a GradScaler, call ``scaler.step(opt)`` in its place, without a closure. Where it skips the update, nothing
        changes.

        Raises:
            RuntimeError: after :meth:`eval`; without a closure and without ``model=``, after :meth:`load_state_dict`,
                if the gradients were taken at the clean weights; if the weights were changed in place while they were
                perturbed; for a sparse gradient; for a closure that came through ``scaler.step``.
            ValueError: for a rho or eta that is no finite number >= 0; for a base that turns out to keep no first
                moment, with the update done.
        """
        self._check_not_borrowed("step()")
        loss = None
        try:
            if not self._training and not self._makes_state():
                raise RuntimeError("step() was called after eval(); call train() before the forward pass")
            if closure is not None:
                amp.check_no_closure(self, "call it yourself, then scaler.step(opt)")
                self._perturb()
                with torch.enable_grad():
                    loss = closure()
            elif self._loaded and self.model is None and self._arithmetic.momenta():
                raise RuntimeError(
                    "step() was called after load_state_dict(), with gradients of the clean weights; call train() "
                    "before the forward pass, or construct with model=..."
                )
            if self._passes == {"eval"} and any(group["rho"] > 0 for group in self.param_groups):
                warn(
                    "every forward pass since the last step was in eval mode, which uses the clean weights: this is "
                    f"the step of {type(self.base_optimizer).__name__}, without SAM. Call model.train() before the "
                    "forward pass; to freeze BatchNorm or dropout, call eval() on these layers alone"
                )
            self._passes.clear()
            self._advance()
        except BaseException:
            amp.forget(self)
            raise
        return loss

    @_disable_dynamo
    def _advance(self) -> None:
        self._check_unchanged("step()")
        grad_scale, found_inf = amp.given(self, self._device())
        try:
            self._marks = None
            go_on = self._arithmetic.advance if self._training else self._arithmetic.update
            go_on(grad_scale, found_inf)
        finally:
            self._moved()
        self._loaded = False
        self._marks = self._arithmetic.marks()
        self._updated()

    def _makes_state(self) -> bool:
        """Whether a step is the one, with learning rate 0, by which torch.distributed.checkpoint makes the state."""
        return not any(trains(group) for group in self.param_groups) and not self._arithmetic.momenta()

    # ---- the clean weights and the perturbed ones ----

    def eval(self) -> None:
        """Give the clean weights back, bit for bit: to evaluate, to save or to change them.

        They stay clean until :meth:`train`, also with ``model=``: so another optimizer may go on with them.

        Raises:
            RuntimeError: if the weights were changed in place while they were perturbed.
        """
        self._check_not_borrowed("eval()")
        self._clean("eval()")
        self._training = False

    def train(self) -> None:
        """Perturb the weights again, to the same bits; to be called before a forward pass for training."""
        self._check_not_borrowed("train()")
        self._training = True
        self._passes.add("train")
        self._perturb()

    @_disable_dynamo
    @torch.no_grad()
    def _clean(self, what: str) -> None:
        if self.perturbed:
            self._check_unchanged(what)
            self._restore()

    @_disable_dynamo
    @torch.no_grad()
    def _perturb(self) -> None:
        self._loaded = False
        if self.perturbed:
            return
        direction = self._arithmetic.momenta()
        if direction:
            self._gather_again()
            self._marks = None
            try:
                self._arithmetic.perturb(direction, self._arithmetic.measure(direction))
            except BaseException:
                self._restore()
                raise
            self._moved()
            self._marks = self._arithmetic.marks()

    def _check_unchanged(self, what: str) -> None:
        """Changes of the perturbed weights would be lost with the next step."""
        changed = self._changed()
        if changed is not None:
            raise RuntimeError(
                f"{what}: {changed} was changed while it was perturbed; change or load weights between eval() and "
                "train(). restore() drops the change and gives the clean weights back. What a forward pass changes, as "
                "nn.Embedding does with max_norm, needs a group with rho=0"
            )

    def _changed(self) -> str | None:
        """The name of a parameter that was changed in place, or given other ``data``, while it was perturbed.

        Another dtype, device or layout is no change: ``model.to()`` keeps the values.
        """
        if not self.perturbed or self._marks is None:
            return None
        marks = self._arithmetic.marks()
        if marks == self._marks:
            return None
        now, before = (struct.iter_unpack(MARK, held) for held in (marks, self._marks))
        changed = {
            p
            for (p, backup), (version, address), mark in zip(self._arithmetic.backups(), now, before, strict=True)
            if version != mark[0] or (address != mark[1] and fits(backup, local(p)))
        }
        groups = self.param_groups
        places = ((g, i, p) for g, group in enumerate(groups) for i, p in enumerate(group["params"]))
        names = (name_of(groups, g, i) for g, i, p in places if p in changed)
        return next(names, "a parameter") if changed else None

    def _params(self) -> set[torch.Tensor]:
        return {p for group in self.param_groups for p in group["params"]}

    # ---- saving and copying ----

    def _check_not_perturbed(self, what: str) -> None:
        if self.model is not None:  # whose state_dict() does the same, whichever comes first
            self._clean(what)
        super()._check_not_perturbed(what)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this class or of the plain base optimizer, which leaves rho, adaptive and eta alone.

        The clean weights are given back before; :meth:`train` perturbs them anew.
        """
        self._clean("load_state_dict()")
        super().load_state_dict(state_dict)
        self._loaded = True


class FusedMSAM(MSAM):
    r"""Momentum-SAM around a base optimizer: the effect of SAM with one forward and backward pass a step.

    Implements Becker, Altrock and Risse, "Momentum-SAM: Sharpness Aware Minimization without Computational Overhead"
    (https://arxiv.org/abs/2401.12033). From one step to the next, the weights stand at

    .. math::
        \tilde w_i = w_i - \rho_i\, T^2 m_i / (\|T m\|_2 + 10^{-12})

    with the base's first moment m, and T = 1, or T = abs(w) + eta if ``adaptive``. The norm is taken over all groups
    whose rho > 0; a group with rho = 0 stays at w. The base's update starts from the clean weights w, which are kept
    exactly. Nothing is measured: there is no ``sharpness`` and no ``grad_norm``.

    BatchNorm's running statistics come from the perturbed weights. Before evaluating or saving, take them anew at the
    clean ones, with :func:`torch.optim.swa_utils.update_bn`, of batches that are shuffled and augmented as in training.

    Args:
        params: as for :class:`FusedSAM`. Groups may have their own ``rho``, ``adaptive`` and ``eta``.
        base: an optimizer class that keeps a first moment, ``exp_avg`` or ``momentum_buffer``: Adam, AdamW, SGD and
            RMSprop with momentum by a native update, any other by its own ``step()``.
        rho: radius, >= 0, in the units of the weights; about ten times that of SAM. It may change from step to step.
        adaptive: as for ASAM, T = abs(w) + eta, element by element.
        eta: ASAM's offset, >= 0.
        model: the module that is trained. It then looks after the weights itself: a forward pass in eval mode or
            without gradients, its ``state_dict()`` and its ``load_state_dict()`` see the clean ones, a forward pass for
            training the perturbed ones. Without it, call :meth:`eval` and :meth:`train`.
        base_kwargs: the base's own options, ``lr`` and the like.

    Raises:
        ImportError: if the extension is not built.
        TypeError, ValueError: on arguments that are not as described; for a ``model`` with a ScriptModule, which takes
            no hooks; for a base without a first moment, such as SGD without momentum (where only the state can tell,
            :meth:`step` raises it, with the update done).
        RuntimeError: where the base's own constructor fails otherwise.

    Example::

        opt = FusedMSAM(model.parameters(), torch.optim.Adam, lr=1e-3, rho=0.5, model=model)

        for x, y in batches:
            opt.zero_grad()
            loss_fn(model(x), y).backward()
            opt.step()
    """

    arithmetic = Fused


class ReferenceMSAM(MSAM):
    """What :class:`FusedMSAM` computes, with the same arguments, in plain PyTorch: slow, and meant to be read."""

    arithmetic = Reference
