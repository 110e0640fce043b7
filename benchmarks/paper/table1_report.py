"""The table and the figures of table1.py, of whatever runs a folder holds."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from scipy.stats import t as student

import train

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter

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
OPTIMIZERS = {"sgd": "SGD", "sgd+sam": "SGD + SAM", "adam": "Adam", "adam+sam": "Adam + SAM"}
NETWORKS = {"resnet18": "ResNet18", "vgg16": "VGG16"}


def read_settings(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["settings"]


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    return [json.loads(x) for x in path.read_text().splitlines()] if path.exists() else []


@dataclass
class Result:
    """A run, as its folder tells of it."""

    name: str
    settings: dict[str, Any]
    environment: dict[str, Any]
    metrics: list[dict[str, Any]]

    @property
    def cell(self) -> tuple[str, str]:
        return self.settings["arch"], self.settings["base"] + ("+sam" if self.settings["rho"] else "")

    @property
    def finished(self) -> bool:
        return len(self.metrics) == self.settings["epochs"]

    def sharpness(self, key: str, rho: float) -> list[float]:
        """By epoch, at ``rho``: to first order it is proportional to it."""
        scale = rho / self.settings["measure_rho"]
        return [float("nan") if m[key] is None else m[key] * scale for m in self.metrics]


def read_results(out: Path, pattern: str = "*") -> list[Result]:
    folders = sorted(path.parent for path in out.glob(f"{pattern}/config.json"))
    configs = [json.loads((folder / "config.json").read_text()) for folder in folders]
    return [
        Result(str(folder.relative_to(out)), config["settings"], config["environment"], read_metrics(folder))
        for folder, config in zip(folders, configs, strict=True)
    ]


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
    cells = {(arch, optimizer): Cell(arch, optimizer, {}) for arch in NETWORKS for optimizer in OPTIMIZERS}
    for r in results:
        if r.finished and r.cell in cells:
            cells[r.cell].by_seed[r.settings["seed"]] = 100 * r.metrics[-1]["test_acc"]
    return cells


def paired(base: Cell, sam: Cell) -> tuple[int, float | None, tuple[float, float] | None]:
    """n, mean and 95 % t interval of SAM - base over the seeds that both have."""
    differences = [sam.by_seed[seed] - base.by_seed[seed] for seed in base.by_seed.keys() & sam.by_seed.keys()]
    n = len(differences)
    if n < 2:
        return n, (differences[0] if n else None), None
    mean = statistics.mean(differences)
    half = student.ppf(0.975, n - 1) * statistics.stdev(differences) / n**0.5
    return n, mean, (mean - half, mean + half)


# ---- the table ----


def plus_minus(mean: float | None, deviation: float | None, digits: int) -> str:
    if mean is None:
        return "-"
    return f"{mean:.{digits}f}" + ("" if deviation is None else f" ± {deviation:.{digits}f}")


def grid_lines(out: Path, option: str) -> list[str]:
    """A line for each network and base: the values of the grid, and the accuracy on the held-out images."""
    rows: dict[tuple[str, str], dict[float, Result]] = {}
    for r in read_results(out, "grid/*"):
        if (option == "rho") == (r.settings["rho"] > 0):
            rows.setdefault(r.cell, {})[r.settings[option]] = r
    lines = []
    for arch, optimizer in [cell for cell in PAPER if cell in rows]:
        by_value = rows[arch, optimizer]
        scores = [
            f"{value:g}: {r.metrics[-1]['test_acc']:.2%}" if r.finished else f"{value:g}: diverged"
            for value, r in sorted(by_value.items())
        ]
        lines.append(f"| {NETWORKS[arch]} | {OPTIMIZERS[optimizer]} | {option} | {', '.join(scores)} |")
    return lines


def header(results: list[Result], recipe: str) -> list[str]:
    def values(name: str, source: str = "settings") -> str:
        return ", ".join(sorted({f"{getattr(r, source)[name]}" for r in results}))

    s = results[0].settings
    widths = {r.settings["arch"]: f"{r.settings['width']} ({NETWORKS[r.settings['arch']]})" for r in results}
    size = "all" if s["train_size"] is None else f"{s['train_size']:,}"
    tested = ", all but the last epoch tested on a fixed subset" if s["eval_size"] else ""
    return [
        f"# Table I, recipe {recipe}",
        "",
        f"{s['dataset']}, {size} training images, width {', '.join(widths.values())}, {values('epochs')} epochs, batch "
        f"{values('batch_size')}{tested}; torch {values('torch', 'environment')}, "
        f"{values('gpu', 'environment') if s['device'] != 'cpu' else values('cpu', 'environment')}.",
        "",
        "Test accuracy after the last epoch in %, mean ± sample standard deviation over the seeds:",
        "",
    ]


def markdown(out: Path, results: list[Result], recipe: str, common_rho: float) -> str:
    cells = cells_of(results)
    lines = header(results, recipe)
    lines += [
        "| | " + " | ".join(f"{n}, paper | {n}, here | n" for n in NETWORKS.values()) + " |",
        "|---|" + "---|" * (3 * len(NETWORKS)),
    ]
    for optimizer, name in OPTIMIZERS.items():
        row = []
        for arch in NETWORKS:
            cell = cells[arch, optimizer]
            row += [
                plus_minus(*PAPER[arch, optimizer], 3),
                plus_minus(cell.mean, cell.deviation, 2),
                str(len(cell.by_seed)),
            ]
        lines.append(f"| {name} | {' | '.join(row)} |")
    lines += [
        "",
        "What SAM adds, in percentage points, with the 95 % t interval of the differences paired by seed:",
        "",
        "| | | paper | here | interval | n |",
        "|---|---|---|---|---|---|",
    ]
    for arch, network in NETWORKS.items():
        for base in ("sgd", "adam"):
            claimed = PAPER[arch, f"{base}+sam"][0] - PAPER[arch, base][0]
            n, mean, interval = paired(cells[arch, base], cells[arch, f"{base}+sam"])
            numbers = f"{claimed:+.3f} | {'-' if mean is None else f'{mean:+.2f}'}"
            between = "-" if interval is None else f"{interval[0]:+.2f} to {interval[1]:+.2f}"
            lines.append(f"| {network} | {OPTIMIZERS[base]} | {numbers} | {between} | {n} |")
    lines += [
        "",
        "The last epoch, means over the seeds; sharpness is the mean of the epoch's batches:",
        "",
        f"| | | lr | rho | train loss | train accuracy | test loss | sharpness at rho = {common_rho:g} |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for arch, network in NETWORKS.items():
        for optimizer, name in OPTIMIZERS.items():
            runs = [r for r in results if r.cell == (arch, optimizer) and r.finished]
            if not runs:
                continue
            s = runs[0].settings
            mean = {
                key: statistics.mean(r.metrics[-1][key] for r in runs)
                for key in ("train_loss", "train_acc", "test_loss")
            }
            sharpness = statistics.mean(r.sharpness("sharpness", common_rho)[-1] for r in runs)
            rho = f"{s['rho']:g}" + (" (ASAM)" if s["adaptive"] else "") if s["rho"] else "-"
            lines.append(
                f"| {network} | {name} | {s['lr']:g} | {rho} | {mean['train_loss']:.3f} | {mean['train_acc']:.1%} | "
                f"{mean['test_loss']:.3f} | {sharpness:.4f} |"
            )
    chosen = [*grid_lines(out, "lr"), *grid_lines(out, "rho")]
    if chosen:
        lines += ["", "Accuracy on the held-out training images by which lr and rho were chosen:", ""]
        lines += ["| | | | |", "|---|---|---|---|", *chosen]
    for r in results:
        if not r.finished:
            lines += ["", f"Not in the table: {r.name}, {len(r.metrics)} of {r.settings['epochs']} epochs."]
    return "\n".join(lines) + "\n"


def comma_separated(results: list[Result]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    differences = ["paper_sam_minus_base", "sam_minus_base", "interval_low", "interval_high"]
    writer.writerow(["network", "optimizer", "paper_mean", "paper_std", "mean", "std", "n", *differences])
    cells = cells_of(results)
    for (arch, optimizer), cell in cells.items():
        difference: list[Any] = [None] * 4
        if optimizer.endswith("+sam"):
            base = optimizer.removesuffix("+sam")
            _, mean, interval = paired(cells[arch, base], cell)
            claimed = PAPER[arch, optimizer][0] - PAPER[arch, base][0]
            difference = [round(claimed, 3), mean, *(interval or (None, None))]
        writer.writerow(
            [arch, optimizer, *PAPER[arch, optimizer], cell.mean, cell.deviation, len(cell.by_seed), *difference]
        )
    return text.getvalue()


# ---- the figures ----

STYLE = {"sgd": "C0--", "sgd+sam": "C0-", "adam": "C1--", "adam+sam": "C1-"}


def band(
    axes: plt.Axes, curves: list[list[float]], style: str, label: str, epochs: Sequence[int] | None = None
) -> None:
    """Mean and, over two or more, sample standard deviation by epoch."""
    by_epoch = list(zip(*curves, strict=False))
    epochs = epochs or range(1, len(by_epoch) + 1)
    means = [statistics.mean(values) for values in by_epoch]
    axes.plot(epochs, means, style, linewidth=1.3, label=label)
    if len(curves) > 1:
        deviations = [statistics.stdev(values) for values in by_epoch]
        low = [m - d for m, d in zip(means, deviations, strict=True)]
        high = [m + d for m, d in zip(means, deviations, strict=True)]
        axes.fill_between(epochs, low, high, color=style[:2], alpha=0.15, linewidth=0)


def log_scale(axes: plt.Axes) -> None:
    """Of the values axis, with plain numbers: 0.1, 0.2, 0.3, 0.5, 1."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def legend_above(figure: plt.Figure) -> None:
    """One for all panels, where it hides no curve."""
    by_label = {
        label: line for axes in figure.axes for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    if by_label:
        figure.legend(by_label.values(), by_label.keys(), loc="outside upper center", ncols=len(by_label))


def draw(results: list[Result], path: Path, key: str, ylabel: str, rho: float) -> None:
    figure, panels = plt.subplots(1, len(NETWORKS), figsize=(11, 4.2), layout="constrained")
    for axes, (arch, network) in zip(panels, NETWORKS.items(), strict=True):
        for optimizer, name in OPTIMIZERS.items():
            runs = [r for r in results if r.cell == (arch, optimizer) and r.metrics]
            if not runs:
                continue
            if key == "sharpness":
                curves = [r.sharpness(key, rho) for r in runs]
            else:
                curves = [[100 * m[key] for m in r.metrics] for r in runs]
            if key == "test_acc" and runs[0].settings["eval_size"]:  # the last epoch is of other images: a point
                lasts = [c[-1] for c, r in zip(curves, runs, strict=True) if r.finished]
                curves = [c[:-1] if r.finished else c for c, r in zip(curves, runs, strict=True)]
                if lasts:
                    at = runs[0].settings["epochs"]
                    spread = statistics.stdev(lasts) if len(lasts) > 1 else 0
                    face = STYLE[optimizer][:2] if optimizer.endswith("+sam") else "white"
                    axes.errorbar(
                        at, statistics.mean(lasts), spread, fmt="o", color=STYLE[optimizer][:2], mfc=face, capsize=3
                    )
            if any(curves):
                band(axes, curves, STYLE[optimizer], name)
        axes.set(xlabel="epoch", ylabel=ylabel, title=network)
        if key == "sharpness":
            log_scale(axes)
        axes.grid(alpha=0.3)
    legend_above(figure)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def report(out: Path) -> str:
    """Write table1.md, table1.csv, figure1.png and figure2.png to ``out``; returns the table."""
    results = read_results(out)
    if not results:
        raise train.RunError(f"{out} holds no runs")
    recipe = "fair" if (out / "grid").is_dir() else results[0].settings["recipe"]
    rho = train.RECIPES[results[0].settings["recipe"]]["rho"]
    text = markdown(out, results, recipe, rho)
    train.save(out / "table1.md", text)
    train.save(out / "table1.csv", comma_separated(results))
    draw(results, out / "figure1.png", "test_acc", "test accuracy, %", rho)
    draw(results, out / "figure2.png", "sharpness", f"sharpness of a batch at rho = {rho:g}", rho)
    return text
