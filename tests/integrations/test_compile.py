"""torch.compile: of the model, of the operators, and of the whole training step."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from sam_fused import FusedSAM
from tests.helpers.cases import assert_near

ops = torch.ops.sam_fused


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1)).double()


def batch(step: int):
    g = torch.Generator().manual_seed(step)
    return torch.randn(16, 6, generator=g, dtype=torch.float64), torch.randn(16, 1, generator=g, dtype=torch.float64)


def train_step(model, opt, step: int):
    x, y = batch(step)

    def closure():
        opt.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        return loss

    return opt.step(closure)


def two_calls(model, opt, x, y):
    nn.functional.mse_loss(model(x), y).backward()
    opt.first_step(zero_grad=True)
    loss = nn.functional.mse_loss(model(x), y)
    loss.backward()
    opt.second_step(zero_grad=True)
    return loss.detach()


def assert_equal_models(a: nn.Module, b: nn.Module) -> None:
    for (name, p), q in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert_near(p, q, 1e-12, name)


@pytest.mark.parametrize("base", [torch.optim.Adam, torch.optim.RMSprop], ids=lambda b: b.__name__)
def test_a_compiled_model_trains_and_is_not_compiled_again(base):
    plain = network()
    model = copy.deepcopy(plain)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter)
    opt = FusedSAM(compiled.parameters(), base, lr=0.05, rho=0.3, model=compiled)
    expected = FusedSAM(plain.parameters(), base, lr=0.05, rho=0.3, model=plain)
    counts = []
    for step in range(5):
        assert_near(train_step(compiled, opt, step), train_step(plain, expected, step), 1e-12, "loss")
        assert_equal_models(model, plain)
        counts.append(counter.frame_count)
    assert counts[0] == 2  # once with BatchNorm's statistics moving, once without
    assert counts == counts[:1] * 5
    assert model[1].num_batches_tracked == 5


def operators(params, grads, backups, state, steps, ascent, total, hyper):
    sq = ops.grad_sq_norm(params, grads, ascent, [1, 1])
    measured = ops.sharpness_(sq, ascent, total)
    norm = measured.select(0, 2)  # [2] would look for a fake's GPU, in torch 2.6
    ops.perturb_(params, grads, backups, norm, ascent, [1, 1])
    moved = [p.clone() for p in params]
    ops.restore_(params, backups)
    ops.perturb_(params, grads, backups, norm, ascent, [1, 1])
    ops.restore_step_("adam", params, grads, backups, state, steps, hyper, [1, 1])
    return measured, moved


def operators_arguments(device: str = "cpu"):
    g = torch.Generator().manual_seed(0)
    tensors = [[torch.randn(n, generator=g).to(device) for n in (5, 40)] for _ in range(3)]
    state = [torch.zeros(n, device=device) for n in (5, 40) * 2]
    steps = [torch.zeros((), device=device) for _ in range(2)]
    ascent = torch.tensor([[0.5, 0.0, 0.0], [0.2, 0.1, 1.0]], dtype=torch.float64)
    hyper = torch.tensor([[0.1, 0.0, 0.0, 0.9, 0.999, 1e-8, 0.0]] * 2, dtype=torch.float64)
    return *tensors, state, steps, ascent, torch.zeros(2, device=device).double(), hyper


def test_the_operators_trace():
    eager, traced = operators_arguments(), operators_arguments()
    expected = operators(*eager)
    compiled = torch.compile(operators, fullgraph=True, backend="aot_eager")
    actual = compiled(*traced)
    assert torch.equal(actual[0], expected[0])
    for mine, theirs in zip([actual[1], *traced[:5]], [expected[1], *eager[:5]], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.filterwarnings("error:Dynamo does not know")
def test_a_whole_step_breaks_at_the_optimizer_and_trains():
    """The optimizer runs outside of the graphs; the passes are compiled, once."""
    plain = network()
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
