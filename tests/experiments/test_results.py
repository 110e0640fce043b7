"""What results/ holds of experiments is complete, and its tables are what the runs beside them say."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.paper import memorising, noise, rounding, runs, sharpness_study, table1
from tests.helpers.paths import ROOT


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sweep", "seeds"),
    [("cpu-paper-text", "3" * 8), ("cpu-paper-code", "3" * 8), ("cpu-fair", "3" * 8), ("large-fair", "3" * 12)],
)
def test_tables_are_rebuilt(sweep, seeds, tmp_path):
    """``seeds``: of each row."""
    committed, rebuilt = ROOT / "results" / sweep, tmp_path / "rebuilt"
    made = ["table1.md", "table1.csv", "sharpness.md", "figure?.png", "sharpness_*.png"]
    shutil.copytree(committed, rebuilt, ignore=shutil.ignore_patterns(*made))
    assert table1.main(["--report-only", "--out", str(rebuilt)]) == 0
    assert sharpness_study.main(["--report-only", "--runs", str(rebuilt)]) == 0
    for name in ("table1.md", "table1.csv", "sharpness.md"):
        assert (rebuilt / name).read_text() == (committed / name).read_text()
    assert {p.name for p in rebuilt.glob("*.png")} == {p.name for p in committed.glob("*.png")}
    with (committed / "table1.csv").open() as file:
        cells = list(csv.DictReader(file))
    assert [cell["n"] for cell in cells] == list(seeds)


def rebuild(main: Callable[[list[str]], int], committed: Path, to: Path) -> None:
    """From the runs alone."""
    shutil.copy(committed / "runs.jsonl.gz", to)
    assert main(["--report-only", "--out", str(to)]) == 0
    [text] = committed.glob("*.md")
    assert (to / text.name).read_text() == text.read_text()
    assert {p.name for p in to.iterdir()} == {p.name for p in committed.iterdir()}


def test_the_table_of_all_images_is_rebuilt(tmp_path):
    """Adam's rows of VGG16, three seeds each."""
    rebuild(table1.main, ROOT / "results" / "all-fair", tmp_path)
    assert (tmp_path / "table1.csv").read_text() == (ROOT / "results" / "all-fair" / "table1.csv").read_text()
    with (tmp_path / "table1.csv").open() as file:
        assert [(row["network"], row["n"]) for row in csv.DictReader(file)] == [("vgg16", "3")] * 3


@pytest.mark.parametrize(("dataset", "tables", "seeds"), [("digits", 8, 5), ("cifar10", 6, 3)])
def test_the_tables_of_wrong_labels_are_rebuilt(dataset, tables, seeds, tmp_path):
    rebuild(noise.main, ROOT / "results" / f"noise-{dataset}", tmp_path)
    text = (tmp_path / "noise.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| base |")]
    assert [row.split(" | ")[1] for row in rows[1:]] == [f"| {seeds}"] * tables
    cells = noise.cells_of(runs.read_runs(tmp_path))
    assert {len(cell.runs) for cell in cells.values()} == {seeds}
    assert "not finished" not in text


def test_the_table_of_memorising_is_rebuilt(tmp_path):
    rebuild(memorising.main, ROOT / "results" / "memorising", tmp_path)
    cells = memorising.cells_of(runs.read_runs(tmp_path))
    assert [len(of_cell) for of_cell in cells.values()] == [10] * 8


def test_the_table_of_rounding_is_rebuilt():
    committed = ROOT / "results" / "rounding"
    content = json.loads((committed / "rounding.json").read_text())
    assert len(content["cells"]) == len(runs.NETWORKS) * len(rounding.SEEDS) * len(rounding.STEPS) * len(rounding.RHOS)
    assert rounding.markdown(content) == (committed / "rounding.md").read_text()


def test_what_rounding_leaves():
    """A perturbation that bfloat16 has in full, and one of a tenth of what it can tell apart."""
    weights, grads = [torch.ones(40_000).bfloat16()], [torch.ones(40_000).bfloat16()]
    whole = rounding.left(weights, grads, rho=2**-7 * 200)
    assert whole == {"to nearest": 1.0, "stochastically": 1.0}
    tenth = rounding.left(weights, grads, rho=2**-7 * 200 / 10)
    assert tenth["to nearest"] == 0
    assert 0.9 < tenth["stochastically"] < 1.1
