"""How calls are timed and compared, when a run is to be trusted, and what the commands that do it have in common."""

from __future__ import annotations

import argparse
import gc
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import torch

import train

# What a cell needs, or it is marked and its run is not to be committed.
ROUNDS = 20
OTHERS = 0.25  # at most: processors that others kept busy meanwhile
SPREAD = 0.25  # at most: interquartile range of the reference's own times over their median
EVICTED = 256 << 20  # bytes that are gone through before a call: 64 MiB left a part of 32 MiB of cache as it was


def busy() -> float | None:
    """Processor seconds of all others, the hypervisor's other guests too; None where /proc/stat does not tell."""
    try:
        ticks = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    except OSError:
        return None
    if not any(ticks):  # as in some sandboxes
        return None
    idle, waiting = ticks[3:5]
    return (sum(ticks) - idle - waiting) / os.sysconf("SC_CLK_TCK") - time.process_time()


def load_average() -> float | None:
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def measure(
    calls: dict[str, Callable[[], object]],
    rounds: int,
    reference: str,
    warm_up: int = 2,
    cold: bool = False,
    again: bool = False,
) -> dict[str, Any]:
    """A cell: the milliseconds of each call, which is made once a round, and how busy the machine was with others.

    ``cold`` empties the caches before each call, as the passes before an optimizer's step do in training: what the
    call before happened to leave there would be measured otherwise. ``again`` is for calls of a few milliseconds. It
    makes each a second time at once, with all in the caches that fits, and keeps those times apart, as the "ms" of
    "again"; and one that is not timed comes before all this, or the first would depend on whose call was the last.
    Every round has an order of its own. The others' share is counted and not taken from the load average, which lags a
    minute behind and holds the cell's own threads.
    """
    ms: dict[str, list[float]] = {name: [] for name in calls}
    second: dict[str, list[float]] = {name: [] for name in calls}
    evicted = torch.zeros(EVICTED // 4 if cold else 0)

    def timed(call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        return round((time.perf_counter() - start) * 1e3, 4)

    order = list(calls.items())
    shuffle = random.Random(0).shuffle
    for call in calls.values():  # states, caches, cached lists
        for _ in range(warm_up):
            call()
    gc.collect()
    gc.disable()  # or one rival's garbage is collected in the next one's time
    load, others, start = load_average(), busy(), time.perf_counter()
    try:
        for _ in range(rounds):
            shuffle(order)
            for name, call in order:
                if again:
                    call()
                evicted.add_(1)
                ms[name].append(timed(call))
                if again:
                    second[name].append(timed(call))
    finally:
        gc.enable()
    wall, others_then = time.perf_counter() - start, busy()
    share = None
    if others is not None and others_then is not None and wall > 1:  # they are counted in hundredths of a second
        share = round((others_then - others) / wall, 3)
    cell = {"reference": reference, "ms": ms, "load": [load, load_average()], "others": share}
    return {**cell, "again": {"ms": second}} if again else cell


def _end_with_the_parent() -> None:
    """A worker whose parent was killed would go on, and disturb what is measured next."""

    def watch() -> None:
        parent = parent_process()
        assert parent is not None  # this is a worker
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def alone(cell: Callable[..., dict[str, Any]], *arguments: object) -> dict[str, Any]:
    """cell(*arguments) in a process of its own: what cells before it left scattered over the heap is not there.

    A cell that was disturbed is measured anew, up to twice.
    """
    for _ in range(3):
        with ProcessPoolExecutor(1, get_context("spawn"), _end_with_the_parent) as pool:
            measured = pool.submit(cell, *arguments).result()
        if rounds(measured) < ROUNDS or not disturbed(measured):
            break
    return measured


def quartiles(values: list[float]) -> tuple[float, float, float]:
    low, middle, high = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.25, 0.5, 0.75]).double())
    return low.item(), middle.item(), high.item()


def median(cell: dict[str, Any], name: str) -> float:
    """Milliseconds."""
    return quartiles(cell["ms"][name])[1]


def ratio(cell: dict[str, Any], name: str) -> tuple[float, float, float]:
    """Quartiles of a call's time over the reference's in the same round."""
    return quartiles([a / b for a, b in zip(cell["ms"][name], cell["ms"][cell["reference"]], strict=True)])


def ratio_words(cell: dict[str, Any], name: str, digits: int = 2) -> str:
    low, middle, high = (f"{x:.{digits}f}" for x in ratio(cell, name))
    return f"{middle} ({low} to {high})"


def rounds(cell: dict[str, Any]) -> int:
    return len(cell["ms"][cell["reference"]])


def disturbed(cell: dict[str, Any]) -> str:
    """Why a cell is not to be trusted; empty if it is."""
    times = cell["ms"][cell["reference"]]
    low, middle, high = quartiles(times)
    found = []
    if len(times) < ROUNDS:
        found.append(f"n below {ROUNDS}")
    if cell["others"] is not None and cell["others"] > OTHERS:
        found.append(f"others had {cell['others']:.2f} processors")
    if (high - low) / middle > SPREAD:
        found.append(f"spread {(high - low) / middle:.2f}")
    if min(times) < cell.get("floor_ms", 0):
        found.append("below the floor")
    return ", ".join(found)


def conclude(cells: Iterable[dict[str, Any]]) -> None:
    """Exit with what is wrong with a run, if anything is."""
    reasons = [disturbed(cell) for cell in cells]
    bad = [reason for reason in reasons if reason]
    if bad:
        bounds = f"at least {ROUNDS} rounds, others {OTHERS} processors, spread {SPREAD}"
        sys.exit(f"{len(bad)} of {len(reasons)} cells were disturbed ({bounds}): this run should not be committed")


def environment() -> dict[str, object]:
    """What train.py says of the machine, and the versions of the rivals."""
    installed = {name: version(name) for name in ("pytorch_optimizer", "heavyball") if find_spec(name)}
    return {k: v for k, v in {**train.environment(), **installed}.items() if v is not None}


def environment_line(env: dict[str, object]) -> str:
    return ", ".join(f"{k} {v}" for k, v in env.items())


def command_line(doc: str) -> argparse.ArgumentParser:
    """With --rounds and --out."""
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rounds", type=int, default=ROUNDS, help=f"of every cell; below {ROUNDS} it is marked")
    p.add_argument("--out", type=Path, default=Path("runs/bench"))
    return p
