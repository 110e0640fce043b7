"""The tables of the documentation that are made from results/ and by programs.

    python -m tests.docs.tables    # writes them anew into README.md and docs/

A table stands between ``<!-- table: NAME -->`` and ``<!-- end of table -->``; test_tables.py compares it with what is
made here.
"""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from typing import Any

from benchmarks.paper.runs import NETWORKS, OPTIMIZERS
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
#: The columns of step.json, ours first; it may lack some of them.
RIVALS = {
    "FusedSAM": "FusedSAM",
    "davda54/sam": "davda54/sam",
    "pytorch_optimizer SAM": "pytorch_optimizer SAM + Adam",
    "pytorch_optimizer SAM, fused=True": "the same, `fused=True`",
    "foreach + fused base": "`_foreach_` + fused Adam",
}


def measured(among: Iterable[str]) -> list[str]:
    return [name for name in RIVALS if name in among]


def digits(x: float, like: float = 0) -> str:
    """With one decimal, but for numbers >= 100 and what stands beside one, ``like``."""
    return f"{x:.0f}" if max(x, like) >= 100 else f"{x:.1f}"


def step_rows() -> list[dict[str, Any]]:
    """Of SAM + Adam, in the order of LISTS."""
    rows = [r for r in read("bench/step.json")["results"] if r["base"] == "adam" and not r["adaptive"]]
    return sorted(rows, key=lambda r: (list(LISTS).index(r["list"]), r["threads"]))


def times(r: dict[str, Any], columns: Iterable[str]) -> list[str]:
    ours = r["ms"]["FusedSAM"]
    cells = [f"{digits(ours['median'])} ± {digits(ours['iqr'] / 2, ours['median'])}"]
    for name in list(columns)[1:]:
        theirs = r["ms"][name]["median"]
        ratio = theirs / ours["median"]
        cells.append(f"{digits(theirs)} ({ratio:.{ratio < 10:d}f}x)")
    return cells


def size_of(r: dict[str, Any]) -> str:
    name = LISTS[r["list"]]
    return name if r["list"][0].isdigit() else f"{name}, {r['tensors']} tensors, {r['numel'] / 1e6:.1f} M"


def step() -> list[str]:
    rows = step_rows()
    columns = measured(rows[0]["ms"])
    header = ["list", "threads", "n", *(RIVALS[name] for name in columns), "time / floor"]
    floor = [f"{r['ms']['FusedSAM']['median'] / r['floor_ms']:.2f}" if "floor_ms" in r else "" for r in rows]
    return table(
        header,
        ([size_of(r), r["threads"], r["rounds"], *times(r, columns), f] for r, f in zip(rows, floor, strict=True)),
    )


def step_short() -> list[str]:
    most = max(r["threads"] for r in step_rows())
    rows = [r for r in step_rows() if r["threads"] == most and r["list"] != "vgg16"]
    columns = measured(rows[0]["ms"])
    return table(["", *(RIVALS[name] for name in columns)], ([size_of(r), *times(r, columns)] for r in rows))


def memory() -> list[str]:
    rows = {r["list"]: r for r in step_rows()}.values()
    columns = measured(next(iter(rows))["peak_extra"])
    header = ["list", *(RIVALS[name] for name in columns)]
    return table(header, ([LISTS[r["list"]], *(f"{r['peak_extra'][name]:.2f}" for name in columns)] for r in rows))


STEPS = {
    "Adam, fused=True": "Adam, `fused=True`",
    "FusedSAM, --rho 0": "FusedSAM, `--rho 0`",
    "FusedMSAM": "FusedMSAM",
    "FusedSAM": "FusedSAM",
    "FusedSAM, --ascent-fraction 0.25": "FusedSAM, `--ascent-fraction 0.25`",
    "FusedSAM, --sam-every 2": "FusedSAM, `--sam-every 2`",
    "davda54/sam": "davda54/sam",
    "pytorch_optimizer SAM": "pytorch_optimizer SAM",
    "pytorch_optimizer SAM, fused=True": "pytorch_optimizer SAM, `fused=True`",
    "foreach + fused base": "`_foreach_` + fused Adam",
}


def training(only: str = "", least: int = 0) -> list[str]:
    networks = [n for n in read("bench/train.json")["networks"] if n["width"] >= least]
    header = ["", *(f"{n['arch']}, width {n['width']}, n = {n['rounds']}" for n in networks)]
    header = [title.replace("resnet18", "ResNet-18").replace("vgg16", "VGG16") for title in header]

    def over(n: dict[str, Any], name: str) -> str:
        return f"{n['seconds'][name] / n['seconds']['forward + backward']:.2f}"

    shown = [name for name in STEPS if name in networks[0]["seconds"] and name.startswith(only)]
    return table(header, ([STEPS[name], *(over(n, name) for n in networks)] for name in shown))


def cost() -> list[str]:
    return training(only="Fused", least=64)


def pipeline() -> list[str]:
    made = read("bench/train.json")["input"]
    header = ["", f"images a second, n = {made['rounds']}"]
    return table(header, ((name, f"{speed:,.0f}") for name, speed in made["images_per_second"].items()))


# ---- Table I ----


def cells_of(recipe: str) -> dict[tuple[str, str], dict[str, str]]:
    with (RESULTS / f"cpu-{recipe}" / "table1.csv").open() as file:
        return {(row["network"], row["optimizer"]): row for row in csv.DictReader(file)}


CELLS = [(network, optimizer) for network in NETWORKS for optimizer in OPTIMIZERS]


def titles(network: str, optimizer: str) -> list[str]:
    return [NETWORKS[network].replace("ResNet18", "ResNet-18"), OPTIMIZERS[optimizer]]


def mean_and_deviation(row: dict[str, str], prefix: str = "") -> str:
    return f"{float(row[prefix + 'mean']):.1f} ± {float(row[prefix + 'std']):.1f}"


def table1() -> list[str]:
    made = {recipe: cells_of(recipe) for recipe in RECIPES}
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
    low, high = float(row["interval_low"]), float(row["interval_high"])
    return f"{float(row['sam_minus_base']):+.1f} ({low:+.1f} to {high:+.1f})"


def table1_gain(recipes: Iterable[str] = RECIPES) -> list[str]:
    made = {recipe: cells_of(recipe) for recipe in recipes}
    rows = []
    for network, optimizer in CELLS:
        if optimizer.endswith("+sam"):
            of = {recipe: cells[network, optimizer] for recipe, cells in made.items()}
            paper = f"{float(next(iter(of.values()))['paper_sam_minus_base']):+.1f}"
            rows.append([*titles(network, optimizer.removesuffix("+sam")), paper, *map(gain, of.values())])
    return table(["SAM - base", "", "paper", *(f"`{recipe}`" for recipe in recipes)], rows)


def table1_short() -> list[str]:
    _, *lines = table1_gain(["fair"])
    return ["| | | the paper, 200 epochs | here |", *lines]


RATIO = re.compile(r"^\| (\w+) \| SGD, Adam \| [^|]* \| ([^|]*) \|$", re.MULTILINE)
SETTING = {
    "paper-text": "`paper-text`: SAM's geometry, lr 0.1 and 0.001",
    "fair": "`fair`: SAM's geometry, each lr chosen",
    "paper-code": "`paper-code`: ASAM's geometry, both lr 0.001",
}


def sharpness_ratio() -> list[str]:
    rows = []
    for recipe, title in SETTING.items():
        ratios = dict(RATIO.findall((RESULTS / f"cpu-{recipe}" / "sharpness.md").read_text()))
        rows.append([title, ratios["ResNet18"], ratios["VGG16"]])
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
    columns = measured(next(iter(costs.values())))
    header = ["time, launches", *(RIVALS[name] for name in columns)]
    return table(header, ([network, *(cells[name] for name in columns)] for network, cells in costs.items()))


def noise() -> list[str]:
    """The first table of noise.md, as it is; nothing before that is there."""
    path = RESULTS / "noise-digits" / "noise.md"
    if not path.exists():
        return []
    lines = path.read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("|"))
    last = next(i for i, line in enumerate(lines) if i > first and not line.startswith("|"))
    return lines[first:last]


TABLES: dict[str, Callable[[], list[str]]] = {
    "step": step,
    "step-short": step_short,
    "memory": memory,
    "training": training,
    "cost": cost,
    "input": pipeline,
    "table1": table1,
    "table1-gain": table1_gain,
    "table1-short": table1_short,
    "sharpness-ratio": sharpness_ratio,
    "gpu": gpu,
    "noise": noise,
}


def renewed(text: str) -> str:
    """A page with its tables as they are now."""
    return MARKED.sub(lambda at: "\n".join([at[1], *TABLES[at[2]](), "", at[3]]), text)


def main() -> None:
    for page in PAGES:
        page.write_text(renewed(page.read_text()))


if __name__ == "__main__":
    main()
