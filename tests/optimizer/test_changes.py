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
from tests.helpers.cases import BASES, assert_near, assert_same_state, awkward, clones, generator, set_grads
from tests.helpers.place import DEVICE
from tests.helpers.sam import assert_untouched, both, lockstep, snapshot


def sam_step(opt, seed: int) -> None:
    params = [p for group in opt.param_groups for p in group["params"]]
    for half in (0, 1):
        set_grads(params, 2 * seed + half)
        opt.second_step() if half else opt.first_step()


# ---- groups ----


@both
@pytest.mark.parametrize("base", ["sgd_momentum", "adagrad"])
def test_replaced_groups(cls, base):
    base_cls, options = BASES[base]
    params = awkward(torch.float64)
    opt = cls(params, base_cls, **options)
    sam_step(opt, 0)
    before = snapshot(params)
    opt.param_groups = [{**group, "lr": 0.0, "weight_decay": 0.0} for group in opt.param_groups]
    sam_step(opt, 1)
    assert_untouched(params, before)
    opt.param_groups[0] = {**opt.param_groups[0], "rho": 0.0}
    opt.first_step()
    assert_untouched(params, before)
    opt.restore()


@both
@pytest.mark.parametrize("option", ["rho", "eta"])
@pytest.mark.parametrize("rho", [-0.1, float("nan"), float("inf"), "big", None])
def test_a_radius_that_is_none(cls, rho, option):
    params = awkward(torch.float32)[:2]
    opt = cls([{"params": params[:1]}, {"params": params[1:]}])
    set_grads(params, 0)
    opt.param_groups[1][option] = rho
    before = snapshot(params)
    for call in (opt.first_step, opt.measure_sharpness, lambda: opt.step(lambda: None)):
        with pytest.raises(ValueError, match=rf"param_groups\[1\]\['{option}'\]: expected a finite number >= 0, got"):
            call()
        assert not opt.perturbed
        assert_untouched(params, before)


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


@both
def test_add_param_group(cls):
    params = awkward(torch.float64)
    opt = cls(params[:3], torch.optim.Adam, rho=0.1)
    set_grads(params, 0)
    opt.first_step()
    opt.second_step()
    opt.add_param_group({"params": params[3:], "rho": 0.0, "lr": 0.5})
    assert opt.param_groups[1]["adaptive"] is False
    assert opt.base_optimizer.param_groups is opt.param_groups
    before = snapshot(params)
    opt.first_step()
    assert_untouched(params[3:], before[3:])
    opt.second_step()
    assert not torch.equal(params[3], before[3][0])


def test_add_param_group_while_perturbed():
    params = awkward(torch.float64)
    opt = FusedSAM(params[:3])
    before = snapshot(params)
    set_grads(params, 0)
    opt.first_step()
    opt.add_param_group({"params": params[3:]})
    opt.restore()
    assert_untouched(params, before)


def test_options_change_between_steps():
    """lr, rho, momentum and amsgrad are read at every step."""
    groups = [{"params": awkward(torch.float64)}]
    fused = lockstep(groups, torch.optim.Adam, {"lr": 0.1}, steps=2)
    twins = clones(groups[0]["params"])
    reference = ReferenceSAM([{"params": twins}], torch.optim.Adam)
    reference.load_state_dict(copy.deepcopy(fused.state_dict()))
    for step in range(4):
        for opt in (fused, reference):
            group = opt.param_groups[0]
            group.update(lr=0.1 / (step + 1), rho=0.1 * step, adaptive=step > 1, weight_decay=0.1 * step)
            set_grads(group["params"], step)
            opt.first_step()
            opt.second_step()
    for p, q in zip(groups[0]["params"], twins, strict=True):
        assert_near(p.detach(), q.detach(), 1e-12, "params")


def test_momentum_switched_on():
    mine = awkward(torch.float64)
    theirs = clones(mine)
    opt, plain = FusedSAM(mine, torch.optim.SGD, lr=0.1, rho=0.0), torch.optim.SGD(theirs, lr=0.1)
    for step in range(4):
        for o, params in ((opt, mine), (plain, theirs)):
            o.param_groups[0]["momentum"] = 0.9 * (step > 1)
            set_grads(params, step)
            o.step()
    for p, q in zip(mine, theirs, strict=True):
        assert_near(p.detach(), q.detach(), 1e-12, "params")


# ---- state ----


@pytest.mark.parametrize("base", ["sgd_momentum", "adam_amsgrad"])
@pytest.mark.parametrize("how", ["cleared", "replaced", "another tensor", "other memory", "all cleared"])
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
                    new = torch.full_like(params[1], 2.0).detach()
                    if how == "other memory":
                        o.state[params[1]][key].data = new
                    else:
                        o.state[params[1]][key] = new
        assert_same_state(opt, plain, 1e-12, f"step {step}")
    saved = opt.state_dict()["state"]
    assert all(saved[i].keys() == saved[0].keys() != set() for i in range(4))


def test_state_cleared_by_hand():
    params = awkward(torch.float64)
    opt = FusedSAM(params, torch.optim.Adam, rho=0.0)
    for _ in range(2):
        set_grads(params, 0)
        opt.step()
    opt.state.clear()
    opt.step()
    assert opt.state[params[0]]["step"].item() == 1


class Counting(torch.optim.Optimizer):
    """A base that makes its state in its constructor, as some do, Adagrad among them."""

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
def test_state_under_keys_of_the_user_s_own(cls):
    """As in torch.optim, whatever they hold."""
    params, twins = awkward(torch.float32), awkward(torch.float32)
    opt, plain = cls(params, torch.optim.Adam), cls(twins, torch.optim.Adam)
    opt.state["epoch"] = 1
    for step in range(2):
        for o, ps in ((opt, params), (plain, twins)):
            for half in (0, 1):
                set_grads(ps, 2 * step + half)
                o.second_step() if half else o.first_step()
        opt.state["epoch"] += 1
    assert opt.state.pop("epoch") == 3
    assert_same_state(opt, plain, 0.0, "after two steps")


@both
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_frozen_sparse_parameters_are_left_alone(cls, layout):
    frozen = nn.Parameter(torch.eye(3).to_sparse(layout=layout), requires_grad=False)
    w = nn.Parameter(torch.ones(3))
    opt = cls([frozen, w], torch.optim.Adam, lr=0.1)
    for _ in range(2):
        for act in (opt.first_step, opt.second_step):
            w.grad = torch.ones(3)
            act()
    assert w[0] < 1
    assert torch.equal(frozen.to_dense(), torch.eye(3))


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


# ---- parameters ----


@pytest.mark.parametrize("base", ["adam", "sgd_dampening"])
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
        model.to_empty(device=DEVICE)
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


@pytest.mark.parametrize("base", ["sgd_dampening", "adamw_amsgrad", "adagrad"])
def test_data_is_replaced(base):
    """p.data = another tensor, in every way that torch allows, between steps; the reference goes along."""
    base_cls, options = BASES[base]
    changes = [
        lambda t: t.clone(),
        lambda t: t.clone(memory_format=torch.channels_last),
        lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
        lambda t: torch.stack([t, t], dim=-1)[..., 0],  # gaps
        lambda t: t.contiguous(),
    ]
    mine = [nn.Parameter(torch.randn(3, 4, 5, 5, dtype=torch.float64)), nn.Parameter(torch.randn(7).double())]
    theirs = clones(mine)
    opt, reference = FusedSAM(mine, base_cls, **options), ReferenceSAM(theirs, base_cls, **options)
    for step, change in enumerate([*changes, *changes]):
        for o, params in ((opt, mine), (reference, theirs)):
            set_grads(params, step)
            o.first_step()
            params[0].grad = None
            if step % 3 == 2:  # and while perturbed
                params[0].data = change(params[0].data)
            set_grads(params, step + 100)
            o.second_step()
            params[0].grad = None
            params[0].data = change(params[0].data)
        for p, q in zip(mine, theirs, strict=True):
            assert_near(p.detach(), q.detach(), 1e-12, f"step {step}")


@pytest.mark.parametrize("of", ["parameter", "state"])
def test_a_lazy_clone_is_left_alone(of):
    """torch._lazy_clone shares the memory until one of the two is written to, which is seen in the storage alone."""
    params = awkward(torch.float64)[:3]
    opt = FusedSAM(params, torch.optim.Adam)
    for seed in range(3):
        sam_step(opt, seed)
    mine = params[1] if of == "parameter" else opt.state[params[1]]["exp_avg"]
    with torch.no_grad():
        lazy = torch._lazy_clone(mine)
    before = mine.detach().clone()
    sam_step(opt, 9)
    assert torch.equal(lazy, before)
    assert not torch.equal(mine, before)


def test_memory_that_is_given_back():
    """A storage that is resized to nothing and back, as offloading does, lies elsewhere: same tensors, other memory."""
    mine = [nn.Parameter(torch.randn(4096)) for _ in range(3)]
    theirs = clones(mine)
    opt, reference = FusedSAM(mine, torch.optim.Adam), ReferenceSAM(theirs, torch.optim.Adam)
    kept = []
    for seed in range(4):
        for o, params in ((opt, mine), (reference, theirs)):
            sam_step(o, seed)
            for p in params:
                values, storage = p.detach().clone(), p.untyped_storage()
                storage.resize_(0)
                kept.append(torch.full_like(values, torch.nan))  # takes the place
                storage.resize_(values.nbytes)
                p.detach().copy_(values)
        for p, q in zip(mine, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_module_to_dtype_while_perturbed():
    model = nn.Linear(6, 5)
    opt = FusedSAM(model.parameters())
    before = model.weight.detach().clone()
    set_grads(list(model.parameters()), 0)
    opt.first_step(zero_grad=True)
    model.double()
    opt.restore()
    assert torch.equal(model.weight, before.double())


def test_module_to_dtype_and_back():
    torch.manual_seed(0)
    model = nn.Linear(6, 5)
    opt = FusedSAM(model.parameters(), torch.optim.Adam)

    def step():
        opt.zero_grad()
        model(torch.randn(4, 6).to(model.weight.dtype)).square().mean().backward()
        opt.first_step()
        opt.second_step()

    step()
    for dtype in (torch.float64, torch.bfloat16, torch.float32):
        model.to(dtype)
        step()
        assert opt.state[model.weight]["exp_avg"].dtype == dtype
        assert opt.state[model.weight]["step"].dtype == torch.float32
    assert opt.state[model.weight]["step"].item() == 4


def test_the_optimizer_is_freed_without_the_collector():
    params = awkward(torch.float32)
    opt = FusedSAM(params)
    set_grads(params, 0)
    opt.first_step()
    opt.second_step()
    gone = weakref.ref(opt)
    gc.disable()
    try:
        del opt
        assert gone() is None
    finally:
        gc.enable()


def test_an_optimizer_in_a_cycle_is_freed_by_the_collector():
    """Such as an optimizer that one of its parameters holds."""
    params = [nn.Parameter(torch.randn(5))]
    opt = params[0].optimizer = FusedSAM(params)
    sam_step(opt, 0)
    gone = weakref.ref(params[0]), weakref.ref(opt)
    del opt, params
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


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
    model.zero_grad()
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
