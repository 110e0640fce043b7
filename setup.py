"""Builds sam_fused._C against the torch that is installed: pip install --no-build-isolation -e .

CUDA kernels are built when an nvcc of torch's CUDA version is found. SAM_FUSED_CUDA=1 makes it an error when none is;
SAM_FUSED_CUDA=0 builds without. CUDA_HOME names the toolkit, TORCH_CUDA_ARCH_LIST the GPUs.
"""

from __future__ import annotations

import atexit
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from setuptools import setup

ROOT = Path(__file__).parent

CXX_FLAGS = [
    "-std=c++20",
    "-O3",
    "-fno-math-errno",  # lets sqrt vectorise
    "-fno-trapping-math",  # lets selects vectorise
    "-ffp-contract=off",  # the same bits on every instruction set
    "-fvisibility=hidden",
    "-g0",  # Python has -g in its own flags, which would make the module six times as large
    "-Wall",
    "-Wno-psabi",
]
if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10) and sys.platform != "darwin":
    # csrc/parallel.h needs it. Not a link flag: the symbols must resolve to the OpenMP runtime that torch carries, or
    # torch.set_num_threads would steer another one.
    CXX_FLAGS.append("-fopenmp")
NVCC_FLAGS = [
    "-std=c++20",
    "-O3",
    "-fmad=false",  # the CPU's bits
    "-lineinfo",  # profilers and sanitizers name lines
    "--threads=0",
    "-Xfatbin=-compress-all",
    "-Xcompiler=-fvisibility=hidden,-Wall",
]


def run(*command: str | Path) -> tuple[bool, str]:
    """Whether a program succeeds, and what it prints."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except OSError:
        return False, ""
    return done.returncode == 0, done.stdout


def candidates() -> list[Path]:
    """Where a CUDA toolkit may be, the most explicit first."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if named:
        return [Path(named)]
    found = []
    if nvcc := shutil.which("nvcc"):  # which may be a script: it knows where it leads
        _, shown = run(nvcc, "--dryrun", "-x", "cu", os.devnull)
        found += [Path(top.strip()) for top in re.findall(r"^#\$ TOP=(.*)$", shown, re.MULTILINE)]
    beside_torch = Path(torch.__file__).parents[1] / "nvidia"  # from pip
    return [*found, *sorted(beside_torch.glob("cu[0-9]*")), Path("/usr/local/cuda")]


def find_cuda() -> tuple[Path, tuple[int, int]]:
    """The toolkit to build with, and its version. Raises LookupError with the reason if there is none."""
    if torch.version.cuda is None:
        raise LookupError("this torch is built without CUDA")
    major = int(torch.version.cuda.split(".")[0])
    if major < 12:
        raise LookupError(f"this torch is built with CUDA {torch.version.cuda}, and the kernels need 12.1 or later")
    seen = []
    for home in candidates():
        nvcc = home / "bin" / "nvcc"
        if not (nvcc.exists() and (home / "include" / "cuda_runtime_api.h").exists()):
            continue
        _, shown = run(nvcc, "--version")
        release = re.search(r"release (\d+)\.(\d+)", shown)
        version = (int(release[1]), int(release[2])) if release else (0, 0)
        if version[0] == major and version >= (12, 1):
            host = ["-ccbin", os.environ["CC"]] if "CC" in os.environ else []  # as torch does
            with tempfile.TemporaryDirectory() as folder:  # it may not accept the C++ compiler
                to = Path(folder) / "nothing.o"
                works, shown = run(nvcc, *host, "-x", "cu", "-c", os.devnull, "-o", to)
            if works:
                return home.resolve(), version
            seen.append(f"{nvcc} compiles nothing: {shown.strip()}")
            continue
        seen.append(f"{nvcc} is of CUDA {release[1]}.{release[2]}" if release else f"{nvcc} does not run")
    raise LookupError(f"no nvcc of CUDA {major} is found, torch's version" + "".join(f"; {s}" for s in seen))


#: Compute capabilities times ten. GPUs in between run the machine code of the one before.
ARCHS = [70, 75, 80, 90, 100, 110, 120]


def architectures(home: Path) -> str:
    """For TORCH_CUDA_ARCH_LIST: those of torch's GPUs, as far as nvcc knows them, and PTX for later ones."""
    _, codes = run(home / "bin" / "nvcc", "--list-gpu-code")
    known = set(map(int, re.findall(r"sm_(\d+)", codes)))
    flags = torch._C._cuda_getArchFlags() or ""  # torch.cuda.get_arch_list() is empty where there is no GPU
    wanted = set()
    for gpu in map(int, re.findall(r"sm_(\d+)", flags)):
        wanted |= set([arch for arch in ARCHS if arch in known and arch <= gpu and arch // 10 == gpu // 10][-1:])
    if not wanted:
        raise LookupError(
            f"the kernels need compute capability 7.0; torch is built for {flags}, nvcc for {codes.split()}"
        )
    return ";".join(f"{arch // 10}.{arch % 10}" for arch in sorted(wanted)) + "+PTX"


def cuda_extension(home: Path, version: tuple[int, int]):
    os.environ["CUDA_HOME"] = str(home)
    if "TORCH_CUDA_ARCH_LIST" not in os.environ:
        os.environ["TORCH_CUDA_ARCH_LIST"] = architectures(home)
    print(f"sam_fused: CUDA kernels for {os.environ['TORCH_CUDA_ARCH_LIST']}, by {home}", file=sys.stderr)
    from torch.utils.cpp_extension import CUDAExtension  # reads CUDA_HOME

    extension = CUDAExtension(
        "sam_fused._C",
        [*SOURCES, "csrc/cuda.cu"],
        define_macros=[("SAM_CUDA", "1")],
        depends=DEPENDS,
        extra_compile_args={"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS},
    )
    extension.libraries.remove("torch_cuda")
    libraries = [home / "lib64", home / "lib"]
    if not any((folder / "libcudart.so").exists() for folder in libraries):  # pip's packages have no link to link with
        folders = [*libraries, *sorted((Path(torch.__file__).parents[1] / "nvidia").glob("*/lib"))]
        runtime = [file for folder in folders for file in sorted(folder.glob(f"libcudart.so.{version[0]}*"))]
        if not runtime:
            raise LookupError(f"no libcudart.so.{version[0]} in {', '.join(map(str, folders))}")
        links = Path(tempfile.mkdtemp(prefix="sam_fused-"))
        atexit.register(shutil.rmtree, links)
        (links / "libcudart.so").symlink_to(runtime[0])
        extension.library_dirs.append(str(links))
    return extension


def extension():
    wanted = os.environ.get("SAM_FUSED_CUDA", "")
    if wanted not in ("", "0", "1"):
        sys.exit(f"SAM_FUSED_CUDA: expected 0 or 1, got {wanted!r}")
    if wanted != "0":
        try:
            return cuda_extension(*find_cuda())
        except LookupError as reason:
            if wanted == "1":
                sys.exit(f"SAM_FUSED_CUDA=1, but {reason}")
            print(f"sam_fused: building without CUDA kernels: {reason}", file=sys.stderr)
    from torch.utils.cpp_extension import CppExtension

    return CppExtension("sam_fused._C", SOURCES, depends=DEPENDS, extra_compile_args={"cxx": CXX_FLAGS})


SOURCES = ["csrc/rows.cpp", "csrc/ops.cpp", "csrc/cpu.cpp", "csrc/module.cpp"]
DEPENDS = [f"csrc/{p.name}" for p in sorted((ROOT / "csrc").iterdir()) if f"csrc/{p.name}" not in SOURCES]


def build_ext():
    from torch.utils.cpp_extension import BuildExtension

    return BuildExtension


setup(ext_modules=[extension()], cmdclass={"build_ext": build_ext()})
