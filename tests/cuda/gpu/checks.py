"""What is checked on a GPU, and on the CPU in its place in a dry run.

Each check takes the device and whether to be quick, and returns what the table says: its first line, and a table of its
own from the second on. It raises toolkit.Skip or an error.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from sam_fused import FusedMSAM, FusedSAM
from tests.cuda.gpu.toolkit import Skip, need_gpu
from tests.helpers.dtypes import DTYPES
from tests.helpers.steps import one_pass_with_scaler, steps_of_every_kind, with_scaler

CPU = torch.device("cpu")
Sizes = list[tuple[int, ...]]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


# ---- lists ----


def lists() -> dict[str, Sizes]:
    """Shapes: ResNet-18's, a few that have every kind of length, and more than a launch takes."""
    from benchmarks.speed.workloads import LISTS

    return {
        "resnet18": LISTS["resnet18"](),
        "quick": [(5,), (8193,), (3, 0), (64, 33), (40000,), (1,)],
        "many": [(1 + i % 7,) for i in range(1300)],
    }


def aligned(t: Tensor, device: torch.device) -> Tensor:
    return t.to(device)


def misaligned(t: Tensor, device: torch.device) -> Tensor:
    """One element after an allocation's beginning, or three: what 16-byte accesses must not meet."""
    start = 1 + 2 * (t.numel() % 2)
    return torch.cat([t.new_zeros(start), t.flatten()]).to(device)[start:].view(t.shape)


def parameters(
    device: torch.device, sizes: Sizes, dtype: torch.dtype = torch.float32, place: Callable = aligned
) -> list[nn.Parameter]:
    """The same numbers on every device. Gradients begin where the parameters do, but for every third."""
    g = torch.Generator().manual_seed(0)
    params = []
    for i, size in enumerate(sizes):
        p = nn.Parameter(place(torch.randn(size, generator=g).to(dtype), device))
        grad = torch.randn(size, generator=g).to(dtype)
        p.grad = aligned(grad, device) if i % 3 == 2 else place(grad, device)
        params.append(p)
    return params


# ---- steps whose second gradient knows where the weights are ----


class Steps(NamedTuple):
    """What a few steps give."""

    norms: list[Tensor]  # of each step's first gradient
    perturbed: list[list[Tensor]]  # of each step, the weights after first_step
    weights: list[Tensor]  # in the end

    def moved(self) -> list[Tensor]:
        return [*(w for weights in self.perturbed for w in weights), *self.weights]


@torch.no_grad()
def set_grads(params: list[nn.Parameter], targets: list[Tensor]) -> None:
    """Those of a quadratic: w + target. In place, one rounding, so the same bits on every device."""
    for p, target in zip(params, targets, strict=True):
        p.grad.copy_(target).add_(p)


def take_steps(params: list[nn.Parameter], base: type, n: int = 3, **options) -> Steps:
    opt = FusedSAM(params, base, lr=1e-3, rho=0.05, **options)
    targets = [p.grad.clone() for p in params]
    steps = Steps([], [], [p.detach() for p in params])
    for _ in range(n):
        set_grads(params, targets)
        opt.first_step()
        steps.norms.append(opt.grad_norm.detach())
        steps.perturbed.append([p.detach().clone() for p in params])
        set_grads(params, targets)
        opt.second_step()
    return steps


def assert_same(a: Steps, b: Steps, what: str) -> None:
    pairs = zip([*a.norms, *a.moved()], [*b.norms, *b.moved()], strict=True)
    assert all(torch.equal(x, y) for x, y in pairs), f"{what}: differs from run to run"


def norm_error(dtype: torch.dtype) -> float:
    """How far a GPU's norm may be from the CPU's, as a fraction of it.

    The CPU adds up squares in float64. A GPU adds up those of 16 bytes in float32 before, one rounding of 2^-24 each,
    and the root halves that. Then thousands of sums are added up in another order, which makes a handful of units in
    the last place of float64, and is far from 1e-12.
    """
    return 1e-12 + (0 if dtype == torch.float64 else 16 // dtype.itemsize * 2.0**-25)


def assert_near(a: Steps, b: Steps, what: str) -> float:
    """Fails if a device's steps are not the CPU's, ``b``, but for rounding; returns how far the weights are, in eps.

    The first norm is of the same numbers. Later ones have the weights' rounding in them.
    """
    eps = max(torch.finfo(w.dtype).eps for w in a.weights)
    allowed = max(norm_error(w.dtype) for w in a.weights)
    for k, (norm, expected) in enumerate(zip(a.norms, b.norms, strict=True)):
        error = abs(norm.item() / expected.item() - 1)
        assert error <= (max(allowed, 4 * eps) if k else allowed), (
            f"{what}: norm {k} is {error:.2g} of it from the CPU's"
        )
    worst = 0.0
    for x, y in zip(a.moved(), b.moved(), strict=True):
        if x.numel():
            distance = (x.cpu().double() - y.double()).abs() / y.double().abs().clamp(min=1)
            far = distance.max().item() / eps
            assert far <= 4, f"{what}: weights are {far:.3g} eps from the CPU's"
            worst = max(worst, far)
    return worst


BASES = [
    (torch.optim.SGD, {"momentum": 0.9}),
    # A large eps: by a small one Adam's step is a sign, which a gradient of nearly 0 has by chance.
    (torch.optim.Adam, {"amsgrad": True, "eps": 1e-2}),
]


def compare(device: torch.device, sizes: Sizes, dtypes=DTYPES, place: Callable = aligned) -> str:
    worst = 0.0
    for dtype in dtypes:
        for base, options in BASES:
            for adaptive in (False, True):
                what = f"{dtype}, {base.__name__}{', adaptive' * adaptive}"
                one, two, cpu = (
                    take_steps(parameters(where, sizes, dtype, place), base, adaptive=adaptive, **options)
                    for where in (device, device, CPU)
                )
                assert_same(one, two, what)
                worst = max(worst, assert_near(one, cpu, what))
    return f"the same bits in every run, perturbed weights too; at most {worst:.2g} eps from the CPU's"


# ---- checks ----


def same_bits(device: torch.device, quick: bool) -> str:
    """From run to run, and nearly those of the CPU."""
    return compare(device, lists()["quick" if quick else "resnet18"])


def many_tensors(device: torch.device, quick: bool) -> str:
    """More than a launch takes: 1,300, which need the large arguments and several launches."""
    return compare(device, lists()["many"], DTYPES[2:3] if quick else DTYPES)


def misaligned_slices(device: torch.device, quick: bool) -> str:
    """Slices of a flat buffer, parameters and gradients, some at one offset and some at two."""
    return compare(device, lists()["quick"], place=misaligned)


def two_devices(device: torch.device, quick: bool) -> str:
    """Parameters on two GPUs, with one norm, and the second one current."""
    places = [device, device]
    if device.type == "cuda":
        if torch.cuda.device_count() < 2:
            raise Skip("needs two GPUs")
        places = [torch.device("cuda", i) for i in range(2)]

    def steps(places: list[torch.device]) -> Steps:
        halves = [parameters(place, lists()["quick"]) for place in places]
        params = [half[i] for i in range(len(halves[0])) for half in halves]
        return take_steps(params, torch.optim.Adam, eps=1e-2)

    expected = steps([CPU, CPU])
    for i, place in enumerate(places):
        with torch.cuda.device(place) if device.type == "cuda" else nullcontext():
            worst = assert_near(steps(places), expected, f"device {i} current")
    return f"{' and '.join(map(str, places))}: at most {worst:.2g} eps from the CPU's"


def large_tensor(device: torch.device, quick: bool) -> str:
    """More than 2^31 elements: offsets past 32 bits."""
    n = (1 << 16 if quick or device.type == "cpu" else 1 << 31) + 5
    if device.type == "cuda":
        need, free = 5 * 2 * n, torch.cuda.mem_get_info(device)[0]  # w, its gradient and backup, room to look at them
        if free < need:
            raise Skip(f"needs {need / 2**30:.1f} GiB of memory, {free / 2**30:.1f} are free")
    w = nn.Parameter(torch.zeros(n, dtype=torch.bfloat16, device=device))
    w.grad = torch.zeros_like(w)
    w.grad[-3:] = 1
    opt = FusedSAM([w], torch.optim.SGD, lr=1.0, rho=2 * 3**0.5)
    for half, expected in ((opt.first_step, 2.0), (opt.second_step, -1.0)):
        half()
        assert w[-4:].tolist() == [0, *[expected] * 3], f"{half.__name__}: the end is {w[-4:].tolist()}"
        assert (w != 0).sum().item() == 3, f"{half.__name__}: more than the end has moved"
    assert abs(opt.grad_norm.item() - 3**0.5) < 1e-12
    return f"{n:,} elements of bfloat16"


def on_a_stream_of_its_own(device: torch.device) -> AbstractContextManager:
    if device.type != "cuda":
        return nullcontext()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    return torch.cuda.stream(stream)


def captured(device: torch.device, call: Callable[[], object]) -> Callable[[], object]:
    """A CUDA graph of the call, to be replayed; on the CPU the call itself. Warm up on a stream of its own before."""
    if device.type != "cuda":
        return call
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def side_stream(device: torch.device, quick: bool) -> str:
    """A step on a stream other than the default one waits for the gradients that this stream makes late."""
    results = []
    for where in (nullcontext(), on_a_stream_of_its_own(device)):
        params = parameters(device, lists()["quick"])
        opt = FusedSAM(params, torch.optim.Adam, lr=1e-3)
        late = [p.grad.clone() for p in params]
        torch._foreach_zero_([p.grad for p in params])
        synchronize(device)
        with where:
            if device.type == "cuda":
                torch.cuda._sleep(100_000_000)  # cycles
            set_grads(params, late)
            opt.first_step()
            results.append([opt.grad_norm, *(p.detach().clone() for p in params)])
            set_grads(params, late)
            opt.second_step()
        synchronize(device)
        results[-1] += [p.detach() for p in params]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)), "differs from the default stream's"
    return "waits for what its stream does before"


def replayed(device: torch.device, step: Callable[[], object], capture: bool) -> Callable[[], object]:
    """What to call for a step, after one that makes the state: a graph of it, or the step itself."""
    with on_a_stream_of_its_own(device):
        step()
    synchronize(device)
    return captured(device, step) if capture else step


def graph(device: torch.device, quick: bool) -> str:
    """Steps that a CUDA graph captured, with the learning rate changed between replays, against eager steps."""
    for cls in (FusedSAM, FusedMSAM):
        results = []
        for capture in (False, True):
            params = parameters(device, lists()["quick" if quick else "resnet18"])
            lr = torch.tensor(1e-3, device=device)
            opt = cls(params, torch.optim.Adam, lr=lr, rho=0.05, capturable=True)
            targets = [p.grad.clone() for p in params]
            perturbed = [torch.empty_like(p, requires_grad=False) for p in params]

            def step(opt=opt, params=params, targets=targets, perturbed=perturbed) -> None:
                if isinstance(opt, FusedSAM):
                    set_grads(params, targets)
                    opt.first_step()
                with torch.no_grad():
                    torch._foreach_copy_(perturbed, params)
                set_grads(params, targets)
                opt.step()

            run = replayed(device, step, capture)
            results.append([])
            for k in range(4):
                lr.fill_(1e-3 / (k + 1))
                run()
                results[-1] += [t.clone() for t in perturbed]
            results[-1] += [opt.state[params[0]]["step"], *(p.detach().clone() for p in params)]
            if isinstance(opt, FusedSAM):
                results[-1].append(opt.mean_sharpness())
            else:
                opt.eval()
                results[-1] += [p.detach() for p in params]
        same = all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        assert same, f"{cls.__name__}: replays differ from eager steps"
    if device.type == "cuda":
        opt = FusedSAM(parameters(device, lists()["quick"]), torch.optim.Adam)
        opt.measure_sharpness()
        opt.step()
        with pytest.raises(RuntimeError, match="capturable=True"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            opt.second_step()
    return "4 replays with a changing learning rate, perturbed weights too, of SAM and Momentum-SAM: as eager steps"


def training_graph(device: torch.device, quick: bool) -> str:
    """Forward, backward and GradScaler, twice a step, in one CUDA graph; one replay overflows."""
    results = []
    for capture in (False, True):
        w, b = (nn.Parameter(p.detach()) for p in parameters(device, [(64, 1000), (1000,)]))
        x, y = (p.detach() for p in parameters(device, [(64, 1000), (64, 1000)]))
        scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10, growth_interval=2)
        scaler.scale(torch.zeros((), device=device))  # which makes the scale, on the device
        opt = FusedSAM([w, b], torch.optim.Adam, lr=1e-2, capturable=True, scaler=scaler)
        w.grad, b.grad = torch.zeros_like(w), torch.zeros_like(b)

        def step(opt=opt, scaler=scaler, w=w, b=b, x=x, y=y) -> None:
            for second in (False, True):
                opt.zero_grad(set_to_none=False)
                scaler.scale((torch.tanh(w * x + b) - y).square().mean()).backward()
                scaler.step(opt) if second else opt.first_step()
            scaler.update()

        run = replayed(device, step, capture)
        results.append([])
        for k in range(4):
            good = y[0, 0].clone()
            y[0, 0] = float("inf") if k == 2 else good
            run()
            y[0, 0] = good
            results[-1] += [w.detach().clone(), b.detach().clone(), scaler._scale.clone()]
    assert all(torch.equal(p, q) for p, q in zip(*results, strict=True)), "replays differ from eager steps"
    weights, scales = results[1][0::3], [s.item() for s in results[1][2::3]]
    assert torch.equal(weights[1], weights[2]), "an overflow has moved the weights"
    assert not torch.equal(weights[2], weights[3])
    assert scales[2] == scales[1] / 2, f"scales {scales}, with an overflow in the third step"
    return "4 replays, one of them with an overflow: the bits of eager steps"


def no_synchronisation(device: torch.device, quick: bool) -> str:
    for base in (torch.optim.SGD, torch.optim.AdamW, None):
        params = parameters(device, lists()["quick" if quick else "resnet18"])
        opt, scaler = with_scaler(params, base) if base else one_pass_with_scaler(params)
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            steps_of_every_kind(opt, scaler)
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    return "steps with and without a GradScaler, the first ones too"


def runtime_calls(step: Callable[[], object]) -> list[str]:
    """The names of all events of a profile; those of CUDA's runtime are its functions'."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize()
    return [event.name for event in profile.events()]


def driver_version() -> int:
    """1000 x major + 10 x minor of the newest CUDA that the driver knows, as csrc/cuda.cu asks for it."""
    version = ctypes.c_int()
    status = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    assert status == 0, f"cuDriverGetVersion: error {status}"
    return version.value


def launches(device: torch.device, quick: bool) -> str:
    """Calls of the runtime. Not what the device lists: annotations, such as a step's own, are there too."""
    need_gpu(device)
    from benchmarks.speed.cost_model import launches_of

    counts = []
    for name in ("resnet18", "many"):
        params = parameters(device, lists()[name])
        opt = FusedSAM(params, torch.optim.Adam, lr=1e-3)

        def step(opt=opt) -> None:
            opt.first_step()
            opt.second_step()

        step()
        step()
        called = [n for n in runtime_calls(step) if n.startswith(("cudaLaunch", "cudaMem"))]
        launched = [n for n in called if n.startswith("cudaLaunchKernel")]
        expected = launches_of("adam", len(params), large=driver_version() >= 12010)
        assert len(launched) == len(called) == expected, (
            f"{name}: expected {expected} launches and no copy, got {called}"
        )
        counts.append(f"{expected} for {len(params)} tensors")
    return f"{', '.join(counts)} with Adam, as the model says"
