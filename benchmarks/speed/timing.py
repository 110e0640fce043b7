"""How calls are timed, where, and what the commands that do it have in common."""

from __future__ import annotations

import argparse
import gc
import random
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from pytest_benchmark.stats import Stats

import train


def rounds_of(
    calls: dict[str, Callable[[], object]], seconds: float, rounds: tuple[int, int], warm_up: int = 2
) -> dict[str, list[float]]:
    """The seconds of each call, made once a round: at least and at most ``rounds``, and none begins after ``seconds``.

    Every round has an order of its own: what a call leaves in the caches then meets all the others alike.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls.items())
    shuffle = random.Random(0).shuffle
    for call in calls.values():  # states, caches, cached lists
        for _ in range(warm_up):
            call()
    start = time.perf_counter()
    gc.collect()
    gc.disable()  # or one rival's garbage is collected in the next one's time
    try:
        for done in range(rounds[1]):
            if done >= rounds[0] and time.perf_counter() - start > seconds:
                break
            shuffle(order)
            for name, call in order:
                t = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - t)
    finally:
        gc.enable()
    return times


def interleaved(
    calls: dict[str, Callable[[], object]], seconds: float, rounds: tuple[int, int], warm_up: int = 2
) -> dict[str, Stats]:
    """The statistics of :func:`rounds_of`."""
    stats = {name: Stats() for name in calls}
    for name, times in rounds_of(calls, seconds, rounds, warm_up).items():
        for seconds_taken in times:
            stats[name].update(seconds_taken)
    return stats


def environment() -> dict[str, object]:
    """What train.py says of the machine, and the version of the rivals."""
    env = {**train.environment(), "pytorch_optimizer": version("pytorch_optimizer")}
    return {k: v for k, v in env.items() if v is not None}


def environment_line(env: dict[str, object]) -> str:
    return ", ".join(f"{k} {v}" for k, v in env.items())


def command_line(doc: str, seconds: float, what: str) -> argparse.ArgumentParser:
    """With --seconds, that ``what`` may take, and --out."""
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seconds", type=float, default=seconds, help=f"{what} may take, once it has had 3 rounds")
    p.add_argument("--out", type=Path, default=Path("runs/bench"))
    return p
