"""Compiles the CPU backend by itself, without torch."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

from tests.helpers.paths import CSRC, ROOT

HERE = Path(__file__).parent
HARNESS = ROOT / "tests" / "cuda" / "emulation" / "test_kernels.cpp"
#: Those of setup.py.
FLAGS = ast.literal_eval(re.search(r"^CXX_FLAGS = (\[.*?^\])", (ROOT / "setup.py").read_text(), re.M | re.S)[1])

#: Chunks of two blocks, and threads for short lists.
SMALL = {"kChunk = 1 << 14;": "kChunk = 1 << 10;", "kGrain = 1 << 17;": "kGrain = 1 << 8;"}
#: The same, and every list is stored past the cache.
STREAMED = {**SMALL, "kPastCacheFrom = 1 << 23;": "kPastCacheFrom = 0;"}


def kernels(folder: Path, compiler: str, flags: list[str], changes: dict[str, str]) -> tuple[Path, str]:
    """tests/cuda/emulation/test_kernels.cpp with a csrc/cpu.cpp in which every key of ``changes`` is its value.

    Each key must occur once. Returns the program and what the compiler said.
    """
    folder.mkdir()
    source = (CSRC / "cpu.cpp").read_text()
    for old, new in changes.items():
        assert source.count(old) == 1, f"csrc/cpu.cpp: expected {old!r} once, found it {source.count(old)} times"
        source = source.replace(old, new)
    (folder / "cpu.cpp").write_text(source)  # here, so that it includes the parallel.h of this folder
    harness, backend = HARNESS.read_text(), '"../../../csrc/cuda.cu"'
    assert harness.count(backend) == 1
    (folder / "test_kernels.cpp").write_text(harness.replace(backend, '"backend.h"'))
    program = folder / "test_kernels"
    includes = [f"-I{path}" for path in (folder, HERE, CSRC)]
    command = [compiler, *FLAGS, *flags, *includes, str(folder / "test_kernels.cpp"), "-pthread", "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return program, done.stderr
