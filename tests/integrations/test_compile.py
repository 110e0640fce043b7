"""torch.compile: of the model, and of the whole training step. (Of the operators: test_tracing.py.)"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from sam_fused import FusedMSAM, FusedSAM
from tests.helpers.cases import assert_near
from tests.helpers.networks import batch, loss_of, perceptron, take_step


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def two_calls(model, opt, x, y):
    loss_of(model, x, y).backward()
    opt.first_step(zero_grad=True)
    loss = loss_of(model, x, y)
    loss.backward()
    opt.second_step(zero_grad=True)
    return loss.detach()


def assert_equal_models(a: nn.Module, b: nn.Module) -> None:
    for (name, p), q in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert_near(p, q, 1e-12, name)


@pytest.mark.parametrize("base", [torch.optim.Adam, torch.optim.Adagrad], ids=lambda b: b.__name__)
def test_a_compiled_model_trains_and_is_not_compiled_again(base):
    plain = perceptron(1).double()
    model = copy.deepcopy(plain)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter)
    opt = FusedSAM(compiled.parameters(), base, lr=0.05, rho=0.3, model=compiled)
    expected = FusedSAM(plain.parameters(), base, lr=0.05, rho=0.3, model=plain)
    counts = []
    for step in range(5):
        assert_near(take_step(opt, compiled, *batch(step)), take_step(expected, plain, *batch(step)), 1e-12, "loss")
        assert_equal_models(model, plain)
        counts.append(counter.frame_count)
    assert counts[0] == 2  # once with BatchNorm's statistics moving, once without
    assert counts == counts[:1] * 5
    assert model[1].num_batches_tracked == 5


@pytest.mark.filterwarnings("error:Dynamo does not know")
def test_a_whole_step_breaks_at_the_optimizer_and_trains():
    """The optimizer runs outside of the graphs; the passes are compiled, once."""
    plain = perceptron(1).double()
    model = copy.deepcopy(plain)
    opt = FusedSAM(model.parameters(), torch.optim.Adam, lr=0.05, rho=0.3, model=model)
    expected = FusedSAM(plain.parameters(), torch.optim.Adam, lr=0.05, rho=0.3, model=plain)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(two_calls, backend=counter)
    counts = []
    for step in range(5):
        assert_near(compiled(model, opt, *batch(step)), two_calls(plain, expected, *batch(step)), 1e-12, "loss")
        assert_equal_models(model, plain)
        counts.append(counter.frame_count)
    assert counts[0] > 0
    assert counts[1:] == counts[1:2] * 4


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("given", [False, True], ids=["by hand", "model="])
def test_a_compiled_model_trains_in_one_pass(given, in_place):
    """And is not compiled again when the weights move; nor by the hooks of model=."""
    plain = perceptron(1).double()
    model = copy.deepcopy(plain)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = model if in_place else torch.compile(model, backend=counter)
    if in_place:
        model.compile(backend=counter)
    opt = FusedMSAM(model.parameters(), torch.optim.Adam, lr=0.05, rho=0.3, model=compiled if given else None)
    expected = FusedMSAM(plain.parameters(), torch.optim.Adam, lr=0.05, rho=0.3)
    counts = []
    for step in range(5):
        for m, o in ((compiled, opt), (plain, expected)):
            o.zero_grad()
            loss_of(m, *batch(step)).backward()
            o.step()
        assert_equal_models(model, plain) if not given else None
        counts.append(counter.frame_count)
    assert counts[0] > 0
    assert counts == counts[:1] * 5
    opt.eval()
    expected.eval()
    assert_equal_models(model, plain)


def one_pass(model, opt, x, y):
    opt.zero_grad()
    loss = loss_of(model, x, y)
    loss.backward()
    opt.step()
    return loss.detach()


@pytest.mark.filterwarnings("error:Dynamo does not know")
def test_a_whole_step_in_one_pass_breaks_at_the_optimizer_and_trains():
    plain = perceptron(1).double()
    model = copy.deepcopy(plain)
    opt = FusedMSAM(model.parameters(), torch.optim.Adam, lr=0.05, rho=0.3)
    expected = FusedMSAM(plain.parameters(), torch.optim.Adam, lr=0.05, rho=0.3)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(one_pass, backend=counter)
    counts = []
    for step in range(5):
        assert_near(compiled(model, opt, *batch(step)), one_pass(plain, expected, *batch(step)), 1e-12, "loss")
        assert_equal_models(model, plain)
        counts.append(counter.frame_count)
    assert counts[0] > 0
    assert counts[1:] == counts[1:2] * 4
