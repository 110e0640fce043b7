"""What changes between steps behind the optimizer's back: groups, state, parameters. It is noticed, or refused."""

from __future__ import annotations

import copy
import gc
import weakref
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from sam_fused import FusedSAM, ReferenceSAM
from tests.helpers.cases import BASES, DEVICE, assert_near, assert_same_state, awkward, clones, generator, set_grads

both = pytest.mark.parametrize("cls", [FusedSAM, ReferenceSAM])


def sam_step(opt, seed: int) -> None:
    params = [p for group in opt.param_groups for p in group["params"]]
    for half in (0, 1):
        set_grads(params, 2 * seed + half)
        opt.second_step() if half else opt.first_step()


# ---- groups ----


@both
@pytest.mark.parametrize("base", ["sgd_momentum", "rmsprop"])
def test_replaced_groups(cls, base):
    base_cls, options = BASES[base]
    params = awkward(torch.float64)
    opt = cls(params, base_cls, **options)
    sam_step(opt, 0)
    before = [p.detach().clone() for p in params]
    opt.param_groups = [{**group, "lr": 0.0, "weight_decay": 0.0} for group in opt.param_groups]
    sam_step(opt, 1)
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    opt.param_groups[0] = {**opt.param_groups[0], "rho": 0.0}
    opt.first_step()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    opt.restore()


@both
@pytest.mark.parametrize("rho", [-0.1, float("nan"), float("inf"), "big", None])
def test_a_radius_that_is_none(cls, rho):
    params = awkward(torch.float32)[:2]
    opt = cls([{"params": params[:1]}, {"params": params[1:]}])
    set_grads(params, 0)
    opt.param_groups[1]["rho"] = rho
    before = [p.detach().clone() for p in params]
    for call in (opt.first_step, opt.measure_sharpness, lambda: opt.step(lambda: None)):
        with pytest.raises(ValueError, match=r"param_groups\[1\]\['rho'\]: expected a finite number >= 0, got"):
            call()
        assert not opt.perturbed
        assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))


@both
def test_defaults_are_those_of_later_groups(cls):
    params = awkward(torch.float32)[:2]
    opt = cls(params[:1], torch.optim.Adam, lr=0.1)
    opt.defaults.update(lr=0.2, rho=0.3)
    opt.add_param_group({"params": params[1:]})
    assert (opt.param_groups[1]["lr"], opt.param_groups[1]["rho"]) == (0.2, 0.3)
    assert opt.param_groups[1]["betas"] == (0.9, 0.999)


@both
@pytest.mark.parametrize("base", [*BASES, "asgd"])
def test_maximize(cls, base):
    """Maximising f is minimising -f: the ascent of the objective's negative goes against the gradient."""
    base_cls, options = {**BASES, "asgd": (torch.optim.ASGD, {"lr": 0.1})}[base]
    maximize = options.get("maximize", False)
    mine = awkward(torch.float32)
    theirs = clones(mine)
    opt = cls(mine, base_cls, rho=0.5, **{**options, "maximize": not maximize})
    plain = cls(theirs, base_cls, rho=0.5, **options)
    for step in range(3):
        for half in (0, 1):
            for o, params, sign in ((opt, mine, -1), (plain, theirs, 1)):
                set_grads(params, 2 * step + half)
                for p in params:
                    p.grad.mul_(sign)
                o.second_step() if half else o.first_step()
            for i, (p, q) in enumerate(zip(mine, theirs, strict=True)):
                assert torch.equal(p, q), f"step {step}, half {half}, params[{i}]"
        assert torch.equal(opt.sharpness, plain.sharpness)
        assert opt.sharpness > 0


# ---- state ----


@pytest.mark.parametrize("base", ["sgd_momentum", "adam_amsgrad"])
@pytest.mark.parametrize("how", ["cleared", "replaced", "another tensor", "all cleared"])
def test_state_that_is_replaced(base, how):
    """The next step goes on from what opt.state says, as torch.optim does."""
    base_cls, options = BASES[base]
    mine = awkward(torch.float64)[:4]
    theirs = clones(mine)
    opt, plain = FusedSAM(mine, base_cls, rho=0.0, **options), base_cls(theirs, **options)
    for step in range(6):
        for o, params in ((opt, mine), (plain, theirs)):
            set_grads(params, step)
            o.step()
            if step == 2:
                if how == "cleared":
                    o.state[params[1]].clear()
                elif how == "replaced":
                    o.state[params[1]] = {}
                elif how == "all cleared":
                    o.state.clear()
                else:
                    key = "momentum_buffer" if base == "sgd_momentum" else "exp_avg"
                    o.state[params[1]][key] = torch.full_like(params[1], 2.0).detach()
        assert_same_state(opt, plain, 1e-12, f"step {step}")
    saved = opt.state_dict()["state"]
    assert all(saved[i].keys() == saved[0].keys() != set() for i in range(4))


@both
@pytest.mark.parametrize("key", ["exp_avg", "step"])
def test_loaded_state_of_another_shape(cls, key):
    params = [nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(2))]
    opt = cls(params, torch.optim.Adam, lr=0.1, rho=0.0)
    set_grads(params, 0)
    opt.step()
    saved = copy.deepcopy(opt.state_dict())
    saved["state"][1][key] = torch.ones(1, 2) if key == "step" else torch.ones(1)
    before = [p.detach().clone() for p in params]
    opt.load_state_dict(saved)
    with pytest.raises((RuntimeError, ValueError), match=r"shape|elements|size|Scalars|broadcast"):
        opt.step()
    if cls is FusedSAM:
        with pytest.raises(ValueError, match=rf"param_groups\[0\]\['params'\]\[1\], state '{key}': expected"):
            opt.step()
        assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))


class Counting(torch.optim.Optimizer):
    """A base that makes its state in its constructor, as Adagrad did and others do."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})
        for p in self.param_groups[0]["params"]:
            self.state[p]["sum"] = torch.full_like(p, 2.0).detach()

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p]["sum"] += p.grad.abs()
                    p -= group["lr"] * p.grad / self.state[p]["sum"]


@both
def test_state_that_a_base_makes_in_its_constructor(cls):
    mine = awkward(torch.float64)
    theirs = clones(mine)
    opt, plain = cls(mine, Counting, rho=0.0), Counting(theirs)
    assert opt.state[mine[0]]["sum"].eq(2).all()
    for o, params in ((opt, mine), (plain, theirs)):
        set_grads(params, 0)
        o.step()
    assert_same_state(opt, plain, 0.0, "")


class Broken(torch.optim.Optimizer):
    def __init__(self, params, lr=0.1):
        self.betas = self.no_such_thing

    def step(self, closure=None):
        pass


@both
def test_a_base_that_fails_in_its_constructor(cls):
    with pytest.raises(RuntimeError, match=r"base: Broken could not be constructed: AttributeError: .*no_such_thing"):
        cls([nn.Parameter(torch.zeros(2))], Broken)


# ---- parameters ----


@pytest.mark.parametrize("base", ["adam", "rmsprop"])
def test_swapped_tensors(base):
    """torch.utils.swap_tensors, by which Module.double() may move parameters, refuses what has weak references."""
    base_cls, options = BASES[base]
    model = nn.Linear(4, 3)
    twin = copy.deepcopy(model)
    opt = FusedSAM(model.parameters(), base_cls, **options)
    plain = FusedSAM(twin.parameters(), base_cls, **options)
    for o in (opt, plain):
        sam_step(o, 0)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        opt.zero_grad()
        model.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    twin.double()
    assert model.weight.dtype == torch.float64
    for o in (opt, plain):
        sam_step(o, 1)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


@both
def test_materialised_after_construction(cls):
    """Built on the meta device; the very parameters get memory later."""
    with torch.device("meta"):
        model = nn.Linear(4, 3)
    opt = cls(model.parameters(), torch.optim.Adam, rho=0.5)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.to_empty(device="cpu")
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    for p in model.parameters():
        nn.init.ones_(p)
    assert opt.param_groups[0]["params"][0] is model.weight
    sam_step(opt, 0)
    opt.measure_sharpness()
    assert opt.mean_sharpness() > 0
    assert opt.grad_norm.device == model.weight.device


def test_replaced_parameters_are_let_go():
    """What was cached for parameters that the groups no longer have does not keep them alive."""
    opt = FusedSAM([nn.Parameter(torch.zeros(3))], torch.optim.Adam)
    gone = []
    for seed in range(4):
        sam_step(opt, seed)
        old = opt.param_groups[0]["params"][0]
        gone.append(weakref.ref(old))
        opt.param_groups[0]["params"][0] = nn.Parameter(torch.zeros(3))
        del opt.state[old], old
    sam_step(opt, 9)
    gc.collect()
    assert [ref() for ref in gone] == [None] * 4


# ---- numbers ----


@both
def test_asam_of_large_weights(cls):
    """T^2 alone overflows above 1.8e19; rho T^2 g / norm does not."""
    w = nn.Parameter(torch.tensor([1e20, -3e19, 2.0]))
    opt = cls([w], torch.optim.SGD, lr=0.0, rho=0.5, adaptive=True)
    w.grad = torch.tensor([1e-20, 1e-20, 1.0])
    expected = w.detach().double()
    t, g = expected.abs(), w.grad.double()
    expected = expected + 0.5 * t * t * g / (t * g).norm()
    opt.first_step()
    assert_near(w.detach().double() / expected, torch.ones(3, dtype=torch.float64), 1e-6, "perturbed")
    opt.restore()


@both
def test_two_optimizers_on_one_network(cls):
    """The first to finish does not let BatchNorm's statistics move in the other's second pass."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    one = cls(model[0].parameters(), torch.optim.SGD, lr=0.1, model=model)
    two = cls(model[2].parameters(), torch.optim.SGD, lr=0.1, model=model)
    x = torch.randn(8, 3)
    model(x).sum().backward()
    one.first_step()
    two.first_step()
    one.second_step()
    before = model[1].running_mean.clone()
    model(x).sum().backward()
    assert torch.equal(model[1].running_mean, before)
    two.second_step()
    model(x)
    assert not torch.equal(model[1].running_mean, before)


@both
@pytest.mark.parametrize("form", ["closure", "two calls"])
def test_autocast_around_both_passes(cls, form):
    """Autocast keeps the casts of weights until its context ends: the second pass is to see the perturbed ones."""

    def train(around: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Linear(6, 3)
        opt = cls(model.parameters(), torch.optim.SGD, lr=0.5, rho=2.0)
        x = torch.randn(8, 6, generator=generator(1))

        def closure():
            opt.zero_grad()
            with torch.autocast(DEVICE.type, torch.bfloat16):
                loss = model(x).float().square().mean()
            loss.backward()
            return loss

        for _ in range(2):
            with torch.autocast(DEVICE.type, torch.bfloat16) if around else nullcontext():
                if form == "closure":
                    opt.step(closure)
                else:
                    closure()
                    opt.first_step()
                    closure()
                    opt.second_step()
                opt.measured = closure()
        return [opt.measured.detach(), *(p.detach() for p in model.parameters())]

    for around, apart in zip(train(True), train(False), strict=True):
        assert torch.equal(around, apart)
