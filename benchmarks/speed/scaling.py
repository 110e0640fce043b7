"""How the cost of a SAM + Adam step grows: with the parameters (in 64 tensors), and with the tensors (of 100 elements).

    python -m benchmarks.speed.scaling

Writes scaling.json and scaling.png to --out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..plots import figure
from .rivals import RIVALS, two_calls
from .timing import alone, command_line, conclude, environment, measure, median
from .workloads import SMALL, parameters

SERIES = ["pytorch_optimizer SAM, fused=True", "foreach + fused base", "FusedSAM"]
AXES = {
    "parameters": [(64, 10**k // 64) for k in (4, 5, 6, 7, 8)],
    "tensors": [(10**k, 100) for k in (1, 2, 3, 4, 5)],
}


def cell(tensors: int, numel: int, rounds: int) -> dict[str, Any]:
    """Rivals are left out where one step would take them seconds."""
    params = parameters([torch.Size([numel])] * tensors)
    names = SERIES if tensors <= 10**4 else SERIES[1:]
    calls = {n: two_calls(RIVALS[n](params, torch.optim.Adam, False, lr=1e-3)) for n in names}
    return measure(calls, rounds, "FusedSAM", cold=True, again=tensors * numel < SMALL)


def plot(results: dict[str, list[dict]], path: Path) -> None:
    with figure(path, 1, 2, size=(10, 4), dpi=120, sharey=True) as (_, panels):
        for axes, (name, rows) in zip(panels, results.items(), strict=True):
            for series in SERIES:
                points = [(r["size"], median(r, series)) for r in rows if series in r["ms"]]
                axes.loglog(*zip(*points, strict=True), marker="o", label=series)
            last = rows[-1]
            line = [median(last, "FusedSAM") * r["size"] / last["size"] for r in rows]
            axes.loglog([r["size"] for r in rows], line, "k:", linewidth=0.8, label="linear, through FusedSAM's last")
            axes.set(xlabel=name, title={"parameters": "in 64 tensors", "tensors": "of 100 elements"}[name])
            axes.grid(alpha=0.3)
        panels[0].set(ylabel="ms a step (first_step + second_step), SAM + Adam")
        panels[0].legend(fontsize=8)


def main() -> None:
    args = command_line(__doc__).parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, list[dict]] = {name: [] for name in AXES}
    for name, sizes in AXES.items():
        for tensors, numel in tqdm(sizes, desc=name, disable=None):
            size = tensors * numel if name == "parameters" else tensors
            results[name].append({"size": size, **alone(cell, tensors, numel, args.rounds)})
    content = {"environment": environment(), **results}
    (args.out / "scaling.json").write_text(json.dumps(content))
    plot(results, args.out / "scaling.png")
    for name, rows in results.items():
        print(name, {r["size"]: round(median(r, "FusedSAM"), 3) for r in rows})
    conclude([r for rows in results.values() for r in rows])


if __name__ == "__main__":
    main()
