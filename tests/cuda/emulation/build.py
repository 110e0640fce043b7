"""Compiles the CUDA backend for the CPU, with the host's C++ compiler alone."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import ModuleType

from tests.helpers.paths import CSRC, ROOT
from tests.helpers.sources import copy_changed

HERE = Path(__file__).parent
FLAGS = ["-std=c++20", "-O1", "-ffp-contract=off", "-fno-strict-aliasing", "-Wall", "-Wno-unknown-pragmas"]

#: Fewer threads, and chunks to match: what sanitizers have the time for.
SMALL = {
    "kThreads = 256;": "kThreads = 64;",
    "kSumThreads = 1024;": "kSumThreads = 64;",
    "kChunk = 1 << 13;": "kChunk = 1 << 9;",
}


def extension() -> ModuleType:
    """sam_fused._C with the emulated backend in the place of the CPU's."""
    from torch.utils.cpp_extension import load

    folder = ROOT / "build" / "emulation"
    folder.mkdir(parents=True, exist_ok=True)
    return load(
        "_C",
        [str(p) for p in (CSRC / "rows.cpp", CSRC / "ops.cpp", CSRC / "module.cpp", HERE / "backend.cpp")],
        extra_cflags=FLAGS,
        extra_include_paths=[str(CSRC), str(HERE)],
        build_directory=str(folder),
    )


def sources(folder: Path, changes: dict[str, str]) -> list[str]:
    """test_kernels.cpp with backend.h and csrc/cuda.cu, changed as :func:`copy_changed` does, in ``folder``.

    Returns g++'s command without an output.
    """
    copy_changed(folder, changes, "cuda.cu")
    test = (HERE / "test_kernels.cpp").read_text()
    (folder / "test_kernels.cpp").write_text(test.replace('"../../../csrc/cuda.cu"', '"backend.h"'))
    return ["g++", *FLAGS, f"-I{folder}", f"-I{HERE}", str(folder / "test_kernels.cpp")]


def kernels(folder: Path, sanitizers: str, changes: dict[str, str]) -> Path:
    """The program of :func:`sources`. ``sanitizers`` are those of -fsanitize=, or none."""
    program = folder / "test_kernels"
    checks = [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"] if sanitizers else []
    subprocess.run([*sources(folder, changes), "-g1", *checks, "-o", str(program)], check=True)
    return program
