"""The host's half of the CUDA backend, without a GPU: what it launches, what an error ends, whose memory is read.

The object that nvcc built is linked with a CUDA runtime that records (host/). Its launches are compared with those of
the emulation, whose kernels and results are test_emulation.py's.
"""

from __future__ import annotations

import os
import re
import subprocess
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.cuda.emulation.build import SMALL, kernels
from tests.cuda.host.build import emulated_half, link, missing, nvcc_half
from tests.helpers.entries import entries
from tests.helpers.place import on_the_cpu
from tests.helpers.sources import QUICK

pytestmark = [on_the_cpu, pytest.mark.slow]
MISSING = missing()
needs_nvcc = pytest.mark.skipif(bool(MISSING), reason=f"needs {MISSING}")

LENGTHS = ("1", "62", "73", "600", "1300")  # of the lists
DRIVERS = {"new": {}, "before CUDA 12.1": {"EMULATION_OLD_DRIVER": "12000"}, "unknown": {"EMULATION_OLD_DRIVER": "0"}}
INJECTED = "error 701"  # cudaErrorLaunchOutOfResources, in the words of runtime.cpp

#: A bug for each thing that is compared. They are built together, into one object.
HOST_BUGS = {
    "kThreads = 256;": "kThreads = 128;",
    "version >= 12010;": "version >= 12000;",
    "pointers, 0, static_cast<cudaStream_t>(stream)": "pointers, 0, nullptr",
    "throw std::runtime_error(": "(void)std::runtime_error(",
    "e.pointers[1] = row.backup;": "e.pointers[1] = row.param;",
}

#: Changes to csrc, and what the address sanitizer reports of the emulation.
MEMORY_BUGS = {
    "a kernel reads the caller's array": (
        {
            "(Rhos) rhos, const double* sq_norms": "(Rhos) rhos, const Ascent* groups, const double* sq_norms",
            "queue.stream, rhos, ": "queue.stream, rhos, groups + g, ",
            "rhos.at[g]);": "groups[g].rho);",
        },
        r"heap-use-after-free .*\nREAD .*\n +#0 .* in sharpness_kernel ",
    ),
    "an argument dies before its kernel runs": (
        {
            "SAM_CONSTANT(Rhos) rhos": "const Rhos* all",
            "queue.stream, rhos, ": "queue.stream, &rhos, ",
            "  Sharpness sharpness;\n  if": "  const Rhos& rhos = *all;\n  Sharpness sharpness;\n  if",
        },
        r"SEGV on unknown address .*\n.* READ .*\n +#0 .* in sharpness_kernel ",
    ),
    "the host reads the device's memory": (
        {"  Preparation<Base> all;\n": "  if (found_inf && *found_inf != 0) return;\n  Preparation<Base> all;\n"},
        r"use-after-poison .*\nREAD .*\n +#0 .* in prepare",
    ),
}


class Call(NamedTuple):
    """A line that launches.cpp prints, a launch or another event such as "allocate 464" or "raised ..."."""

    what: str
    grid: str = ""
    block: str = ""
    shared: str = ""
    stream: str = ""
    arguments: tuple[str, ...] = ()  # up to 8 bytes in hexadecimal, others as "4040 bytes" and their hash

    def sizes(self) -> list[int]:
        return [int(a.split()[0]) if "bytes" in a else len(a) // 2 for a in self.arguments]


Calls = list[Call]


class Program:
    def __init__(self, folder: Path, objects: list[Path], changes: dict[str, str]):
        built, self.kernels = nvcc_half(folder, changes)
        self.path = folder / "launches"
        self.functions = link(self.path, built, *objects)

    def run(self, mode: str, *lengths: str, driver: str = "new") -> dict[str, dict[str, Calls]]:
        """The calls of each case, by whose they are."""
        command = [self.path, self.kernels, mode, *lengths]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **DRIVERS[driver]})
        assert done.returncode == 0, f"{done.returncode}: {done.stdout[-2000:]}{done.stderr}"
        demangled = subprocess.run(["c++filt"], input=done.stdout, capture_output=True, text=True, check=True).stdout
        cases: dict[str, dict[str, Calls]] = {}
        for line in demangled.splitlines():
            case, side, what, *rest = line.split("\t")
            call = Call(self.functions.get(what, what), *rest[:4], arguments=tuple(rest[4:]))
            cases.setdefault(case, {}).setdefault(side, []).append(call)
        return cases


@pytest.fixture(scope="module")
def emulated(tmp_path_factory) -> list[Path]:
    return emulated_half(tmp_path_factory.mktemp("emulated"))


@pytest.fixture(scope="module")
def program(tmp_path_factory, emulated) -> Program:
    return Program(tmp_path_factory.mktemp("sound") / "csrc", emulated, {})


@pytest.fixture(scope="module")
def wrong(tmp_path_factory, emulated) -> Program:
    return Program(tmp_path_factory.mktemp("wrong") / "csrc", emulated, {**QUICK, **HOST_BUGS})


def launches(calls: Calls) -> Calls:
    return [call for call in calls if call.grid]


@needs_nvcc
@pytest.mark.parametrize("driver", DRIVERS)
def test_launches(driver, program):
    """The same kernels, grids, blocks, streams and bytes of arguments as the emulation's, for every operation."""
    cases = program.run("same", *LENGTHS, driver=driver)
    assert len(cases) > len(LENGTHS) * 2 * 6
    for case, sides in cases.items():
        assert launches(sides["nvcc"]), case
        assert sides["nvcc"] == sides["emulated"], case
        for call in launches(sides["nvcc"]):
            assert call.stream == "the stream", case
    # An old driver refuses more than 4,096 bytes of arguments, as runtime.cpp does.
    large = {case for case, sides in cases.items() for c in launches(sides["nvcc"]) if max(c.sizes()) > 4096}
    assert bool(large) == (driver == "new")


@needs_nvcc
@pytest.mark.parametrize("driver", DRIVERS)
def test_a_launch_that_fails(driver, program):
    """It raises the kernel's name and what the runtime says, nothing follows, and no error is left for others."""
    for case, sides in program.run("fail", "73", driver=driver).items():
        n = len(launches(sides["emulated"]))
        for k in range(n):
            *before, raised = sides[f"fails at {k}"]
            assert len(launches(before)) == k + 1, case
            assert before == sides["emulated"][: len(before)], case
            kernel = re.search(r"::(\w+)[<(]", before[-1].what)[1]
            assert re.match(rf"raised .*\b{kernel}\b.*{INJECTED}", raised.what), case
        assert sides["pending"] == [Call("0")] * n, case
        assert sides["nvcc"] == sides["emulated"], case  # called once more


@needs_nvcc
def test_an_error_from_before(program):
    """Another's error is not taken for the launch's own."""
    for case, sides in program.run("earlier", "73").items():
        assert sides["nvcc"] == sides["emulated"], case


@needs_nvcc
def test_planted_bugs_of_the_host_are_found(wrong):
    def differing(case: str, driver: str = "new") -> set[str]:
        sides = wrong.run("same", "73", "600", driver=driver)[case]
        pairs = zip_longest(launches(sides["nvcc"]), launches(sides["emulated"]), fillvalue=Call("none"))
        return {field for a, b in pairs for field in Call._fields if getattr(a, field) != getattr(b, field)}

    assert differing("73 small: perturb") == {"block", "stream"}
    assert differing("73 small: restore") == {"block", "stream", "arguments"}
    assert differing("600 small: perturb", "before CUDA 12.1") >= {"what", "arguments"}
    assert all(
        len(launches(sides["fails at 0"])) == len(launches(sides["emulated"])) and "raised" not in str(sides)
        for case, sides in wrong.run("fail", "73").items()
        if re.fullmatch("73 small: (grad_sq_norm|perturb|restore_step adam)", case)
    )


@pytest.mark.parametrize("name", MEMORY_BUGS)
def test_planted_bugs_of_memory_are_found(name, tmp_path):
    changes, report = MEMORY_BUGS[name]
    program = kernels(tmp_path / "csrc", "address", {**SMALL, **QUICK, **changes})
    environment = {**os.environ, "SAM_BASES": entries(), "ASAN_OPTIONS": "detect_stack_use_after_return=0"}
    done = subprocess.run([program, "quick"], capture_output=True, text=True, env=environment)
    assert done.returncode != 0
    assert re.search(report, done.stderr), done.stdout + done.stderr
