"""The pages that a user reads, and the blocks in them."""

from __future__ import annotations

import re
from typing import NamedTuple

from tests.helpers.paths import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    page: str
    line: int  # of its first line
    text: str


def blocks(language: str) -> dict[str, Block]:
    """The fenced blocks in ``language``, by page and line."""
    found = {}
    for path in PAGES:
        text, page = path.read_text(), path.relative_to(ROOT).as_posix()
        for block in BLOCK.finditer(text):
            if block[1] == language:
                line = text.count("\n", 0, block.start()) + 2
                found[f"{page}:{line}"] = Block(page, line, block[2])
    return found


def prose(text: str) -> str:
    """A page without its blocks, inline code and comments."""
    return re.sub(r"<!--.*?-->|`[^`\n]+`", "", BLOCK.sub("", text), flags=re.DOTALL)
