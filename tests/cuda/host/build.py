"""The host's half of csrc/cuda.cu as nvcc builds it, linked with a CUDA runtime that only records (runtime.cpp)."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
from pathlib import Path

from tests.helpers.paths import CSRC, ROOT
from tests.helpers.sources import copy_changed

HERE = Path(__file__).parent
EMULATION = HERE.parent / "emulation"
NVCC = shutil.which("nvcc", path=os.pathsep.join([os.environ["PATH"], "/usr/local/cuda/bin"]))
#: What nothing writes to, padding and the rest of an array, is the same in whatever has the same arguments.
FILLED = "-ftrivial-auto-var-init=pattern"
#: Those of setup.py; the machine code of the device is not needed.
NVCC_FLAGS = [
    *ast.literal_eval(re.search(r"^NVCC_FLAGS = (\[.*?^\])", (ROOT / "setup.py").read_text(), re.M | re.S)[1]),
    f"-Xcompiler={FILLED}",
    "-gencode=arch=compute_90,code=compute_90",
]
CXX_FLAGS = ["-std=c++20", "-O0", FILLED, "-fno-strict-aliasing", "-Wall", "-Wno-unknown-pragmas"]

ALIGNMENTS = {"8": 1, "16": 2, "32": 4, "64": 8}  # of PTX's types by their bits


def _run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def missing() -> str:
    """What is needed here and is not there, or nothing."""
    if NVCC is None:
        return "nvcc"
    known = subprocess.run(["g++", FILLED, "-fsyntax-only", "-x", "c++", os.devnull], capture_output=True)
    return "" if known.returncode == 0 else f"a g++ that knows {FILLED}"


def parameters(ptx: str) -> str:
    """What the device's half expects, a line a kernel: name, threads a block at most, alignment and bytes of each."""
    lines = []
    for name, body, bounds in re.findall(r"\.entry (\w+)\(([^)]*)\)([^{]*)", ptx):
        threads = re.search(r"\.maxntid (\d+)", bounds)
        line = [name, threads[1] if threads else "1024"]
        for alignment, bits, count in re.findall(r"\.param (?:\.align (\d+) )?\.[a-z](\d+) \w+(?:\[(\d+)\])?", body):
            size = ALIGNMENTS[bits]
            line += [alignment or str(size), str(size * int(count or 1))]
        lines.append(" ".join(line))
    return "\n".join(lines)


def nvcc_half(folder: Path, changes: dict[str, str]) -> tuple[Path, Path]:
    """csrc/cuda.cu, changed as :func:`copy_changed` does, built by nvcc in ``folder``, which is made.

    Returns the object, and the file of :func:`parameters`.
    """
    copy_changed(folder, changes, "cuda.cu")
    built = folder / "cuda.o"
    _run(NVCC, *NVCC_FLAGS, "--keep", f"--keep-dir={folder}", "-c", folder / "cuda.cu", "-o", built)
    [ptx] = folder.glob("*.ptx")
    kernels = folder / "kernels.txt"
    kernels.write_text(parameters(ptx.read_text()))
    return built, kernels


def emulated_half(folder: Path) -> list[Path]:
    """launches.cpp with the emulation of csrc/cuda.cu as it is, and runtime.cpp: their objects, in ``folder``."""
    objects = [folder / "launches.o", folder / "runtime.o"]
    _run("g++", *CXX_FLAGS, f"-I{EMULATION}", f"-I{CSRC}", "-c", HERE / "launches.cpp", "-o", objects[0])
    _run(NVCC, "-std=c++20", "-c", HERE / "runtime.cpp", "-o", objects[1])  # which knows where the headers are
    return objects


def link(program: Path, *objects: Path) -> dict[str, str]:
    """Builds ``program``. Returns the functions in it by their addresses, as printf's %p writes them.

    Under the names that kernels have for nvcc: SAM_CONSTANT is a reference in the emulation alone.
    """
    _run("g++", "-no-pie", *objects, "-o", program)
    symbols = re.findall(r"^0*([0-9a-f]+) [tTW] (.+)$", _run("nm", "-C", program), re.M)
    return {f"0x{address}": name.replace(" const&", "") for address, name in symbols}
