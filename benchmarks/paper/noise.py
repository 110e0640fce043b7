"""What helps against wrong labels: SAM in several forms, and what else the same time or less could be spent on.

    python -m benchmarks.paper.noise --preset digits --threads 1 --out runs/noise-digits
    python -m benchmarks.paper.noise --preset cifar10 --data DIR --threads 1 --out runs/noise-cifar10
    python -m benchmarks.paper.noise --report-only --out results/noise-digits    # the tables and the figures again

A part of the training and the validation labels is wrong; the labels of the test set are right. For each base and part
the learning rate is chosen first, with the plain base; then, with it, each method's own number. What is chosen has the
highest accuracy on the validation images, wrong labels included, after the last epoch, with a seed that the table does
not use; of equal values it is the smallest. A grid is extended while its best value is at its edge, by up to three
values to each side. The test set chooses nothing.

The same command goes on with a sweep that was cut (see sweep.py); processes that share --out share the sweep. Writes
noise.md and a figure for each part of wrong labels, as noise-40.png, to --out.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import train

from ..plots import band, figure, legend_above
from ..tables import percent, table
from .intervals import t_interval
from .runs import GRID, OPTIMIZERS, Result, left_out, machines_of, read_packed, read_runs
from .sweep import GRID_SEED, LEARNING_RATES, Case, Grid, Run, command, command_line, tune


@dataclass(frozen=True)
class Method:
    """``flags`` are train.py's; ``grid`` has the values of one more, which is chosen."""

    title: str
    flags: dict[str, Any] = field(default_factory=dict)
    grid: Grid | None = None


PLAIN = {"rho": 0}
METHODS = {
    "base": Method("base", PLAIN),
    "long": Method("base, twice the epochs", PLAIN),
    "decay": Method("base, weight decay chosen", PLAIN, Grid("weight_decay", -6, -4)),
    "sam": Method("SAM", {}, Grid("rho", -2, 0)),
    "asam": Method("ASAM", {"adaptive": True}, Grid("rho", 0, 2)),
    "late": Method("SAM in the second half", {"sam_from": 0.5}, Grid("rho", -2, 0)),
    "msam": Method("Momentum-SAM", {"method": "msam"}, Grid("rho", -1, 1)),
    "norm": Method("SAM of the norm layers", {"norm_only": True}, Grid("rho", -1, 1)),
    "part": Method("SAM, ascent on a quarter", {"ascent_fraction": 0.25}, Grid("rho", -2, 0)),
}

PRESETS: dict[str, dict[str, Any]] = {
    "digits": {
        "flags": {"dataset": "digits", "arch": "mlp", "width": 256, "validate": 287, "no_augment": True},
        "epochs": 40,
        "noise": [0, 20, 40, 60],
        "methods": list(METHODS),
        "seeds": [0, 1, 2, 3, 4],
    },
    "cifar10": {
        "flags": {
            "arch": "vgg16",
            "width": 8,  # which fits wrong labels too
            "train_size": 10_000,
            "validate": 2000,
            "no_augment": True,
        },
        "epochs": 30,
        "noise": [0, 20, 40],
        "methods": ["base", "sam", "late", "msam"],
        "seeds": [0, 1, 2],
    },
}


# ---- what is run ----


def plan(args: argparse.Namespace) -> list[list[Run]]:
    """The learning rates, then the methods' own numbers, then the runs of the table."""
    packed = read_packed(args.out)

    def run(name: str, base: str, noise: int, method: str, seed: int, chosen: dict[str, float]) -> Run:
        flags = {
            **PRESETS[args.preset]["flags"],
            "data": args.data,
            "threads": args.threads,
            "epochs": args.epochs * (2 if method == "long" else 1),
            "label_noise": noise / 100,
            "base": base,
            "seed": seed,
            **METHODS[method].flags,
            **chosen,
        }
        return Run.of(args.out, name, packed, flags)

    def run_of_grid(case: Case, method: str, suffix: str, values: dict[str, float]) -> Run:
        words = (*case, *(() if method == "base" else (method,)), suffix)
        return run(GRID + "-".join(map(str, words)), *case, method, GRID_SEED, values)

    cells = [(base, noise) for noise in args.noise for base in args.bases]
    rates, numbers, chosen = tune(
        {(base, noise): LEARNING_RATES[base] for base, noise in cells},
        {method: METHODS[method].grid for method in args.methods},
        run_of_grid,
        key="val_acc",
    )
    last = [
        run(f"{base}-{noise}-{method}-{seed}", base, noise, method, seed, chosen[(base, noise), method])
        for seed in args.seeds
        for base, noise in cells
        for method in args.methods
    ]
    return [rates, numbers, last]


# ---- what came out ----


@dataclass
class Cell:
    """The runs of one base, part of wrong labels in % and method, by seed."""

    base: str
    noise: int
    method: str
    runs: dict[int, Result] = field(default_factory=dict)

    def last(self, key: str) -> dict[int, float]:
        return {seed: r.metrics[-1][key] for seed, r in self.runs.items() if key in r.metrics[-1]}

    def best(self) -> dict[int, float]:
        """The test accuracy in the epoch with the highest validation accuracy, the first of equal ones."""
        return {seed: max(r.metrics, key=lambda m: m["val_acc"])["test_acc"] for seed, r in self.runs.items()}

    def seconds(self) -> dict[int, float]:
        """The processor time of training, without evaluation, by seed."""
        return {seed: sum(m["train_cpu_seconds"] for m in r.metrics) for seed, r in self.runs.items()}


def cells_of(runs: list[Result]) -> dict[tuple[str, int, str], Cell]:
    """Of the finished runs outside the grids."""
    cells: dict[tuple[str, int, str], Cell] = {}
    for r in runs:
        if not (r.in_grid or r.why_not):
            base, noise, method, seed = r.name.split("-")
            key = base, int(noise), method
            cells.setdefault(key, Cell(*key)).runs[int(seed)] = r
    order = {name: i for i, name in enumerate(METHODS)}
    return dict(sorted(cells.items(), key=lambda item: (item[0][0], item[0][1], order[item[0][2]])))


def interval(base: dict[int, float], other: dict[int, float]) -> tuple[float, float] | None:
    """The 95 % t interval of other - base in percentage points, paired by seed."""
    differences = [100 * (other[seed] - base[seed]) for seed in sorted(base.keys() & other.keys())]
    return t_interval(differences) if len(differences) > 1 else None


def gain(base: dict[int, float], other: dict[int, float]) -> str:
    """The interval, with so many digits that each end shows its sign, and n if it is not that of ``other``."""
    ends = interval(base, other)
    if ends is None:
        return "-"
    digits = 1 if min(map(abs, ends)) >= 0.05 else 2
    pairs = len(base.keys() & other.keys())
    return " to ".join(f"{end:+.{digits}f}" for end in ends) + (f" (n = {pairs})" if pairs < len(other) else "")


def time_ratio(base: dict[int, float], other: dict[int, float]) -> str:
    """The median over the seeds of other / base; runs of one seed were neighbours in the sweep."""
    ratios = [other[seed] / base[seed] for seed in base.keys() & other.keys()]
    return f"{statistics.median(ratios):.2f}" if ratios else "-"


def method_row(cell: Cell, base: Cell) -> list[str]:
    s = next(iter(cell.runs.values())).settings
    method = METHODS[cell.method]
    number = f"{s[method.grid.name]:g}" if method.grid else ""
    return [
        method.title,
        number,
        str(len(cell.runs)),
        percent(cell.last("test_acc").values()),
        "" if cell is base else gain(base.last("test_acc"), cell.last("test_acc")),
        percent(cell.best().values()),
        "" if cell is base else gain(base.best(), cell.best()),
        percent(cell.last("memorised").values()),
        time_ratio(base.seconds(), cell.seconds()),
    ]


def searched(base: str, method: str) -> str:
    """What a grid has values of: train.py's option."""
    return (METHODS[method].grid or LEARNING_RATES[base]).name


def grids_of(runs: list[Result]) -> dict[tuple[str, int, str], dict[float, Result]]:
    """By base, part of wrong labels in % and method: the runs of its grid by value, in ascending order."""
    found: dict[tuple[str, int, str], dict[float, Result]] = {}
    for r in runs:
        if r.in_grid:
            base, noise, *words = r.name.removeprefix(GRID).split("-")
            method = "base" if words[0].startswith("lr") else words[0]
            found.setdefault((base, int(noise), method), {})[r.settings[searched(base, method)]] = r
    order = [(b, n, m) for b, n in dict.fromkeys((b, n) for b, n, _ in found) for m in METHODS if (b, n, m) in found]
    return {key: dict(sorted(found[key].items())) for key in order}


def grid_row(base: str, noise: int, method: str, grid: dict[float, Result]) -> list[str]:
    scores = [f"{value:g}: {r.outcome('val_acc', 1)}" for value, r in grid.items()]
    number = "learning rate" if method == "base" else searched(base, method).replace("_", " ")
    return [OPTIMIZERS[base], str(noise), METHODS[method].title, number, ", ".join(scores)]


def markdown(runs: list[Result]) -> str:
    results, cells = [r for r in runs if not r.in_grid], cells_of(runs)
    first = next(iter(cells.values())).runs
    r = next(iter(first.values()))
    s, environment = r.settings, r.environment
    pairs = list(dict.fromkeys((base, noise) for base, noise, _ in cells))
    size = "" if s["train_size"] is None else f"{s['train_size']:,} training images, "
    lines = [
        "# Wrong labels",
        "",
        f"{s['dataset']}, {size}{s['validate']:,} images for validation, no augmentation, {s['arch']} of width "
        f"{s['width']}, {s['epochs']} epochs, batch {s['batch_size']}; torch {environment['torch']}, "
        f"{machines_of(results)}, {environment['threads']} thread. Seeds {', '.join(map(str, first))}. Learning rate "
        "and number by the accuracy on the validation images, whose labels are wrong in the same part. Test labels "
        "are right.",
        "",
        "Test accuracy after the last epoch in %, mean ± sample standard deviation, by the part of wrong labels:",
        "",
    ]
    titles = ["", *(f"{OPTIMIZERS[base]}, {noise} %" for base, noise in pairs)]
    methods = [name for name in METHODS if any(key[2] == name for key in cells)]

    def summary(name: str) -> list[str]:
        found = [cells.get((base, noise, name)) for base, noise in pairs]
        return [METHODS[name].title, *("-" if c is None else percent(c.last("test_acc").values()) for c in found)]

    lines += table(titles, map(summary, methods))
    columns = ["", "number", "n", "last epoch", "gain", "best by validation", "gain", "memorised", "time"]
    lines += [
        "",
        "By base and part of wrong labels. Number: the chosen rho or weight decay. Best by validation: test accuracy "
        "in the epoch with the highest validation accuracy. Gain: over the base in percentage points, the 95 % t "
        "interval of the differences paired by seed. Memorised: the share of the wrong training labels that the "
        "network gives back after the last epoch, in %, which a network that gives the true label does not. Time: the "
        "processor time of training, without evaluation, over the base's, median over the seeds.",
    ]
    for base, noise in pairs:
        mine = {name: cells[base, noise, name] for name in methods if (base, noise, name) in cells}
        if "base" not in mine:
            continue
        rate = next(iter(mine["base"].runs.values())).settings["lr"]
        lines += ["", f"## {OPTIMIZERS[base]}, {noise} % wrong, learning rate {rate:g}", ""]
        lines += table(columns, (method_row(cell, mine["base"]) for cell in mine.values()))
    if grids := grids_of(runs):
        lines += ["", "## The grids", ""]
        lines += [
            f"Validation accuracy after the last epoch, seed {GRID_SEED}. Of equal values the smallest is taken.",
            "",
        ]
        lines += table(["", "wrong, %", "", "", ""], (grid_row(*key, grid) for key, grid in grids.items()))
    return "\n".join([*lines, *left_out(results)]) + "\n"


def draw(cells: dict[tuple[str, int, str], Cell], noise: int, path: Path) -> None:
    """Test accuracy and memorised share by epoch, with that part of wrong labels in %."""
    cells = {key: cell for key, cell in cells.items() if key[1] == noise and key[2] != "long"}
    bases = list(dict.fromkeys(base for base, *_ in cells))
    with figure(path, 2, len(bases), size=(5.5 * len(bases), 7), dpi=110, sharex=True, squeeze=False) as (
        drawn,
        panels,
    ):
        for row, key, label in zip(panels, ("test_acc", "memorised"), ("test accuracy", "memorised"), strict=True):
            for axes, base in zip(row, bases, strict=True):
                for i, name in enumerate(METHODS):
                    if (base, noise, name) in cells:
                        runs = cells[base, noise, name].runs.values()
                        band(axes, [[100 * m[key] for m in r.metrics] for r in runs], f"C{i}-", METHODS[name].title)
                axes.set(title=f"{OPTIMIZERS[base]}, {noise} % of the labels wrong", ylabel=f"{label}, %")
                axes.grid(alpha=0.3)
        for axes in panels[-1]:
            axes.set(xlabel="epoch")
        legend_above(drawn)


def report(out: Path) -> str:
    """Write noise.md and a figure for each part of wrong labels, as noise-40.png, to ``out``; returns the text.

    Raises:
        train.RunError: if there are no finished runs.
    """
    runs = read_runs(out)
    cells = cells_of(runs)
    if not cells:
        raise train.RunError(f"{out} holds no finished runs")
    text = markdown(runs)
    train.save(out / "noise.md", text)
    for noise in {noise for _, noise, method in cells if noise and method != "long"}:
        draw(cells, noise, out / f"noise-{noise}.png")
    return text


# ---- command line ----


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    p = command_line(__doc__, "runs/noise-PRESET")
    p.add_argument("--preset", choices=list(PRESETS), default="digits")
    p.add_argument("--bases", nargs="+", choices=sorted(LEARNING_RATES), default=sorted(LEARNING_RATES))
    p.add_argument("--data", metavar="DIR", help="as in train.py")
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    g = p.add_argument_group("without them, the preset's")
    g.add_argument("--noise", nargs="+", type=int, metavar="P", help="parts of wrong labels, in %%")
    g.add_argument("--methods", nargs="+", choices=list(METHODS))
    g.add_argument("--seeds", nargs="+", type=int)
    g.add_argument("--epochs", type=int, metavar="N")
    args = p.parse_args(argv)
    for name in ("noise", "methods", "seeds", "epochs"):
        if getattr(args, name) is None:
            setattr(args, name, PRESETS[args.preset][name])
    if args.out is None:
        args.out = Path("runs") / f"noise-{args.preset}"
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    return command("noise.py", args, lambda: plan(args), f"noise, {args.preset}", report, keep_checkpoints=False)


if __name__ == "__main__":
    sys.exit(main())
