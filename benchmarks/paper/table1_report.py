"""The table and the figures of table1.py, of whatever runs a folder holds."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import train

from ..plots import band, figure, legend_above, log_scale, plt
from ..tables import table
from .intervals import t_interval
from .runs import (
    NETWORKS,
    OPTIMIZERS,
    STYLE,
    Result,
    by_cell,
    left_out,
    machines_of,
    networks_of,
    of_network,
    read_runs,
    recorded,
)

#: Test accuracy in %, mean and standard deviation over three seeds: Table I of the paper.
PAPER = {
    ("resnet18", "sgd"): (90.899, 0.137),
    ("resnet18", "sgd+sam"): (91.873, 0.102),
    ("resnet18", "adam"): (92.716, 0.247),
    ("resnet18", "adam+sam"): (94.896, 0.160),
    ("vgg16", "sgd"): (90.089, 0.070),
    ("vgg16", "sgd+sam"): (90.453, 0.066),
    ("vgg16", "adam"): (92.173, 0.310),
    ("vgg16", "adam+sam"): (94.126, 0.112),
}


# ---- the numbers ----


@dataclass
class Cell:
    """Test accuracy in % of one network and optimizer."""

    arch: str
    optimizer: str
    by_seed: dict[int, float]

    @property
    def mean(self) -> float | None:
        return statistics.mean(self.by_seed.values()) if self.by_seed else None

    @property
    def deviation(self) -> float | None:
        """Of the sample, n - 1."""
        return statistics.stdev(self.by_seed.values()) if len(self.by_seed) > 1 else None


def cells_of(results: list[Result]) -> dict[tuple[str, str], Cell]:
    """Of the networks and bases that there are runs of: the paper's optimizers, and others that there are runs of."""
    found = {r.cell[1] for r in results}
    bases = set(map(base_of, found))
    optimizers = [o for o in OPTIMIZERS if o in found or (("vgg16", o) in PAPER and base_of(o) in bases)]
    networks = networks_of(r.cell for r in results)
    cells = {(arch, optimizer): Cell(arch, optimizer, {}) for arch in networks for optimizer in optimizers}
    for r in results:
        if not r.why_not and r.cell in cells:
            cells[r.cell].by_seed[r.settings["seed"]] = 100 * r.metrics[-1]["test_acc"]
    return cells


def paired(base: Cell, sam: Cell) -> tuple[int, float | None, tuple[float, float] | None]:
    """n, mean and 95 % t interval of SAM - base over the seeds that both have."""
    differences = [sam.by_seed[seed] - base.by_seed[seed] for seed in base.by_seed.keys() & sam.by_seed.keys()]
    n = len(differences)
    if n < 2:
        return n, (differences[0] if n else None), None
    return n, statistics.mean(differences), t_interval(differences)


# ---- the table ----


def plus_minus(mean: float | None, deviation: float | None, digits: int) -> str:
    if mean is None:
        return "-"
    return f"{mean:.{digits}f}" + ("" if deviation is None else f" ± {deviation:.{digits}f}")


def grid_rows(grid: list[Result], option: str) -> list[tuple[str, str, str, str]]:
    """A row for each network and base: the values of the grid, and the accuracy on the held-out images."""
    rows = []
    for (arch, optimizer), runs in by_cell(r for r in grid if (option == "rho") == (r.settings["rho"] > 0)).items():
        scores = [
            f"{r.settings[option]:g}: {r.outcome('test_acc', 2)}"
            for r in sorted(runs, key=lambda r: r.settings[option])
        ]
        rows.append((NETWORKS[arch], OPTIMIZERS[optimizer], option, ", ".join(scores)))
    return rows


def values_of(results: list[Result], name: str, source: str = "settings") -> str:
    return ", ".join(sorted({f"{getattr(r, source)[name]}" for r in results}))


def size_of(results: list[Result]) -> str:
    size = results[0].settings["train_size"]
    return "all" if size is None else f"{size:,}"


def header(results: list[Result], recipe: str) -> list[str]:
    s = results[0].settings
    widths = {r.settings["arch"]: f"{r.settings['width']} ({NETWORKS[r.settings['arch']]})" for r in results}
    tested = ", all but the last epoch tested on a fixed subset" if s["eval_size"] else ""
    if s["eval_size"] == 0 and not s["validate"]:
        tested = ", tested after the last epoch only"
    if s["validate"]:
        tested += f", {s['validate']:,} images held out for the accuracy by epoch, tested after the last epoch only"
    if s["amp"]:
        tested += f", {s['amp']} autocast"
    return [
        f"# Table I, recipe {recipe}",
        "",
        f"{s['dataset']}, {size_of(results)} training images, width {', '.join(widths.values())}, "
        f"{values_of(results, 'epochs')} epochs, batch {values_of(results, 'batch_size')}{tested}; torch "
        f"{values_of(results, 'torch', 'environment')}, "
        f"{machines_of(results)}.",
        "",
        "Test accuracy after the last epoch in %, mean ± sample standard deviation over the seeds:",
        "",
    ]


def accuracy_rows(cells: dict[tuple[str, str], Cell]) -> Iterator[list[str]]:
    for optimizer in dict.fromkeys(optimizer for _, optimizer in cells):
        row = [OPTIMIZERS[optimizer]]
        for arch in networks_of(cells):
            cell, paper = cells[arch, optimizer], PAPER.get((arch, optimizer), (None, None))
            row += [plus_minus(*paper, 3), plus_minus(cell.mean, cell.deviation, 2), str(len(cell.by_seed))]
        yield row


def base_of(optimizer: str) -> str:
    return optimizer.partition("+")[0]


def claimed(arch: str, optimizer: str) -> float | None:
    """What the paper says that it adds to its base, in percentage points."""
    if (arch, optimizer) not in PAPER:
        return None
    return PAPER[arch, optimizer][0] - PAPER[arch, base_of(optimizer)][0]


def difference_rows(cells: dict[tuple[str, str], Cell]) -> Iterator[list[str]]:
    for (arch, optimizer), cell in cells.items():
        base = base_of(optimizer)
        if base == optimizer:
            continue
        paper = claimed(arch, optimizer)
        n, mean, interval = paired(cells[arch, base], cell)
        there = "-" if paper is None else f"{paper:+.3f}"
        here = "-" if mean is None else f"{mean:+.2f}"
        between = "-" if interval is None else f"{interval[0]:+.2f} to {interval[1]:+.2f}"
        yield [NETWORKS[arch], OPTIMIZERS[optimizer], there, here, between, str(n)]


def last_epoch_rows(results: list[Result], common_rho: float) -> Iterator[list[str]]:
    for (arch, optimizer), runs in by_cell(r for r in results if not r.why_not).items():
        s = runs[0].settings
        loss, accuracy = (statistics.mean(r.metrics[-1][key] for r in runs) for key in ("train_loss", "train_acc"))
        test_losses = [r.metrics[-1]["test_loss"] for r in runs]  # None: not finite
        test_loss = "-" if None in test_losses else f"{statistics.mean(test_losses):.3f}"
        sharpness = statistics.mean(r.sharpness(common_rho)[-1] for r in runs)  # nan: not recorded
        rho = f"{s['rho']:g}" + (" (ASAM)" if s["adaptive"] else "") if s["rho"] else "-"
        numbers = [f"{s['lr']:g}", rho, f"{loss:.3f}", f"{accuracy:.1%}", test_loss]
        numbers.append("-" if math.isnan(sharpness) else f"{sharpness:.4f}")
        yield [NETWORKS[arch], OPTIMIZERS[optimizer], *numbers]


def markdown(results: list[Result], grid: list[Result], recipe: str, common_rho: float) -> str:
    cells = cells_of(results)
    by_network = [name for n in networks_of(cells).values() for name in (f"{n}, paper", f"{n}, here", "n")]
    last_epoch = ["lr", "rho", "train loss", "train accuracy", "test loss", f"sharpness at rho = {common_rho:g}"]
    lines = [
        *header(results, recipe),
        *table(["", *by_network], accuracy_rows(cells)),
        "",
        "What is added to the base, in percentage points, with the 95 % t interval of the differences paired by seed:",
        "",
        *table(["", "", "paper", "here", "interval", "n"], difference_rows(cells)),
        "",
        "The last epoch, means over the seeds; sharpness is the mean of the epoch's batches:",
        "",
        *table(["", "", *last_epoch], last_epoch_rows(results, common_rho)),
    ]
    of_table = {(arch, base_of(optimizer)) for arch, optimizer in cells}
    grid = [r for r in grid if (r.cell[0], base_of(r.cell[1])) in of_table]
    if chosen := [*grid_rows(grid, "lr"), *grid_rows(grid, "rho")]:
        runs = f"{size_of(grid)} training images and {values_of(grid, 'epochs')} epochs"
        lines += [
            "",
            f"Accuracy on the held-out training images by which lr and rho were chosen, in runs of {runs}:",
            "",
            *table([""] * 4, chosen),
        ]
    return "\n".join([*lines, *left_out(results)]) + "\n"


def comma_separated(results: list[Result]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    differences = ["paper_sam_minus_base", "sam_minus_base", "interval_low", "interval_high"]
    writer.writerow(["network", "optimizer", "paper_mean", "paper_std", "mean", "std", "n", *differences])
    cells = cells_of(results)
    for (arch, optimizer), cell in cells.items():
        difference: list[Any] = [None] * 4
        base = base_of(optimizer)
        if base != optimizer:
            paper = claimed(arch, optimizer)
            _, mean, interval = paired(cells[arch, base], cell)
            difference = [None if paper is None else round(paper, 3), mean, *(interval or (None, None))]
        there = PAPER.get((arch, optimizer), (None, None))
        writer.writerow([arch, optimizer, *there, cell.mean, cell.deviation, len(cell.by_seed), *difference])
    return text.getvalue()


# ---- the figures ----


def accuracies(r: Result) -> tuple[list[float], float | None]:
    """In %: by epoch, and where the last epoch is tested on other images than those before it, of that apart."""
    validated, key = r.settings["validate"], "val_acc" if r.settings["validate"] else "test_acc"
    by_epoch = [100 * m[key] for m in r.metrics if key in m]
    if not r.finished or (not validated and r.settings["eval_size"] is None):
        return by_epoch, None
    return by_epoch if validated else by_epoch[:-1], 100 * r.metrics[-1]["test_acc"]


@contextmanager
def network_panels(
    path: Path, cells: Iterable[tuple[str, str]], xlabel: str, ylabel: str, sharey: bool = False
) -> Iterator[Iterator[tuple[plt.Axes, str]]]:
    """A panel for each network in ``cells``, and the network's name in the settings."""
    networks = networks_of(cells)
    size = (5.5 * len(networks), 4.2)
    with figure(path, 1, len(networks), size=size, dpi=110, sharey=sharey, squeeze=False) as (drawn, [panels]):
        yield zip(panels, networks, strict=True)
        for axes, network in zip(panels, networks.values(), strict=True):
            axes.set(xlabel=xlabel, title=network)
            axes.grid(alpha=0.3)
        for axes in panels[:1] if sharey else panels:
            axes.set(ylabel=ylabel)
        legend_above(drawn)


def drawable(results: list[Result]) -> dict[tuple[str, str], list[Result]]:
    """The runs that are in the table; while it has none of a network and optimizer, those that have begun."""
    whole = {r.cell for r in results if not r.why_not}
    return by_cell(r for r in results if r.metrics and (not r.why_not or r.cell not in whole))


def draw_accuracy(results: list[Result], path: Path) -> None:
    """Curves, and points for the test set where that is seen at the end only."""
    cells = drawable(results)
    apart = any(accuracies(r)[1] is not None for r in results)
    held_out = any(r.settings["validate"] for r in results)
    ylabel = "accuracy on held-out images" if held_out else "test accuracy"
    with network_panels(path, cells, "epoch", ylabel + (", %\npoints: whole test set" if apart else ", %")) as panels:
        for axes, arch in panels:
            for optimizer, runs in of_network(cells, arch):
                curves, lasts = zip(*map(accuracies, runs), strict=True)
                if any(curves):
                    band(axes, curves, STYLE[optimizer], OPTIMIZERS[optimizer])
                tested = [last for last in lasts if last is not None]
                if tested:
                    spread = statistics.stdev(tested) if len(tested) > 1 else 0
                    color, line = STYLE[optimizer][:2], STYLE[optimizer][2:]
                    marker = {"--": "o", "-": "o", ":": "D"}[line]
                    point = {"fmt": marker, "color": color, "mfc": color if line == "-" else "white", "capsize": 3}
                    axes.errorbar(runs[0].settings["epochs"], statistics.mean(tested), spread, **point)


def draw_sharpness(results: list[Result], path: Path, rho: float) -> None:
    cells = recorded(drawable(results))
    with network_panels(path, cells, "epoch", f"sharpness of a batch at rho = {rho:g}") as panels:
        for axes, arch in panels:
            for optimizer, runs in of_network(cells, arch):
                band(axes, [r.sharpness(rho) for r in runs], STYLE[optimizer], OPTIMIZERS[optimizer])
            log_scale(axes)


def report(out: Path) -> str:
    """Write table1.md, table1.csv, figure1.png and figure2.png to ``out``; returns the table."""
    runs = read_runs(out)
    results, grid = [r for r in runs if not r.in_grid], [r for r in runs if r.in_grid]
    if not results:
        raise train.RunError(f"{out} holds no runs")
    recipe = "fair" if grid else results[0].settings["recipe"]
    rho = train.RECIPES[results[0].settings["recipe"]]["rho"]
    text = markdown(results, grid, recipe, rho)
    train.save(out / "table1.md", text)
    train.save(out / "table1.csv", comma_separated(results))
    draw_accuracy(results, out / "figure1.png")
    draw_sharpness(results, out / "figure2.png", rho)
    return text
