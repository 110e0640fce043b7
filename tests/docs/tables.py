"""The tables of the documentation that are made from results/ and by programs.

    python -m tests.docs.tables    # writes them anew into README.md and docs/

A table stands between ``<!-- table: NAME -->`` and ``<!-- end of table -->``; test_tables.py compares it with what is
made here.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from benchmarks.paper.runs import NETWORKS, OPTIMIZERS
from benchmarks.speed import timing
from benchmarks.speed.workloads import SMALL
from benchmarks.tables import table
from tests.docs.pages import PAGES
from tests.helpers.paths import ROOT

MARKED = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
RESULTS = ROOT / "results"
RECIPES = ("paper-text", "paper-code", "fair")


def read(name: str) -> Any:
    return json.loads((RESULTS / name).read_text())


# ---- results/bench ----

LISTS = {
    "resnet18": "ResNet-18",
    "vgg16": "VGG16",
    "vit_s16": "ViT-S/16",
    "24x4M": "24 tensors of 4 M",
    "1000x100": "1000 tensors of 100",
}
#: The columns of step.json, ours first; a cell may lack some of them.
COLUMNS = {
    "FusedSAM": "FusedSAM",
    "davda54/sam": "davda54/sam",
    "pytorch_optimizer SAM": "pytorch_optimizer SAM + Adam",
    "pytorch_optimizer SAM, fused=True": "the same, `fused=True`",
    "foreach + fused base": "`_foreach_` + fused Adam",
    "FusedMSAM": "FusedMSAM",
    "base, fused=True": "Adam alone, `fused=True`",
}


def columns(of: Iterable[str]) -> list[str]:
    return [name for name in COLUMNS if name in of]


def half_range(cell: dict[str, Any], name: str) -> float:
    """Half the interquartile range, in milliseconds."""
    low, _, high = timing.quartiles(cell["ms"][name])
    return (high - low) / 2


def ratio(cell: dict[str, Any], name: str) -> float:
    """The median of the rounds' ratios to the cell's reference."""
    return timing.ratio(cell, name)[1]


def digits(x: float, like: float = 0) -> str:
    """With one decimal, but for numbers >= 100 and what stands beside one, ``like``."""
    return f"{x:.0f}" if max(x, like) >= 100 else f"{x:.1f}"


def step_cells() -> list[dict[str, Any]]:
    """Of SAM + Adam, in the order of LISTS."""
    cells = [c for c in read("bench/step.json")["cells"] if c["base"] == "adam" and not c["adaptive"]]
    return sorted(cells, key=lambda c: (list(LISTS).index(c["list"]), c["threads"]))


def times(cell: dict[str, Any], names: list[str]) -> list[str]:
    ours, *others = names
    middle = timing.median(cell, ours)
    words = [f"{digits(middle)} ± {digits(half_range(cell, ours), middle)}"]
    for name in others:
        over = ratio(cell, name)
        words.append(f"{digits(timing.median(cell, name))} ({over:.{over < 9.95:d}f}x)")
    return words


def size_of(cell: dict[str, Any]) -> str:
    name = LISTS[cell["list"]]
    return name if name[0].isdigit() else f"{name}, {cell['tensors']} tensors, {cell['numel'] / 1e6:.1f} M"


def step() -> list[str]:
    cells = step_cells()
    names = columns(cells[0]["ms"])

    def row(c: dict[str, Any]) -> list[Any]:
        floor = f"{timing.median(c, 'FusedSAM') / c['floor_ms']:.2f}" if c["numel"] >= SMALL else ""
        return [size_of(c), c["threads"], timing.rounds(c), *times(c, names), floor]

    return table(["list", "threads", "n", *(COLUMNS[name] for name in names), "time / floor"], map(row, cells))


def step_short() -> list[str]:
    most = max(c["threads"] for c in step_cells())
    cells = [c for c in step_cells() if c["threads"] == most and c["list"] != "vgg16"]
    names = [name for name in columns(cells[0]["ms"]) if name not in ("FusedMSAM", "base, fused=True")]
    return table(
        ["", "n", *(COLUMNS[name] for name in names)], ([size_of(c), timing.rounds(c), *times(c, names)] for c in cells)
    )


def memory() -> list[str]:
    cells = {c["list"]: c["peak_extra"] for c in step_cells() if "peak_extra" in c}
    names = columns(next(iter(cells.values())))
    rows = ([LISTS[n], *(f"{extra[name]:.2f}" for name in names)] for n, extra in cells.items())
    return table(["list", *(COLUMNS[name] for name in names)], rows)


STEPS = {
    "Adam, fused=True": "Adam, `fused=True`",
    "FusedMSAM": "FusedMSAM",
    "FusedSAM": "FusedSAM",
    "FusedSAM, --ascent-fraction 0.25": "FusedSAM, `--ascent-fraction 0.25`",
    "FusedSAM, --norm-only": "FusedSAM, `--norm-only`",
    "FusedSAM, --sam-every 2": "FusedSAM, `--sam-every 2`",
    "davda54/sam": "davda54/sam",
    "pytorch_optimizer SAM": "pytorch_optimizer SAM",
    "pytorch_optimizer SAM, fused=True": "pytorch_optimizer SAM, `fused=True`",
    "foreach + fused base": "`_foreach_` + fused Adam",
}


def training() -> list[str]:
    networks = read("bench/train.json")["networks"]
    header = ["", *(f"{NETWORKS[n['arch']]}, width {n['width']}, n = {timing.rounds(n)}" for n in networks)]
    shown = [name for name in STEPS if name in networks[0]["ms"]]
    return table(header, ([STEPS[name], *(f"{ratio(n, name):.2f}" for n in networks)] for name in shown))


def cost() -> list[str]:
    """Our rows of it."""
    return [line for i, line in enumerate(training()) if i < 2 or line.startswith("| Fused")]


def pipeline() -> list[str]:
    made = read("bench/train.json")["input"]
    return table(["", f"time, n = {timing.rounds(made)}"], ((n, f"{ratio(made, n):.1f}x") for n in made["ms"]))


# ---- Table I ----


def cells_of(sweep: str) -> dict[tuple[str, str], dict[str, str]]:
    with (RESULTS / sweep / "table1.csv").open() as file:
        return {(row["network"], row["optimizer"]): row for row in csv.DictReader(file)}


CELLS = [(network, optimizer) for network in NETWORKS for optimizer in ("sgd", "sgd+sam", "adam", "adam+sam")]


def titles(network: str, optimizer: str) -> list[str]:
    return [NETWORKS[network], OPTIMIZERS[optimizer]]


def mean_and_deviation(row: dict[str, str], prefix: str = "") -> str:
    return f"{float(row[prefix + 'mean']):.1f} ± {float(row[prefix + 'std']):.1f}"


def table1() -> list[str]:
    made = {recipe: cells_of(f"cpu-{recipe}") for recipe in RECIPES}
    rows = (
        [
            *titles(*cell),
            mean_and_deviation(made["fair"][cell], "paper_"),
            *(mean_and_deviation(made[recipe][cell]) for recipe in RECIPES),
        ]
        for cell in CELLS
    )
    return table(["", "", "paper", *(f"`{recipe}`" for recipe in RECIPES)], rows)


def gain(row: dict[str, str]) -> str:
    mean, low, high = (
        f"{round(float(row[key]), 1) + 0.0:+.1f}"  # + 0.0: no -0.0
        for key in ("sam_minus_base", "interval_low", "interval_high")
    )
    return f"{mean} ({low} to {high})"


def table1_gain() -> list[str]:
    made = {recipe: cells_of(f"cpu-{recipe}") for recipe in RECIPES}
    rows = []
    for network, optimizer in CELLS:
        if optimizer.endswith("+sam"):
            of = {recipe: cells[network, optimizer] for recipe, cells in made.items()}
            paper = f"{float(next(iter(of.values()))['paper_sam_minus_base']):+.1f}"
            rows.append([*titles(network, optimizer.removesuffix("+sam")), paper, *map(gain, of.values())])
    return table(["SAM - base", "", "paper", *(f"`{recipe}`" for recipe in RECIPES)], rows)


def table1_with_msam(sweep: str) -> list[str]:
    rows = []
    for cell, row in cells_of(sweep).items():
        paper = mean_and_deviation(row, "paper_") if row["paper_mean"] else ""
        claimed = f"{float(row['paper_sam_minus_base']):+.1f}" if row["paper_sam_minus_base"] else ""
        added = gain(row) if row["sam_minus_base"] else ""
        rows.append([*titles(*cell), mean_and_deviation(row), added, paper, claimed])
    return table(["", "", "here", "over the base", "the paper", "over the base"], rows)


def table1_short() -> list[str]:
    sweeps = [cells_of(f"{size}-fair") for size in ("cpu", "large", "all")]
    rows = []
    for cell in CELLS:
        network, optimizer = cell
        if optimizer.endswith("+sam"):
            paper = f"{float(sweeps[0][cell]['paper_sam_minus_base']):+.1f}"
            gains = (gain(cells[cell]) if cell in cells else "not run" for cells in sweeps)
            rows.append([*titles(network, optimizer.removesuffix("+sam")), paper, *gains])
    return table(["", "", "the paper", "1,000 images", "10,000 images", "50,000 images"], rows)


RATIO = re.compile(r"^\| ([\w-]+) \| SGD, Adam \| [^|]* \| ([^|]*) \|$", re.MULTILINE)
SETTING = {
    "paper-text": "`paper-text`: SAM's geometry, lr 0.1 and 0.001",
    "fair": "`fair`: SAM's geometry, each lr chosen",
    "paper-code": "`paper-code`: ASAM's geometry, both lr 0.001",
}


def sharpness_ratio() -> list[str]:
    rows = []
    for recipe, title in SETTING.items():
        ratios = dict(RATIO.findall((RESULTS / f"cpu-{recipe}" / "sharpness.md").read_text()))
        rows.append([title, ratios["ResNet-18"], ratios["VGG16"]])
    return table(["", "ResNet-18", "VGG16"], rows)


# ---- by programs ----


def gpu() -> list[str]:
    """The cost model's rows, one for each network."""
    command = [sys.executable, "-m", "benchmarks.speed.cost_model"]
    printed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    costs: dict[str, dict[str, str]] = {}
    for line in printed.splitlines()[2:]:
        network, name, launches, _, ms = line.strip("| ").split(" | ")
        costs.setdefault(network, {})[name] = f"{ms} ms, {launches}"
    names = columns(next(iter(costs.values())))
    header = ["time, launches", *(COLUMNS[name] for name in names)]
    return table(header, ([network, *(cells[name] for name in names)] for network, cells in costs.items()))


def noise() -> list[str]:
    """The first table of noise.md, as it is."""
    lines = (RESULTS / "noise-digits" / "noise.md").read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("|"))
    last = next(i for i, line in enumerate(lines) if i > first and not line.startswith("|"))
    return lines[first:last]


NOISE_SECTION = re.compile(r"^## (\w+), (\d+) % wrong, [^\n]*\n\n((?:\|[^\n]*\n)+)", re.MULTILINE)


def noise_cifar10() -> list[str]:
    """The tables of noise.md by base and part of wrong labels, in one."""
    lines: list[str] = []
    for base, part, rows in NOISE_SECTION.findall((RESULTS / "noise-cifar10" / "noise.md").read_text()):
        header, rule, *found = rows.splitlines()
        lines += [] if lines else [f"| {header}", f"|---{rule}"]
        lines += [f"| {base}, {part} % {row}" for row in found]
    return lines


def memorising() -> list[str]:
    """The table of memorising.md, without the accuracies of the test set."""
    lines = (RESULTS / "memorising" / "memorising.md").read_text().splitlines()
    cells = [line.strip("|").split("|") for line in lines if line.startswith("|")]
    shown = [i for i, title in enumerate(cells[0]) if title.strip() not in ("best", "last")]
    return ["|" + "|".join(row[i] for i in shown) + "|" for row in cells]


def rounding() -> list[str]:
    return (RESULTS / "rounding" / "rounding.md").read_text().splitlines()


TABLES: dict[str, Callable[[], list[str]]] = {
    "step": step,
    "step-short": step_short,
    "memory": memory,
    "training": training,
    "cost": cost,
    "input": pipeline,
    "table1": table1,
    "table1-gain": table1_gain,
    "table1-large": partial(table1_with_msam, "large-fair"),
    "table1-all": partial(table1_with_msam, "all-fair"),
    "table1-short": table1_short,
    "sharpness-ratio": sharpness_ratio,
    "gpu": gpu,
    "noise": noise,
    "noise-cifar10": noise_cifar10,
    "memorising": memorising,
    "rounding": rounding,
}


def renewed(text: str) -> str:
    """A page with its tables as they are now."""
    return MARKED.sub(lambda at: "\n".join([at[1], *TABLES[at[2]](), "", at[3]]), text)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for page in PAGES:
        page.write_text(renewed(page.read_text()))


if __name__ == "__main__":
    main()
