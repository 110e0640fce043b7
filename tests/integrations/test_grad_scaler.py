"""torch.amp.GradScaler: the ascent needs no unscale, scaler.step does the second half, an overflow skips it."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from sam_fused import FusedSAM
from tests.helpers.cases import BASES, assert_near, assert_same_state, awkward, clones, set_grads
from tests.helpers.place import DEVICE
from tests.helpers.sam import assert_untouched, both, snapshot

bases = pytest.mark.parametrize("base", ["sgd_dampening", "adam_amsgrad", "adamw", "adagrad"])
SCALE = 2.0**10


def scaler(**options) -> torch.amp.GradScaler:
    s = torch.amp.GradScaler(DEVICE.type, init_scale=SCALE, **options)
    s.scale(torch.zeros(1))  # which makes the scale tensor
    return s


def set_scaled(params, seed: int, scale: float = SCALE) -> None:
    set_grads(params, seed)
    for p in params:
        p.grad.mul_(scale)


@both
@bases
def test_the_same_steps_as_without(base, cls):
    """A power of two scales without rounding."""
    base_cls, options = BASES[base]
    mine = awkward(torch.float64)
    theirs = clones(mine)
    amp = scaler()
    opt, plain = cls(mine, base_cls, scaler=amp, **options), cls(theirs, base_cls, **options)
    for step in range(6):
        set_scaled(mine, 2 * step)
        set_grads(theirs, 2 * step)
        opt.first_step(zero_grad=True)
        plain.first_step()
        assert_near(opt.sharpness, plain.sharpness, 1e-12, "sharpness is reported unscaled")
        assert_near(opt.grad_norm, plain.grad_norm, 1e-12, "norm")
        for p, q in zip(mine, theirs, strict=True):
            assert_near(p.detach(), q.detach(), 1e-12, "the ascent does not depend on the scale")
        set_scaled(mine, 2 * step + 1)
        set_grads(theirs, 2 * step + 1)
        amp.step(opt)
        amp.update()
        plain.second_step()
        assert not opt.perturbed
        assert_same_state(opt, plain, 1e-12, f"step {step}")
    assert_near(opt.mean_sharpness(), plain.mean_sharpness(), 1e-12, "mean")


@both
@bases
@pytest.mark.parametrize("when", [{1}, {2}, {1, 2}])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_an_overflow_restores_and_skips_and_backs_off(base, cls, when, value):
    base_cls, options = BASES[base]
    params = awkward(torch.float32)
    amp = scaler()
    opt = cls(params, base_cls, scaler=amp, rho=0.5, **options)
    for step in range(2):  # the base has a state
        set_scaled(params, step)
        opt.first_step()
        amp.step(opt)
        amp.update()
    before = [p.detach().clone() for p in params]
    state = {i: {k: torch.as_tensor(v).clone() for k, v in opt.state[p].items()} for i, p in enumerate(params)}
    scale = amp.get_scale()
    for half in (1, 2):
        set_scaled(params, half, amp.get_scale())
        if half in when:
            params[0].grad[1, 2] = value
        opt.first_step() if half == 1 else amp.step(opt)
    amp.update()
    assert amp.get_scale() == scale / 2
    assert not opt.perturbed
    for i, p in enumerate(params):
        assert torch.equal(p, before[i])
        for key, held in state[i].items():
            assert torch.equal(torch.as_tensor(opt.state[p][key]), held), key
    set_scaled(params, 3, amp.get_scale())  # and it goes on
    opt.first_step()
    amp.step(opt)
    assert not torch.equal(params[0], before[0])


@both
def test_without_the_scaler_given_the_second_pass_still_counts(cls):
    """Only the unscaled sharpness, and the backing off for an overflow in pass 1 alone, need scaler=."""
    params = awkward(torch.float32)
    amp = scaler()
    opt = cls(params, torch.optim.Adam, rho=0.5)
    before = snapshot(params)
    for when in (1, 2):
        for half in (1, 2):
            set_scaled(params, half)
            if half == when:
                params[0].grad[1, 2] = float("inf")
            opt.first_step() if half == 1 else amp.step(opt)
        amp.update()
        assert_untouched(params, before)
    assert amp.get_scale() == SCALE / 2


@both
def test_unscale_and_clip(cls):
    mine = awkward(torch.float64)
    theirs = clones(mine)
    amp = scaler()
    opt, plain = cls(mine, torch.optim.Adam, scaler=amp), cls(theirs, torch.optim.Adam)
    for step in range(3):
        for o, params, set_ in ((opt, mine, set_scaled), (plain, theirs, set_grads)):
            set_(params, 2 * step)
            o.first_step()
            set_(params, 2 * step + 1)
        amp.unscale_(opt)
        for params in (mine, theirs):
            torch.nn.utils.clip_grad_norm_(params, 0.1)
        amp.step(opt)
        amp.update()
        plain.second_step()
        assert_same_state(opt, plain, 1e-10, f"step {step}")


@both
def test_a_second_step_with_scaled_gradients_is_refused(cls):
    params = awkward(torch.float32)[:2]
    before = clones(params)
    held = scaler()
    opt = cls(params, torch.optim.SGD, lr=0.1, rho=0.5, scaler=held)
    set_scaled(params, 0)
    opt.first_step()
    set_scaled(params, 1)
    with pytest.raises(RuntimeError, match=r"gradients are still scaled; call scaler.step\(opt\)"):
        opt.second_step()
    assert opt.perturbed
    held.step(opt)
    assert not opt.perturbed
    assert not torch.equal(params[0], before[0])
    held.update()


@both
@pytest.mark.parametrize("act", ["step", "second_step", "measure and step"])
def test_a_step_without_an_ascent_with_scaled_gradients_is_refused(cls, act):
    params = awkward(torch.float32)[:2]
    before = clones(params)
    held = scaler()
    opt = cls(params, torch.optim.SGD, lr=0.1, rho=0.5 if act == "measure and step" else 0.0, scaler=held)
    set_scaled(params, 0)
    if act == "measure and step":
        opt.measure_sharpness()
    with pytest.raises(RuntimeError, match=r"gradients are still scaled; call scaler.step\(opt\)"):
        opt.second_step() if act == "second_step" else opt.step()
    for p, q in zip(params, before, strict=True):
        assert torch.equal(p, q)
    held.step(opt)
    assert not torch.equal(params[0], before[0])


@both
def test_scaled_gradients_are_refused_after_a_forgotten_update(cls):
    params = awkward(torch.float32)[:2]
    held = scaler()
    opt = cls(params, torch.optim.SGD, lr=0.1, rho=0.5, scaler=held)
    for step in range(2):
        set_scaled(params, 2 * step)
        opt.first_step()
        set_scaled(params, 2 * step + 1)
        if step == 0:
            held.step(opt)
    with pytest.raises(RuntimeError, match="gradients are still scaled"):
        opt.second_step()


@both
def test_steps_without_the_scaler_that_are_no_mistake(cls):
    """With gradients that were never scaled or are unscaled, without any, or where the learning rate is 0."""
    params = awkward(torch.float32)[:2]
    opt = cls(params, torch.optim.SGD, lr=0.1, rho=0.0, scaler=torch.amp.GradScaler(DEVICE.type))
    set_grads(params, 0)
    opt.step()
    opt.scaler = scaler()
    set_scaled(params, 1)
    opt.scaler.unscale_(opt)
    opt.step()
    opt.scaler.update()
    opt.zero_grad()
    opt.step()
    set_scaled(params, 2)
    opt.param_groups[0]["lr"] = 0.0  # torch.distributed.checkpoint makes the base's state so
    opt.step()


@both
@pytest.mark.parametrize("form", ["two calls", "closure"])
def test_unscale_and_clip_in_both_passes(cls, form):
    mine = awkward(torch.float64)
    theirs = clones(mine)
    amp = scaler()
    opt, plain = cls(mine, torch.optim.Adam, scaler=amp), cls(theirs, torch.optim.Adam)
    for step in range(3):
        seeds = iter((2 * step, 2 * step + 1))

        def backward(seeds=seeds):
            set_scaled(mine, next(seeds))
            amp.unscale_(opt)
            torch.nn.utils.clip_grad_norm_(mine, 0.1)

        if form == "closure":
            opt.step(backward)
        else:
            backward()
            opt.first_step()
            backward()
            amp.step(opt)
        amp.update()
        for half, act in enumerate((plain.first_step, plain.second_step)):
            set_grads(theirs, 2 * step + half)
            torch.nn.utils.clip_grad_norm_(theirs, 0.1)
            act()
        assert_same_state(opt, plain, 1e-10, f"step {step}")
        assert_near(opt.sharpness, plain.sharpness, 1e-10, f"step {step}, sharpness")


@both
def test_an_overflow_that_unscale_finds_in_the_first_pass(cls):
    params = awkward(torch.float32)
    amp = scaler()
    opt = cls(params, scaler=amp)
    before = snapshot(params)
    for half in (1, 2):
        set_scaled(params, half)
        if half == 1:
            params[0].grad[1, 2] = float("inf")
        amp.unscale_(opt)
        opt.first_step() if half == 1 else amp.step(opt)
    amp.update()
    assert_untouched(params, before)
    assert amp.get_scale() == SCALE / 2


@both
def test_measuring_after_unscale(cls):
    params = awkward(torch.float64)
    twins = clones(params)
    amp = scaler()
    opt, plain = cls(params, scaler=amp), cls(twins)
    set_scaled(params, 0)
    set_grads(twins, 0)
    amp.unscale_(opt)
    for o in (opt, plain):
        o.measure_sharpness()
    assert_near(opt.sharpness, plain.sharpness, 1e-12, "sharpness")
    amp.step(opt)
    plain.step()
    assert_same_state(opt, plain, 1e-12, "after the step")


@both
@pytest.mark.parametrize("enabled", [True, False])
def test_closure(cls, enabled):
    torch.manual_seed(0)
    models = [torch.nn.Linear(4, 3).double() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    x = torch.randn(8, 4, dtype=torch.float64)
    amp = torch.amp.GradScaler(DEVICE.type, init_scale=SCALE, enabled=enabled)
    opt = cls(models[0].parameters(), torch.optim.Adam, lr=0.1, scaler=amp)
    plain = cls(models[1].parameters(), torch.optim.Adam, lr=0.1)

    def closure():
        opt.zero_grad()
        loss = models[0](x).square().mean()
        amp.scale(loss).backward()
        return loss

    def plain_closure():
        plain.zero_grad()
        loss = models[1](x).square().mean()
        loss.backward()
        return loss

    for _ in range(4):
        a, b = opt.step(closure), plain.step(plain_closure)
        amp.update()
        assert_near(a.detach(), b.detach(), 1e-12, "the loss that the closure returns")
        assert_near(opt.sharpness, plain.sharpness, 1e-12, "sharpness")
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        assert_near(p.detach(), q.detach(), 1e-12, "weights")


@both
def test_a_closure_through_the_scaler_is_refused(cls):
    params = awkward(torch.float32)
    amp = scaler()
    opt = cls(params, scaler=amp)
    before = snapshot(params)
    set_scaled(params, 0)
    opt.first_step()
    with pytest.raises(RuntimeError, match=r"a closure came through GradScaler\.step.*construct with scaler="):
        amp.step(opt, lambda: None)
    assert not opt.perturbed
    assert_untouched(params, before)


@both
@pytest.mark.parametrize("ascends", [True, False])
def test_an_error_leaves_no_scale_behind(cls, ascends):
    """GradScaler.step would multiply the next scale by it. Without an ascent nobody calls restore()."""
    mine = awkward(torch.float64)[:2]
    theirs = clones(mine)
    amp = scaler()
    opt, plain = cls(mine, torch.optim.SGD, lr=0.1, scaler=amp), torch.optim.SGD(theirs, lr=0.1)
    set_scaled(mine, 0)
    if ascends:
        opt.first_step()
    mine[1].grad = mine[1].grad.to_sparse()
    without_sam = nullcontext() if ascends else pytest.warns(UserWarning, match="without SAM")
    with without_sam, pytest.raises(RuntimeError, match="sparse gradients are not supported"):
        amp.step(opt)
    if ascends:
        opt.restore()
    set_scaled(mine, 1)
    set_grads(theirs, 1)
    amp.step(opt)
    plain.step()
    for p, q in zip(mine, theirs, strict=True):
        assert_near(p.detach(), q.detach(), 1e-12, "one scale, not two")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_trains(dtype):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(10, 32), torch.nn.ReLU(), torch.nn.Linear(32, 3))
    x = torch.randn(64, 10)
    y = x[:, :3].argmax(1)
    amp = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**24)  # which overflows in float16 at first, and backs off
    opt = FusedSAM(model.parameters(), torch.optim.Adam, lr=0.02, rho=0.05, scaler=amp)
    losses = []
    for _ in range(80):
        for _ in range(2):
            opt.zero_grad()
            with torch.autocast(DEVICE.type, dtype):
                loss = torch.nn.functional.cross_entropy(model(x), y)
            amp.scale(loss).backward()
            opt.first_step() if not opt.perturbed else amp.step(opt)
        amp.update()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert opt.sharpness < 1
    if dtype == torch.float16:
        assert amp.get_scale() < 2.0**24


def test_not_a_scaler():
    with pytest.raises(TypeError, match=r"scaler: expected a torch\.amp\.GradScaler, got float"):
        FusedSAM([torch.nn.Parameter(torch.zeros(2))], scaler=2.0)


@both
@bases
def test_no_gradient_in_the_second_pass(base, cls):
    """Nothing to look at for an overflow, and nothing to update."""
    base_cls, options = BASES[base]
    params = awkward(torch.float32)
    amp = scaler()
    opt = cls(params, base_cls, scaler=amp, rho=0.5, **options)
    before = snapshot(params)
    set_scaled(params, 0)
    opt.first_step(zero_grad=True)
    amp.step(opt)  # update() would raise, as it does with every optimizer
    assert not opt.perturbed
    assert_untouched(params, before)


@both
def test_nothing_was_scaled(cls):
    params = awkward(torch.float32)
    before = snapshot(params)
    opt = cls(params, scaler=torch.amp.GradScaler(DEVICE.type))
    set_grads(params, 0)
    with pytest.raises(RuntimeError, match=r"scaler: .*has scaled nothing yet.*scaler\.scale\(loss\)\.backward\(\)"):
        opt.first_step()
    assert not opt.perturbed
    assert_untouched(params, before)
