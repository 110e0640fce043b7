"""What a CUDA graph asks of a step: a learning rate and counters on the device, and errors where it cannot be kept."""

from __future__ import annotations

import contextlib
import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import sam_fused.buffers
import sam_fused.fused
from sam_fused import FusedMSAM, FusedSAM
from sam_fused.bases import native_update
from tests.helpers.cases import awkward, clones, set_grads
from tests.helpers.dtypes import FULL
from tests.helpers.place import DEVICE
from tests.helpers.steps import one_pass_with_scaler, steps_of_every_kind, with_scaler


@pytest.mark.parametrize("dtype", FULL, ids=str)
@pytest.mark.parametrize(("base", "options"), [(torch.optim.Adam, {"capturable": True}), (torch.optim.SGD, {})])
def test_a_learning_rate_in_a_tensor(base, options, dtype):
    """Changed in place, in one of two groups; the bits of a float's."""
    mine = awkward(torch.float64)
    theirs = clones(mine)
    lr = torch.tensor(0.5, dtype=dtype)
    opt = FusedSAM([{"params": mine[:6]}, {"params": mine[6:], "lr": 0.25}], base, lr=lr, **options)
    plain = FusedSAM([{"params": theirs[:6]}, {"params": theirs[6:], "lr": 0.25}], base, lr=0.5)
    for step in range(3):
        lr.fill_(0.5 ** (step + 1))
        plain.param_groups[0]["lr"] = 0.5 ** (step + 1)
        for o, params in ((opt, mine), (plain, theirs)):
            set_grads(params, step)
            o.first_step()
            o.second_step()
    assert all(torch.equal(p, q) for p, q in zip(mine, theirs, strict=True))
    assert opt.state[mine[0]].get("step", torch.zeros((), device=DEVICE)).device == DEVICE


def test_a_learning_rate_in_a_tensor_in_one_pass():
    mine = awkward(torch.float64)
    theirs = clones(mine)
    lr = torch.tensor(0.5)
    opt = FusedMSAM(mine, torch.optim.Adam, lr=lr, rho=0.3, capturable=True)
    plain = FusedMSAM(theirs, torch.optim.Adam, lr=0.5, rho=0.3)
    for step in range(3):
        lr.fill_(0.5 ** (step + 1))
        plain.param_groups[0]["lr"] = 0.5 ** (step + 1)
        for o, params in ((opt, mine), (plain, theirs)):
            set_grads(params, step)
            o.step()
        assert all(torch.equal(p, q) for p, q in zip(mine, theirs, strict=True))
    opt.eval()
    plain.eval()
    assert all(torch.equal(p, q) for p, q in zip(mine, theirs, strict=True))


class Called(TorchDispatchMode):
    """The names of the operators that run, but for reading a value, which a learning rate on a GPU is spared."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name != "aten::_local_scalar_dense":
            self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("cls", [FusedSAM, FusedMSAM])
def test_a_learning_rate_in_a_tensor_costs_no_operator(cls, dtype):
    """The update reads it where it is: on a GPU each operator would be a launch, for each group."""
    called = []
    for lr in (0.5, torch.tensor(0.5, dtype=dtype, device=DEVICE)):
        params = awkward(torch.float32)
        groups = [{"params": params[:6]}, {"params": params[6:]}]
        opt = cls(groups, torch.optim.Adam, lr=lr, rho=0.1, capturable=True)
        for step in range(2):
            set_grads(params, step)
            with Called() as mode:
                if cls is FusedSAM:
                    opt.first_step()
                opt.step()
        called.append(mode.names)
    assert called[0] == called[1]


class Capture:
    """Whether a CUDA graph is being captured, as far as the optimizers know."""

    on = False


@pytest.fixture
def capture(monkeypatch):
    capture = Capture()
    for module in (sam_fused.buffers, sam_fused.fused):
        monkeypatch.setattr(module, "capturing", lambda: capture.on)
    return capture


#: What an update of Adam says in a capture, by its options.
UPDATE_ERRORS = (
    ({}, r"param_groups\[0\]: a CUDA graph is capturing .* capturable=True"),
    ({"capturable": True}, r"state cannot be made in a CUDA graph: run a step before"),
)


def test_errors_under_capture_in_one_pass(capture):
    params = awkward(torch.float32)
    set_grads(params, 0)
    for options, message in UPDATE_ERRORS:
        opt = FusedMSAM(params, torch.optim.Adam, rho=0.3, **options)
        before = clones(params)
        capture.on = True
        with pytest.raises(RuntimeError, match=message):
            opt.step()
        assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
        capture.on = False
        opt.step()
        opt.eval()
    opt.train()
    capture.on = True
    opt.step()  # the state is there


def test_errors_under_capture(capture):
    params = awkward(torch.float32)
    set_grads(params, 0)
    for options, message in UPDATE_ERRORS:
        opt = FusedSAM(params, torch.optim.Adam, **options)
        capture.on = True
        with pytest.raises(RuntimeError, match=r"backup cannot be made in a CUDA graph: run a step before"):
            opt.first_step()
        assert not opt.perturbed
        capture.on = False
        opt.first_step()
        opt.restore()
        capture.on = True
        opt.first_step()
        with pytest.raises(RuntimeError, match=message):
            opt.second_step()
        opt.restore()
        capture.on = False
        opt.step()
    capture.on = True
    opt.first_step()
    opt.second_step()  # the state is there


def test_measurements_stay_where_a_graph_writes_them():
    params = awkward(torch.float32)
    set_grads(params, 0)
    opt = FusedSAM(params)
    opt.measure_sharpness()
    values, total = opt._readings
    sharpness, norm = opt.sharpness, opt.grad_norm
    kept = sharpness.clone(), norm.clone()
    set_grads(params, 1)
    opt.first_step()
    opt.second_step()
    assert (sharpness, norm) == kept  # an earlier step's
    assert opt.sharpness != sharpness
    assert opt.grad_norm != norm
    assert opt.mean_sharpness() > 0
    assert opt._readings.values is values
    assert opt._readings.total is total
    assert opt.mean_sharpness().isnan()


@pytest.mark.parametrize(
    ("lr", "warns"), [(0.0, False), (torch.tensor(0.0, device="cpu"), False), (torch.tensor(0.0, device="meta"), True)]
)
def test_a_learning_rate_on_another_device_is_not_read(lr, warns):
    """To know whether to warn; "meta" stands for a GPU, which would be waited for."""
    opt = FusedSAM(awkward(torch.float32), torch.optim.SGD)
    opt.param_groups[0]["lr"] = lr
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        opt.step()
    assert any("without first_step()" in str(w.message) for w in caught) == warns


class Refusing(TorchDispatchMode):
    """An operator that :meth:`refuses` is an error."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.refuses(func):
            raise AssertionError(f"{func._schema.name} in a step")
        return func(*args, **(kwargs or {}))


class NothingWaits(Refusing):
    """Reading a tensor's value on the host is an error, as it would wait for a GPU."""

    def refuses(self, func):
        return func._schema.name in ("aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::is_nonzero")


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_no_step_reads_a_value(base):
    params = awkward(torch.float32)
    set_grads(params, 0)
    opt, scaler = with_scaler(params, base)
    with NothingWaits():
        steps_of_every_kind(opt, scaler)


class NothingIsCopied(Refusing):
    """On a GPU each would be a memcpy or a kernel beside the extension's own."""

    def refuses(self, func):
        name = func._schema.name
        return not (name in ("aten::empty", "aten::detach") or name.startswith("profiler::") or func.is_view)


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_a_step_calls_no_kernel_but_the_extension_s(base):
    params = [torch.nn.Parameter(torch.ones(5, 3)), torch.nn.Parameter(torch.ones(40))]
    opt = FusedSAM(params, base, lr=0.1)
    for step in range(3):
        set_grads(params, step)
        with NothingIsCopied() if step else contextlib.nullcontext():  # the first makes backups and state
            opt.first_step()
            opt.second_step()
            opt.measure_sharpness()


def test_no_step_in_one_pass_reads_a_value():
    params = awkward(torch.float32)
    set_grads(params, 0)
    with NothingWaits():
        steps_of_every_kind(*one_pass_with_scaler(params))


def test_reading_a_value_is_noticed():
    """A base that is called by its own step() must know whether to skip it."""
    params = awkward(torch.float32)
    set_grads(params, 0)
    opt = FusedSAM(params, torch.optim.Adagrad, rho=0)
    opt.found_inf = torch.zeros(())
    with NothingWaits(), pytest.raises(AssertionError, match="_local_scalar_dense in a step"):
        opt.step()


def test_betas_in_tensors_are_left_to_the_base():
    base = torch.optim.Adam(awkward(torch.float32))
    group = base.param_groups[0]
    assert native_update(base, group) is not None
    assert native_update(base, {**group, "betas": (torch.tensor(0.9), 0.999)}) is None


def test_the_default_device_is_not_asked():
    params = awkward(torch.float32)
    set_grads(params, 0)
    opt = FusedSAM(params, torch.optim.Adam)
    before = torch.get_default_device()
    torch.set_default_device("meta")
    try:
        opt.first_step()
        opt.second_step()
    finally:
        torch.set_default_device(before)
    assert opt.state[params[0]]["step"].device == DEVICE
