"""The least time that a step's memory traffic can take here."""

from __future__ import annotations

import time
import zlib
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.cpp_extension import load

from .rivals import update_of

FLAGS = ["-std=c++20", "-O3", "-march=native", "-fopenmp", "-Wno-psabi"]


def traffic(base: str, adaptive: bool) -> dict[str, tuple[list[str], list[str]]]:
    """What each part of a step reads and writes, all of it once: arrays as large as the parameters together."""
    states = [f"state {i}" for i in range(len(update_of(base).state))]
    return {
        "norm": (["g", "w"] if adaptive else ["g"], []),
        "perturb": (["w", "g"], ["w", "backup"]),
        "update": (["backup", "g", *states], ["w", *states]),
    }


def streams(base: str, adaptive: bool) -> int:
    """Values read or written for each parameter: 12 for SAM + Adam."""
    return sum(len(reads) + len(writes) for reads, writes in traffic(base, adaptive).values())


def cpu() -> str:
    """A name for this kind of processor: a kernel built for another may not run here, and both may share a cache."""
    info = Path("/proc/cpuinfo")
    flags = next((x for x in info.read_text().splitlines() if x.startswith("flags")), "") if info.exists() else ""
    return f"{zlib.crc32(flags.encode()):08x}"


class Floor:
    """The parts of a step done by the plainest kernel: the same reads and writes, and an addition for arithmetic.

    A call does the three parts one after the other, as a step does, so that each finds in the caches what a step would
    find. It does so in three ways: with all stores through the cache, with those past it that write what was not read,
    and with all of them past it. The floor is the sum of each part's least time, over the three ways and all calls.
    Nothing can do the same traffic in less, and one undisturbed call of a part is enough: so every time over the floor
    is at least 1. A cell in which FusedSAM was once below it is marked, for then the floor had no such call.
    """

    def __init__(self, numel: int, base: str, adaptive: bool) -> None:
        source = str(Path(__file__).parent / "bandwidth.cpp")
        self.move = load(f"sam_fused_move_{cpu()}", [source], extra_cflags=FLAGS).move
        parts = traffic(base, adaptive)
        self.least = dict.fromkeys(parts, float("inf"))  # seconds
        n = max(numel // 64 * 64, 64)
        names = sorted({name for reads, writes in parts.values() for name in (*reads, *writes)})
        # 1 KiB further each: at equal addresses modulo 4 KiB, loads would wait for stores that are not theirs.
        held = {name: torch.ones(n + 256 * i)[256 * i :] for i, name in enumerate(names)}
        self.plan: list[tuple[str, tuple[list[Tensor], ...]]] = []
        for way in (lambda name, reads: False, lambda name, reads: name not in reads, lambda name, reads: True):
            for part, (reads, writes) in parts.items():
                split = [n for n in writes if not way(n, reads)], [n for n in writes if way(n, reads)]
                self.plan.append((part, tuple([held[name] for name in names] for names in (reads, *split))))

    def __call__(self) -> None:
        for part, arrays in self.plan:
            start = time.perf_counter()
            self.move(*arrays)
            self.least[part] = min(self.least[part], time.perf_counter() - start)

    @property
    def ms(self) -> float:
        return 1e3 * sum(self.least.values())
