"""measure_sharpness and loss_slice: closed forms on a quadratic, and that nothing is left behind."""

from __future__ import annotations

import copy
import math
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

import sam_fused.sharpness
from sam_fused import FusedMSAM, FusedSAM, loss_slice, measure_sharpness
from tests.helpers.dtypes import HALF
from tests.helpers.sam import assert_untouched, snapshot

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


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kind", [*KINDS, "slice"])
def test_weights_that_a_forward_pass_changes(kind, frozen):
    """nn.Embedding scales down in place the rows that are longer than max_norm."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(6, 4, max_norm=1.0), nn.Flatten(), nn.Linear(8, 3))
    net[0].requires_grad_(not frozen)
    before = snapshot(net.parameters())
    common = net, nn.functional.cross_entropy, [(torch.arange(6).view(3, 2), torch.arange(3))]
    if kind == "slice":
        loss_slice(*common, radii=[0.0, 0.1])
    else:
        measure_sharpness(*common, rho=0.05, kind=kind)
    assert_untouched(net.parameters(), before)


@pytest.mark.parametrize("state", ["perturbed", "clean", "after eval()"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", [*KINDS, "slice"])
def test_a_model_in_momentum_sam_s_hands(kind, training, state):
    """Its clean weights are measured; training goes on as if nothing had been."""

    def trained(measured: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
        opt = FusedMSAM(net.parameters(), torch.optim.Adam, lr=0.01, rho=0.5, model=net)
        batch = torch.randn(16, 5), torch.arange(16) % 3

        def train() -> None:
            opt.zero_grad()
            nn.functional.cross_entropy(net(batch[0]), batch[1]).backward()
            opt.step()

        def sharpness(of: nn.Module) -> object:
            common = of.train(training), nn.functional.cross_entropy, [batch]
            if kind == "slice":
                return loss_slice(*common, radii=[-0.1, 0.1])
            return measure_sharpness(*common, rho=0.05, kind=kind, generator=torch.Generator().manual_seed(0))

        for _ in range(3):
            train()
        if measured:
            opt.restore()
            plain = copy.deepcopy(net)
            opt.eval() if state == "after eval()" else opt.train()
            if state == "clean":
                opt.restore()
            before = [p.detach().clone() for p in net.parameters()]
            assert sharpness(net) == sharpness(plain)
            assert all(torch.equal(p, w) for p, w in zip(net.parameters(), before, strict=True))
            assert opt.perturbed == (state == "perturbed")
            if state == "after eval()":
                with pytest.raises(RuntimeError, match="after eval"):
                    opt.step()
                opt.train()
            net.train()
        train()
        opt.eval()
        return [p.detach().clone() for p in net.parameters()]

    assert all(torch.equal(p, q) for p, q in zip(trained(True), trained(False), strict=True))


def test_a_part_of_a_model_in_momentum_sam_s_hands():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    opt = FusedMSAM(net.parameters(), torch.optim.Adam, lr=0.01, rho=0.5, model=net)
    x, target = torch.randn(16, 5), torch.randn(16, 8)
    for _ in range(2):
        opt.zero_grad()
        net(x).square().mean().backward()
        opt.step()
    net.state_dict()
    common = nn.functional.mse_loss, [(x, target)], 0.05
    expected = measure_sharpness(copy.deepcopy(net[0]), *common)
    opt.train()
    assert measure_sharpness(net[0], *common) == expected
    assert opt.perturbed
    opt.step()


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


LOSS = nn.functional.cross_entropy


def all_kinds(model, batches, loss_fn=LOSS, rho=RHO, **options) -> list[float]:
    g = torch.Generator().manual_seed(5)
    return [measure_sharpness(model, loss_fn, batches, rho, kind, generator=g, **options).value for kind in KINDS]


# ---- gradients ----


class Checkpointed(nn.Module):
    def __init__(self, model: nn.Sequential, first: int, reentrant: bool) -> None:
        super().__init__()
        self.model, self.first, self.reentrant = model, first, reentrant

    def forward(self, x):
        return checkpoint(self.model[self.first :], self.model[: self.first](x), use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("first", [0, 1])
def test_checkpointed_activations(first, reentrant):
    model = network(torch.float64).eval()
    batches = [(x.requires_grad_(first == 0), y) for x, y in images(torch.float64)]
    expected = all_kinds(model, batches)
    assert all_kinds(Checkpointed(model, first, reentrant), batches) == pytest.approx(expected, rel=1e-6)
    assert all(x.grad is None for x, _ in batches)


def test_gradients_of_others_and_hooks_are_left_alone():
    """A hook that steps and clears, as torch's tutorial has it; a loss with a parameter of its own; an input's."""
    model, batches = network(), [(x.requires_grad_(), y) for x, y in images()]
    scale = nn.Parameter(torch.tensor(2.0))
    kept = {t: torch.full_like(t, 3.0) for t in (*model.parameters(), scale, *(x for x, _ in batches))}
    for t, g in kept.items():
        t.grad = g
    opt = torch.optim.SGD(model.parameters(), lr=1.0)
    called = []

    def step_and_clear(p):
        opt.step()
        opt.zero_grad()
        called.append("step")

    scale.register_post_accumulate_grad_hook(lambda _: called.append("of the loss"))
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step_and_clear)
        p.register_post_accumulate_grad_hook(lambda _: called.append("second"))
    weights = [p.detach().clone() for p in model.parameters()]
    measure_sharpness(model, lambda output, y: LOSS(scale * output, y), batches, RHO, "realised")
    assert all(t.grad is g and torch.equal(g, torch.full_like(t, 3.0)) for t, g in kept.items())
    assert not called
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
    sum(p.sum() for p in model.parameters()).backward()
    assert called == ["step", "second"] * len(weights)  # in their order


def test_gradients_of_every_form():
    """Negative bit, transposed, sparse: the value that plain dense gradients give."""

    class Forms(nn.Module):
        def __init__(self, plain: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.plain = plain
            self.table = nn.Embedding(5, 3, sparse=not plain)
            self.a, self.b = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.tensor(0.25))
            self.matrix = nn.Parameter(torch.randn(3, 4))

        def forward(self, i):
            size = (self.a**2 + self.b**2).sqrt() if self.plain else torch.complex(self.a, self.b).conj().abs()
            return (self.table(i).mul(size) @ self.matrix).t().square()

    batches = [(torch.tensor([0, 3, 3]), torch.zeros(3)), (torch.tensor([1]), torch.zeros(1))]
    values = [all_kinds(Forms(plain).double(), batches, mean, 0.1) for plain in (False, True)]
    assert values[0] == pytest.approx(values[1], rel=1e-6)


def test_in_every_context():
    """Autocast keeps casts of the weights, which must not outlive the move."""
    model, batches = network().eval(), images()
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        expected = all_kinds(model, batches, rho=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        before = model(batches[0][0])
        assert all_kinds(model, batches, rho=1.0) == expected
        assert torch.equal(model(batches[0][0]), before)
    assert expected[1] > 0
    expected = all_kinds(model, batches)
    with torch.no_grad():
        assert all_kinds(model, batches) == expected
    with torch.inference_mode():
        assert all_kinds(model, batches) == expected
    LOSS(model(batches[0][0]), batches[0][1]).backward()


# ---- models ----


@pytest.mark.slow
def test_a_compiled_model():
    model, batches = network(torch.float64), images(torch.float64)
    expected = all_kinds(model, batches)
    assert all_kinds(torch.compile(model, backend="aot_eager"), batches) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", HALF)
def test_16_bits_are_evaluated_in_float32(dtype, training):
    """At a radius where w + eps is mostly w in 16 bits: within 0.1 % of float64."""
    model = network(dtype).train(training)
    exact, double = copy.deepcopy(model).double(), [(x.to(dtype).double(), y) for x, y in images()]
    values = all_kinds(Unpacks(model), [({"image": x}, y) for x, y in images(dtype)], rho=0.01)
    assert values[:2] == pytest.approx(all_kinds(exact, double, rho=0.01)[:2], rel=1e-3)
    expected = all_kinds(exact, double, rho=0.5, directions=200)[2]
    assert all_kinds(model, images(dtype), rho=0.5, directions=200)[2] == pytest.approx(expected, rel=0.2)


class Unpacks(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch):
        return self.model(batch["image"])


def test_16_bits_keep_their_memory_and_gradients():
    model = network(torch.bfloat16)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    kept = [(t, t.data_ptr(), t.clone(), t.grad) for t in (*model.parameters(), *model.buffers())]
    all_kinds(model, images(torch.bfloat16))
    for t, pointer, value, grad in kept:
        assert (t.data_ptr(), t.dtype) == (pointer, value.dtype)
        assert torch.equal(t, value)
        assert t.grad is grad
    LOSS(model(images(torch.bfloat16)[0][0]), images()[0][1]).backward()
    assert all(p.grad.dtype == p.dtype for p in model.parameters())


def test_a_frozen_16_bit_part_stays_as_it_is():
    """Its casts are in the model, as an adapter's are."""

    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.base, self.adapter = nn.Linear(4, 4).bfloat16().requires_grad_(False), nn.Linear(4, 4)

        def forward(self, x):
            assert self.base.weight.dtype == torch.bfloat16
            return self.adapter(self.base(x).float())

    batch = [(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).bfloat16(), torch.arange(6) % 4)]
    first, realised, _ = all_kinds(Adapted(), batch, rho=1e-2)
    assert realised == pytest.approx(first, rel=0.05)


def test_tied_weights_are_one_parameter():
    class Tied(nn.Module):
        def __init__(self, names: list[str]) -> None:
            super().__init__()
            w = nn.Parameter(torch.tensor([0.5, -1.0], dtype=torch.float64))
            for name in names:
                self.register_parameter(name, w)
            self.names = names

        def forward(self, x):
            return x @ (getattr(self, self.names[0]) * getattr(self, self.names[-1]))

    batch = [(torch.ones(3, 2, dtype=torch.float64), torch.zeros(3))]
    assert all_kinds(Tied(["a", "b"]), batch, mean) == all_kinds(Tied(["a"]), batch, mean)


class Holds(nn.Module):
    def __init__(self, *tensors: torch.Tensor) -> None:
        super().__init__()
        self.held = nn.ParameterList(nn.Parameter(t) for t in tensors)

    def forward(self, x):
        return x * sum(p.sum() ** 2 for p in self.held)


def unusable(which: str) -> nn.Module:
    w = torch.arange(6.0)
    if which == "inference":
        with torch.inference_mode():
            return nn.Linear(2, 2)
    tensors = {
        "same": (w, w),
        "overlapping": (w[:4], w[3:]),
        "strided": (w[::2], w[2:]),
        "dtypes": (w, w.view(torch.int32).view(torch.float32)[:2].view(torch.float64)),
        "expanded": (torch.ones(1).expand(3),),
        "complex": (torch.ones(2, dtype=torch.complex64),),
    }
    return Holds(*tensors[which])


@pytest.mark.parametrize(
    ("which", "message"),
    [
        ("same", r"model: held\.0 and model: held\.1 share memory"),
        ("overlapping", r"model: held\.0 and model: held\.1 share memory"),
        ("strided", r"model: held\.0 and model: held\.1 share memory"),
        ("dtypes", r"model: held\.0 and model: held\.1 share memory"),
        ("expanded", r"model: held\.0: its elements share memory with each other"),
        ("complex", r"model: held\.0: complex parameters are not supported; hold torch\.view_as_real of it"),
        ("inference", "model: weight: made in inference mode"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_parameters_that_cannot_be_moved(which, message, kind):
    model = unusable(which)
    before = snapshot(model.parameters())
    with pytest.raises(ValueError, match=message):
        measure_sharpness(model, mean, [(torch.ones(2), torch.zeros(2))], RHO, kind)
    with pytest.raises(ValueError, match=message):
        loss_slice(model, mean, [(torch.ones(2), torch.zeros(2))], [0.1])
    assert_untouched(model.parameters(), before)


def test_neighbours_in_one_memory_are_fine():
    w = torch.arange(6.0, dtype=torch.float64)
    batch = [(torch.ones(2, dtype=torch.float64), torch.zeros(2))]
    for parts in [(w[:2], w[2:]), (w[::2], w[1::2])]:
        expected = all_kinds(Holds(*(part.clone() for part in parts)), batch, mean)
        assert all_kinds(Holds(*parts), batch, mean) == pytest.approx(expected, rel=1e-12)


def test_asam_of_large_weights_does_not_overflow():
    """As |w|^2 would."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 1e20)
    batch = [(torch.full((2, 1), 1e-20), torch.zeros(2))]
    assert loss_slice(model, mean, batch, [0.0, 0.5], adaptive=True) == pytest.approx([1.0, 1.5])


# ---- buffers ----


class Counts(nn.Module):
    """Replaces its buffer, and scales by how often it did."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.ones(()))

    def forward(self, x):
        self.calls = self.calls + 1
        return x * self.calls


def moving(which: str) -> nn.Module:
    torch.manual_seed(0)
    norm = {
        "batchnorm": lambda: nn.BatchNorm2d(3),
        "instancenorm": lambda: nn.InstanceNorm2d(3, track_running_stats=True),
        "counts": Counts,
        "script": lambda: torch.jit.script(nn.BatchNorm2d(3)),
        "spectral": lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 3, 1)),
        "old_spectral": lambda: nn.utils.spectral_norm(nn.Conv2d(3, 3, 1)),
    }[which]()
    return nn.Sequential(nn.Conv2d(2, 3, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(12, 4))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("which", ["batchnorm", "instancenorm", "counts", "script", "spectral", "old_spectral"])
def test_every_forward_starts_from_the_same_buffers(which, training):
    model, batches = moving(which).train(training), images()
    buffers = {name: (b, b.clone()) for name, b in model.named_buffers()}
    first = [loss_slice(model, LOSS, batches, [0.0, 0.1, 0.0]) for _ in range(2)]
    assert first[0] == first[1]
    assert first[0][0] == first[0][2]
    assert first[0][0] == pytest.approx(loss_slice(model, LOSS, batches[::-1], [0.0])[0], rel=1e-6)
    for name, b in model.named_buffers():
        assert b is buffers[name][0]
        assert torch.equal(b, buffers[name][1]), name


class Lazy(nn.Module):
    """Makes its buffers in a forward pass, as caches of masks and of rotary embeddings are made."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.register_buffer("cache", None)

    def forward(self, x):
        if self.cache is None:
            self.cache = torch.ones(4, dtype=self.linear.weight.dtype)
        if not hasattr(self, "mask"):
            self.register_buffer("mask", torch.ones(4, dtype=self.linear.weight.dtype), persistent=False)
        return self.linear(x * self.cache * self.mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [*KINDS, "slice"])
def test_buffers_that_a_forward_pass_makes_do_not_stay(kind, dtype):
    model, x = Lazy().to(dtype), torch.ones(5, 4, dtype=dtype)
    common = model, LOSS, [(x, torch.arange(5) % 3)]
    if kind == "slice":
        loss_slice(*common, radii=[0.0, 0.1])
    else:
        measure_sharpness(*common, rho=0.05, kind=kind)
    assert model.cache is None
    assert not hasattr(model, "mask")
    assert not model._non_persistent_buffers_set
    assert model(x).dtype == dtype


def test_buffers_beside_a_parameter_in_one_memory():
    """As slices of one flat tensor: only a buffer that is a part of a parameter moves with it."""
    flat = torch.zeros(32)
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).train()
    begin = 0
    for module in model:
        for held in (module._parameters, module._buffers):
            for name, t in held.items():
                if t is not None and t.is_floating_point():
                    view = flat[begin : begin + t.numel()].view_as(t).copy_(t.detach())
                    held[name] = nn.Parameter(view) if held is module._parameters else view
                    begin += t.numel()
    before = flat.clone()
    measure_sharpness(model, LOSS, [(torch.randn(6, 2), torch.arange(6) % 3)], 0.1, "realised")
    assert torch.equal(flat, before)


def test_expanded_and_sparse_buffers_stay_as_they_are():
    model = Quadratic()
    expected = measure_sharpness(model, mean, data(), RHO, "realised")
    model.register_buffer("wide", torch.ones(1, 2).expand(4, 2))
    model.register_buffer("sparse", torch.eye(3).to_sparse())
    model.first.grad = torch.ones(2, dtype=torch.float64)
    assert measure_sharpness(model, mean, data(), RHO, "realised") == expected
    assert torch.equal(model.first.grad, torch.ones(2, dtype=torch.float64))
    assert model.wide.stride() == (0, 1)


def test_frozen_wrappers_are_left_alone():
    """As quantised weights are."""
    model = Quadratic()
    expected = measure_sharpness(model, mean, data(), RHO, "realised")
    model.frozen = nn.Parameter(TwoTensor(torch.ones(2), torch.ones(2)), requires_grad=False)
    model.register_buffer("held", TwoTensor(torch.ones(2), torch.ones(2)))
    assert measure_sharpness(model, mean, data(), RHO, "realised") == expected
    assert torch.equal(model.frozen.a, torch.ones(2))


def test_a_buffer_that_is_a_parameter_s_memory_moves_with_it():
    class Sees(Quadratic):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", self.first.detach())

    model, batches = Sees(), data()
    assert measure(model, "realised").value == measure(Quadratic(), "realised").value
    assert len(batches) > 1


@pytest.mark.parametrize("kind", ["first_order", "realised"])
def test_float16_autocast_does_not_depend_on_the_number_of_batches(kind):
    """A weight of 1 in 1000 on the loss would have its gradients underflow."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 4))
    x, y = torch.randn(64, 8), torch.arange(64) % 4
    opt = torch.optim.Adam(model.parameters(), lr=0.03)
    for _ in range(150):
        opt.zero_grad()
        LOSS(model(x), y).backward()
        opt.step()
    assert LOSS(model(x), y) < 1e-2
    with torch.autocast("cpu", torch.float16):
        one, many = (measure_sharpness(model, LOSS, [(x, y)] * n, 0.05, kind).value for n in (1, 300))
    assert many == pytest.approx(one, rel=1e-3)


# ---- whatever comes in between ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [*KINDS, "slice"])
def test_an_interrupt_at_any_line_leaves_nothing_behind(kind, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)).to(dtype)
    called = []
    for p in model.parameters():
        p.grad = torch.ones_like(p)
        p.register_post_accumulate_grad_hook(called.append)
    held = [(t, t.data_ptr(), t.clone(), t.grad) for t in (*model.parameters(), *model.buffers())]
    batches = [(torch.randn(4, 3).to(dtype), torch.arange(4) % 2)]
    path, lines, at = sam_fused.sharpness.__file__, 0, None

    def trace(frame, event, _):
        nonlocal lines
        if frame.f_code.co_filename != path:
            return None
        if event == "line":
            lines += 1
            if lines == at:
                raise KeyboardInterrupt
        return trace

    def run() -> None:
        nonlocal lines
        lines, tracing = 0, sys.gettrace()
        sys.settrace(trace)
        try:
            if kind == "slice":
                loss_slice(model, LOSS, batches, [0.3, -0.1])
            else:
                measure_sharpness(model, LOSS, batches, RHO, kind, directions=2)
        finally:
            sys.settrace(tracing)
            torch.set_grad_enabled(True)  # torch's own contexts do not survive every interrupt

    run()
    for at in range(1, lines + 1):
        with pytest.raises(KeyboardInterrupt):
            run()
        for t, pointer, value, grad in held:
            assert t.data_ptr() == pointer, f"line {at} of the run"
            assert torch.equal(t, value), f"line {at} of the run"
            assert t.grad is grad, f"line {at} of the run"
        assert all(len(p._post_accumulate_grad_hooks) == 1 for p in model.parameters()), f"line {at} of the run"
        assert all(m.track_running_stats for m in model.modules() if isinstance(m, nn.BatchNorm1d))
    assert not called
    assert lines > 100


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite(value):
    model = network()
    before = [t.clone() for t in model.state_dict().values()]
    for kind in KINDS:
        result = measure_sharpness(model, lambda output, y: LOSS(output, y) * value, images(), RHO, kind)
        assert math.isnan(result.value) or (kind == "first_order" and math.isinf(result.value))
    assert all(torch.equal(t, b) for t, b in zip(model.state_dict().values(), before, strict=True))


def test_a_loss_near_the_largest_number():
    value, error = measure_sharpness(
        Quadratic(), lambda output, _: output.mean() * 1e300, data(), RHO, "average", directions=4
    )
    assert value > 1e299
    assert error == math.inf


# ---- arguments ----


@pytest.mark.parametrize("number", [np.float32(0.25), np.float64(0.25), np.int64(1)])
def test_numbers_of_numpy(number):
    model = Quadratic()
    given = measure_sharpness(model, mean, data(), number, "realised", adaptive=True, eta=number)
    plain = measure_sharpness(model, mean, data(), float(number), "realised", adaptive=True, eta=float(number))
    assert given == plain
    assert type(given.value) is float
    assert loss_slice(model, mean, data(), np.array([number])) == loss_slice(model, mean, data(), [float(number)])
    opt = FusedSAM([{"params": model.parameters(), "eta": number}], torch.optim.SGD, rho=number)
    assert {type(opt.param_groups[0][name]) for name in ("rho", "eta")} == {float}  # a checkpoint loads as weights_only


def test_radii_may_be_a_generator():
    model, radii = Quadratic(), [-0.1, 0.0, 0.2]
    assert loss_slice(model, mean, data(), (r for r in radii)) == loss_slice(model, mean, data(), radii)


X = torch.randn(3, 2, 4, 4)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([(X[:0], torch.zeros(0))], r"batches\[0\]: expected at least one example, got an empty target"),
        ([*images(), (X[:0], torch.zeros(0))], r"batches\[2\]: expected at least one example, got an empty target"),
        ([(X, {"y": torch.zeros(3)})], r"batches\[0\]: expected a target whose len\(\) .* got dict"),
        ([(X, (torch.zeros(3), torch.zeros(3)))], r"batches\[0\]: expected a target whose len\(\) .* got tuple"),
        ([(X, 3)], r"batches\[0\]: expected a target whose len\(\) .* got int"),
        ([(X, torch.tensor(3))], r"batches\[0\]: expected a target whose len\(\) .* got a tensor of 0"),
        ([X], r"batches\[0\]: expected a pair \(input, target\), got Tensor"),
        ([(X,)], r"batches\[0\]: expected a pair \(input, target\), got tuple"),
        ([7], r"batches\[0\]: expected a pair \(input, target\), got int"),
    ],
)
def test_bad_batches(batches, message):
    with pytest.raises(ValueError, match=message):
        measure_sharpness(network(), LOSS, iter(batches), RHO)


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (lambda output, y: LOSS(output, y, reduction="none"), r"got torch.float32 of shape \(8,\)"),
        (lambda output, y: LOSS(output, y)[None], r"got torch.float32 of shape \(1,\)"),
        (lambda output, y: LOSS(output, y) + 0j, "got torch.complex64"),
        (lambda output, y: LOSS(output, y).item(), r"got \d"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_bad_losses(loss_fn, message, kind):
    with pytest.raises(ValueError, match=f"loss_fn: expected a real 0-dim tensor, the mean over the batch, {message}"):
        measure_sharpness(network(), loss_fn, images(), RHO, kind)


@pytest.mark.parametrize("change", [{"rho": True}, {"rho": np.bool_(True)}, {"rho": "1"}, {"rho": np.float32("nan")}])
def test_bad_numbers(change):
    with pytest.raises(ValueError, match="rho: expected a finite number >= 0"):
        measure_sharpness(network(), LOSS, images(), **change)
    with pytest.raises(ValueError, match="rho: expected a finite number >= 0"):
        FusedSAM(network().parameters(), **change)
    with pytest.raises(ValueError, match="radii: expected finite numbers"):
        loss_slice(network(), LOSS, images(), ["1"])
    with pytest.raises(ValueError, match="directions: expected 2 or more, got 2\\.5"):
        measure_sharpness(network(), LOSS, images(), RHO, "average", directions=2.5)
