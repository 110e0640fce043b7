"""rho as a switch: one pass where it is 0, schedules of it, and groups in which alone it is not 0."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sam_fused import FusedMSAM, FusedSAM, LambdaRho, ReferenceSAM, at_random, groups, late, norm_only, warm_up
from tests.helpers.networks import batch, loss_of, perceptron
from tests.helpers.sam import both


def trained(model: nn.Module, opt, step: int, calls: list[float] | None = None):
    def closure():
        if calls is not None:
            calls.append(opt.param_groups[0]["rho"])
        opt.zero_grad()
        loss = loss_of(model, *batch(step))
        loss.backward()
        return loss

    return opt.step(closure)


def same(model: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


# ---- one pass ----


@both
@pytest.mark.parametrize("base", [torch.optim.Adam, torch.optim.Adagrad])
def test_one_pass_where_every_rho_is_0(cls, base):
    """Which is the base's own step, BatchNorm's statistics included; SAM from the step on at which a rho is not 0."""
    model, twin = perceptron(1).double(), perceptron(1).double()
    opt = cls(model.parameters(), base, lr=0.05, rho=0.0, model=model)
    plain = cls(twin.parameters(), base, lr=0.05, rho=0.3, model=twin)
    calls = []
    for step in range(3):
        loss = trained(model, opt, step, calls)
        plain.zero_grad()
        expected = loss_of(twin, *batch(step))
        expected.backward()
        plain.measure_sharpness()
        plain.step()
        assert torch.equal(loss, expected)
    assert calls == [0.0] * 3
    assert same(model, twin)
    opt.param_groups[0]["rho"] = 0.3
    for step in range(3, 5):
        trained(model, opt, step, calls)
        trained(twin, plain, step)
    assert calls == [0.0] * 3 + [0.3] * 4
    assert same(model, twin)
    assert model[1].num_batches_tracked == 5


@both
def test_one_pass_that_raises(cls):
    model = perceptron(1).double()
    opt = cls(model.parameters(), torch.optim.Adam, lr=0.05, rho=0.0, model=model)
    before = [p.detach().clone() for p in model.parameters()]

    def closure():
        loss_of(model, *batch(0)).backward()
        raise ArithmeticError("stop")

    with pytest.raises(ArithmeticError, match="stop"):
        opt.step(closure)
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), before, strict=True))
    assert not opt.perturbed


def test_one_pass_with_a_scaler():
    model = perceptron(1).double()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    opt = FusedSAM(model.parameters(), torch.optim.Adam, lr=0.05, rho=0.0, model=model, scaler=scaler)
    twin = perceptron(1).double()
    plain = FusedSAM(twin.parameters(), torch.optim.Adam, lr=0.05, rho=0.0, model=twin)
    calls = 0
    for step in range(3):

        def closure(step=step):
            nonlocal calls
            calls += 1
            opt.zero_grad()
            scaler.scale(loss_of(model, *batch(step))).backward()

        opt.step(closure)
        scaler.update()
        trained(twin, plain, step)
    assert calls == 3
    assert same(model, twin)


# ---- schedules ----


def test_factors():
    assert [late(3)(t) for t in range(5)] == [0.0, 0.0, 0.0, 1.0, 1.0]
    assert [late(2.5)(t) for t in range(4)] == [0.0, 0.0, 0.0, 1.0]
    assert [warm_up(4)(t) for t in range(6)] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    draws = [at_random(0.3)(t) for t in range(4000)]
    assert set(draws) == {0.0, 1.0}
    assert sum(draws) / 4000 == pytest.approx(0.3, abs=0.03)
    assert draws == [at_random(0.3, seed=0)(t) for t in range(4000)]
    assert draws != [at_random(0.3, seed=1)(t) for t in range(4000)]


@pytest.mark.parametrize("call", [lambda: warm_up(0), lambda: at_random(1.5)])
def test_factors_of_nonsense(call):
    with pytest.raises(ValueError, match="expected a number"):
        call()


@pytest.mark.parametrize("cls", [FusedSAM, FusedMSAM])
def test_a_schedule_sets_the_groups(cls):
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    opt = cls([{"params": [a]}, {"params": [b], "rho": 0.4}], torch.optim.Adam, rho=0.1)
    schedule = LambdaRho(opt, warm_up(2))
    seen = [schedule.get_last_rho()]
    for _ in range(3):
        schedule.step()
        seen.append(schedule.get_last_rho())
    assert seen == [[0.0, 0.0], [0.05, 0.2], [0.1, 0.4], [0.1, 0.4]]
    assert [group["rho"] for group in opt.param_groups] == [0.1, 0.4]


def test_late_sam_takes_two_passes_from_its_start():
    model = perceptron(1).double()
    opt = FusedSAM(model.parameters(), torch.optim.Adam, lr=0.05, rho=0.3, model=model)
    schedule = LambdaRho(opt, late(2))
    calls = []
    for step in range(4):
        trained(model, opt, step, calls)
        schedule.step()
    assert calls == [0.0, 0.0, 0.3, 0.3, 0.3, 0.3]


@pytest.mark.parametrize("optimizer_first", [False, True])
def test_a_schedule_goes_on_from_its_state(optimizer_first):
    def make():
        model = perceptron(1).double()
        opt = FusedSAM(model.parameters(), torch.optim.Adam, lr=0.05, rho=0.3, model=model)
        return model, opt, LambdaRho(opt, late(3))

    model, opt, schedule = make()
    for step in range(2):
        trained(model, opt, step)
        schedule.step()
    saved = {"model": model.state_dict(), "opt": opt.state_dict(), "schedule": schedule.state_dict()}
    twin, other, again = make()
    twin.load_state_dict(saved["model"])
    holders = [(other, saved["opt"]), (again, saved["schedule"])]
    for holder, state in holders if optimizer_first else holders[::-1]:
        holder.load_state_dict(state)
    assert again.get_last_rho() == [0.0]
    for step in range(2, 5):
        trained(twin, other, step)
        again.step()
    assert again.get_last_rho() == [0.3]
    assert other.param_groups[0]["rho"] == 0.3


@pytest.mark.parametrize("cls", [FusedSAM, FusedMSAM])
def test_a_schedule_made_after_the_optimizer_has_loaded(cls):
    """Late SAM that is still off leaves a rho of 0 in the checkpoint; the initial one is in there too."""

    def make():
        return cls([nn.Parameter(torch.ones(2))], torch.optim.Adam, rho=0.3)

    opt = make()
    LambdaRho(opt, late(3))
    other = make()
    other.load_state_dict(opt.state_dict())
    assert other.param_groups[0]["rho"] == 0.0
    schedule = LambdaRho(other, late(0))
    assert schedule.get_last_rho() == [0.3]
    schedule.load_state_dict({"last_epoch": 2, "base_rhos": [0.7]})
    other.load_state_dict(torch.optim.Adam([nn.Parameter(torch.ones(2))]).state_dict())  # which has none
    assert LambdaRho(other, late(0)).get_last_rho() == [0.7]


def test_a_schedule_of_nonsense():
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(TypeError, match="optimizer: expected one of sam_fused's, got Adam"):
        LambdaRho(torch.optim.Adam([p]), late(1))
    opt = FusedSAM([p])
    with pytest.raises(TypeError, match=r"factor: expected a function.*got 0\.5"):
        LambdaRho(opt, 0.5)
    schedule = LambdaRho(opt, late(0))
    opt.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    with pytest.raises(RuntimeError, match="expected the 1 groups that it had, got 2"):
        schedule.step()


def test_a_step_or_a_checkpoint_that_is_refused_changes_nothing():
    opt = FusedSAM([nn.Parameter(torch.ones(2))], rho=0.2)

    def factor(t):
        if t == 2:
            raise ValueError("no such step")
        return 1 / (1 + t)

    schedule = LambdaRho(opt, factor)
    schedule.step()
    before = schedule.state_dict()
    with pytest.raises(ValueError, match=r"state_dict: expected base_rhos of 1 groups, got 2"):
        schedule.load_state_dict({"last_epoch": 7, "base_rhos": [0.1, 0.2]})
    for refused in (schedule.step, lambda: schedule.load_state_dict({"last_epoch": 2, "base_rhos": [0.5]})):
        with pytest.raises(ValueError, match="no such step"):
            refused()
    assert schedule.state_dict() == before
    assert schedule.get_last_rho() == [0.1]
    schedule.load_state_dict({"last_epoch": 3, "base_rhos": [0.4]})
    assert schedule.get_last_rho() == [0.1]


# ---- normalisation layers alone ----


class Weight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))


@pytest.mark.parametrize(("name", "counts"), [("LlamaRMSNorm", True), ("ScaleNorm2d", True), ("NormedLinear", False)])
def test_layers_of_other_libraries_count_by_the_end_of_their_name(name, counts):
    layer = type(name, (Weight,), {})()
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), layer)
    chosen, others = norm_only(model, rho=0.1)
    names = [name for name, _ in (chosen if counts else others)["params"]]
    assert "2.weight" in names


class LlamaRMSNorm(Weight):
    pass


def test_norm_only_finds_the_normalisation_layers():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.GroupNorm(2, 4),
        nn.LayerNorm(4),
        nn.RMSNorm(4),
        nn.InstanceNorm2d(4, affine=True),
        LlamaRMSNorm(),
        nn.Linear(4, 2),
        nn.BatchNorm2d(4, affine=False),
    )
    model[2].bias.requires_grad_(False)
    chosen, others = norm_only(model, rho=0.5, weight_decay=0.01)
    assert (chosen["rho"], others["rho"]) == (0.5, 0.0)
    assert chosen["weight_decay"] == others["weight_decay"] == 0.01
    names = {name for name, _ in chosen["params"]}
    expected = {f"{i}.{kind}" for i in range(1, 7) for kind in ("weight", "bias")}
    assert names == expected - {"2.bias", "4.bias", "6.bias"}
    assert {name for name, _ in others["params"]} == {"0.weight", "0.bias", "7.weight", "7.bias"}


@pytest.mark.parametrize("cls", [FusedSAM, FusedMSAM])
def test_norm_only_moves_nothing_else(cls):
    model = perceptron(1).double()
    opt = cls(norm_only(model, rho=0.5), torch.optim.Adam, rho=0.05, lr=0.05)
    for step in range(2):
        opt.zero_grad()
        before = [p.detach().clone() for p in model.parameters()]
        loss_of(model, *batch(step)).backward()
        if cls is FusedSAM:
            opt.first_step()
            moved = [not torch.equal(p, w) for p, w in zip(model.parameters(), before, strict=True)]
            opt.second_step()
        else:
            opt.step()
            after = [p.detach().clone() for p in model.parameters()]
            opt.eval()
            moved = [not torch.equal(p, w) for p, w in zip(model.parameters(), after, strict=True)]
            opt.train()
        assert moved == [False, False, True, True, False, False]
        assert opt.param_groups[0]["param_names"] == ["1.weight", "1.bias"]


@pytest.mark.parametrize("cls", [FusedSAM, ReferenceSAM])
def test_a_lean_ascent_is_the_same_step(cls):
    """The first pass takes no gradients where nothing is perturbed; weights, state and sharpness are the same bits."""
    ends, asked = [], []
    for lean in (False, True):
        model = perceptron(1).double()
        model[0].bias.requires_grad_(False)
        opt = cls(norm_only(model, rho=0.5), torch.optim.Adam, lr=0.05, model=model, lean_ascent=lean)

        def closure(model=model, opt=opt) -> torch.Tensor:
            opt.zero_grad()
            loss = loss_of(model, *batch(len(asked) // 2))
            loss.backward()
            asked.append([p.grad is not None for p in model.parameters()])
            return loss

        del asked[:]
        sharpness = [(opt.step(closure), opt.sharpness.clone())[1] for _ in range(3)]
        ends.append([*sharpness, *model.parameters(), *(t for s in opt.state.values() for t in s.values())])
        first = [False, False, True, True, False, False] if lean else [True, False, True, True, True, True]
        assert asked == [first, [True, False, True, True, True, True]] * 3
        assert [p.requires_grad for p in model.parameters()] == [True, False, True, True, True, True]
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_a_lean_ascent_where_all_that_ascends_is_frozen():
    """A backward pass without any gradient to compute would be an error."""
    ends = []
    for lean in (False, True):
        model = perceptron(1).double()
        opt = FusedSAM(norm_only(model, rho=0.5), torch.optim.Adam, lr=0.05, lean_ascent=lean)
        for p in opt.param_groups[0]["params"]:
            p.requires_grad_(False)

        def closure(model=model, opt=opt) -> torch.Tensor:
            opt.zero_grad()
            loss = loss_of(model, *batch(0))
            loss.backward()
            return loss

        opt.step(closure)
        ends.append(list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_a_lean_ascent_that_raises_asks_for_gradients_again():
    model = perceptron(1)
    opt = FusedSAM(norm_only(model, rho=0.5), torch.optim.Adam, lean_ascent=True)

    def closure():
        assert not model[0].weight.requires_grad
        raise RuntimeError("no loss")

    with pytest.raises(RuntimeError, match="no loss"):
        opt.step(closure)
    assert all(p.requires_grad for p in model.parameters())


def test_a_lean_ascent_that_cannot_be(monkeypatch):
    model = perceptron(1)
    with pytest.raises(ValueError, match="lean_ascent: expected False with sync_perturbation"):
        FusedSAM(norm_only(model, rho=0.5), lean_ascent=True, sync_perturbation=True)
    opt = FusedSAM(norm_only(model, rho=0.5), lean_ascent=True)
    monkeypatch.setattr(groups, "is_dtensor", lambda p: True)
    with pytest.raises(RuntimeError, match=r"lean_ascent: 0.weight is a DTensor"):
        opt.step(lambda: None)


def test_norm_only_without_a_normalisation_layer():
    with pytest.raises(ValueError, match="model: expected normalisation layers"):
        norm_only(nn.Linear(2, 2), rho=0.5)


def test_norm_only_of_nothing_but_normalisation_layers():
    [group] = norm_only(nn.LayerNorm(3), rho=0.5)
    assert len(group["params"]) == 2
