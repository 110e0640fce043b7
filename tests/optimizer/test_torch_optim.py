"""With SAM off, FusedSAM is the base optimizer: against torch.optim itself, and with each other's checkpoints."""

from __future__ import annotations

import copy

import pytest
import torch

from sam_fused import FusedSAM, ReferenceSAM
from tests.helpers.cases import BASES, TOLERANCE, assert_same_state, awkward, clones, set_grads

pytestmark = pytest.mark.filterwarnings("ignore:step.. was called without a closure")
both = pytest.mark.parametrize("cls", [FusedSAM, ReferenceSAM])


def run(opt, params, steps, sam=False, seed=0) -> None:
    for step in range(steps):
        set_grads(params, seed + step, skip=frozenset({step % 5}))
        if sam:
            opt.first_step()
            set_grads(params, 77 + seed + step)
        opt.step()


@both
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("base", BASES)
def test_same_steps_as_torch(base, dtype, cls):
    base_cls, options = BASES[base]
    mine = awkward(dtype)
    theirs = clones(mine)
    opt, plain = cls(mine, base_cls, **options), base_cls(theirs, **options, foreach=False)
    for step in range(30):
        for params in (mine, theirs):
            set_grads(params, step, skip=frozenset({step % 5, 10}))
        opt.step()
        plain.step()
        assert_same_state(opt, plain, TOLERANCE[dtype] * (1 if dtype == torch.float64 else 10), f"step {step}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("base", ["adam", "adamw"])
def test_same_steps_as_torch_fused_in_half_types(base, dtype):
    """torch's fused kernels compute in float32 and keep the state in the parameter's type, as the extension does.

    (Not SGD: its fused momentum in half types is wrong in torch 2.6.)
    """
    base_cls, options = BASES[base]
    mine = [p for p in awkward(dtype) if p.is_contiguous()]
    theirs = clones(mine)
    options = {**options, "eps": 1e-4}
    for step in range(5):
        opt, plain = FusedSAM(mine, base_cls, **options), base_cls(theirs, **options, fused=True)
        for params in (mine, theirs):
            set_grads(params, step)
        opt.step()
        plain.step()
        assert_same_state(opt, plain, TOLERANCE[dtype], f"step {step}")
        for p, q in zip(mine, theirs, strict=True):
            q.data.copy_(p.data)


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


@both
@pytest.mark.parametrize("which", ["itself", "base_optimizer"])
def test_schedulers_take_either(cls, which, recwarn):
    params = awkward(torch.float64)[:3]
    opt = cls(params, torch.optim.SGD, lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(opt if which == "itself" else opt.base_optimizer, 1, 0.5)
    for step in range(2):
        before = params[0].detach().clone()
        set_grads(params, step)
        opt.first_step()
        opt.second_step()
        torch.testing.assert_close(params[0].detach(), before - 0.5**step * params[0].grad)
        scheduler.step()
    assert not [w for w in recwarn if "lr_scheduler" in str(w.message)]


@both
@pytest.mark.parametrize("closure_form", [True, False])
def test_step_hooks(cls, closure_form):
    """Once a step, around the update; in step(closure) around both passes."""
    params = awkward(torch.float64)[:3]
    opt = cls(params, torch.optim.Adam)
    calls = []
    opt.register_step_pre_hook(lambda *_: calls.append("pre"))
    opt.register_step_post_hook(lambda *_: calls.append("post"))

    def closure():
        set_grads(params, 0)
        calls.append("closure")

    if closure_form:
        opt.step(closure)
        assert calls == ["pre", "closure", "closure", "post"]
    else:
        set_grads(params, 0)
        opt.first_step()
        assert calls == []
        opt.second_step()
        assert calls == ["pre", "post"]


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
