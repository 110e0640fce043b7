"""The order of calls: two passes, a closure, steps without SAM."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from tests.helpers.cases import assert_near, awkward, clones, set_grads
from tests.helpers.place import DEVICE
from tests.helpers.sam import both


@both
def test_calls_out_of_order(cls):
    params = awkward(torch.float32)[:2]
    opt = cls(params)
    set_grads(params, 0)
    opt.first_step()
    calls = [
        opt.first_step,
        opt.measure_sharpness,
        opt.state_dict,
        lambda: opt.load_state_dict({}),
        lambda: copy.deepcopy(opt),
        lambda: pickle.dumps(opt),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match=r"while the weights are perturbed; call second_step\(\)"):
            call()
    opt.second_step()
    opt.second_step()  # a plain base step
    opt.state_dict()


@both
def test_step_returns_the_first_loss(cls):
    w = nn.Parameter(torch.tensor([2.0]))
    opt = cls([w], torch.optim.SGD, lr=0.1)
    losses = []

    def closure():
        opt.zero_grad()
        loss = (w**2).sum()
        loss.backward()
        losses.append(loss.item())
        return loss

    assert opt.step(closure).item() == losses[0] == 4.0
    assert losses[1] > 4.0


@both
def test_a_closure_after_first_step_makes_the_second_pass(cls):
    """Lightning calls step with a closure that does nothing where the user gave none."""
    mine = awkward(torch.float64)
    opt = cls(mine, torch.optim.Adam)
    twins = [clones(mine) for _ in range(2)]
    others = [cls(params, torch.optim.Adam) for params in twins]

    def closure():
        set_grads(twins[0], 1)
        return "the loss"

    for o, params in ((opt, mine), *zip(others, twins, strict=True)):
        set_grads(params, 0)
        o.first_step()
    set_grads(mine, 1)
    opt.second_step()
    assert others[0].step(closure) == "the loss"
    set_grads(twins[1], 1)
    assert others[1].step(lambda: None) is None
    for params in twins:
        assert all(torch.equal(p, q) for p, q in zip(mine, params, strict=True))


@both
def test_sam_every_kth_step(cls):
    """Steps without first_step are the base's."""
    mine, theirs = awkward(torch.float64), awkward(torch.float64)
    opt, plain = cls(mine, torch.optim.AdamW), torch.optim.AdamW(theirs)
    for step in range(6):
        set_grads(mine, step)
        if step % 3 == 0:
            opt.first_step()
            set_grads(mine, step + 50)
        opt.step()
        set_grads(theirs, step + 50 if step % 3 == 0 else step)
        plain.step()
    for p, q in zip(mine, theirs, strict=True):
        assert_near(p.detach(), q.detach(), 1e-12, "params")


@both
def test_a_warning_where_sam_is_never_on(cls, recwarn):
    """A trainer that calls step() alone would train without SAM, and nobody would know."""

    def warned(first=None, **options) -> list[str]:
        w = nn.Parameter(torch.ones(3))
        w.grad = torch.ones(3)
        opt = cls([w], **options)
        torch.optim.lr_scheduler.ConstantLR(opt)  # which wraps step once more
        if first is not None:
            getattr(opt, first)()
        opt.step()
        copy.deepcopy(opt).step()
        opt.step()
        return [(w.filename, str(w.message)) for w in (recwarn.pop() for _ in range(len(recwarn)))]

    ((file, message),) = warned()
    assert file == __file__
    assert "this is the step of Adam, without SAM" in message
    for quiet in ({"rho": 0.0}, {"first": "first_step"}, {"first": "measure_sharpness"}):
        assert warned(**quiet) == []


@both
@pytest.mark.parametrize("closure_form", [True, False])
def test_a_warning_where_the_passes_add_up(cls, closure_form, recwarn):
    """A closure that does not zero its gradients, as under Lightning's accumulate_grad_batches."""

    def warned(zero=None) -> list[tuple[str, str]]:
        w = nn.Parameter(torch.ones(3))
        opt = cls([w], torch.optim.SGD, lr=0.1)

        def backward():
            if zero is not None:
                zero(opt)
            (w**2).sum().backward()

        for _ in range(2):
            if closure_form:
                opt.step(backward)
            else:
                backward()
                opt.first_step()
                backward()
                opt.second_step()
        return [(str(w.message), w.filename) for w in (recwarn.pop() for _ in range(len(recwarn)))]

    message, file = warned()[0]
    assert "the second pass added its gradients to the first pass's" in message
    assert file == __file__
    assert warned(lambda opt: opt.zero_grad()) == []
    assert warned(lambda opt: opt.zero_grad(set_to_none=False)) == []
    assert warned(lambda opt: opt.base_optimizer.zero_grad(set_to_none=False)) == []
    opt = cls([nn.Parameter(torch.ones(3))], torch.optim.SGD, lr=0.1, rho=0.0)
    opt.step(lambda: opt.param_groups[0]["params"][0].sum().backward())  # one pass, which may add to what is there
    assert len(recwarn) == 0


@both
def test_no_warning_where_gradients_are_written_otherwise(cls, recwarn):
    """Copied into place, left at zero by a layer that is frozen, or clipped after they were zeroed in place."""
    frozen, w = nn.Linear(3, 3), nn.Parameter(torch.ones(3))
    opt = cls([*frozen.parameters(), w], torch.optim.SGD, lr=0.1)
    frozen(w).sum().backward()
    frozen.requires_grad_(False)

    def clipped():
        opt.base_optimizer.zero_grad(set_to_none=False)
        (w**2).sum().backward()
        nn.utils.clip_grad_norm_([w], 1.0)

    def copied():
        opt.base_optimizer.zero_grad(set_to_none=False)
        w.grad.copy_(torch.ones(3))

    for closure in (clipped, copied):
        for _ in range(2):
            opt.step(closure)
    assert len(recwarn) == 0


@both
def test_the_warning_comes_with_clipping_too(cls):
    w = nn.Parameter(torch.ones(3))
    opt = cls([w], torch.optim.SGD, lr=0.1)

    def closure():
        for _ in range(2):  # micro-batches
            (w**2).sum().backward()
        nn.utils.clip_grad_norm_([w], 1.0)

    with pytest.warns(UserWarning, match="the second pass added its gradients"):
        opt.step(closure)
    assert not w._post_accumulate_grad_hooks


@both
def test_made_in_inference_mode(cls):
    """Readings that are written outside it."""
    w = nn.Parameter(torch.ones(3))
    with torch.inference_mode():
        opt = cls([w], torch.optim.SGD, lr=0.1, rho=0.5)
    opt.step(lambda: (opt.zero_grad(), w.sum().backward()))
    assert opt.mean_sharpness().item() == pytest.approx(0.5 * 3**0.5)


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
def test_step_hooks_with_a_closure_and_a_scaler(cls):
    """They run around the scaler.step in it, too."""
    params = awkward(torch.float64)[:3]
    scaler = torch.amp.GradScaler(DEVICE.type)
    opt = cls(params, torch.optim.Adam, scaler=scaler)
    calls = []
    opt.register_step_pre_hook(lambda *_: calls.append("pre"))
    opt.register_step_post_hook(lambda *_: calls.append("post"))

    def closure():
        calls.append("closure")
        opt.zero_grad()
        scaler.scale(sum(p.square().sum() for p in params)).backward()

    opt.step(closure)
    assert calls == ["pre", "closure", "closure", "pre", "post", "post"]
