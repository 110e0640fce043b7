"""BatchNorm's running statistics move in pass 1 only."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from sam_fused import FusedSAM
from tests.helpers.cases import generator
from tests.helpers.sam import both


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.LazyLinear(6),
        nn.BatchNorm1d(6, momentum=None),  # a cumulative average
        nn.Linear(6, 5),
        nn.BatchNorm1d(5, track_running_stats=False),
        nn.Linear(5, 2),
    )


def statistics(model: nn.Module) -> list[torch.Tensor]:
    return [b.clone() for b in model.buffers()]


@both
def test_statistics_are_those_of_the_first_pass(cls):
    x, y = torch.randn(16, 3, 6, 6, generator=generator(1)), torch.arange(16) % 2
    model, plain = network(), network()
    model(x), plain(x)  # the lazy layer
    plain.load_state_dict(model.state_dict())
    opt = cls(model.parameters(), torch.optim.SGD, lr=0.1, rho=0.5, model=model)
    counts = []

    def closure():
        opt.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        counts.append(statistics(model))
        return loss

    for _ in range(3):
        plain.load_state_dict(model.state_dict())
        plain(x)
        opt.step(closure)
        assert all(torch.equal(a, b) for a, b in zip(statistics(model), statistics(plain), strict=True))
    assert len(counts) == 6
    assert model[1].track_running_stats
    assert not model[6].track_running_stats


@both
def test_without_model_they_move_twice(cls):
    """The option does something."""
    x = torch.randn(16, 3, 6, 6, generator=generator(1))
    model = network()
    model(x)
    opt = cls(model.parameters(), torch.optim.SGD, lr=0.1)
    before = model[1].num_batches_tracked.item()

    def closure():
        opt.zero_grad()
        model(x).square().mean().backward()

    opt.step(closure)
    assert model[1].num_batches_tracked.item() == before + 2


@both
def test_two_call_form_and_eval_mode(cls):
    x = torch.randn(16, 3, 6, 6, generator=generator(1))
    model = network()
    model(x)
    model[1].eval()  # a frozen layer goes on to normalise by its buffers in both passes
    frozen = [b.clone() for b in model[1].buffers()]
    opt = cls(model.parameters(), torch.optim.SGD, lr=0.0, rho=1e-9, model=model)
    losses = []
    for _ in range(2):
        loss = model(x).square().mean()
        loss.backward()
        losses.append(loss.item())
        opt.first_step(zero_grad=True) if not opt.perturbed else opt.second_step(zero_grad=True)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(frozen, model[1].buffers(), strict=True))
    assert model[4].num_batches_tracked.item() == 2
    assert all(p.grad is None for p in model.parameters())


@both
@pytest.mark.parametrize("when", [1, 2])
def test_after_an_exception_they_are_as_the_first_forward_left_them(cls, when):
    x = torch.randn(16, 3, 6, 6, generator=generator(1))
    model = network()
    model(x)
    opt = cls(model.parameters(), torch.optim.SGD, lr=0.1, model=model)
    calls = 0
    after_first = []

    def closure():
        nonlocal calls
        calls += 1
        opt.zero_grad()
        loss = model(x).square().mean()
        if calls == 1:
            after_first.extend(statistics(model))
        if calls == when:
            raise RuntimeError("out of memory")
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match="out of memory"):
        opt.step(closure)
    assert all(torch.equal(a, b) for a, b in zip(statistics(model), after_first, strict=True))
    assert all(m.track_running_stats for m in (model[1], model[4]))


def test_every_kind_of_batchnorm_stands_still():
    kinds = [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm]
    model = nn.Sequential(*(kind(3) for kind in kinds), nn.BatchNorm1d(3, track_running_stats=False), nn.LayerNorm(3))
    opt = FusedSAM(model.parameters(), model=model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    opt.first_step()
    assert not any(m.track_running_stats for m in model[:5])
    opt.second_step()
    assert [m.track_running_stats for m in model[:5]] == [True, True, True, True, False]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("how", ["script", "trace"])
@both
def test_inside_torch_jit_they_cannot_stand_still(cls, how):
    """Which is said where they would move, and only there."""

    def step(layer: nn.Module, training: bool = True) -> None:
        inner = layer.train(training)
        inner = torch.jit.script(inner) if how == "script" else torch.jit.trace(inner, torch.randn(4, 3))
        model = nn.Sequential(nn.Linear(3, 3), inner).train(training)
        opt = cls(model.parameters(), torch.optim.SGD, lr=0.1, model=model)
        model(torch.randn(4, 3, generator=generator(1))).square().mean().backward()
        opt.first_step()
        opt.second_step()

    with pytest.warns(UserWarning, match="BatchNorm inside a torch.jit module cannot be frozen") as caught:
        step(nn.Sequential(nn.BatchNorm1d(3)))
    assert {w.filename for w in caught if "torch.jit module" in str(w.message)} == {__file__}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        step(nn.Sequential(nn.BatchNorm1d(3)), training=False)
        step(nn.Sequential(nn.LayerNorm(3)))
