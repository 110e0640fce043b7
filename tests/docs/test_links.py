"""Every relative link and picture of the documentation leads somewhere, and nothing stands in a page twice."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from tests.docs.pages import BLOCK, PAGES, prose
from tests.helpers.paths import ROOT

LINK = re.compile(r"\]\(([^()\s]+)\)")
#: Where files are named, and not linked to.
NAMED = re.compile(r"\b(?:csrc|sam_fused|benchmarks|tests|results|docs)/[\w./+-]*\w")


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of the headings."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links(page):
    links = [link for link in LINK.findall(prose(page.read_text())) if not link.startswith("https://")]
    for link in links:
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_relative_to(ROOT), link
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_that_are_named(page):
    """Also those of the map of the code; not what a run is to write, nor what a placeholder stands for."""
    text = re.sub(r"<!--.*?-->|OUT=\S+|https://\S+", "", page.read_text(), flags=re.DOTALL)
    missing = [path for path in NAMED.findall(text) if not (ROOT / path).exists()]
    assert not missing


def test_the_map_is_whole():
    """Every source file has its line in docs/architecture.md, and every extra its name in CONTRIBUTING.md."""
    shown = (ROOT / "docs" / "architecture.md").read_text()
    sources = [*(ROOT / "csrc").iterdir(), *(ROOT / "sam_fused").glob("*.py")]
    assert not [p.name for p in sources if p.name not in shown and p.name != "__init__.py"]
    extras = re.search(r"optional-dependencies\]\n(.*?)\n\n", (ROOT / "pyproject.toml").read_text(), re.DOTALL)[1]
    shown = (ROOT / "CONTRIBUTING.md").read_text()
    assert not [extra for extra in re.findall(r"^(\w+) =", extras, re.MULTILINE) if f"`{extra}`" not in shown]


def test_links_are_found():
    """From the README to every page."""
    readme = (ROOT / "README.md").read_text()
    assert {f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")} <= {
        x.partition("#")[0] for x in LINK.findall(readme)
    }


def test_the_readme_fits_on_a_few_screens():
    assert len((ROOT / "README.md").read_text().splitlines()) < 200


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_no_paragraph_stands_twice(page):
    paragraphs = Counter(p for p in BLOCK.sub("", page.read_text()).split("\n\n") if len(p) > 60)
    assert [p for p, n in paragraphs.items() if n > 1] == []
