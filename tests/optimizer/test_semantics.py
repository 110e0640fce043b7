"""What FusedSAM promises around the arithmetic: restoring, failing, copying, and being told nonsense."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import sam_fused.fused
from sam_fused import _C, FusedSAM, ReferenceSAM
from tests.helpers.cases import BASES, assert_near, awkward, clones, on_the_cpu, set_grads
from tests.optimizer.test_parity import lockstep

both = pytest.mark.parametrize("cls", [FusedSAM, ReferenceSAM])


def snapshot(params):
    return [(p.detach().clone(), p.data_ptr(), p.stride()) for p in params]


def assert_untouched(params, before) -> None:
    for i, (p, (value, pointer, stride)) in enumerate(zip(params, before, strict=True)):
        assert torch.equal(p, value), f"params[{i}]"
        assert p.data_ptr() == pointer
        assert p.stride() == stride


# ---- restoring ----


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_restore_is_bit_exact_and_in_place(cls, dtype):
    params = awkward(dtype)
    opt = cls(params, rho=3.0)
    before = snapshot(params)
    set_grads(params, 0)
    opt.first_step()
    assert opt.perturbed
    assert all(not torch.equal(p, b[0]) for p, b in zip(params, before, strict=True) if p.numel())
    opt.restore()
    assert not opt.perturbed
    assert_untouched(params, before)
    opt.restore()  # nothing to do
    assert_untouched(params, before)


@both
def test_restore_is_keyed_to_what_was_perturbed(cls):
    params = awkward(torch.float32)
    opt = cls(params, torch.optim.Adam, lr=0.1)
    before = snapshot(params)
    set_grads(params, 0, skip=frozenset({1, 4}))
    opt.first_step(zero_grad=True)  # no gradient is left
    assert all(p.grad is None for p in params)
    opt.second_step()
    assert_untouched(params, before)
    assert not opt.state


@both
@pytest.mark.parametrize("when", [1, 2])
def test_a_closure_that_raises_leaves_the_weights(cls, when):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    params = list(model.parameters())
    opt = cls(params, torch.optim.Adam, lr=0.1, model=model)
    x = torch.randn(16, 5)
    calls = 0

    def closure():
        nonlocal calls
        calls += 1
        opt.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        if calls == when:
            raise KeyboardInterrupt
        return loss

    before = snapshot(params)
    with pytest.raises(KeyboardInterrupt):
        opt.step(closure)
    assert_untouched(params, before)
    assert not opt.perturbed
    assert calls == when
    opt.step(closure)  # and it goes on
    assert not torch.equal(params[0], before[0][0])


@both
def test_gradients_that_cannot_be_used_leave_the_weights(cls):
    """An error inside the second half of step(closure), after the closure."""
    w = nn.Parameter(torch.ones(4))
    v = nn.Parameter(torch.ones(3))
    opt = cls([w, v], torch.optim.Adam)
    calls = 0

    def closure():
        nonlocal calls
        calls += 1
        w.grad = torch.ones(4).to_sparse() if calls == 2 else torch.ones(4)
        v.grad = torch.ones(3)

    with pytest.raises(RuntimeError, match="sparse gradients are not supported"):
        opt.step(closure)
    assert torch.equal(w, torch.ones(4))
    assert torch.equal(v, torch.ones(3))
    assert not opt.perturbed


def test_the_error_names_the_sparse_gradient():
    w = [nn.Parameter(torch.ones(4)) for _ in range(3)]
    opt = FusedSAM([{"params": w[:1]}, {"params": w[1:]}])
    w[2].grad = torch.ones(4).to_sparse()
    with pytest.raises(RuntimeError, match=r"param_groups\[1\]\['params'\]\[1\]\.grad: .*Sparse.*not supported"):
        opt.first_step()


def respelled(device: torch.device) -> torch.device:
    """The same device, unequal: with its index, or without."""
    return torch.device(device.type, 0) if device.index is None else torch.device(device.type)


def alternate_places(monkeypatch):
    """Every second parameter is taken to be on another device; returns the places by the id of the parameter."""
    places = {}

    def place(p):
        return places.setdefault(id(p), (respelled(p.device) if len(places) % 2 else p.device, None))

    monkeypatch.setattr(sam_fused.fused, "_place", place)
    return places


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_alternate_places_are_where_the_tensors_are(device, monkeypatch):
    """Or the tests that use them could not pass on a GPU."""
    places = alternate_places(monkeypatch)
    with FakeTensorMode():
        params = [torch.empty(2, device=device) for _ in range(2)]
        here, there = (sam_fused.fused._place(p) for p in params)
        assert here != there
        assert there[0].type == here[0].type == params[1].device.type
    assert len(places) == 2


def test_a_perturbation_that_fails_halfway_is_undone(monkeypatch):
    alternate_places(monkeypatch)
    params = awkward(torch.float32)
    opt = FusedSAM(params, rho=1.0)
    set_grads(params, 0)
    before = snapshot(params)
    perturb, calls = sam_fused.fused._C.perturb_, []

    class Failing:
        def __getattr__(self, name):
            return getattr(_C, name)

        def perturb_(self, *args):
            calls.append(args)
            if len(calls) == 2:
                raise MemoryError
            perturb(*args)

    monkeypatch.setattr(sam_fused.fused, "_C", Failing())
    with pytest.raises(MemoryError):
        opt.first_step()
    assert len(calls) == 2
    assert not opt.perturbed
    assert_untouched(params, before)


@both
def test_zero_norm(cls):
    params = awkward(torch.float32)
    opt = cls(params)
    before = snapshot(params)
    for p in params:
        p.grad = torch.zeros_like(p)
    opt.first_step()
    assert_untouched(params, before)
    assert opt.sharpness.item() == 0
    opt.second_step()


@both
def test_no_gradient_at_all(cls):
    params = awkward(torch.float32)
    opt = cls(params)
    before = snapshot(params)
    opt.first_step()
    assert opt.perturbed
    assert opt.sharpness.item() == 0
    opt.second_step()
    assert_untouched(params, before)


@both
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_norm_not_finite(cls, bad):
    params, twins = awkward(torch.float32), awkward(torch.float32)
    opt = cls(params, torch.optim.Adam, lr=0.1)
    plain = torch.optim.Adam(twins, lr=0.1)
    before = snapshot(params)
    set_grads(params, 0)
    params[0].grad[3, 2] = bad
    opt.first_step()
    assert_untouched(params, before)  # nothing perturbed
    assert opt.perturbed
    assert not opt.sharpness.isfinite()
    for p in (params, twins):
        set_grads(p, 1)
    opt.second_step()
    plain.step()
    for p, q in zip(params, twins, strict=True):
        assert_near(p.detach(), q.detach(), 1e-6, "the second gradient decides")
    set_grads(params, 2)
    opt.measure_sharpness()
    assert opt.mean_sharpness().isfinite()  # the mean leaves such a step out


# ---- the state machine ----


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


# ---- changes after construction ----


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


@pytest.mark.parametrize("base", ["sgd_dampening", "adamw_amsgrad", "rmsprop"])
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


def test_state_cleared_by_hand():
    params = awkward(torch.float64)
    opt = FusedSAM(params, torch.optim.Adam, rho=0.0)
    for _ in range(2):
        set_grads(params, 0)
        opt.step()
    opt.state.clear()
    opt.step()
    assert opt.state[params[0]]["step"].item() == 1


# ---- copies ----


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


# ---- memory and devices ----


@on_the_cpu
def test_a_step_allocates_nothing_but_the_backup():
    params = [nn.Parameter(torch.randn(1 << 18)) for _ in range(8)]
    size = sum(p.numel() * 4 for p in params)
    opt = FusedSAM(params, torch.optim.SGD, lr=0.1)
    for expected in (size, 0):  # the backup is kept
        set_grads(params, 0)
        with torch.profiler.profile(profile_memory=True) as profile:
            opt.first_step()
            opt.second_step()
        got = sum(max(0, e.nbytes()) for e in profile.profiler.kineto_results.events() if e.name() == "[memory]")
        assert expected <= got < expected + 4096


def test_several_devices(monkeypatch):
    """Parameters on two devices go into two calls, with one norm. (One device stands in for both.)"""
    places = alternate_places(monkeypatch)
    lockstep([{"params": awkward(torch.float64)}], torch.optim.Adam, {}, skips=[({0}, {4, 5}), ({6}, {1})], steps=6)
    assert len(places) > 2


@on_the_cpu
def test_more_than_2_to_the_31_elements():
    """Offsets past 32 bits; zeros that NumPy has not touched and that are only read cost no memory."""
    n = (1 << 31) + 5
    available = next(
        int(x.split()[1]) for x in Path("/proc/meminfo").read_text().splitlines() if x.startswith("MemAvailable")
    )
    if available < 7 << 20:
        pytest.skip(f"needs 7 GiB of memory, {available >> 20} GiB available")
    g, backup = (torch.from_numpy(np.zeros(n, np.int16)).view(torch.bfloat16) for _ in range(2))
    w = torch.empty(n, dtype=torch.bfloat16)
    g[-3:] = 1
    backup[-3:] = 5
    ascent = torch.tensor([[1.0, 0, 0]], dtype=torch.float64)
    assert _C.grad_sq_norm([g], [g], ascent, [1]).item() == 3
    hyper = torch.tensor([[1.0, 0, 0, 0, 0, 0]], dtype=torch.float64)
    _C.restore_step_("sgd", [w], [g], [backup], [], [], hyper, [1])
    assert w[-4:].tolist() == [0, 4, 4, 4]
    assert w[: 1 << 20].count_nonzero() == 0


# ---- nonsense ----


class Wrapper(torch.Tensor):
    """A subclass that holds its values in another tensor."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return Wrapper(torch.zeros(3)) if function is torch.ops.aten.detach.default else NotImplemented


def test_a_wrapper_without_memory_is_refused():
    p = nn.Parameter(Wrapper(torch.zeros(3)))
    p.grad = Wrapper(torch.zeros(3))
    with pytest.raises(RuntimeError, match=r"params\[0\]: expected a tensor with memory of its own"):
        FusedSAM([p]).first_step()


ERRORS = [
    ({"rho": -0.1}, ValueError, r"rho: expected a finite number >= 0, got -0\.1"),
    ({"rho": float("nan")}, ValueError, r"rho: expected a finite number >= 0, got nan"),
    ({"rho": "big"}, ValueError, r"rho: expected a finite number >= 0, got 'big'"),
    ({"eta": -1.0}, ValueError, r"eta: expected a finite number >= 0, got -1\.0"),
    ({"adaptive": 1}, ValueError, r"adaptive: expected True or False, got 1"),
    ({"base": "adam"}, TypeError, r"base: expected a class of torch\.optim\.Optimizer.*got 'adam'"),
    ({"base": torch.optim.Adadelta}, ValueError, r"base: Adadelta has an option 'rho' of its own"),
    ({"base": torch.optim.LBFGS}, TypeError, r"base: LBFGS\.step needs a closure of its own"),
    ({"model": "resnet"}, TypeError, r"model: expected a torch\.nn\.Module, got str"),
    ({"lr": -1.0}, ValueError, r"Invalid learning rate"),
    ({"momentun": 0.9}, TypeError, r"momentun"),
    ({"params": []}, ValueError, r"empty parameter list"),
    ({"params": [torch.zeros(2, dtype=torch.complex64)]}, ValueError, r"\['params'\]\[0\]: complex .*view_as_real"),
    ({"params": [{"params": [torch.zeros(2)], "rho": -1}]}, ValueError, r"rho: expected a finite number >= 0, got -1"),
]


@both
@pytest.mark.parametrize(("kwargs", "error", "message"), ERRORS)
def test_errors_at_construction(cls, kwargs, error, message):
    with pytest.raises(error, match=message):
        cls(**{"params": [nn.Parameter(torch.zeros(2))], **kwargs})


@both
def test_a_parameter_twice_in_a_group(cls):
    p = nn.Parameter(torch.zeros(2))
    with pytest.warns(UserWarning, match="duplicate"), pytest.raises(ValueError, match="appears twice"):
        cls([p, p])
    opt = cls([p])
    q = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"param_groups\[1\]\['params'\]\[0\]: complex"):
        opt.add_param_group({"params": [q]})
    assert len(opt.param_groups) == 1


def test_unsupported_dtype_and_device():
    for p, error, message in [
        (
            torch.zeros(3, dtype=torch.float8_e5m2),
            TypeError,
            r"params\[0\]: expected dtype float32, .* got Float8_e5m2",
        ),
        (torch.zeros(3, device="meta"), NotImplementedError, r"no kernels for device meta"),
    ]:
        w = nn.Parameter(p)
        w.grad = torch.zeros_like(p)
        with pytest.raises(error, match=message):
            FusedSAM([w]).first_step()


def test_missing_extension():
    """The first error is kept, and comes with the command that builds the extension."""
    program = (
        "import sys; sys.modules['sam_fused._C'] = None\n"
        "import sam_fused, torch\n"
        "w = [torch.nn.Parameter(torch.zeros(2))]\n"
        "sam_fused.ReferenceSAM(w)\n"
        "print('the reference works')\n"
        "sam_fused.FusedSAM(w)\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 1
    last = run.stderr.strip().splitlines()[-1]
    assert "import of sam_fused._C halted" in last
    assert sam_fused.fused.BUILD_COMMAND in last
    assert run.stdout == "the reference works\n"
