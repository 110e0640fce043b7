"""Does memorising show in sharpness before it shows in accuracy?

    python -m benchmarks.paper.memorising --out runs/memorising
    python -m benchmarks.paper.memorising --report-only --out results/memorising    # the table and the figure again

Trains two networks on scikit-learn's digits by plain SGD and Adam, with none and with 40 % of the training and the
validation labels wrong, and asks of each run in which epoch each of three signals is first seen:

- memorised: the network gives back a fifth of the wrong training labels, where chance is a tenth,
- accuracy: the validation accuracy is 3 points below the highest so far,
- sharpness: the recorded sharpness is 20 % above the lowest so far.

With right labels only there is nothing to memorise, and a signal is a false alarm. These rules, the settings and the
seeds were committed before the first run. The same command goes on with a sweep that was cut (see sweep.py). Writes
memorising.md and memorising.png to --out.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import train

from ..plots import band, figure, legend_above
from ..tables import percent, table
from .runs import OPTIMIZERS, Result, left_out, machines_of, read_packed, read_runs
from .sweep import Run, command, command_line

SHARED: dict[str, Any] = {"dataset": "digits", "validate": 287, "no_augment": True, "rho": 0, "threads": 1}
NETWORKS: dict[str, dict[str, Any]] = {
    "mlp": {"arch": "mlp", "width": 256, "epochs": 40},
    "vgg16": {"arch": "vgg16", "width": 8, "epochs": 20},
}
LEARNING_RATES = {"sgd": 0.1, "adam": 0.001}
NOISE = (0, 40)

MEMORISED, FALL, RISE = 0.2, 0.03, 1.2
SIGNALS = ("memorised", "accuracy", "sharpness")


def plan(args: argparse.Namespace) -> list[list[Run]]:
    packed = read_packed(args.out)
    runs = [
        Run.of(
            args.out,
            f"{network}-{base}-{noise}-{seed}",
            packed,
            {
                **SHARED,
                **NETWORKS[network],
                **({} if args.epochs is None else {"epochs": args.epochs}),
                "base": base,
                "lr": LEARNING_RATES[base],
                "label_noise": noise / 100,
                "seed": seed,
            },
        )
        for seed in args.seeds
        for network in args.networks
        for base in LEARNING_RATES
        for noise in NOISE
    ]
    return [runs]


# ---- signals ----


def first(values: list[Any], seen: Callable[[list[Any]], bool]) -> int | None:
    """The first epoch, from 1, at which ``seen`` is true of the values so far."""
    return next((epoch for epoch in range(1, len(values) + 1) if seen(values[:epoch])), None)


def signals(r: Result) -> dict[str, int | None]:
    """The epoch in which each is first seen; None if it is not."""
    memorised = [m.get("memorised", 0.0) for m in r.metrics]
    accuracy = [m["val_acc"] for m in r.metrics]
    return {
        "memorised": first(memorised, lambda so_far: so_far[-1] >= MEMORISED),
        "accuracy": first(accuracy, lambda so_far: so_far[-1] <= max(so_far) - FALL),
        "sharpness": first(r.sharpness(1.0), lambda so_far: so_far[-1] >= RISE * min(so_far)),
    }


# ---- what came out ----

Cell = tuple[str, str, int]  # network, base, part of wrong labels in %


def cells_of(results: list[Result]) -> dict[Cell, list[Result]]:
    cells: dict[Cell, list[Result]] = {}
    for r in results:
        if not r.why_not:
            s = r.settings
            cells.setdefault((s["arch"], s["base"], round(100 * s["label_noise"])), []).append(r)
    return dict(sorted(cells.items()))


def epochs_of(runs: list[Result], signal: str) -> str:
    """Median and range over the runs in which it is seen, and in how many that is."""
    found = [epoch for r in runs if (epoch := signals(r)[signal]) is not None]
    if not found:
        return "never"
    seen = "" if len(found) == len(runs) else f", in {len(found)} of {len(runs)}"
    return f"{statistics.median(found):g} ({min(found)} to {max(found)}){seen}"


def order(runs: list[Result]) -> str:
    """In how many runs sharpness is first, accuracy, or both in one epoch; a signal that is not seen comes last."""
    never = 1 + max(len(r.metrics) for r in runs)
    pairs = [[signals(r)[name] or never for name in ("sharpness", "accuracy")] for r in runs]
    counts = [sum(s < a for s, a in pairs), sum(s > a for s, a in pairs), sum(s == a for s, a in pairs)]
    return ", ".join(map(str, counts))


def row(cell: Cell, runs: list[Result]) -> list[str]:
    network, base, noise = cell
    return [
        network,
        OPTIMIZERS[base],
        f"{noise} %",
        str(len(runs)),
        percent(max(m["test_acc"] for m in r.metrics) for r in runs),
        percent(r.metrics[-1]["test_acc"] for r in runs),
        percent(r.metrics[-1]["memorised"] for r in runs) if noise else "",
        *(epochs_of(runs, signal) if noise or signal != "memorised" else "" for signal in SIGNALS),
        order(runs),
    ]


def markdown(results: list[Result]) -> str:
    cells = cells_of(results)
    r = next(iter(cells.values()))[0]
    seeds = sorted({r.settings["seed"] for runs in cells.values() for r in runs})
    columns = ["", "", "wrong", "n", "best", "last", "memorised", *(f"{signal} seen" for signal in SIGNALS), "order"]
    lines = [
        "# Does memorising show in sharpness before it shows in accuracy?",
        "",
        f"{r.settings['dataset']}, plain SGD with lr {LEARNING_RATES['sgd']:g} and Adam with lr "
        f"{LEARNING_RATES['adam']:g}, {r.settings['validate']} images for validation, whose labels are wrong in the "
        f"same part; seeds {', '.join(map(str, seeds))}; torch {r.environment['torch']}, {machines_of(results)}.",
        "",
        "Best and last: test accuracy in the best and after the last epoch, in %. Memorised: share of the wrong "
        "training labels that are given back after the last epoch, in %. Seen: the first epoch in which at least "
        f"{MEMORISED:.0%} of them are given back, in which the validation accuracy is {100 * FALL:g} points below the "
        f"highest so far, in which the recorded sharpness is {RISE - 1:.0%} above the lowest so far: median (range). "
        "Order: in how many runs sharpness is seen before accuracy, after it, in the same epoch (or neither is seen).",
        "",
        *table(columns, (row(cell, runs) for cell, runs in cells.items())),
    ]
    return "\n".join([*lines, *left_out(results)]) + "\n"


def draw(results: list[Result], path: Path) -> None:
    """Validation accuracy, memorised share and sharpness by epoch; the share where labels are wrong."""
    cells = cells_of(results)
    columns = list(dict.fromkeys((network, base) for network, base, _ in cells))
    curves: dict[str, Callable[[Result], list[float]]] = {
        "validation accuracy, %": lambda r: [100 * m["val_acc"] for m in r.metrics],
        "memorised, %": lambda r: [100 * m["memorised"] for m in r.metrics if "memorised" in m],
        "sharpness over the first epoch's": lambda r: [x / r.sharpness(1.0)[0] for x in r.sharpness(1.0)],
    }
    size = (3.6 * len(columns), 7.5)
    with figure(path, len(curves), len(columns), size=size, dpi=110, sharex="col", squeeze=False) as (drawn, panels):
        for axes_row, (label, curve) in zip(panels, curves.items(), strict=True):
            axes_row[0].set(ylabel=label)
            for axes, (network, base) in zip(axes_row, columns, strict=True):
                for i, noise in enumerate(NOISE):
                    drawable = [c for r in cells.get((network, base, noise), []) if (c := curve(r))]
                    if drawable:
                        band(axes, drawable, f"C{i}-", f"{noise} % wrong")
                axes.grid(alpha=0.3)
        for axes, (network, base) in zip(panels[0], columns, strict=True):
            axes.set(title=f"{network}, {OPTIMIZERS[base]}")
        for axes in panels[-1]:
            axes.set(xlabel="epoch")
        legend_above(drawn)


def report(out: Path) -> str:
    """Write memorising.md and memorising.png to ``out``; returns the text.

    Raises:
        train.RunError: if there are no finished runs.
    """
    results = read_runs(out)
    if not cells_of(results):
        raise train.RunError(f"{out} holds no finished runs")
    text = markdown(results)
    train.save(out / "memorising.md", text)
    draw(results, out / "memorising.png")
    return text


# ---- command line ----


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    p = command_line(__doc__, "runs/memorising")
    p.set_defaults(out=Path("runs/memorising"))
    p.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    p.add_argument("--seeds", nargs="+", type=int, default=list(range(10)))
    p.add_argument("--epochs", type=int, metavar="N", help="default: 40 of mlp, 20 of vgg16")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    return command("memorising.py", args, lambda: plan(args), "memorising", report, keep_checkpoints=False)


if __name__ == "__main__":
    sys.exit(main())
