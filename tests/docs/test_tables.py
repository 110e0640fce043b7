"""The tables of the documentation say what results/ and the programs say."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys

import pytest

from tests.docs.pages import PAGES
from tests.docs.tables import MARKED, TABLES
from tests.helpers.paths import ROOT

#: What stands between the marks, by the table's name.
SHOWN = {at[2]: at[0].splitlines()[2:-2] for page in PAGES for at in MARKED.finditer(page.read_text())}
PROGRAMS = {"gpu"}


def skip_with_other_versions() -> None:
    """What rivals and torch's operators do is shown for one version of each."""
    page = " ".join((ROOT / "docs" / "migrating.md").read_text().split())
    [shown] = re.findall(r"torch ([\d.]+), pytorch_optimizer ([\d.]+), davda54", page)
    here = tuple(importlib.metadata.version(name).split("+")[0] for name in ("torch", "pytorch_optimizer"))
    if here != shown:
        pytest.skip(f"the page was made with torch and pytorch_optimizer {shown}, not {here}")


def test_every_table_is_shown():
    assert SHOWN.keys() == TABLES.keys()


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in PROGRAMS)) for n in TABLES])
def test_table(name):
    if name in PROGRAMS:
        skip_with_other_versions()
    assert SHOWN[name] == TABLES[name](), "bring it up to date: python -m tests.docs.tables"


def rows_of(page: str, first_column: str) -> list[str]:
    """Of the table whose header names ``first_column`` first."""
    lines = (ROOT / page).read_text().splitlines()
    [header] = [i for i, line in enumerate(lines) if line.startswith(f"|  | {first_column} |")]
    end = next(i for i, line in enumerate(lines) if i > header and not line.startswith("|"))
    return lines[header:end]


def test_the_readme_shows_rows_of_the_whole_comparison():
    short, whole = rows_of("README.md", "FusedSAM"), rows_of("docs/migrating.md", "FusedSAM")
    assert len(short) == 2 + 8
    assert set(short) <= set(whole)


@pytest.mark.slow
def test_comparison():
    """All but the column of davda54/sam, which is on no index."""
    skip_with_other_versions()
    command = [sys.executable, "-m", "benchmarks.speed.features"]
    printed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    made = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("|")]
    _, _, *shown = [line.strip("| ").split(" | ") for line in rows_of("docs/migrating.md", "FusedSAM")]
    assert [[name, ours, theirs] for name, ours, _, theirs in shown] == [row[:3] for row in made[2:]]
