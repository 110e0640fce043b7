"""Sweeps: runs of train.py in stages, of which later ones depend on what earlier ones chose.

A run has its folder in --out: a finished one is skipped, also when only its config.json and metrics.jsonl are left, or
its lines in a runs.jsonl.gz there (see runs.py); one that was cut goes on; one that diverged leaves
failed.txt and is skipped too, until that is removed. Processes that share --out share the sweep.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

import train

from .runs import Result, read_folder

# How much a training pass costs for each image and unit of width, by its multiplications; for the time left.
COST = {"resnet18": 1.8, "vgg16": 1.0, "mlp": 0.01}


@functools.cache
def settings_of(*words: str) -> train.Settings:
    return train.settle(train.parse(words))


@dataclass(frozen=True)
class Run:
    name: str
    settings: train.Settings
    packed: Result | None  # what runs.jsonl.gz has of it

    @classmethod
    def of(cls, out: Path, name: str, packed: dict[str, Result], flags: dict[str, Any]) -> Run:
        """``flags`` are train.py's, with underscores: None and False are not given, True has no value."""
        given = {
            key.replace("_", "-"): value for key, value in flags.items() if value is not None and value is not False
        }
        words = [f"--{flag}" if value is True else f"--{flag}={value}" for flag, value in given.items()]
        return cls(name, settings_of(*words, f"--out={out / name}"), packed.get(name))

    @property
    def folder(self) -> Path:
        return Path(self.settings.out)

    @property
    def cost(self) -> float:
        s = self.settings
        passes = 2 if s.rho and s.method == "sam" else 1
        return COST[s.arch] * s.width * passes * (s.train_size or 50_000) * s.epochs

    def result(self) -> Result:
        """What there is of it by now."""
        return read_folder(self.folder, self.name) or self.packed or Result(self.name)

    def work_done(self) -> float:
        """The part of its epochs that needs no doing any more."""
        held = self.result()
        return 1.0 if held.failed else len(held.metrics) / self.settings.epochs

    def finished(self) -> bool:
        """Whether nothing is left to do.

        Raises:
            train.RunError: if there is a finished run of this name with other settings.
        """
        if self.work_done() < 1:
            return False
        held = self.result().settings
        for name, value in dataclasses.asdict(self.settings).items():
            if name not in {"device", "threads"} and held.get(name, value) != value:
                raise train.RunError(f"{self.folder} was run with {name} = {held[name]!r}, not {value!r}")
        return True

    @contextlib.contextmanager
    def locked(self) -> Iterator[bool]:
        """Whether the folder is this process's; the system gives the lock back, however the process ends."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("w") as f:
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True

    def held(self) -> bool:
        with self.locked() as mine:
            return not mine


# ---- choosing ----


def step_of(k: int) -> float:
    """The ladder ..., 0.1, 0.3, 1, 3, 10, ...: 1 at 0."""
    return float(f"{(1, 3)[k % 2]}e{k // 2}")


@dataclass(frozen=True)
class Grid:
    """Values of train.py's option ``name``: ``scale`` times the ladder's, from ``first`` to ``last`` to begin with."""

    name: str
    first: int
    last: int
    scale: float = 1.0

    def at(self, k: int) -> dict[str, float]:
        return {self.name: step_of(k) * self.scale}


#: By base, around the paper's 0.1 and 0.001.
LEARNING_RATES = {"sgd": Grid("lr", -3, -1), "adam": Grid("lr", -7, -5)}
#: Of the runs that something is chosen by; no table uses it.
GRID_SEED = 100


def search(
    grid: Grid, run_at: Callable[[dict[str, float]], Run], key: str, extend: int = 3
) -> tuple[list[Run], dict[str, float]]:
    """The best value of a hyper-parameter, by ``key`` in the last epoch.

    Args:
        run_at: the run with a value, which it is given as {name: value}.
        extend: by how many positions on the ladder the grid may grow, to each side, while its best value is at its
            edge.

    Returns:
        The runs, and the best value as {name: value}, the smallest of equal ones; empty while a run is not finished.

    Raises:
        train.RunError: if the runs diverged with every value.
    """
    first, last = grid.first, grid.last
    while True:
        runs = {k: run_at(grid.at(k)) for k in range(first, last + 1)}
        everyone = list(runs.values())
        if not all(run.finished() for run in everyone):
            return everyone, {}
        scores = {k: run.result().metrics[-1][key] for k, run in runs.items() if not run.result().failed}
        if not scores:
            raise train.RunError(f"no run of a grid came to an end: {everyone[0].name} to {everyone[-1].name}")
        best = max(scores, key=lambda k: scores[k])
        if best == first > grid.first - extend:
            first -= 1
        elif best == last < grid.last + extend:
            last += 1
        else:
            return everyone, grid.at(best)


# What is tuned by itself: a base on a network, or with a part of wrong labels.
Case = tuple[Any, ...]


def tune(
    rates: dict[Case, Grid],
    methods: dict[str, Grid | None],
    run_at: Callable[[Case, str, str, dict[str, float]], Run],
    key: str,
    extend: int = 3,
) -> tuple[list[Run], list[Run], dict[tuple[Case, str], dict[str, float]]]:
    """Choose each case's learning rate with the plain base; then, with it, each method's own number, if it has one.

    Args:
        rates: the grid of each case's learning rate.
        methods: the grid of each method's number; the method "base" is the plain base.
        run_at: the run of a case and method; then what tells it from the others of its grid, as "rho0.1"; and its
            values.
        key, extend: as in :func:`search`.

    Returns:
        The runs of the two stages, and what is chosen by case and method. While a stage is not finished, what it
        decides is missing.
    """
    first: list[Run] = []
    second: list[Run] = []
    chosen: dict[tuple[Case, str], dict[str, float]] = {}

    def run_with(case: Case, method: str, found: dict[str, float], at: dict[str, float]) -> Run:
        [(name, value)] = found.items()
        return run_at(case, method, f"{name}{value:g}", {**at, **found})

    def choose(case: Case, method: str, grid: Grid, at: dict[str, float]) -> tuple[list[Run], dict[str, float]]:
        runs, found = search(grid, lambda found: run_with(case, method, found, at), key, extend)
        return runs, {**at, **found}

    for case, rate in rates.items():
        runs, lr = choose(case, "base", rate, {})
        first += runs
        for method, grid in methods.items():
            chosen[case, method] = lr
            if grid is None:
                continue
            if lr:
                runs, chosen[case, method] = choose(case, method, grid, lr)
            else:  # there is nothing to compare finished runs with yet
                runs = [run_with(case, method, grid.at(k), {}) for k in range(grid.first, grid.last + 1)]
            second += runs
    return first, second, chosen


# ---- running ----


def work_done(runs: list[Run]) -> float:
    """Of the cost of ``runs``, what needs no doing any more."""
    return sum(r.cost * r.work_done() for r in runs)


def train_run(run: Run, after_epoch: Callable[[dict[str, Any]], None]) -> None:
    """Train it, from where it was cut. One that diverges leaves failed.txt, and the sweep goes on."""
    try:
        train.train(run.settings, resume=True, after_epoch=after_epoch)
    except FloatingPointError as error:
        train.save(run.folder / "failed.txt", f"{error}\n")


def sweep(
    plan: Callable[[], list[list[Run]]], title: str, max_runs: int | None = None, keep_checkpoints: bool = True
) -> None:
    """Train what is not finished yet, stage by stage.

    Args:
        plan: the runs by stage. While a stage is not finished, later ones may be provisional, and it may itself grow.
        title: what the progress bar is called.
        max_runs: stop after so many.
        keep_checkpoints: False removes the checkpoint of a finished run.
    """
    before, start, trained = work_done([run for runs in plan() for run in runs]), time.monotonic(), 0
    form = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}, {remaining} left{postfix}"
    stages = range(len(plan()))
    with tqdm(total=0, initial=before, desc=title, bar_format=form, smoothing=0, disable=None) as bar:
        for stage in stages:
            while pending := [run for run in plan()[stage] if not run.finished()]:
                if trained == max_runs:
                    return
                everyone = [run for runs in plan() for run in runs]
                bar.total = sum(run.cost for run in everyone)
                for run in pending:

                    def after_epoch(row: dict[str, Any], run: Run = run, everyone: list[Run] = everyone) -> None:
                        bar.n = work_done(everyone)  # what other processes did is in it
                        bar.set_postfix_str(f"{run.name}, epoch {row['epoch']}/{run.settings.epochs}")

                    with run.locked() as mine:
                        if not mine or run.finished():
                            continue
                        train_run(run, after_epoch)
                        if not keep_checkpoints:
                            (run.folder / "checkpoint.pt").unlink(missing_ok=True)
                    trained += 1
                    now = work_done(everyone)
                    left = tqdm.format_interval((time.monotonic() - start) * (bar.total - now) / (now - before))
                    done = sum(r.work_done() >= 1 for r in everyone)
                    result, of = run.result(), "held-out" if run.settings.holdout else "test"
                    outcome = result.failed or f"{of} accuracy {result.metrics[-1]['test_acc']:.2%}"
                    bar.write(f"{run.name}: {outcome}; {done} of {len(everyone)} runs, {left} left")
                    break
                else:  # they are with other processes, and only a later stage needs them
                    if stage == stages[-1]:
                        return
                    time.sleep(1)


# ---- commands ----


def command_line(doc: str | None, out: str) -> argparse.ArgumentParser:
    """With what :func:`command` needs; ``out`` is what the help says of --out's default, which the caller fills in."""
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--report-only", action="store_true", help="make the tables and figures of what --out holds")
    p.add_argument("--max-runs", type=int, metavar="N", help="stop after N runs; the next call goes on")
    p.add_argument("--out", type=Path, metavar="DIR", help=f"default: {out}")
    return p


def command(
    program: str,
    args: argparse.Namespace,
    plan: Callable[[], list[list[Run]]],
    title: str,
    report: Callable[[Path], str],
    keep_checkpoints: bool = True,
) -> int:
    """Of a command that trains a sweep, unless it is to report only, and prints its report: the exit status."""

    def run() -> None:
        if not args.report_only:
            sweep(plan, title, args.max_runs, keep_checkpoints)
            if not any(run.work_done() == 1 for run in plan()[-1]):
                print("no run of the table is finished yet; the same command goes on")
                return
        print(report(args.out))

    return train.exit_status(program, run, f"{args.out} keeps the runs and whole epochs: the same command goes on")
