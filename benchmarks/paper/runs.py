"""The runs of a sweep: a folder each while they train, or all in one file, runs.jsonl.gz.

    python -m benchmarks.paper.runs runs/cpu-fair results/cpu-fair   # writes results/cpu-fair/runs.jsonl.gz
    python -m benchmarks.paper.runs --grids results/large-fair runs/all-fair   # for a sweep that chooses from them
    zcat results/cpu-fair/runs.jsonl.gz | head

It has a line for a run's config.json, {"run": name, "config": {...}}; then one for each line of its metrics.jsonl,
{"run": name, "epoch": 1, ...}, in eight digits; and for failed.txt {"run": name, "failed": "..."}.
"""

from __future__ import annotations

import argparse
import functools
import gzip
import json
import math
import sys
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import train

OPTIMIZERS = {
    "sgd": "SGD",
    "sgd+sam": "SGD + SAM",
    "sgd+msam": "SGD + Momentum-SAM",
    "adam": "Adam",
    "adam+sam": "Adam + SAM",
    "adam+msam": "Adam + Momentum-SAM",
}
NETWORKS = {"resnet18": "ResNet-18", "vgg16": "VGG16"}
# Of an optimizer's curves.
STYLE = {"sgd": "C0--", "sgd+sam": "C0-", "sgd+msam": "C0:", "adam": "C1--", "adam+sam": "C1-", "adam+msam": "C1:"}
GRID = "grid/"  # the names of runs that something is chosen by begin with it
PACKED = "runs.jsonl.gz"


@dataclass
class Result:
    """What a run has left: its config, its metrics by epoch and, if it diverged, why it ended."""

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    failed: str | None = None

    @property
    def settings(self) -> dict[str, Any]:
        return {**train.DEFAULTS, **self.config["settings"]}  # an old run lacks younger options

    @property
    def environment(self) -> dict[str, Any]:
        return self.config["environment"]

    @property
    def machines(self) -> list[str]:
        """The one that it began on, and those that it was resumed on: the GPU, or else the CPU."""
        return [e.get("gpu") or e["cpu"] for e in (self.environment, *self.config.get("resumed_on", []))]

    @property
    def cell(self) -> tuple[str, str]:
        s = self.settings
        return s["arch"], s["base"] + (f"+{s['method']}" if s["rho"] else "")

    @property
    def in_grid(self) -> bool:
        return self.name.startswith(GRID)

    @property
    def finished(self) -> bool:
        return len(self.metrics) == self.settings["epochs"]

    @property
    def why_not(self) -> str | None:
        """Why it is in no table, if it is not."""
        if self.failed or not self.config:
            return self.failed or "not begun"
        return None if self.finished else f"{len(self.metrics)} of {self.settings['epochs']} epochs"

    def outcome(self, key: str, digits: int) -> str:
        """The last epoch's ``key`` in %, or why there is none."""
        if self.failed:
            return "diverged"
        return f"{self.metrics[-1][key]:.{digits}%}" if self.finished else "not finished"

    def sharpness(self, rho: float) -> list[float]:
        """As recorded, by epoch, at ``rho``: to first order it is proportional to it. NaN of Momentum-SAM's runs."""
        scale = rho / self.settings["measure_rho"]
        return [float("nan") if m["sharpness"] is None else m["sharpness"] * scale for m in self.metrics]


def machines_of(results: Iterable[Result]) -> str:
    return ", ".join(sorted({machine for r in results for machine in r.machines}))


def left_out(results: Iterable[Result]) -> list[str]:
    """Lines for the runs that are in no table."""
    return [line for r in results if r.why_not for line in ("", f"Not in the tables: {r.name}, {r.why_not}.")]


def recorded(cells: dict[tuple[str, str], list[Result]]) -> dict[tuple[str, str], list[Result]]:
    """Those whose runs have recorded the sharpness: all but Momentum-SAM's, which have no gradient at the weights."""
    return {cell: runs for cell, runs in cells.items() if not math.isnan(runs[0].sharpness(1.0)[0])}


def by_cell(results: Iterable[Result]) -> dict[tuple[str, str], list[Result]]:
    """The runs of each network and optimizer that has any, in the order of the tables."""
    cells = {(arch, optimizer): [] for arch in NETWORKS for optimizer in OPTIMIZERS}
    for r in results:
        if r.cell in cells:
            cells[r.cell].append(r)
    return {cell: runs for cell, runs in cells.items() if runs}


def networks_of(cells: Iterable[tuple[str, str]]) -> dict[str, str]:
    """The networks that occur and their titles, in the order of the tables."""
    found = {arch for arch, _ in cells}
    return {arch: title for arch, title in NETWORKS.items() if arch in found}


def of_network(cells: dict[tuple[str, str], list[Result]], arch: str) -> Iterator[tuple[str, list[Result]]]:
    """The optimizers and their runs."""
    return ((optimizer, runs) for (at, optimizer), runs in cells.items() if at == arch)


def read_folder(folder: Path, name: str) -> Result | None:
    """The run ``name`` from its folder; None if there is none, or it has not begun."""
    paths = [folder / file for file in ("config.json", "metrics.jsonl", "failed.txt")]
    return _read(name, *((path, path.stat().st_mtime_ns if path.exists() else None) for path in paths))


@functools.lru_cache(maxsize=4096)  # a sweep asks for all its runs after each epoch
def _read(name: str, *files: tuple[Path, int | None]) -> Result | None:
    config, metrics, failed = (path for path, _ in files)
    if not config.exists():
        return None
    return Result(
        name,
        json.loads(config.read_text()),
        train.json_lines(metrics),
        failed.read_text().strip() if failed.exists() else None,
    )


def read_packed(out: Path) -> dict[str, Result]:
    """The runs of ``out``/runs.jsonl.gz by name; none if there is no such file.

    Raises:
        train.RunError: if it, or a line of it, is not as expected.
    """
    path = out / PACKED
    found: dict[str, Result] = {}
    try:
        text = gzip.decompress(path.read_bytes()).decode() if path.exists() else ""
    except (OSError, EOFError, zlib.error) as error:
        raise train.RunError(f"{path}: expected a gzip file: {error}") from error
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            row = json.loads(line)
            name = row.pop("run")
            if "config" in row:
                found[name] = Result(name, row["config"])
            elif "failed" in row:
                found[name].failed = row["failed"]
            else:
                found[name].metrics.append(row)
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise train.RunError(
                f"{path}, line {number}: expected a JSON object with a run's name and its config, or an epoch of a run "
                f"whose config stands before it, got {line[:80]}"
            ) from error
    return found


def read_runs(out: Path) -> list[Result]:
    """All runs of ``out``, by name: those packed, and those with a folder, which is the newer."""
    found = read_packed(out)
    for config in (*out.glob("*/config.json"), *out.glob(f"{GRID}*/config.json")):
        name = config.parent.relative_to(out).as_posix()
        found[name] = read_folder(config.parent, name)
    return [found[name] for name in sorted(found)]


def pack(out: Path, to: Path, grids: bool = False) -> Path:
    """Write the runs of ``out`` to ``to``/runs.jsonl.gz, and return its path.

    Args:
        grids: only the runs of grids, from which values are chosen.

    Raises:
        train.RunError: if there are none, or if the file is there and has runs that would be lost.
    """
    lines = []
    results = [r for r in read_runs(out) if r.in_grid or not grids]
    whole = {r.name for r in results if not r.why_not or r.failed}
    lost = {r.name for r in read_packed(to).values() if (r.finished or r.failed) and r.name not in whole}
    if lost:
        raise train.RunError(f"{to / PACKED} has {len(lost)} runs that would be lost, such as {min(lost)}")
    for r in results:
        ending = [] if r.failed is None else [{"failed": r.failed}]
        rows = ({"config": r.config}, *map(_rounded, r.metrics), *ending)
        lines += [json.dumps({"run": r.name, **row}) + "\n" for row in rows]
    if not lines:
        raise train.RunError(f"{out} holds no runs")
    to.mkdir(parents=True, exist_ok=True)
    train.save(to / PACKED, gzip.compress("".join(lines).encode(), mtime=0))
    return to / PACKED


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    """Eight digits are more than a table shows, and pack to half the size."""
    return {key: float(f"{x:.8g}") if isinstance(x, float) else x for key, x in row.items()}


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", type=Path, help="the folder of a sweep")
    p.add_argument("to", type=Path, help="the folder that gets runs.jsonl.gz")
    p.add_argument("--grids", action="store_true", help="only the runs of grids, from which values are chosen")
    args = p.parse_args(argv)
    return train.exit_status("runs.py", lambda: print(pack(args.out, args.to, args.grids)), "nothing was written")


if __name__ == "__main__":
    sys.exit(main())
