"""What is measured on a GPU: a number each, never a failure."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from benchmarks.speed.rivals import BASES, RIVALS, two_calls
from sam_fused import FusedSAM
from tests.cuda.gpu.checks import lists, parameters, synchronize

CALLS = 10  # between two events: the first one's way to the device is a small part of them


class Time(NamedTuple):
    """Medians, of one call."""

    ms: float  # of the device
    host_us: float  # until the call returns


def timed(device: torch.device, call: Callable[[], object], rounds: int) -> Time:
    times, hosts = [], []
    for _ in range(3):
        call()
    for _ in range(rounds):
        synchronize(device)
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else []
        if events:
            events[0].record()
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        hosts.append((time.perf_counter() - start) * 1e6 / CALLS)
        if events:
            events[1].record()
            events[1].synchronize()
        times.append((events[0].elapsed_time(events[1]) if events else hosts[-1] * CALLS / 1e3) / CALLS)
    return Time(statistics.median(times), statistics.median(hosts))


def bandwidth(device: torch.device, quick: bool) -> str:
    """Of the parts of a step on one large tensor, beside a copy of it."""
    n, rounds = (1 << 16, 3) if quick else (1 << 27, 10)
    w = nn.Parameter(torch.zeros(n, device=device))
    w.grad = torch.ones_like(w)
    other = torch.empty_like(w.grad)
    opt = FusedSAM([w], torch.optim.Adam, lr=1e-3)

    def ascend_and_restore() -> None:
        opt.first_step()
        opt.restore()

    calls = {
        "copy": (lambda: other.copy_(w.grad), 2),
        "norm": (opt.measure_sharpness, 1),
        "norm, perturb, restore": (ascend_and_restore, 7),
        "Adam": (opt.step, 7),
        "SAM + Adam": (two_calls(opt), 12),
    }
    table = ["| float32 | GB/s | ms | host µs |", "|---|---|---|---|"]
    for name, (call, streams) in calls.items():
        t = timed(device, call, rounds)
        table.append(f"| {name} | {streams * 4 * n / t.ms / 1e6:.0f} | {t.ms:.3f} | {t.host_us:.0f} |")
    return "\n".join([f"{n:,} elements, medians of {rounds} x {CALLS} calls", *table])


def rivals(device: torch.device, quick: bool) -> str:
    """first_step and second_step of SAM + Adam, ours and others'."""
    base, options = BASES["adam"]
    names, rounds = (["quick"], 3) if quick else (["resnet18", "many"], 10)
    table = ["| tensors | optimizer | ms | host µs |", "|---|---|---|---|"]
    for list_name in names:
        for name, make in RIVALS.items():
            params = parameters(device, lists()[list_name])
            t = timed(device, two_calls(make(params, base, False, **options)), rounds)
            table.append(f"| {list_name} | {name} | {t.ms:.3f} | {t.host_us:.0f} |")
    return "\n".join([f"SAM + Adam, medians of {rounds} x {CALLS} steps", *table])
