"""measure_sharpness and loss_slice: closed forms on a quadratic, and that nothing is left behind."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from sam_fused import FusedSAM, loss_slice, measure_sharpness

RHO, ETA = 0.3, 0.01
KINDS = ["first_order", "realised", "average"]


class Quadratic(nn.Module):
    """L(w) = w A w / 2 + b w over two tensors; each example of a batch adds its own b."""

    def __init__(self, n: int = 6, isotropic: bool = False) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        root = torch.randn(n, n, generator=g, dtype=torch.float64)
        self.curvature = 1.7 * torch.eye(n, dtype=torch.float64) if isotropic else root @ root.T
        w = torch.randn(n, generator=g, dtype=torch.float64)
        self.first, self.second = nn.Parameter(w[:2].clone()), nn.Parameter(w[2:].clone().view(2, -1))

    @property
    def w(self) -> torch.Tensor:
        return torch.cat([self.first, self.second.flatten()])

    def forward(self, slopes: torch.Tensor) -> torch.Tensor:
        return slopes @ self.w + self.w @ self.curvature @ self.w / 2


def mean(output, target):
    return output.mean()


def data(sizes=(3, 1, 4)) -> list:
    """Batches of different sizes: the mean is over examples, not over batches."""
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 6, generator=g, dtype=torch.float64), torch.zeros(n)) for n in sizes]


def closed_form(model: Quadratic, adaptive: bool) -> dict[str, float]:
    w, a = model.w.detach(), model.curvature
    g = a @ w + torch.cat([x for x, _ in data()]).mean(0)
    t = w.abs() + ETA if adaptive else torch.ones_like(w)
    norm = (t * g).norm()
    d = t * t * g / norm
    return {
        "first_order": (RHO * norm).item(),
        "realised": (RHO * g @ d + RHO**2 * d @ a @ d / 2).item(),
        "average": (RHO**2 * (t * t * a.diagonal()).sum() / (2 * len(w))).item(),
    }


def measure(model: nn.Module, kind: str, adaptive: bool = False, **options):
    generator = torch.Generator().manual_seed(2)
    return measure_sharpness(
        model, mean, data(), RHO, kind=kind, adaptive=adaptive, eta=ETA, generator=generator, **options
    )


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("kind", ["first_order", "realised"])
def test_a_quadratic(kind, adaptive):
    model = Quadratic()
    value, error = measure(model, kind, adaptive)
    assert value == pytest.approx(closed_form(model, adaptive)[kind], rel=1e-12)
    assert error is None


def test_the_average_of_a_round_quadratic_is_exact():
    model = Quadratic(isotropic=True)
    value, error = measure(model, "average")
    assert value == pytest.approx(closed_form(model, False)["average"], rel=1e-12)
    assert error < 1e-12


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_average_of_a_quadratic(adaptive):
    """Within four standard errors, which are small enough to tell a missing factor, and as large as the spread says."""
    model = Quadratic()
    expected = closed_form(model, adaptive)["average"]
    few, many = (measure(model, "average", adaptive, directions=n) for n in (500, 2000))
    for value, error in (few, many):
        assert abs(value - expected) < 4 * error
        assert error < 0.05 * expected
    assert few.standard_error / many.standard_error == pytest.approx(2, rel=0.15)


@pytest.mark.parametrize("adaptive", [False, True])
def test_a_slice_of_a_quadratic(adaptive):
    model = Quadratic()
    w, values = model.w.detach().clone(), closed_form(model, adaptive)
    radii = [-2 * RHO, -RHO, 0.0, RHO, 2 * RHO]
    losses = loss_slice(model, mean, data(), radii, adaptive=adaptive, eta=ETA)
    slope, curve = values["first_order"], values["realised"] - values["first_order"]
    start = (torch.cat([x for x, _ in data()]).mean(0) @ w + w @ model.curvature @ w / 2).item()
    assert losses == pytest.approx([start + slope * r / RHO + curve * (r / RHO) ** 2 for r in radii], rel=1e-12)


def network(dtype=torch.float32) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4)]
    return nn.Sequential(*layers).to(dtype)


def images(dtype=torch.float32) -> list:
    g = torch.Generator().manual_seed(3)
    return [(torch.randn(n, 2, 4, 4, generator=g).to(dtype), torch.arange(n) % 4) for n in (8, 6)]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("adaptive", [False, True])
def test_it_is_what_the_optimizer_measures(adaptive, training):
    """One batch: first_order is FusedSAM's sharpness, realised the rise of the closure's loss."""
    model, batch = network().train(training), images()[:1]
    options = {"adaptive": adaptive, "eta": ETA}
    values = {k: measure_sharpness(model, nn.functional.cross_entropy, batch, RHO, k, **options)[0] for k in KINDS[:2]}
    opt = FusedSAM(model.parameters(), torch.optim.SGD, lr=0.0, rho=RHO, model=model, **options)
    losses = []

    def closure():
        opt.zero_grad()
        losses.append(nn.functional.cross_entropy(model(batch[0][0]), batch[0][1]))
        losses[-1].backward()

    opt.step(closure)
    assert values["first_order"] == pytest.approx(opt.sharpness.item(), rel=1e-5)
    assert values["realised"] == pytest.approx((losses[1] - losses[0]).item(), rel=1e-4)


class Fails(Exception):
    pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("fails_at", [None, 1, 2, 4, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_left_behind(kind, fails_at, training, dtype):
    model = network(dtype).train(training)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    calls = 0

    def loss_fn(output, target):
        nonlocal calls
        calls += 1
        if calls == fails_at:
            raise Fails
        return nn.functional.cross_entropy(output, target)

    try:
        measure_sharpness(model, loss_fn, images(dtype), RHO, kind=kind)
    except Fails:
        assert calls == fails_at
    else:
        assert fails_at is None or calls < fails_at
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
    assert all(m.track_running_stats for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert model.training is training


def test_a_generator_makes_it_reproducible():
    model, twice = network().eval(), []
    for _ in range(2):
        torch.randn(3)  # the global generator is not asked
        generator = torch.Generator().manual_seed(4)
        loss = nn.functional.cross_entropy
        twice.append(measure_sharpness(model, loss, images(), RHO, "average", generator=generator))
    assert twice[0] == twice[1]
    other = measure_sharpness(model, loss, images(), RHO, "average", generator=generator)
    assert other.value != twice[0].value


def test_batches_are_read_once_and_frozen_parameters_left_out():
    model, whole = network().eval(), network().eval()
    model[0].requires_grad_(False)
    loss = nn.functional.cross_entropy
    value, _ = measure_sharpness(model, loss, iter(images()), RHO, kind="realised")
    assert 0 < value < measure_sharpness(whole, loss, images(), RHO, kind="realised").value


def test_a_parameter_that_the_loss_does_not_use():
    model = Quadratic()
    expected = measure(model, "realised").value
    model.unused = nn.Parameter(torch.ones(3))
    assert measure(model, "realised").value == expected


def test_at_a_minimum_nothing_is_moved():
    model = Quadratic()
    flat = [(torch.zeros(1, 6, dtype=torch.float64), torch.zeros(1))]
    with torch.no_grad():
        model.first.zero_()
        model.second.zero_()
    assert measure_sharpness(model, mean, flat, RHO).value == 0
    assert measure_sharpness(model, mean, flat, RHO, kind="realised").value == 0
    assert measure_sharpness(model, mean, flat, RHO, kind="average").value > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "worst"}, "kind: expected one of first_order, realised, average, got 'worst'"),
        ({"rho": -1.0}, "rho: expected a finite number >= 0, got -1.0"),
        ({"rho": math.inf}, "rho: expected a finite number >= 0"),
        ({"eta": -1.0}, "eta: expected a finite number >= 0"),
        ({"adaptive": 1}, "adaptive: expected True or False, got 1"),
        ({"directions": 1}, "directions: expected 2 or more, got 1"),
        ({"batches": []}, "batches: expected at least one, got none"),
        ({"model": nn.Flatten()}, "model: expected a parameter that requires a gradient, got none"),
    ],
)
def test_bad_arguments(change, message):
    arguments = {"model": network(), "loss_fn": nn.functional.cross_entropy, "batches": images(), "rho": RHO}
    with pytest.raises(ValueError, match=message):
        measure_sharpness(**{**arguments, **change})
    with pytest.raises(ValueError, match="radii: expected finite numbers"):
        loss_slice(network(), nn.functional.cross_entropy, images(), [0.0, math.nan])
