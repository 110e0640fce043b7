"""An interrupt loses nothing: the weights are what they were, or ``perturbed`` says so and restore() is exact."""

from __future__ import annotations

import signal
import sys
import timeit
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sam_fused
from sam_fused import FusedMSAM, FusedSAM, ReferenceMSAM, ReferenceSAM
from sam_fused.msam import MSAM
from tests.helpers.cases import generator

PACKAGE = str(Path(sam_fused.__file__).parent)


class Interrupter:
    """Raises KeyboardInterrupt before the ``at``-th line of sam_fused that a call runs; keeps which lines it ran."""

    def __init__(self, at: int = -1) -> None:
        self.at = at
        self.lines: list[tuple[str, int]] = []  # the file and the number

    def _trace(self, frame, event, _):
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            self.lines.append((frame.f_code.co_filename, frame.f_lineno))
            if len(self.lines) == self.at:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self._trace

    def __call__(self, action: Callable[[], object]) -> bool:
        """Whether ``action`` was interrupted."""
        old = sys.gettrace()
        sys.settrace(self._trace)
        try:
            action()
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(old)
        return False


def lean(cls: Callable[..., Any]) -> bool:
    return isinstance(cls, partial)


class Training:
    """A network with BatchNorm in two groups, some steps old, and what its weights must be."""

    def __init__(self, cls: Callable[..., Any], base: type[torch.optim.Optimizer], earlier: int) -> None:
        torch.default_generator.manual_seed(0)  # torch.manual_seed takes a tenth of the test's time
        self.model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        groups = [
            {"params": list(self.model[:2].parameters())},
            {"params": list(self.model[2].parameters()), "rho": 0.0 if lean(cls) else 0.2},
        ]
        self.opt = cls(groups, base, lr=0.1, rho=0.5, model=self.model)
        self.x, self.y = torch.randn(8, 3, generator=generator(1)), torch.arange(8) % 2
        for _ in range(earlier):
            self.opt.step(self.closure)
        self.before = self.clean_weights()

    def clean_weights(self) -> list[torch.Tensor]:
        if isinstance(self.opt, MSAM):
            self.opt.eval()
        weights = [p.detach().clone() for p in self.model.parameters()]
        if isinstance(self.opt, MSAM):
            self.opt.train()
        return weights

    def closure(self) -> torch.Tensor:
        self.opt.zero_grad()
        loss = nn.functional.cross_entropy(self.model(self.x), self.y)
        loss.backward()
        return loss

    def two_calls(self) -> None:
        self.closure()
        self.opt.first_step()
        self.closure()
        self.model[2].bias.grad = None  # perturbed, and without a gradient now
        self.opt.second_step()

    def one_pass(self) -> None:
        self.closure()
        self.opt.step()
        self.opt.eval()
        self.opt.train()

    def act(self, how: str) -> Callable[[], object]:
        if how == "closure":
            return lambda: self.opt.step(self.closure)
        return self.one_pass if isinstance(self.opt, MSAM) else self.two_calls

    def check(self, after: list[torch.Tensor], where: str) -> None:
        torch.set_grad_enabled(True)  # torch's own contexts do not survive every interrupt
        if self.opt.perturbed:
            self.opt.restore()
        assert not self.opt.perturbed
        for expected in (self.before, after):
            if all(torch.equal(p, w) for p, w in zip(self.model.parameters(), expected, strict=True)):
                break
        else:
            raise AssertionError(f"{where}: the weights are neither those before the step nor those after it")
        assert self.model[1].track_running_stats, where
        assert all(p.requires_grad for p in self.model.parameters()), where
        if isinstance(self.opt, MSAM):
            self.opt.train()
        self.opt.step(self.closure)
        assert all(p.isfinite().all() for p in self.model.parameters()), where


ADAM, RPROP, NADAM = torch.optim.Adam, torch.optim.Rprop, torch.optim.NAdam  # fused, and composed
CASES = [
    (FusedSAM, ADAM, 0),  # the first step, which makes the state
    (FusedSAM, ADAM, 2),
    (partial(FusedSAM, lean_ascent=True), ADAM, 2),
    (FusedSAM, RPROP, 2),
    (ReferenceSAM, ADAM, 0),
    (ReferenceSAM, RPROP, 2),
    (FusedMSAM, ADAM, 0),
    (FusedMSAM, ADAM, 2),  # from backup to backup
    (FusedMSAM, NADAM, 2),
    (ReferenceMSAM, ADAM, 2),
]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["closure", "two calls"])
@pytest.mark.parametrize(("cls", "base", "earlier"), CASES)
def test_at_every_line(cls, base, earlier, how):
    """The first time that a line is run and the last."""
    whole = Training(cls, base, earlier)
    trace = Interrupter()
    assert not trace(whole.act(how))
    after = whole.clean_weights()
    first = {line: at for at, line in reversed(list(enumerate(trace.lines, start=1)))}
    last = {line: at for at, line in enumerate(trace.lines, start=1)}
    assert len(first) > 40
    for at in sorted({*first.values(), *last.values()}):
        training = Training(cls, base, earlier)
        interrupt = Interrupter(at)
        assert interrupt(training.act(how))
        file, number = interrupt.lines[-1]
        where = f"{Path(file).name}:{number}, line {at} of {len(trace.lines)}"
        if how == "closure" and not isinstance(training.opt, MSAM):
            assert not training.opt.perturbed, f"{where}: step(closure) left the weights perturbed"
        training.check(after, where)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs POSIX timers")
@pytest.mark.parametrize("how", ["closure", "two calls"])
def test_at_random_times(how):
    """Between and inside the operators, whose time is most of a step's."""
    w = [nn.Parameter(torch.randn(n, generator=generator(n))) for n in (1 << 20, 7, 1 << 18)]
    opt = FusedSAM(w, torch.optim.SGD, lr=0.1, rho=0.5)
    armed = False

    def interrupt(*_):
        nonlocal armed
        if armed:
            armed = False
            raise KeyboardInterrupt

    def closure():
        for p in w:
            p.grad = p.detach() * 0.5 + 1

    def two_calls():
        closure()
        opt.first_step()
        closure()
        opt.second_step()

    def act():
        opt.step(closure) if how == "closure" else two_calls()

    handler = signal.signal(signal.SIGALRM, interrupt)
    fractions = torch.rand(100, generator=torch.Generator().manual_seed(0)) * 1.2
    step_time = min(timeit.repeat(act, number=1, repeat=20))
    interrupts = 0
    try:
        for delay in (fractions * step_time).tolist():
            before = [p.detach().clone() for p in w]
            twins = [nn.Parameter(p.clone()) for p in before]
            after = FusedSAM(twins, torch.optim.SGD, lr=0.1, rho=0.5)
            try:
                armed = True
                signal.setitimer(signal.ITIMER_REAL, max(delay, 1e-6))
                act()
                armed = False
            except KeyboardInterrupt:
                interrupts += 1
                torch.set_grad_enabled(True)
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            if opt.perturbed:
                opt.restore()

            def twin_closure(twins=twins):
                for p in twins:
                    p.grad = p.detach() * 0.5 + 1

            after.step(twin_closure)
            kept = all(torch.equal(p, q) for p, q in zip(w, before, strict=True))
            assert kept or all(torch.equal(p, q) for p, q in zip(w, twins, strict=True)), f"after {delay * 1e3:.3f} ms"
    finally:
        signal.signal(signal.SIGALRM, handler)
    assert interrupts, f"of {len(fractions)} signals none came within a step"
