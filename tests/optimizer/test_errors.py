"""Bad input is refused with an error that names it and says what was expected."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from sam_fused import FusedSAM
from sam_fused.extension import BUILD_COMMAND
from tests.helpers.cases import Wrapper
from tests.helpers.sam import both

ERRORS = [
    ({"rho": -0.1}, ValueError, r"rho: expected a finite number >= 0, got -0\.1"),
    ({"rho": float("nan")}, ValueError, r"rho: expected a finite number >= 0, got nan"),
    ({"rho": "big"}, ValueError, r"rho: expected a finite number >= 0, got 'big'"),
    ({"eta": -1.0}, ValueError, r"eta: expected a finite number >= 0, got -1\.0"),
    ({"adaptive": 1}, ValueError, r"adaptive: expected True or False, got 1"),
    ({"base": "adam"}, TypeError, r"base: expected a class of torch\.optim\.Optimizer.*got 'adam'"),
    ({"base": torch.optim.Adadelta}, ValueError, r"base: Adadelta has an option 'rho' of its own"),
    ({"base": torch.optim.LBFGS}, TypeError, r"base: LBFGS\.step needs a closure of its own"),
    ({"differentiable": True}, ValueError, r"param_groups\[0\]: differentiable=True is not supported"),
    ({"model": "resnet"}, TypeError, r"model: expected a torch\.nn\.Module, got str"),
    ({"lr": -1.0}, ValueError, r"Invalid learning rate"),
    ({"momentun": 0.9}, TypeError, r"momentun"),
    ({"base_optimizer": torch.optim.SGD}, TypeError, r"base_optimizer: give the class as base, as in base=torch"),
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


class Broken(torch.optim.Optimizer):
    def __init__(self, params, lr=0.1):
        self.betas = self.no_such_thing

    def step(self, closure=None):
        pass


class MaximizesAsAttribute(torch.optim.SGD):
    """As pytorch_optimizer's bases do."""

    def __init__(self, params, lr=0.1, maximize=False):
        super().__init__(params, lr=lr)
        del self.defaults["maximize"]
        for group in self.param_groups:
            del group["maximize"]
        self.maximize = maximize


@both
def test_a_base_that_says_in_no_group_that_it_maximizes(cls):
    w = [nn.Parameter(torch.zeros(2))]
    cls(w, MaximizesAsAttribute)
    with pytest.raises(ValueError, match=r"base: MaximizesAsAttribute keeps maximize=True .* minimise the negative"):
        cls(w, MaximizesAsAttribute, maximize=True)


@both
def test_a_parameter_that_was_appended_has_no_name(cls):
    w, other = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    opt = cls([("w", w)], torch.optim.SGD, lr=0.1, rho=0.5)
    opt.param_groups[0]["params"].append(other)
    for p in (w, other):
        p.grad = torch.ones(2)
    opt.first_step()
    opt.second_step()
    assert torch.equal(other, torch.full((2,), -0.1))
    other.grad = torch.ones(2).to_sparse()
    with pytest.raises(RuntimeError, match=r"param_groups\[0\]\['params'\]\[1\].*sparse"):
        opt.first_step()


@both
def test_lazy_parameters(cls):
    """As torch.optim, before and after they have a shape."""
    model = nn.LazyLinear(3)
    opt = cls(model.parameters(), torch.optim.SGD, lr=0.1, rho=0.5)
    x = torch.ones(2, 4)

    def closure():
        opt.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    first = opt.step(closure)
    assert opt.step(closure) < first
    model.bias.data = model.weight.data[:, 0]
    with pytest.raises(ValueError, match="share memory"):
        opt.step(closure)


@both
def test_a_base_that_fails_in_its_constructor(cls):
    with pytest.raises(RuntimeError, match=r"base: Broken could not be constructed: AttributeError: .*no_such_thing"):
        cls([nn.Parameter(torch.zeros(2))], Broken)


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


def test_the_error_names_the_sparse_gradient():
    w = [nn.Parameter(torch.ones(4)) for _ in range(3)]
    opt = FusedSAM([{"params": w[:1]}, {"params": w[1:]}])
    w[2].grad = torch.ones(4).to_sparse()
    with pytest.raises(RuntimeError, match=r"param_groups\[1\]\['params'\]\[1\]\.grad: .*Sparse.*not supported"):
        opt.first_step()


def test_a_wrapper_without_memory_is_refused():
    p = nn.Parameter(Wrapper(torch.zeros(3)))
    p.grad = Wrapper(torch.zeros(3))
    with pytest.raises(RuntimeError, match=r"params\[0\]: expected a tensor with memory of its own"):
        FusedSAM([p]).first_step()


@pytest.mark.slow
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
    assert BUILD_COMMAND in last
    assert run.stdout == "the reference works\n"
