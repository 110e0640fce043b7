"""Table I and Figures 1 and 2 of the paper: SGD, SGD + SAM, Adam and Adam + SAM on two networks and three seeds.

    python -m benchmarks.paper.table1 --preset paper --recipe paper-text --data DIR --device cuda --out runs/paper-text
    python -m benchmarks.paper.table1 --preset cpu --recipe fair --data DIR --threads 1 --out runs/cpu-fair
    python -m benchmarks.paper.table1 ... --dry-run                          # what is done, and how long the rest takes
    python -m benchmarks.paper.table1 --report-only --out results/cpu-fair   # the table and figures of what --out holds

Recipes paper-text and paper-code are train.py's. fair is paper-text with each base's learning rate, and then each rho,
chosen for each network on a held-out part of the training set, from the grids that are printed with the table.

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

from .runs import GRID, NETWORKS, Result, read_packed
from .sweep import Run, sweep
from .table1_report import report

# ---- what is run ----

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "width": {"resnet18": 64, "vgg16": 64},
        "epochs": 200,
        "batch_size": 128,
        "train_size": None,
        "eval_size": None,
        "holdout": 5000,
    },
    "cpu": {
        "width": {"resnet18": 8, "vgg16": 16},  # a pass costs about the same
        "epochs": 60,
        "batch_size": 128,
        "train_size": 1000,
        "eval_size": 500,
        "holdout": 5000,
    },
}

# The fair recipe's grids, in the order of choosing: the paper's value, a third of it and three times it. Their seed is
# none of the table's.
GRIDS = {
    "lr": {"sgd": (0.03, 0.1, 0.3), "adam": (3e-4, 1e-3, 3e-3)},
    "rho": {"sgd": (0.015, 0.05, 0.15), "adam": (0.015, 0.05, 0.15)},
}
GRID_SEED = 100


def make_run(args: argparse.Namespace, packed: dict[str, Result], name: str, **flags: Any) -> Run:
    shared = ("dataset", "data", "device", "threads", "amp", "compile", "keep_every", *PRESETS["paper"])
    flags = {**{k: getattr(args, k) for k in shared}, "holdout": None, **flags}
    if isinstance(flags["width"], dict):
        flags["width"] = flags["width"][flags["arch"]]
    flags["recipe"] = "paper-text" if args.recipe == "fair" else args.recipe
    return Run.of(args.out, name, packed, flags)


def best(runs: list[Run]) -> train.Settings:
    """The settings of the run with the highest accuracy in the last epoch, of those the one with the lowest loss."""
    finished = [run for run in runs if run.finished() and run.result().failed is None]
    if not finished:
        raise train.RunError(f"no run of the grid came to an end: {', '.join(run.name for run in runs)}")

    def score(run: Run) -> tuple[float, float]:
        last = run.result().metrics[-1]
        return last["test_acc"], -last["test_loss"]

    return max(finished, key=score).settings


def plan(args: argparse.Namespace) -> list[list[Run]]:
    """The runs by stage; while a stage is not finished, what it decides of later ones is the recipe's.

    Neighbours cost about the same, so that processes that share a sweep end together.
    """
    pairs = [(arch, base) for arch in args.archs for base in args.bases]
    chosen: dict[tuple[str, str], dict[str, float]] = {pair: {} for pair in pairs}
    stages: list[list[Run]] = []
    packed = read_packed(args.out)
    ready = args.recipe == "fair"
    for option, values in GRIDS.items() if ready else ():
        grid = {
            (arch, base): [
                make_run(
                    args,
                    packed,
                    f"{GRID}{arch}-{base}{'+sam' if option == 'rho' else ''}-{option}{value:g}",
                    arch=arch,
                    base=base,
                    seed=GRID_SEED,
                    holdout=args.holdout,
                    **{"rho": 0, **chosen[arch, base], option: value},
                )
                for value in values[base]
            ]
            for arch, base in pairs
        }
        stages.append([run for runs in grid.values() for run in runs])
        ready = ready and all(run.finished() for run in stages[-1])
        for pair, runs in grid.items() if ready else ():
            chosen[pair][option] = getattr(best(runs), option)
    stages.append(
        [
            make_run(
                args,
                packed,
                f"{arch}-{base}{'+sam' if sam else ''}-{seed}",
                arch=arch,
                base=base,
                seed=seed,
                **{**chosen[arch, base], **({} if sam else {"rho": 0})},
            )
            for seed in args.seeds
            for arch in args.archs
            for sam in (False, True)
            for base in args.bases
        ]
    )
    return stages


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
    measured: dict[tuple[str, bool], tuple[float, float]] = {}
    total = left = 0.0
    for i, stage in enumerate(stages):
        decided = i == 0 or all(run.finished() for run in stages[i - 1])
        for run in stage:
            s, held = run.settings, run.result()
            key = (s.arch, s.rho > 0)
            if key not in measured:
                measured[key] = seconds_of(s)
            step, test = measured[key]
            steps = math.ceil((s.train_size or 50_000) / s.batch_size)
            seconds = s.epochs * (steps * step + (s.eval_size or s.holdout or 10_000) * test)
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
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--recipe", choices=["paper-text", "paper-code", "fair"], default="paper-text")
    p.add_argument("--preset", choices=list(PRESETS), default="cpu")
    p.add_argument("--dry-run", action="store_true", help="print the runs and how long they would take")
    p.add_argument("--report-only", action="store_true", help="make the table and figures of what --out holds")
    p.add_argument("--max-runs", type=int, metavar="N", help="stop after N runs; the next call goes on")
    p.add_argument("--out", type=Path, metavar="DIR", help="default: runs/PRESET-RECIPE")
    p.add_argument("--archs", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    p.add_argument("--bases", nargs="+", choices=["sgd", "adam"], default=["sgd", "adam"])
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    g = p.add_argument_group("as in train.py; without them, the preset's")
    g.add_argument("--dataset", default="cifar10")
    g.add_argument("--data", metavar="DIR")
    g.add_argument("--device", default="cpu")
    g.add_argument("--threads", type=int, default=torch.get_num_threads())
    g.add_argument("--amp", choices=sorted(train.AMP))
    g.add_argument("--compile", action="store_true")
    g.add_argument("--keep-every", type=int, metavar="K")
    for name in PRESETS["paper"]:
        g.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N")
    args = p.parse_args(argv)
    for name, value in PRESETS[args.preset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.out is None:
        args.out = Path("runs") / f"{args.preset}-{args.recipe}"
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)

    def run() -> None:
        if args.dry_run:
            dry_run(args)
            return
        if not args.report_only:
            sweep(lambda: plan(args), args.recipe, args.max_runs)
        print(report(args.out))

    return train.exit_status("table1.py", run, f"{args.out} keeps the runs and whole epochs: the same command goes on")


if __name__ == "__main__":
    sys.exit(main())
