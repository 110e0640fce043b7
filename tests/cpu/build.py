"""Compiles the CPU backend by itself, without torch."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

from tests.helpers.paths import ROOT
from tests.helpers.sources import copy_changed

HERE = Path(__file__).parent
HARNESS = ROOT / "tests" / "cuda" / "emulation" / "test_kernels.cpp"
#: Those of setup.py.
FLAGS = ast.literal_eval(re.search(r"^CXX_FLAGS = (\[.*?^\])", (ROOT / "setup.py").read_text(), re.M | re.S)[1])

#: Chunks of two blocks, and threads for short lists.
SMALL = {"kChunk = 1 << 14;": "kChunk = 1 << 10;", "kGrain = 1 << 17;": "kGrain = 1 << 8;"}
#: The same, and every list is stored past the cache.
STREAMED = {**SMALL, "kPastCacheFrom = 1 << 23;": "kPastCacheFrom = 0;"}


def kernels(folder: Path, compiler: str, flags: list[str], changes: dict[str, str]) -> tuple[Path, str]:
    """tests/cuda/emulation/test_kernels.cpp with csrc/cpu.cpp, changed as :func:`copy_changed` does.

    Returns the program and what the compiler said.
    """
    copy_changed(folder, changes, "cpu.cpp")
    (folder / "parallel.h").write_text((HERE / "parallel.h").read_text())  # threads without torch
    harness, backend = HARNESS.read_text(), '"../../../csrc/cuda.cu"'
    assert harness.count(backend) == 1
    (folder / "test_kernels.cpp").write_text(harness.replace(backend, '"backend.h"'))
    program = folder / "test_kernels"
    includes = [f"-I{folder}", f"-I{HERE}"]
    command = [compiler, *FLAGS, *flags, *includes, str(folder / "test_kernels.cpp"), "-pthread", "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return program, done.stderr
