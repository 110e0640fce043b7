"""Copies of csrc with lines changed, to be compiled by themselves."""

from __future__ import annotations

from pathlib import Path

from tests.helpers.paths import CSRC

BASES = "std::make_index_sequence<std::tuple_size_v<Bases>>"  # in functors.h
#: One base for each number of states, which is what memory and threads depend on.
FOUR_BASES = {BASES: "std::index_sequence<0, 1, 2, 3>"}
#: The types that the harness needs for "quick".
QUICK_TYPES = {
    "case DType::kDouble: return f(double{});": "case DType::kDouble: return;",
    "case DType::kBFloat16: return f(BFloat16{});": "case DType::kBFloat16: return;",
}
#: For "quick" with Adam alone: an eighth of the time to compile.
QUICK = {**QUICK_TYPES, BASES: "std::index_sequence<2>"}


def copy_changed(folder: Path, changes: dict[str, str], *backends: str) -> None:
    """Copy csrc's headers and ``backends`` to ``folder``, which is made, with every key of ``changes`` its value.

    Each key must occur once in all of them together.
    """
    folder.mkdir()
    texts = {path.name: path.read_text() for path in [*CSRC.glob("*.h"), *(CSRC / name for name in backends)]}
    for old, new in changes.items():
        found = [name for name, text in texts.items() for _ in range(text.count(old))]
        assert len(found) == 1, f"csrc: expected {old!r} once, found it in {found}"
        texts[found[0]] = texts[found[0]].replace(old, new)
    for name, text in texts.items():
        (folder / name).write_text(text)
