"""The least time that a step's memory traffic can take here: bytes that must move over the best measured bandwidth."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.cpp_extension import load

from .rivals import update_of

FLAGS = ["-std=c++20", "-O3", "-fopenmp", "-Wno-psabi"]

# Streams of 4 bytes a parameter, read or written (float32).
NORM = {False: 1, True: 2}  # g, and for ASAM w
PERTURB = 4  # reads w, g; writes w, backup


def streams(base: str, adaptive: bool) -> int:
    update = 3 + 2 * len(update_of(base).state)  # reads backup, g, states; writes w, states
    return NORM[adaptive] + PERTURB + update


class Bandwidth:
    """Plain kernels over arrays as large as the parameters together; each is a callable and the bytes it moves."""

    def __init__(self, numel: int) -> None:
        here = Path(__file__).parent
        kernels = load("sam_fused_bandwidth", [str(here / "bandwidth.cpp")], extra_cflags=FLAGS)
        n = max(numel // 16 * 16, 16)
        x, y, z = (torch.ones(n) for _ in range(3))
        self.kernels: dict[str, tuple[Callable[[], object], int]] = {
            "sum": (lambda: kernels.sum(x), 4 * n),
            "fill, non-temporal": (lambda: kernels.fill(z), 4 * n),
            "copy, non-temporal": (lambda: kernels.copy(z, x), 8 * n),
            "triad, non-temporal": (lambda: kernels.triad(z, x, y), 12 * n),
            "add in place": (lambda: kernels.add(x, y), 12 * n),
            "torch copy_": (lambda: z.copy_(x), 8 * n),
            "torch add_": (lambda: x.add_(y, alpha=1e-9), 12 * n),
        }
