"""How much of a perturbation is left when w + eps is rounded to bfloat16, to nearest and stochastically.

    python -m benchmarks.paper.rounding --out runs/rounding

ResNet-18 and VGG16 at full width, on batches of scikit-learn's digits: the gradient of the first batch, and the one
after eight steps of Adam. Weights and gradient are then taken in bfloat16, as a 16-bit training has them. What is left
is (perturbed - w) eps / (eps eps), over all weights. Writes rounding.json and rounding.md to --out; some minutes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import train
from sam_fused import FusedSAM

from ..tables import table
from .runs import NETWORKS

WIDTH, BATCH, LR = 64, 64, 1e-3
STEPS = {0: "the first gradient", 8: "after eight steps of Adam"}
RHOS = (0.05, 0.01)
SEEDS = (0, 1, 2)
KINDS = ("to nearest", "stochastically")


def gradients(arch: str, seed: int) -> dict[int, tuple[list[Tensor], list[Tensor]]]:
    """The weights and their gradients in bfloat16, by how many steps were made before."""
    torch.manual_seed(seed)
    split = train.load_digits()[0]
    normalize = train.Normalize(split.images)
    model = train.ARCHS[arch](WIDTH).to(memory_format=torch.channels_last)
    adam = torch.optim.Adam(model.parameters(), lr=LR)
    found = {}
    for step, index in enumerate(torch.randperm(len(split.labels)).split(BATCH)[: max(STEPS) + 1]):
        adam.zero_grad()
        F.cross_entropy(model(normalize(split.images[index])), split.labels[index]).backward()
        if step in STEPS:
            params = list(model.parameters())
            found[step] = (
                [p.detach().bfloat16() for p in params],
                [p.grad.bfloat16() for p in params if p.grad is not None],
            )
        adam.step()
    return found


def left(weights: list[Tensor], grads: list[Tensor], rho: float) -> dict[str, float]:
    """The part of eps that is left, by how w + eps is rounded."""
    params = [nn.Parameter(w.clone()) for w in weights]
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    opt = FusedSAM(params, torch.optim.SGD, rho=rho)
    opt.first_step()
    norm = opt.grad_norm
    eps = [rho * g.double() / norm for g in grads]
    nearest = [(w.double() + e).bfloat16() for w, e in zip(weights, eps, strict=True)]
    whole = sum((e * e).sum() for e in eps)
    return {
        kind: float(
            sum(((q.double() - w.double()) * e).sum() for q, w, e in zip(to, weights, eps, strict=True)) / whole
        )
        for kind, to in zip(KINDS, (nearest, [p.detach() for p in params]), strict=True)
    }


def markdown(content: dict) -> str:
    """A row a case, a column a network and a way to round: the range over the seeds."""
    cells = content["cells"]

    def entry(arch: str, kind: str, rho: float, steps: int) -> str:
        shares = [c[kind] for c in cells if (c["arch"], c["rho"], c["steps"]) == (arch, rho, steps)]
        low, high = f"{100 * min(shares):.0f}", f"{100 * max(shares):.0f}"
        return f"{low} %" if low == high else f"{low} to {high} %"

    columns = [(arch, kind) for arch in NETWORKS for kind in KINDS]
    rows = [
        [f"rho {rho:g}, {STEPS[steps]}", *(entry(*column, rho, steps) for column in columns)]
        for rho in RHOS
        for steps in STEPS
    ]
    return "\n".join(table(["", *(f"{NETWORKS[arch]}, {kind}" for arch, kind in columns)], rows)) + "\n"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=Path("runs/rounding"))
    out: Path = p.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    content: dict = {"environment": train.environment(), "cells": []}
    for arch, seed in tqdm([(arch, seed) for arch in NETWORKS for seed in SEEDS], disable=None):
        for steps, (weights, grads) in gradients(arch, seed).items():
            for rho in RHOS:
                case = {"arch": arch, "seed": seed, "steps": steps, "rho": rho}
                content["cells"].append({**case, **left(weights, grads, rho)})
    (out / "rounding.json").write_text(json.dumps(content, indent=1) + "\n")
    (out / "rounding.md").write_text(markdown(content))
    print(markdown(content))


if __name__ == "__main__":
    main()
