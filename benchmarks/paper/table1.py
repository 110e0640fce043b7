"""Table I and Figures 1 and 2 of the paper: SGD, SGD + SAM, Adam and Adam + SAM on two networks and three seeds.

    python -m benchmarks.paper.table1 --preset paper --recipe paper-text --data DIR --device cuda --out runs/paper-text
    python -m benchmarks.paper.table1 --preset cpu --recipe fair --data DIR --threads 1 --out runs/cpu-fair
    python -m benchmarks.paper.table1 --preset large --recipe fair --data DIR --threads 1 --out runs/large-fair
    python -m benchmarks.paper.table1 --preset all --recipe fair --data DIR --threads 1 --out runs/all-fair
    python -m benchmarks.paper.table1 ... --dry-run                          # what is done, and how long the rest takes
    python -m benchmarks.paper.table1 --report-only --out results/cpu-fair   # the table and figures of what --out holds

Recipes paper-text and paper-code are train.py's. fair is paper-text with each base's learning rate, and then each rho,
chosen for each network on a held-out part of the training set, from the grids that are printed with the table.

Preset large has Momentum-SAM beside the paper's rows, trains in bfloat16, tests after the last epoch only, and shows
the accuracy on held-out images by epoch. It chooses on a shorter schedule, and extends a grid while its best value is
at its edge. Preset all trains on all images, with what preset large chooses: its grids are the same runs.

The same command goes on with a sweep that was cut (see sweep.py). Several processes that share --out, with --threads 1
each, get more out of a CPU than one with more threads, at small widths. Writes table1.md, table1.csv, figure1.png and
figure2.png to --out.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import train

from .runs import GRID, NETWORKS, read_packed
from .sweep import GRID_SEED, LEARNING_RATES, Case, Grid, Run, command, command_line, tune
from .table1_report import report

# ---- what is run ----

# What the presets have in common; each replaces some of it.
COMMON: dict[str, Any] = {
    "batch_size": 128,
    "train_size": None,
    "eval_size": None,
    "validate": None,
    "holdout": 5000,
    "grid": {},  # what its runs have in place of the table's
    "extend": 0,
    "amp": None,
    "methods": ["base", "sam"],
}
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {**COMMON, "width": {"resnet18": 64, "vgg16": 64}, "epochs": 200},
    "cpu": {
        **COMMON,
        "width": {"resnet18": 8, "vgg16": 16},  # a pass costs about the same
        "epochs": 60,
        "train_size": 1000,
        "eval_size": 500,
    },
    "large": {
        **COMMON,
        "width": {"resnet18": 16, "vgg16": 16},
        "epochs": 30,
        "train_size": 10_000,
        "eval_size": 0,
        "validate": 2000,
        "holdout": 2000,
        "grid": {"epochs": 20},
        "extend": 3,
        "amp": "bf16",
        "methods": ["base", "sam", "msam"],
    },
}
LARGE = PRESETS["large"]
PRESETS["all"] = {
    **LARGE,
    "train_size": None,
    "eval_size": None,
    "validate": None,
    "grid": {**LARGE["grid"], "train_size": LARGE["train_size"], "eval_size": LARGE["eval_size"]},  # the same runs
}
# Flags of train.py that take a number.
NUMBERS = ("width", "epochs", "batch_size", "train_size", "eval_size", "validate", "holdout")

METHODS: dict[str, dict[str, Any]] = {"base": {"rho": 0}, "sam": {}, "msam": {"method": "msam"}}

# The fair recipe's grids: around the paper's value, or for Momentum-SAM's rho ten times that.
RHOS = {"sam": Grid("rho", -3, -1, 0.5), "msam": Grid("rho", -1, 1, 0.5)}


def plan(args: argparse.Namespace) -> list[list[Run]]:
    """The runs by stage; while a stage is not finished, what it decides of later ones is the recipe's.

    Neighbours cost about the same, so that processes that share a sweep end together.
    """
    packed = read_packed(args.out)
    pairs = [(arch, base) for arch in args.archs for base in args.bases]

    def run(arch: str, base: str, method: str, suffix: str, prefix: str = "", **flags: Any) -> Run:
        shared = ("dataset", "data", "device", "threads", "amp", "compile", "keep_every", *NUMBERS)
        given = {k: getattr(args, k) for k in shared}
        given |= {"arch": arch, "base": base, "holdout": None, **METHODS[method], **flags}
        if isinstance(given["width"], dict):
            given["width"] = given["width"][arch]
        given["recipe"] = "paper-text" if args.recipe == "fair" else args.recipe
        name = f"{prefix}{arch}-{base}{'' if method == 'base' else '+' + method}-{suffix}"
        return Run.of(args.out, name, packed, given)

    def run_of_grid(case: Case, method: str, suffix: str, values: dict[str, float]) -> Run:
        return run(
            *case,
            method,
            suffix,
            prefix=GRID,
            seed=GRID_SEED,
            keep_every=None,
            holdout=args.holdout,
            validate=None,
            **args.grid,
            **values,
        )

    rates, rhos, chosen = tune(
        {pair: LEARNING_RATES[pair[1]] for pair in pairs if args.recipe == "fair"},
        {method: RHOS.get(method) for method in args.methods},
        run_of_grid,
        key="test_acc",  # of the held-out images
        extend=args.extend,
    )
    last = [
        run(arch, base, method, f"{seed}", seed=seed, **chosen.get(((arch, base), method), {}))
        for seed in args.seeds
        for arch in args.archs
        for method in args.methods
        for base in args.bases
    ]
    return [rates, rhos, last] if rates else [last]


# ---- what it would take ----


def seconds_of(s: train.Settings) -> tuple[float, float]:
    """Of a training step and of testing an image, measured on random images."""
    torch.set_num_threads(s.threads)
    parts = train.build(s)
    images = torch.randint(0, 256, (s.batch_size, 3, 32, 32), dtype=torch.uint8, device=s.device)
    labels = torch.randint(0, train.CLASSES, (s.batch_size,), device=s.device)
    normalize = train.Normalize(images)

    def timed(call: Callable[[], Any], rounds: int = 3) -> float:
        call()
        start = time.perf_counter()
        for _ in range(rounds):
            call()
            if s.device.startswith("cuda"):
                torch.cuda.synchronize()
        return (time.perf_counter() - start) / rounds

    step = timed(lambda: train.train_step(s, parts, normalize(images), labels, 0))
    test = timed(lambda: train.evaluate(parts.model, train.Split(images, labels), normalize))
    return step, test / s.batch_size


def dry_run(args: argparse.Namespace) -> None:
    stages = plan(args)
    measured: dict[tuple[str, str, bool], tuple[float, float]] = {}
    total = left = 0.0
    decided = True
    for i, stage in enumerate(stages):
        decided = i == 0 or (decided and all(run.finished() for run in stages[i - 1]))
        for run in stage:
            s, held = run.settings, run.result()
            if decided:
                run.finished()  # an error now, and not after hours
            key = (s.arch, s.method, s.rho > 0)
            if key not in measured:
                measured[key] = seconds_of(s)
            step, test = measured[key]
            steps = math.ceil((s.train_size or 50_000) / s.batch_size)
            tested = (s.holdout or 10_000) if s.eval_size is None else s.eval_size
            seconds = s.epochs * (steps * step + (tested + (s.validate or 0)) * test)
            rest = 1 - run.work_done()
            total, left = total + seconds, left + seconds * rest
            part = f"{len(held.metrics)} of {s.epochs} epochs"
            state = "to do" if rest == 1 else part if rest else held.failed or "done"
            if (run.folder / "lock").exists() and run.held():
                state += ", with a process"
            numbers = f"lr {s.lr:g}, rho {s.rho:g}" if decided else "to be chosen"
            print(f"{run.name:30} {numbers:22} {seconds / 60:8.1f} min  {state}")
    print(
        f"{sum(map(len, stages))} runs, {total / 3600:.1f} h; to do: {left / 3600:.1f} h. By steps timed here, "
        f"for one process on {args.device} with {args.threads} threads."
    )


# ---- command line ----


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    p = command_line(__doc__, "runs/PRESET-RECIPE")
    p.add_argument("--recipe", choices=["paper-text", "paper-code", "fair"], default="paper-text")
    p.add_argument("--preset", choices=list(PRESETS), default="cpu")
    p.add_argument("--dry-run", action="store_true", help="print the runs and how long they would take")
    p.add_argument("--archs", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    p.add_argument("--bases", nargs="+", choices=["sgd", "adam"], default=["sgd", "adam"])
    p.add_argument("--methods", nargs="+", choices=list(METHODS), help="default: the preset's")
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    g = p.add_argument_group("of the fair recipe's grids; without them, the preset's")
    g.add_argument("--grid-epochs", type=int, metavar="N", help="of a run that something is chosen by")
    g.add_argument("--extend", type=int, metavar="N", help="by how many values a grid may grow to each side")
    g = p.add_argument_group("as in train.py; without them, the preset's")
    g.add_argument("--dataset", default="cifar10")
    g.add_argument("--data", metavar="DIR")
    g.add_argument("--device", default="cpu")
    g.add_argument("--threads", type=int, default=torch.get_num_threads())
    g.add_argument("--amp", choices=sorted(train.AMP))
    g.add_argument("--compile", action="store_true")
    g.add_argument("--keep-every", type=int, metavar="K")
    for name in NUMBERS:
        g.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N")
    args = p.parse_args(argv)
    for name, value in PRESETS[args.preset].items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    if args.grid_epochs is not None:
        args.grid = {**args.grid, "epochs": args.grid_epochs}
    if args.out is None:
        args.out = Path("runs") / f"{args.preset}-{args.recipe}"
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.dry_run:
        return train.exit_status("table1.py", lambda: dry_run(args), "nothing was trained")
    return command("table1.py", args, lambda: plan(args), args.recipe, report)


if __name__ == "__main__":
    sys.exit(main())
