"""Copies of an optimizer, by a checkpoint and otherwise, go on as the original would."""

from __future__ import annotations

import copy
import io
import pickle
from functools import partial

import pytest
import torch
from torch import nn

from sam_fused import FusedSAM
from tests.helpers.cases import BASES, TOLERANCE, assert_near, assert_same_state, awkward, clones, set_grads
from tests.helpers.dtypes import DTYPES, FULL
from tests.helpers.place import DEVICE
from tests.helpers.sam import assert_untouched, both, snapshot

pytestmark = pytest.mark.filterwarnings("ignore:step.. was called without a closure")


def on_disk(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def by_state_dict(params, opt, make):
    saved = on_disk({"params": params, "opt": opt.state_dict()})
    new = clones(saved["params"])
    other = make(new)
    other.load_state_dict(saved["opt"])
    return new, other


def by_deepcopy(params, opt, make):
    return copy.deepcopy((params, opt))


def by_pickle(params, opt, make):
    return pickle.loads(pickle.dumps((params, opt)))


def mixed() -> list[nn.Parameter]:
    """Every shape and layout in every dtype."""
    return [p for i, dtype in enumerate(DTYPES) for p in awkward(dtype, seed=i)]


def make_groups(cls, base: str, params: list[nn.Parameter]):
    """Groups with options of their own; the last is neither perturbed nor counted."""
    base_cls, options = BASES[base]
    groups = [
        {"params": params[:20], "rho": 0.5},
        {"params": params[20:50], "rho": 0.2, "adaptive": True, "eta": 0.01, "lr": 0.05},
        {"params": params[50:], "rho": 0.0},
    ]
    return cls(groups, base_cls, **options)


def steps(params, opt, seeds) -> list[torch.Tensor]:
    """SAM steps with gradients missing in either pass and in both; returns what was measured."""
    measured = []
    for seed in seeds:
        set_grads(params, 2 * seed, skip=frozenset({seed, seed + 1, 40}))
        opt.first_step()
        set_grads(params, 2 * seed + 1, skip=frozenset({seed + 1, seed + 2, 40}))
        opt.second_step()
        measured += [opt.sharpness.clone(), opt.grad_norm.clone()]
    return measured


@both
@pytest.mark.parametrize("base", ["sgd_nesterov", "adam_amsgrad", "adamw", "adagrad"])
@pytest.mark.parametrize("by", [by_state_dict, by_deepcopy, by_pickle])
def test_a_copy_goes_on_bit_for_bit(by, base, cls):
    make = partial(make_groups, cls, base)
    params = mixed()
    opt = make(params)
    steps(params, opt, range(3))
    others, other = by(params, opt, make)
    before = snapshot(params)
    theirs = steps(others, other, range(3, 7))
    assert_untouched(params, before)  # the copy is one
    mine = steps(params, opt, range(3, 7))
    assert mine == theirs
    for i, (p, q) in enumerate(zip(params, others, strict=True)):
        assert torch.equal(p, q), f"params[{i}]"
    assert_same_state(other, opt, 0.0, "state")
    assert torch.equal(other.mean_sharpness(), opt.mean_sharpness()) or by is by_state_dict
    assert_still_an_optimizer(others, other)


def assert_still_an_optimizer(params, opt) -> None:
    """What holds around the arithmetic, of a copy too."""
    assert opt.base_optimizer.param_groups is opt.param_groups
    assert opt.base_optimizer.state is opt.state
    before = snapshot(params)

    def closure():
        set_grads(params, 0)
        if opt.perturbed:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        opt.step(closure)
    assert_untouched(params, before)
    opt.first_step()
    with pytest.raises(RuntimeError, match="while the weights are perturbed"):
        opt.state_dict()
    opt.restore()
    assert_untouched(params, before)
    plain = {**opt.state_dict(), "param_groups": [dict(g) for g in opt.state_dict()["param_groups"]]}
    for group in plain["param_groups"]:
        del group["rho"]
    opt.base_optimizer.load_state_dict(plain)  # which the base takes without SAM's options
    assert [g["rho"] for g in opt.param_groups] == [0.5, 0.2, 0.0]
    opt.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert opt.param_groups[3]["rho"] == 0.05


@both
def test_deepcopy_and_pickle(cls):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    opt = cls(model.parameters(), torch.optim.AdamW, lr=0.1, rho=0.2, model=model)
    x = torch.randn(8, 4)

    def step(m, o):
        def closure():
            o.zero_grad()
            loss = m(x).square().mean()
            loss.backward()
            return loss

        o.step(closure)

    step(model, opt)
    copies = [copy.deepcopy((model, opt)), pickle.loads(pickle.dumps((model, opt)))]
    step(model, opt)
    for m, o in copies:
        assert o.model is m
        step(m, o)
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), m.parameters(), strict=True))
        assert torch.equal(o.sharpness, opt.sharpness)
        assert torch.equal(o.mean_sharpness(), opt.mean_sharpness(reset=False))
        assert o.base_optimizer.param_groups is o.param_groups


@both
@pytest.mark.parametrize("option", ["sync_perturbation", "lean_ascent"])
@pytest.mark.parametrize("by", [copy.deepcopy, lambda held: pickle.loads(pickle.dumps(held))], ids=["copy", "pickle"])
def test_a_copy_keeps_its_scaler_and_its_options(cls, by, option):
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    scaler = torch.amp.GradScaler(DEVICE.type)
    opt = cls(model.parameters(), torch.optim.Adam, lr=0.1, scaler=scaler, **{option: True})
    x = torch.randn(8, 4)

    def step(m, o):
        def closure():
            o.zero_grad()
            o.scaler.scale(m(x).square().mean()).backward()

        o.step(closure)
        o.scaler.update()

    step(model, opt)
    copied, other = by((model, opt))
    assert other.scaler is not scaler
    assert getattr(other, option)
    for m, o in ((model, opt), (copied, other)):
        step(m, o)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), copied.parameters(), strict=True))


@both
def test_copying_after_a_measurement_with_a_scaler(cls):
    """Which may not look like a step that has begun."""
    p = nn.Parameter(torch.ones(3))
    scaler = torch.amp.GradScaler(DEVICE.type)
    opt = cls([p], scaler=scaler)
    scaler.scale(p.square().sum()).backward()
    opt.measure_sharpness()
    assert copy.deepcopy(opt).scaler.get_scale() == scaler.get_scale()


@both
def test_a_hook_before_loading_has_a_copy_of_its_own(cls):
    """As torch.optim says: what it takes out is still there in the checkpoint."""
    opt = cls([nn.Parameter(torch.ones(3))])
    held = {**opt.state_dict(), "epoch": 7}
    opt.register_load_state_dict_pre_hook(lambda o, state: state.pop("epoch") and None)
    opt.load_state_dict(held)
    assert held["epoch"] == 7


def test_state_dict_needs_no_pickle():
    params = awkward(torch.float32)
    opt = FusedSAM(params, torch.optim.Adam)
    set_grads(params, 0)
    opt.first_step()
    opt.second_step()
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    assert file.tell() < 3 * sum(p.numel() * 4 for p in params)  # two moments, and no backup
    file.seek(0)
    opt.load_state_dict(torch.load(file, weights_only=True))


@both
@pytest.mark.parametrize("base", ["sgd_momentum", "adam", "adagrad"])
def test_back_to_an_earlier_checkpoint(base, cls):
    """In the same optimizer, whose lists are made already."""
    params = awkward(torch.float32)
    opt = cls(params, BASES[base][0], **BASES[base][1])
    steps(params, opt, range(2))
    saved = on_disk({"params": params, "opt": opt.state_dict()})
    first = steps(params, opt, range(2, 5))
    end = [p.detach().clone() for p in params]
    with torch.no_grad():
        for p, q in zip(params, saved["params"], strict=True):
            p.copy_(q)
    opt.load_state_dict(saved["opt"])
    assert steps(params, opt, range(2, 5)) == first
    assert all(torch.equal(p, q) for p, q in zip(params, end, strict=True))


@both
def test_the_options_of_a_checkpoint_win(cls):
    params = awkward(torch.float32)[:2]
    saved = cls(params, rho=0.3, adaptive=True, eta=0.1).state_dict()
    opt = cls(params, rho=0.5)
    opt.load_state_dict(saved)
    assert [opt.param_groups[0][key] for key in ("rho", "adaptive", "eta")] == [0.3, True, 0.1]


@both
@pytest.mark.parametrize("base", ["sgd_dampening", "adam_amsgrad", "adagrad"])
@pytest.mark.parametrize("old", DTYPES, ids=str)
@pytest.mark.parametrize("new", DTYPES, ids=str)
def test_into_another_dtype_as_torch_does(new, old, base, cls):
    base_cls, options = BASES[base]
    source = [nn.Parameter(p.detach() / 8) for p in awkward(old)]
    opt = cls(source, base_cls, **options)
    steps(source, opt, range(2))
    saved = on_disk(opt.state_dict())
    mine = [nn.Parameter(p.detach().to(new)) for p in source]
    theirs = clones(mine)
    opt, plain = cls(mine, base_cls, **options), base_cls(theirs, foreach=False, **options)
    for o in (opt, plain):
        o.load_state_dict(copy.deepcopy(saved))
    for i, (p, q) in enumerate(zip(mine, theirs, strict=True)):
        assert opt.state[p].keys() == plain.state[q].keys()
        for key, value in plain.state[q].items():
            assert opt.state[p][key].dtype == value.dtype, f"params[{i}], {key}"
            assert torch.equal(opt.state[p][key], value), f"params[{i}], {key}"
    if new in FULL:  # in half types torch rounds after every operation
        steps(mine, opt, [3])
        set_grads(theirs, 7, skip=frozenset({4, 5, 40}))
        plain.step()
        assert_near(
            torch.cat([p.detach().flatten() for p in mine]),
            torch.cat([p.detach().flatten() for p in theirs]),
            10 * TOLERANCE[new],
            "one step on",
        )


@both
def test_into_another_device_as_torch_does(cls):
    source = awkward(torch.float32)[:4]
    opt = cls(source, torch.optim.Adam)
    steps(source, opt, range(3))
    saved = on_disk(opt.state_dict())
    mine = [nn.Parameter(torch.empty_like(p, device="meta")) for p in source]
    opt, plain = (make(mine, torch.optim.Adam) if make is cls else make(mine) for make in (cls, torch.optim.Adam))
    for o in (opt, plain):
        o.load_state_dict(saved)
    for p in mine:
        places = {key: value.device for key, value in opt.state[p].items()}
        assert places == {key: value.device for key, value in plain.state[p].items()}
        assert places["exp_avg"].type == "meta"


@both
def test_a_checkpoint_that_does_not_fit(cls):
    params = awkward(torch.float32)[:4]
    opt = cls(params)
    with pytest.raises(ValueError, match="different number of parameter groups"):
        opt.load_state_dict(cls([{"params": params[:2]}, {"params": params[2:]}]).state_dict())
    with pytest.raises(ValueError, match="doesn't match the size of optimizer's group"):
        opt.load_state_dict(cls(params[:3]).state_dict())


@both
def test_a_base_may_keep_state_of_no_parameter(cls):
    class Counting(torch.optim.SGD):
        def step(self, closure=None):
            self.state["steps"] = self.state.get("steps", 0) + 1
            super().step(closure)

    params = awkward(torch.float32)[:2]
    opt = cls(params, Counting, lr=0.1)
    run(opt, params, 2, sam=True)
    other = cls(clones(params), Counting, lr=0.1)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert other.state["steps"] == 2


@both
@pytest.mark.parametrize("moments", [False, True], ids=["without the base's state", "with it"])
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam])
def test_a_checkpoint_of_another_sam_is_refused(base, moments, cls):
    """davda54/sam saves its backups and no moments, pytorch_optimizer both."""
    params = awkward(torch.float32)[:2]
    opt = cls(params, base, lr=0.1, rho=0.0)
    set_grads(params, 0)
    opt.step()
    saved = copy.deepcopy(opt.state_dict())
    saved["state"] = {i: {**(saved["state"].get(i, {}) if moments else {}), "old_p": params[i].data} for i in range(2)}
    before = copy.deepcopy(opt.state_dict()["state"])
    with pytest.raises(ValueError, match=r"state_dict: .*'old_p'"):
        opt.load_state_dict(saved)
    assert opt.state_dict()["state"].keys() == before.keys()


@both
@pytest.mark.parametrize("key", ["exp_avg", "step"])
def test_loaded_state_of_another_shape(cls, key):
    params = [nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(2))]
    opt = cls(params, torch.optim.Adam, lr=0.1, rho=0.0)
    set_grads(params, 0)
    opt.step()
    saved = copy.deepcopy(opt.state_dict())
    saved["state"][1][key] = torch.ones(1, 2) if key == "step" else torch.ones(1)
    before = snapshot(params)
    opt.load_state_dict(saved)
    with pytest.raises((RuntimeError, ValueError), match=r"shape|elements|size|Scalars|broadcast"):
        opt.step()
    if cls is FusedSAM:
        with pytest.raises(ValueError, match=rf"param_groups\[0\]\['params'\]\[1\], state '{key}': expected"):
            opt.step()
        assert_untouched(params, before)


# ---- to and from the plain base ----


def run(opt, params, steps, sam=False, seed=0) -> None:
    for step in range(steps):
        set_grads(params, seed + step, skip=frozenset({step % 5}))
        if sam:
            opt.first_step()
            set_grads(params, 77 + seed + step)
        opt.step()


@both
@pytest.mark.parametrize("base", BASES)
def test_a_plain_checkpoint_loads_and_goes_on(base, cls):
    base_cls, options = BASES[base]
    theirs = awkward(torch.float64)
    plain = base_cls(theirs, **options, foreach=False)
    run(plain, theirs, 3)
    mine = clones(theirs)
    opt = cls(mine, base_cls, rho=0.3, **options)
    opt.load_state_dict(copy.deepcopy(plain.state_dict()))
    assert opt.param_groups[0]["rho"] == 0.3
    run(plain, theirs, 4, seed=50)
    run(opt, mine, 4, seed=50)
    assert_same_state(opt, plain, 1e-12, "after loading")


@both
@pytest.mark.parametrize("base", BASES)
def test_our_checkpoint_loads_into_the_plain_base(base, cls):
    base_cls, options = BASES[base]
    mine = awkward(torch.float64)
    opt = cls(mine, base_cls, **options)
    run(opt, mine, 3, sam=True)
    state = opt.state_dict()
    assert {"rho", "adaptive", "eta"} <= state["param_groups"][0].keys()
    theirs = clones(mine)
    plain = base_cls(theirs, **options, foreach=False)
    expected = {k: v for k, v in plain.state_dict()["param_groups"][0].items() if k not in ("params", "foreach")}
    assert expected.items() <= state["param_groups"][0].items()
    plain.load_state_dict(copy.deepcopy(state))
    run(plain, theirs, 4, seed=50)
    run(opt, mine, 4, seed=50)
    assert_same_state(opt, plain, 1e-12, "after loading")


@both
@pytest.mark.parametrize("base", BASES)
def test_resume_is_bit_identical(base, cls, tmp_path):
    base_cls, options = BASES[base]
    params = awkward(torch.float32)
    opt = cls(params, base_cls, **options)
    run(opt, params, 3, sam=True)
    torch.save({"opt": opt.state_dict(), "params": params}, tmp_path / "checkpoint.pt")
    run(opt, params, 4, sam=True, seed=50)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    again = clones(saved["params"])
    other = cls(again, base_cls, **options)
    other.load_state_dict(saved["opt"])
    run(other, again, 4, sam=True, seed=50)
    assert all(torch.equal(p, q) for p, q in zip(params, again, strict=True))


@both
def test_load_into_the_base_optimizer(cls):
    """The base is the same optimizer: what is loaded there is seen here."""
    theirs = awkward(torch.float64)
    plain = torch.optim.Adam(theirs, foreach=False)
    run(plain, theirs, 3)
    mine = clones(theirs)
    opt = cls(mine, torch.optim.Adam)
    run(opt, mine, 1)
    for p, q in zip(mine, theirs, strict=True):
        p.data.copy_(q.data)
    opt.base_optimizer.load_state_dict(copy.deepcopy(plain.state_dict()))
    run(plain, theirs, 2, seed=9)
    run(opt, mine, 2, seed=9)
    assert_same_state(opt, plain, 1e-12, "after loading")


class WithCount(torch.optim.SGD):
    """A base with a number of its own in its checkpoints, on which its steps depend."""

    def __init__(self, params, **options) -> None:
        super().__init__(params, **options)
        self.count = 0

    def step(self, closure=None):
        self.count += 1
        for group in self.param_groups:
            group["lr"] = 0.1 / self.count
        super().step(closure)

    def state_dict(self):
        return {**super().state_dict(), "count": self.count}

    def load_state_dict(self, state_dict):
        self.count = state_dict["count"]
        super().load_state_dict(state_dict)


@both
def test_a_base_s_own_checkpoints(cls):
    params = awkward(torch.float32)[:2]
    opt = cls(params, WithCount, lr=0.1, momentum=0.9, rho=0.3)
    run(opt, params, 2, sam=True)
    saved = on_disk(opt.state_dict())
    assert saved["count"] == 2
    again = clones(params)
    other = cls(again, WithCount, lr=0.1, momentum=0.9)
    other.load_state_dict(saved)
    assert other.param_groups[0]["rho"] == 0.3
    for o, p in ((opt, params), (other, again)):
        run(o, p, 1, sam=True, seed=9)
    assert all(torch.equal(p, q) for p, q in zip(params, again, strict=True))
    plain = WithCount(clones(params), lr=0.1, momentum=0.9)
    plain.load_state_dict(on_disk(opt.state_dict()))
    assert plain.count == 3


class LoadsByItself(torch.optim.SGD):
    """Without the hooks of torch.optim.Optimizer."""

    def load_state_dict(self, state_dict):
        for group, loaded in zip(self.param_groups, state_dict["param_groups"], strict=True):
            params = group["params"]
            group.clear()
            group.update(loaded, params=params)


@both
def test_a_base_that_calls_no_hooks(cls):
    """A checkpoint of the plain base leaves rho alone."""
    plain = LoadsByItself([nn.Parameter(torch.ones(2))], lr=0.5)
    p = nn.Parameter(torch.ones(2))
    opt = cls([p], LoadsByItself, lr=0.1, rho=0.3)
    opt.load_state_dict(plain.state_dict())
    assert (opt.param_groups[0]["lr"], opt.param_groups[0]["rho"]) == (0.5, 0.3)
    p.grad = torch.ones(2)
    opt.first_step()


@both
def test_a_base_s_own_hooks(cls):
    calls = []

    class Hooked(torch.optim.Adam):
        def __init__(self, params, **options) -> None:
            super().__init__(params, **options)
            self.register_state_dict_pre_hook(lambda o: calls.append("save"))
            self.register_state_dict_post_hook(lambda o, state: {"held": state, "extra": 1})
            self.register_load_state_dict_pre_hook(lambda o, state: calls.append(state["extra"]))
            self.register_load_state_dict_pre_hook(lambda o, state: state["held"])
            self.register_load_state_dict_post_hook(lambda o: calls.append("loaded"))

    params = awkward(torch.float32)[:2]
    opt = cls(params, Hooked)
    opt.load_state_dict(opt.state_dict())
    assert calls == ["save", 1, "loaded"]


@both
def test_state_dict_hooks(cls):
    """As torch calls them; a hook may make a checkpoint into another one, of the plain base even."""
    params = awkward(torch.float64)[:3]
    opt = cls(params, torch.optim.Adam, lr=0.5, rho=0.3)
    calls = []
    opt.register_state_dict_pre_hook(lambda o: calls.append("save"))
    opt.register_state_dict_post_hook(lambda o, state: {"wrapped": state})
    opt.register_load_state_dict_pre_hook(lambda o, state: state["wrapped"])
    opt.register_load_state_dict_post_hook(lambda o: calls.append("loaded"))
    run(opt, params, 2, sam=True)
    saved = copy.deepcopy(opt.state_dict())
    run(opt, params, 1, sam=True)
    opt.load_state_dict(saved)
    assert calls == ["save", "loaded"]
    assert torch.equal(opt.state[params[0]]["exp_avg"], saved["wrapped"]["state"][0]["exp_avg"])
    opt.load_state_dict({"wrapped": torch.optim.Adam(clones(params), lr=0.1).state_dict()})
    assert opt.param_groups[0]["lr"] == 0.1
    assert opt.param_groups[0]["rho"] == 0.3
    run(opt, params, 1, sam=True)
