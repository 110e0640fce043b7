"""The CPU backend by itself (tests/cpu): its results, its machine code, its memory and its threads.

It is compiled by each compiler that there is, and for another machine where one can be emulated.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.cpu.build import FLAGS, SMALL, STREAMED, kernels
from tests.helpers.entries import entries
from tests.helpers.paths import CSRC
from tests.helpers.place import on_the_cpu
from tests.helpers.sources import FOUR_BASES, QUICK, QUICK_TYPES

pytestmark = [on_the_cpu, pytest.mark.slow]
ISAS = ["default", "avx2", "avx512"]
CANNOT = 77  # what the program ends with where the machine lacks the instruction set
COMPILERS = ["g++", "clang++"]
ARM = ("aarch64-linux-gnu-g++", "qemu-aarch64")
PORTABLE = {"#if defined(__x86_64__)": "#if 0"}  # one instruction set is enough to see a planted bug
CHECKS = ["-O1", "-g1", "-fno-sanitize-recover=all"]
ADDRESS = [*CHECKS, "-fsanitize=address,undefined,float-cast-overflow"]
THREAD = [*CHECKS, "-fsanitize=thread"]

#: name: (compiler, flags beside those of setup.py, changes to csrc)
SOUND = {
    "g++": ("g++", [], SMALL),
    "clang++": ("clang++", [], STREAMED),
    "address, undefined": ("g++", ADDRESS, {**STREAMED, **FOUR_BASES}),
    "thread": ("g++", THREAD, {**STREAMED, **FOUR_BASES, **QUICK_TYPES}),
    "aarch64": (ARM[0], ["-static"], SMALL),
}
#: name: (flags, changes to csrc beside QUICK and PORTABLE, what must be reported)
BUGS = {
    "a wrong number": (
        ["-O1"],
        {"copy(w + b, fresh,": "copy(w, fresh,"},
        r"adam: row \d",
    ),
    "a read past the end": (
        ADDRESS,
        {"i < n; ++i) ascend.perturb(to[i], to": "i <= n; ++i) ascend.perturb(to[i], to"},
        r"heap-buffer-overflow.*\n.*READ of size",
    ),
    "a shift by too many bits": (
        ADDRESS,
        {"bytes >= kPastCacheFrom": "bytes >> (64 + n) >= kPastCacheFrom"},
        r"shift exponent \d+ is too large",
    ),
    "a count that all threads share": (
        THREAD,
        {"if (past_cache) order_stores();": "static int calls = 0;\n    if (past_cache) ++calls;"},
        r"ThreadSanitizer: data race",
    ),
}  # fmt: skip


def missing(name: str) -> str | None:
    """The first tool that is needed for a program of SOUND and is not there."""
    tools = ARM if name == "aarch64" else SOUND[name][:1]
    return next((tool for tool in tools if not shutil.which(tool)), None)


def run(program: Future[tuple[Path, str]], *arguments: str, isa: str = "default", emulator: tuple[str, ...] = ()):
    command = [*emulator, program.result()[0], *arguments]
    environment = {**os.environ, "SAM_ISA": isa, "SAM_BASES": entries()}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def programs(tmp_path_factory) -> Iterator[dict[str, Future[tuple[Path, str]]]]:
    """All that the tests run, built at once: it takes as many processors as there are."""
    folder = tmp_path_factory.mktemp("kernels")
    pool = ThreadPoolExecutor(os.cpu_count())
    wanted = {name: what for name, what in SOUND.items() if not missing(name)}
    wanted |= {name: ("g++", flags, {**STREAMED, **PORTABLE, **QUICK, **bug}) for name, (flags, bug, _) in BUGS.items()}
    yield {name: pool.submit(kernels, folder / str(i), *what) for i, (name, what) in enumerate(wanted.items())}
    pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("name", SOUND)
def test_kernels(name, programs):
    """Within the error that each base is allowed, and clean, by every instruction set."""
    if tool := missing(name):
        pytest.skip(f"needs {tool}")
    emulator, isas = (ARM[1:], ISAS[:1]) if name == "aarch64" else ((), expected_isas())
    quick = ["quick"] if name == "thread" else []
    outputs = []
    for isa in ISAS:
        done = run(programs[name], *quick, isa=isa, emulator=emulator)
        if done.returncode == CANNOT and isa not in isas:
            continue
        assert done.returncode == 0, f"{isa}: {done.stdout}{done.stderr}"
        assert done.stderr == ""
        outputs.append(done.stdout)
    assert outputs[0].count("largest error") == (0 if quick else 4)
    assert len(set(outputs)) == 1
    assert not re.search(r"unknown|ignored|not vectorized", programs[name].result()[1])


def expected_isas() -> list[str]:
    """Those of this machine."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(re.findall(r"\w+", cpuinfo.read_text())) if cpuinfo.exists() else set()
    needs = {"default": set(), "avx2": {"avx2"}, "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"}}
    return [isa for isa in ISAS if needs[isa] <= flags]


@pytest.mark.parametrize("name", BUGS)
def test_planted_bugs_are_found(name, programs):
    done = run(programs[name], "quick")
    assert done.returncode not in (0, CANNOT)
    assert re.search(BUGS[name][-1], done.stdout + done.stderr)


@pytest.mark.skipif(sysconfig.get_platform() != "linux-x86_64", reason="about x86-64")
@pytest.mark.skipif(not shutil.which("objdump"), reason="needs objdump")
@pytest.mark.parametrize("name", COMPILERS)
def test_each_instruction_set_has_its_registers(name, programs):
    """The square roots of Adam's update, which are vectors if all of it is: in the width of each function's set."""
    if tool := missing(name):
        pytest.skip(f"needs {tool}")
    text = subprocess.run(["objdump", "-d", programs[name].result()[0]], capture_output=True, text=True, check=True)
    roots: dict[str, set[str]] = {"run_avx2": set(), "run_avx512": set()}
    for function in text.stdout.split("\n\n"):
        if found := re.match(r"[0-9a-f]+ <_ZN3sam\S*?\d(run_avx2|run_avx512)I", function):
            roots[found[1]] |= set(re.findall(r"vsqrtp[sd] .*?%([xyz]mm)", function))
    assert "ymm" in roots["run_avx2"]
    assert "zmm" not in roots["run_avx2"]
    assert "zmm" in roots["run_avx512"]


@pytest.mark.skipif(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10), reason="needs torch 2.10")
@pytest.mark.parametrize("compiler", COMPILERS)
def test_no_openmp_runtime_is_called(compiler, tmp_path):
    """Threads are libtorch's, so that the module needs no runtime that another compiler's code brings along."""
    if not shutil.which(compiler):
        pytest.skip(f"needs {compiler}")
    include = Path(torch.__file__).parent / "include"
    includes = [f"-I{include}", f"-I{include}/torch/csrc/api/include"]
    made = tmp_path / "cpu.o"
    command = [compiler, *FLAGS, "-O0", "-fPIC", *includes, "-c", str(CSRC / "cpu.cpp"), "-o", str(made)]
    subprocess.run(command, check=True, capture_output=True)
    names = made.read_bytes()
    assert b"torch_parallel_for" in names
    assert not re.search(rb"__kmpc_|GOMP_|omp_get", names)
