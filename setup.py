"""Builds sam_fused._C against the torch that is installed: pip install --no-build-isolation -e ."""

from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).parent

CXX_FLAGS = [
    "-std=c++20",
    "-O3",
    # at::parallel_for is serial without it. Not a link flag: the symbols must resolve to the OpenMP runtime that torch
    # carries, or torch.set_num_threads would steer another one.
    "-fopenmp",
    "-fno-math-errno",  # lets sqrt vectorise
    "-fno-trapping-math",  # lets selects vectorise
    "-ffp-contract=off",  # the same bits on every instruction set
    "-fvisibility=hidden",
    "-Wall",
    "-Wno-psabi",
]

setup(
    ext_modules=[
        CppExtension(
            "sam_fused._C",
            ["csrc/ops.cpp", "csrc/cpu.cpp", "csrc/module.cpp"],
            depends=[str(p.relative_to(ROOT)) for p in sorted((ROOT / "csrc").glob("*.h"))],
            extra_compile_args={"cxx": CXX_FLAGS},
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
