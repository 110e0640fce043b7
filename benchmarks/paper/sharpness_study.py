"""What the sharpness of table1.py's networks says: by the gradient, by the loss it rises to, and on average.

    python -m benchmarks.paper.table1 --preset cpu --recipe fair --data DIR --keep-every 1 --out runs/cpu-fair
    python -m benchmarks.paper.sharpness_study --runs runs/cpu-fair --data DIR
    python -m benchmarks.paper.sharpness_study --runs results/cpu-fair --report-only

The loss is the mean over a fixed part of a run's own training images, not augmented, in batches of the run's size, with
BatchNorm in training mode: what training sees. The geometry (SAM or ASAM) and the rho of the curves over training are
the recipe's; the average, which grows with its square and is close to float32's rounding there, is taken at 20 times
that. Writes sharpness.json, sharpness.md and three figures to --runs: sharpness_training.png,
sharpness_rho.png (at the last epoch), sharpness_loss.png (what training recorded, against the training loss).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

import train
from sam_fused import loss_slice, measure_sharpness
from sam_fused.sharpness import KINDS

from ..plots import band, figure, legend_above, log_scale
from ..tables import table
from .runs import NETWORKS, OPTIMIZERS, STYLE, Result, by_cell, networks_of, of_network, read_runs, recorded
from .table1_report import network_panels

RHOS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # ten times as much for ASAM
AVERAGE_AT = 20  # times the recipe's rho
PAIRS = (("sgd", "adam"), ("sgd", "sgd+sam"), ("adam", "adam+sam"))  # that are compared at equal training loss
DEFAULTS = {"images": 512, "directions": 5}  # of the options on which the values depend
TOLERANCE = 0.2  # Proposition 1 holds while the realised rise is within this of the first-order one


def recipe_of(settings: dict[str, Any]) -> tuple[float, bool]:
    recipe = train.RECIPES[settings["recipe"]]
    return recipe["rho"], recipe["adaptive"]


# ---- measuring ----


def batches_of(r: Result, args: argparse.Namespace) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """``--images`` of the run's training images, in batches of its size; all batches are full."""
    s = dataclasses.replace(train.settle(train.parse([])), **{**r.settings, "data": args.data, "device": "cpu"})
    split = train.load_data(s)["train"]
    normalize = train.Normalize(split.images)
    n = min(args.images, len(split.labels)) // s.batch_size * s.batch_size
    order = torch.randperm(len(split.labels), generator=torch.Generator().manual_seed(0))[:n]
    return [(normalize(split.images[i]), split.labels[i]) for i in order.split(s.batch_size)]


def weights_of(r: Result, args: argparse.Namespace) -> dict[int, Path]:
    """The weights to measure, by epoch."""
    paths = sorted((args.runs / r.name).glob("weights-*.pt"))
    kept = {int(path.stem.removeprefix("weights-")): path for path in paths}
    return {e: path for e, path in kept.items() if e in (min(kept), r.settings["epochs"]) or e % args.every == 0}


def measure(r: Result, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each epoch that is measured; the last one's has the values by rho."""
    s = r.settings
    rho, adaptive = recipe_of(s)
    batches = batches_of(r, args)
    model = train.ARCHS[s["arch"]](s["width"]).to(memory_format=torch.channels_last).train()
    common = {"model": model, "batches": batches, "adaptive": adaptive}
    common["loss_fn"] = lambda logits, y: F.cross_entropy(logits, y, label_smoothing=s["label_smoothing"])

    weights = weights_of(r, args)
    if s["epochs"] not in weights:
        missing = args.runs / r.name / f"weights-{s['epochs']:04}.pt"
        raise train.RunError(f"{missing} is not there: train with table1.py --keep-every K")
    rows = []
    for epoch, path in weights.items():
        model.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
        row = {kind: measure_sharpness(**common, rho=rho, kind=kind).value for kind in KINDS[:2]}
        generator = torch.Generator().manual_seed(0)
        row["average"], row["standard_error"] = measure_sharpness(
            **common, rho=AVERAGE_AT * rho, kind="average", directions=args.directions, generator=generator
        )
        rows.append({"epoch": epoch, **row})
    radii = [10 * x if adaptive else x for x in RHOS]
    start, *losses = loss_slice(**common, radii=[0.0, *radii])
    slope = rows[-1]["first_order"] / rho
    rows[-1] |= {name: getattr(args, name) for name in DEFAULTS}
    rows[-1]["by_rho"] = [
        {"rho": at, "first_order": slope * at, "realised": loss - start} for at, loss in zip(radii, losses, strict=True)
    ]
    return rows


def study(args: argparse.Namespace, results: list[Result]) -> dict[str, list[dict[str, Any]]]:
    """By the run's name. What sharpness.json has already is not measured again.

    Raises:
        train.RunError: if it was measured with other options than would be now.
    """
    path = args.runs / "sharpness.json"
    held = json.loads(path.read_text()) if path.exists() else {}
    for r in results:
        measured = [row["epoch"] for row in held.get(r.name, [])]
        others = [e for e in measured[1:-1] if e % args.every]
        if measured and (others or not weights_of(r, args).keys() <= set(measured)):
            raise train.RunError(
                f"{path} has {r.name} in epochs {measured}, which --every {args.every} does not choose: remove it, or "
                "give the same --every"
            )
        for name, default in DEFAULTS.items():
            now = getattr(args, name)
            before = held[r.name][-1].get(name, default) if measured else now
            if before != now:
                raise train.RunError(
                    f"{path} has {r.name} with --{name} {before}, not {now}: remove it, or give the same --{name}"
                )
    for r in tqdm([r for r in results if r.name not in held], desc="sharpness", disable=None):
        torch.set_num_threads(args.threads)
        held[r.name] = measure(r, args)
        train.save(path, json.dumps(held, indent=1))
    return held


# ---- reporting ----

TITLES = {"first_order": "first order", "realised": "realised", "average": "average"}


def ratios(held: dict[str, Any], runs: list[Result]) -> dict[float, float]:
    """By rho: realised over first-order sharpness at the last epoch, mean over the seeds."""
    by_rho: dict[float, list[float]] = {}
    for r in runs:
        for row in held[r.name][-1]["by_rho"]:
            by_rho.setdefault(row["rho"], []).append(row["realised"] / row["first_order"])
    return {rho: statistics.mean(values) for rho, values in by_rho.items()}


def reach(by_rho: dict[float, float]) -> float | None:
    """The largest rho up to which the ratio stays within TOLERANCE of 1."""
    last = None
    for rho, ratio in sorted(by_rho.items()):
        if abs(ratio - 1) > TOLERANCE:
            break
        last = rho
    return last


def peak(r: Result) -> tuple[int, float]:
    """The epoch of the highest recorded sharpness, and that over the first epoch's."""
    values = r.sharpness(1.0)
    return 1 + values.index(max(values)), max(values) / values[0]


def at_equal_loss(one: Result, other: Result) -> tuple[float, float]:
    """The lowest training loss that both runs reach, and the other's recorded sharpness over the one's there."""
    reached = max(min(m["train_loss"] for m in r.metrics) for r in (one, other))
    first, second = (
        next(x for x, m in zip(r.sharpness(1.0), r.metrics, strict=True) if m["train_loss"] <= reached)
        for r in (one, other)
    )
    return reached, second / first


def equal_loss_rows(cells: dict[tuple[str, str], list[Result]]) -> Iterator[list[str]]:
    """A row for each network and pair, over the seeds that both have."""
    for arch, network in NETWORKS.items():
        for one, other in PAIRS:
            runs = [{r.settings["seed"]: r for r in cells.get((arch, o), [])} for o in (one, other)]
            seeds = sorted(runs[0].keys() & runs[1].keys())
            if seeds:
                found = [at_equal_loss(runs[0][seed], runs[1][seed]) for seed in seeds]
                losses, values = (", ".join(f"{x[k]:.2f}" for x in found) for k in range(2))
                yield [network, f"{OPTIMIZERS[one]}, {OPTIMIZERS[other]}", losses, values]


def markdown(held: dict[str, Any], cells: dict[tuple[str, str], list[Result]], rho: float, adaptive: bool) -> str:
    def rows(
        of_cell: Callable[[list[Result]], list[str]], of_cells: dict[tuple[str, str], list[Result]] = cells
    ) -> list[list[str]]:
        return [[NETWORKS[arch], OPTIMIZERS[o], *of_cell(runs)] for (arch, o), runs in of_cells.items()]

    def last_epoch(runs: list[Result]) -> list[str]:
        loss = statistics.mean(r.metrics[-1]["train_loss"] for r in runs)
        in_training = statistics.mean(r.sharpness(rho)[-1] for r in runs)
        measured = [statistics.mean(held[r.name][-1][kind] for r in runs) for kind in KINDS]
        values = ["-" if math.isnan(v) else f"{v:.4g}" for v in (in_training, *measured)]
        return [str(len(runs)), f"{loss:.3f}", *values]

    def by_radius(runs: list[Result]) -> list[str]:
        by_rho = ratios(held, runs)
        up_to = reach(by_rho)
        return [*(f"{by_rho[x]:.2f}" for x in rhos), f"less than {rhos[0]:g}" if up_to is None else f"{up_to:g}"]

    def highest(runs: list[Result]) -> list[str]:
        peaks = [peak(r) for r in runs]
        ends = [r.sharpness(1.0)[-1] / r.sharpness(1.0)[0] for r in runs]
        return [
            ", ".join(str(epoch) for epoch, _ in peaks),
            ", ".join(f"{x:.2f}" for _, x in peaks),
            ", ".join(f"{x:.2f}" for x in ends),
        ]

    rhos = [row["rho"] for row in next(iter(held.values()))[-1]["by_rho"]]
    lines = [
        f"# Sharpness, {'ASAM' if adaptive else 'SAM'} geometry",
        "",
        f"After the last epoch, at rho {rho:g}, the average at {AVERAGE_AT * rho:g}, means over the seeds. Recorded: "
        "what training measured, a batch at a time. The others: of the loss over many training images.",
        "",
        *table(["", "", "n", "train loss", "recorded", *TITLES.values()], rows(last_epoch)),
        "",
        f"Realised over first-order sharpness by rho, and the largest rho up to which it stays within "
        f"{TOLERANCE:.0%} of 1:",
        "",
        *table(["", "", *(f"{x:g}" for x in rhos), "holds up to"], rows(by_radius)),
        "",
        "When the recorded sharpness is highest: the epoch, and how many times the first epoch's it is, by seed:",
        "",
        *table(["", "", "epoch", "over the first", "last over the first"], rows(highest, recorded(cells))),
        "",
        "Recorded sharpness, the second's over the first's, when each came to the lowest training loss that both "
        "reach, by seed:",
        "",
        *table(["", "", "training loss", "ratio"], equal_loss_rows(cells)),
    ]
    return "\n".join(lines) + "\n"


def draw_training(held: dict[str, Any], cells: dict[tuple[str, str], list[Result]], rho: float, path: Path) -> None:
    networks = networks_of(cells)
    size = (12, 3.5 * len(networks))
    with figure(path, len(networks), len(KINDS), size=size, dpi=100, sharex=True, squeeze=False) as (drawn, panels):
        for row, (arch, network) in zip(panels, networks.items(), strict=True):
            for axes, kind in zip(row, KINDS, strict=True):
                for optimizer, runs in of_network(cells, arch):
                    epochs = [x["epoch"] for x in held[runs[0].name]]
                    curves = [[x[kind] for x in held[r.name]] for r in runs]
                    band(axes, curves, STYLE[optimizer], OPTIMIZERS[optimizer], epochs)
                at = AVERAGE_AT * rho if kind == "average" else rho
                axes.set(title=f"{network}, {TITLES[kind]}, rho = {at:g}")
                log_scale(axes)
                axes.grid(alpha=0.3)
            row[0].set(ylabel="sharpness")
        for axes in panels[-1]:
            axes.set(xlabel="epoch")
        legend_above(drawn)


def draw_rho(held: dict[str, Any], cells: dict[tuple[str, str], list[Result]], path: Path) -> None:
    with network_panels(path, cells, "rho", "realised / first-order sharpness, last epoch", sharey=True) as panels:
        for axes, arch in panels:
            axes.axhspan(1 - TOLERANCE, 1 + TOLERANCE, color="k", alpha=0.07, linewidth=0)
            axes.axhline(1, color="k", linewidth=0.8)
            for optimizer, runs in of_network(cells, arch):
                by_rho = ratios(held, runs)
                axes.plot(by_rho.keys(), by_rho.values(), STYLE[optimizer], marker=".", label=OPTIMIZERS[optimizer])
            axes.set(xscale="log")
            log_scale(axes)


def draw_loss(cells: dict[tuple[str, str], list[Result]], rho: float, path: Path) -> None:
    ylabel = f"recorded sharpness of a batch at rho = {rho:g}"
    with network_panels(path, cells, "training loss (training goes to the right)", ylabel, sharey=True) as panels:
        for axes, arch in panels:
            for optimizer, runs in of_network(cells, arch):
                losses = [
                    statistics.mean(x) for x in zip(*([m["train_loss"] for m in r.metrics] for r in runs), strict=True)
                ]
                values = [statistics.mean(x) for x in zip(*(r.sharpness(rho) for r in runs), strict=True)]
                axes.plot(losses, values, STYLE[optimizer], marker=".", markersize=3, label=OPTIMIZERS[optimizer])
            axes.invert_xaxis()
            log_scale(axes)


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--runs", type=Path, required=True, metavar="DIR", help="where table1.py left its runs")
    p.add_argument("--data", metavar="DIR", help="as in train.py")
    p.add_argument("--report-only", action="store_true", help="make the tables and figures of sharpness.json")
    p.add_argument("--images", type=int, default=DEFAULTS["images"], metavar="N", help="that the loss is over")
    p.add_argument(
        "--every",
        type=int,
        default=6,
        metavar="K",
        help="measure every K-th epoch, of those with weights the first and the last",
    )
    p.add_argument("--directions", type=int, default=DEFAULTS["directions"], metavar="M", help="of the average")
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = p.parse_args(argv)

    def run() -> None:
        results = [r for r in read_runs(args.runs) if r.finished and not r.in_grid]
        if not results:
            raise train.RunError(f"{args.runs} holds no finished runs of table1.py")
        rho, adaptive = recipe_of(results[0].settings)
        path = args.runs / "sharpness.json"
        held = json.loads(path.read_text()) if args.report_only else study(args, results)
        cells = by_cell([r for r in results if r.name in held])
        text = markdown(held, cells, rho, adaptive)
        train.save(args.runs / "sharpness.md", text)
        draw_training(held, cells, rho, args.runs / "sharpness_training.png")
        draw_rho(held, cells, args.runs / "sharpness_rho.png")
        draw_loss(recorded(cells), rho, args.runs / "sharpness_loss.png")
        print(text)

    return train.exit_status("sharpness_study.py", run, "the same command goes on")


if __name__ == "__main__":
    sys.exit(main())
