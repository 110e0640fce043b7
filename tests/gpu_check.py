"""What to run first on a machine with a GPU: builds for it, and checks and measures what only a GPU can show.

    make gpu-check                           # or python -m tests.gpu_check
    python -m tests.gpu_check --device cpu   # a dry run: what needs a GPU is skipped

Prints one table, and ends with 1 if a check failed. A timing is a number in it, never a failure.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import pytest  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Skip(Exception):
    """Why a check is not made."""


def need_gpu(device: torch.device) -> None:
    if device.type != "cuda":
        raise Skip("needs a GPU")


def run(command: list[str], **environment: str) -> str:
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)
    if done.returncode != 0:
        raise AssertionError((done.stdout + done.stderr)[-4000:])
    return done.stdout


def parameters(device: torch.device, dtype: torch.dtype = torch.float32, quick: bool = False) -> list[nn.Parameter]:
    """ResNet-18's, or a few that have every kind of length."""
    from benchmarks.speed.workloads import LISTS

    shapes = [(5,), (8193,), (3, 0), (64, 33), (40000,), (1,)] if quick else LISTS["resnet18"]()
    g = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(s, generator=g).to(device, dtype)) for s in shapes]
    for p in params:
        p.grad = torch.randn(p.shape, generator=g).to(device, dtype)
    return params


def steps(opt, n: int) -> None:
    for _ in range(n):
        opt.first_step()
        opt.second_step()


# ---- checks: each returns what the table says ----


def build(device: torch.device, quick: bool) -> str:
    need_gpu(device)
    major, minor = torch.cuda.get_device_capability()
    start = time.perf_counter()
    command = [sys.executable, "setup.py", "build_ext", "--inplace", "--force"]
    run(command, SAM_FUSED_CUDA="1", TORCH_CUDA_ARCH_LIST=f"{major}.{minor}")
    return f"for compute capability {major}.{minor}, {time.perf_counter() - start:.0f} s"


def tests(device: torch.device, quick: bool) -> str:
    files = ["tests/test_algorithm.py"] if quick else ["tests"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    return run(command, SAM_FUSED_TEST_DEVICE=device.type).strip().splitlines()[-1]


def same_bits(device: torch.device, quick: bool) -> str:
    """From run to run, and nearly those of the CPU."""
    from sam_fused import FusedSAM

    worst = 0.0
    bases = [(torch.optim.SGD, {"momentum": 0.9}), (torch.optim.Adam, {"amsgrad": True})]
    for dtype in DTYPES:
        for base, options in bases:
            for adaptive in (False, True):
                results = []
                for where in (device, device, torch.device("cpu")):
                    params = parameters(where, dtype, quick)
                    opt = FusedSAM(params, base, lr=1e-3, rho=0.05, adaptive=adaptive, **options)
                    steps(opt, 3)
                    results.append([opt.grad_norm.detach(), *(p.detach() for p in params)])
                assert all(torch.equal(a, b) for a, b in zip(*results[:2], strict=True)), f"{dtype}, {base.__name__}"
                for a, b in zip(results[0], results[2], strict=True):
                    if a.numel():
                        distance = (a.cpu().double() - b.double()).abs() / b.double().abs().clamp(min=1)
                        worst = max(worst, (distance / torch.finfo(a.dtype).eps).max().item())
    assert worst <= 4, f"{worst} units in the last place from the CPU"
    return f"the same in every run; at most {worst:.2g} eps from the CPU's"


def graph(device: torch.device, quick: bool) -> str:
    """A step that a CUDA graph captured, with the learning rate changed between replays, against eager steps."""
    need_gpu(device)
    from sam_fused import FusedSAM

    results = []
    for captured in (False, True):
        params = parameters(device, quick=quick)
        lr = torch.tensor(1e-3, device=device)
        opt = FusedSAM(params, torch.optim.Adam, lr=lr, capturable=True)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            steps(opt, 1)
        torch.cuda.current_stream().wait_stream(stream)
        cuda_graph = torch.cuda.CUDAGraph()
        if captured:
            with torch.cuda.graph(cuda_graph):
                steps(opt, 1)
        for k in range(4):
            lr.fill_(1e-3 / (k + 1))
            cuda_graph.replay() if captured else steps(opt, 1)
        results.append([opt.state[params[0]]["step"], opt.mean_sharpness(), *(p.detach() for p in params)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)), "replays differ from eager steps"
    opt = FusedSAM(parameters(device, quick=True), torch.optim.Adam)
    steps(opt, 1)
    with pytest.raises(RuntimeError, match="capturable=True"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        opt.second_step()
    return "4 replays with a changing learning rate: the bits of eager steps"


def no_synchronisation(device: torch.device, quick: bool) -> str:
    need_gpu(device)
    from tests.steps import steps_of_every_kind, with_scaler

    for base in (torch.optim.SGD, torch.optim.AdamW):
        opt, scaler = with_scaler(parameters(device, quick=quick), base)
        torch.cuda.set_sync_debug_mode("error")
        try:
            steps_of_every_kind(opt, scaler)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return "steps with and without a GradScaler, the first ones too"


def launches(device: torch.device, quick: bool) -> str:
    need_gpu(device)
    from benchmarks.speed.cost_model import launches_of
    from sam_fused import FusedSAM

    params = parameters(device)
    opt = FusedSAM(params, torch.optim.Adam, lr=1e-3)
    steps(opt, 2)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        steps(opt, 1)
        torch.cuda.synchronize()
    names = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    kernels = [n for n in names if not n.startswith("Mem")]
    expected = launches_of("adam", len(params))
    assert len(kernels) == len(names) == expected <= 8, f"expected {expected} launches and no copy, got {names}"
    return f"{len(kernels)} for the {len(params)} tensors of ResNet-18 with Adam, as the model says"


def timed(device: torch.device, call: Callable[[], object], rounds: int) -> float:
    """Median milliseconds."""
    times = []
    for k in range(rounds + 3):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        else:
            start = time.perf_counter()
            call()
            times.append((time.perf_counter() - start) * 1e3)
        if k == 2:
            times.clear()  # warm-up
    return statistics.median(times)


def bandwidth(device: torch.device, quick: bool) -> str:
    """Of the parts of a step on one large tensor, beside a copy of it."""
    from sam_fused import FusedSAM

    n, rounds = (1 << 16, 3) if quick else (1 << 27, 20)
    w = nn.Parameter(torch.zeros(n, device=device))
    w.grad = torch.ones_like(w)
    other = torch.empty_like(w.grad)
    opt = FusedSAM([w], torch.optim.Adam, lr=1e-3)
    steps(opt, 1)

    def ascend_and_restore() -> None:
        opt.first_step()
        opt.restore()

    calls = {
        "copy": (lambda: other.copy_(w.grad), 2),
        "norm": (opt.measure_sharpness, 1),
        "norm, perturb, restore": (ascend_and_restore, 7),
        "Adam": (opt.step, 7),
        "SAM + Adam": (lambda: steps(opt, 1), 12),
    }
    speeds = {name: streams * 4 * n / timed(device, call, rounds) / 1e6 for name, (call, streams) in calls.items()}
    return ", ".join(f"{name} {speed:.0f}" for name, speed in speeds.items()) + " GB/s"


def rivals(device: torch.device, quick: bool) -> str:
    from benchmarks.speed.rivals import BASES, RIVALS, two_calls

    base, options = BASES["adam"]
    out = []
    for name, make in RIVALS.items():
        params = parameters(device, quick=quick)
        ms = timed(device, two_calls(make(params, base, False, **options)), 3 if quick else 50)
        out.append(f"{name} {ms:.3f}")
    return ", ".join(out) + " ms"


def sanitizer(tool: str) -> Callable[[torch.device, bool], str]:
    def check(device: torch.device, quick: bool) -> str:
        need_gpu(device)
        if shutil.which("compute-sanitizer") is None:
            raise Skip("compute-sanitizer is not on PATH")
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--kernel-regex", "kns=sam"]
        me = [sys.executable, "-m", "tests.gpu_check", "--device", device.type, "--quick", "--only", "same_bits"]
        out = run([*command, *me], PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        summary = re.findall(r"=+ (.*SUMMARY.*)", out)
        return summary[-1] if summary else "clean"

    return check


CHECKS: dict[str, Callable[[torch.device, bool], str]] = {
    "build": build,
    "tests": tests,
    "same_bits": same_bits,
    "graph": graph,
    "no_synchronisation": no_synchronisation,
    "launches": launches,
    "bandwidth": bandwidth,
    "rivals": rivals,
    **{tool: sanitizer(tool) for tool in ("memcheck", "racecheck", "synccheck", "initcheck")},
}


def rows(device: torch.device, names: list[str], quick: bool) -> Iterator[tuple[str, str, str]]:
    for name in names:
        try:
            yield name, "ok", CHECKS[name](device, quick)
        except Skip as reason:
            yield name, "skipped", str(reason)
        except Exception as error:
            yield name, "FAILED", f"{type(error).__name__}: {error}"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    p.add_argument("--quick", action="store_true", help="small tensors, few rounds, one test file")
    p.add_argument("--only", nargs="+", choices=list(CHECKS), default=list(CHECKS))
    args = p.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        p.exit(2, "there is no GPU; --device cpu is a dry run\n")
    where = torch.cuda.get_device_name() if args.device == "cuda" else "the CPU: a dry run"
    print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, on {where}\n\n| check | outcome | |\n|---|---|---|")
    failed = []
    for name, outcome, detail in rows(torch.device(args.device), args.only, args.quick):
        print(f"| {name} | {outcome} | {detail.splitlines()[0] if detail else ''} |", flush=True)
        if outcome == "FAILED":
            failed.append((name, detail))
    for name, detail in failed:
        print(f"\n{name}\n{detail}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
