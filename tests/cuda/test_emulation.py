"""The CUDA backend's own source, run on the CPU (emulation/): its results, its races, and that they are found."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.cuda.emulation.build import SMALL, kernels, sources
from tests.helpers.entries import entries
from tests.helpers.paths import ROOT
from tests.helpers.place import DEVICE_TESTS, on_the_cpu
from tests.helpers.sources import FOUR_BASES, QUICK, QUICK_TYPES

pytestmark = [on_the_cpu, pytest.mark.slow]
TENSORS = [1, 62, 63, 64, 72, 73, 180, 181, 219, 499, 500, 571, 1000, 1300, 2000]  # in a list, to count launches
OLD = {"EMULATION_OLD_DRIVER": "1"}
DTYPE = torch.float64  # whose weights have no room for a wrong norm
ORDERS = ("0", "1", "5")  # of threads and blocks: as numbered, from the end, random

BLOCKS = "kBlocks = 1 << 12;"  # fewer, so that there are larger chunks

#: name: (sanitizers, changes to csrc)
SOUND = {
    "plain": ("", {}),
    "address, undefined": ("address,undefined", {**SMALL, **FOUR_BASES, BLOCKS: "kBlocks = 1 << 4;"}),
    "thread": ("thread", {**SMALL, **FOUR_BASES, **QUICK_TYPES, BLOCKS: "kBlocks = 1 << 1;"}),
}
#: name: (sanitizers, changes to csrc beside QUICK, what must be reported)
BUGS = {
    "a missing barrier": (
        "",
        {"  if (lane == 0) sums[warp] = x;\n  __syncthreads();\n": "  if (lane == 0) sums[warp] = x;\n"},
        r"grad_sq_norm: row 0",
    ),
    "a read past the end": (
        "address",
        {**SMALL, "if (thread < n - body)": "if (thread <= n - body)"},
        r"heap-buffer-overflow.*\n.*READ of size",
    ),
    "a misaligned vector": (
        "alignment",
        {**SMALL, "address % sizeof(V) == 0)\n    *reinterpret_cast": "true)\n    *reinterpret_cast"},
        r"misaligned address",
    ),
    "shared memory used again without a barrier": (
        "thread",
        {**SMALL, "  const double total = block_sum(sum, sums);\n  if (threadIdx.x == 0) partial": (
            "  const double total = block_sum(sum, sums) + block_sum(-sum, sums);\n  if (threadIdx.x == 0) partial"
        )},
        r"ThreadSanitizer: data race",
    ),
    "squares lost to underflow": ("", {"sum >= A(0x1p-100) && ": ""}, r"norm of extreme numbers"),
    "squares that overflow": ("", {" && std::isfinite(sum)": ""}, r"norm of extreme numbers"),
    "a sum over blocks that is not atomic": (
        "thread",
        {**SMALL, "+ blockIdx.x - share.entry.first_block] = total;": "] += total;"},
        r"ThreadSanitizer: data race",
    ),
}  # fmt: skip


def run(program: Future[Path], order: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    options = {
        "EMULATION_ORDER": order,
        "ASAN_OPTIONS": "detect_stack_use_after_return=0",
        "TSAN_OPTIONS": "halt_on_error=1",
    }
    command = [program.result(), *arguments]
    environment = {**os.environ, **options, "SAM_BASES": entries(), **environment}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def pytest_run(
    files: list[str], chosen: str = "not ReferenceSAM and not ReferenceMSAM", **environment: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", chosen]
    environment = {**os.environ, "SAM_FUSED_TEST_DEVICE": "emulated", "OMP_NUM_THREADS": "1", **environment}
    paths = [str(ROOT / "tests" / file) for file in files]
    return subprocess.run([*command, *paths], cwd=ROOT, capture_output=True, text=True, env=environment)


def emulated_steps(path: Path) -> Path:
    """Those that gpu_check compares with the CPU's."""
    program = (
        "import sys, tests.conftest, torch\n"
        "from tests.cuda.gpu.checks import BASES, CPU, lists, parameters, take_steps\n"
        f"steps = [take_steps(parameters(CPU, lists()['many'], {DTYPE}), base, **options) for base, options in BASES]\n"
        "torch.save([tuple(s) for s in steps], sys.argv[1])\n"
    )
    environment = {**os.environ, "SAM_FUSED_TEST_DEVICE": "emulated", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", program, str(path)], cwd=ROOT, env=environment, check=True)
    return path


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Iterator[dict[str, list[Future[subprocess.CompletedProcess[str]]]]]:
    """What every test looks at, all begun at once: it takes as many processors as there are.

    Programs are built before the first is run, so that no worker waits for one that none is building.
    """
    folder = tmp_path_factory.mktemp("kernels")
    pool = ThreadPoolExecutor(os.cpu_count())
    halves = DEVICE_TESTS[:2], DEVICE_TESTS[2:]  # about half the time each
    started = {"Python": [pool.submit(pytest_run, half) for half in halves]}
    variants = {**SOUND, **{name: (sanitizers, {**QUICK, **bug}) for name, (sanitizers, bug, _) in BUGS.items()}}
    programs = {
        name: pool.submit(kernels, folder / str(i), *variant) for i, (name, variant) in enumerate(variants.items())
    }
    for name, (sanitizers, _) in variants.items():
        quick = ["quick"] if sanitizers == "thread" or name in BUGS else []
        orders = ORDERS if name in SOUND else ORDERS[:1]
        started[name] = [pool.submit(run, programs[name], order, *quick) for order in orders]
    started["gpu_check"] = [pool.submit(emulated_steps, folder / "steps.pt")]
    started["old driver"] = [pool.submit(run, programs[name], "0", **OLD) for name in ("plain", "address, undefined")]
    started["old driver, Python"] = [pool.submit(pytest_run, DEVICE_TESTS[:1], "launch", **OLD)]
    for name, environment in (("launches", {}), ("old driver, launches", OLD)):
        started[name] = [pool.submit(run, programs["plain"], "0", *map(str, TENSORS), **environment)]
    yield started
    pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("name", SOUND)
def test_kernels(name, done):
    """Within the error that each base is allowed, and clean, whatever the order of threads."""
    outputs = []
    for process in (future.result() for future in done[name]):
        assert process.returncode == 0, process.stdout + process.stderr
        assert process.stderr == ""
        outputs.append(process.stdout)
    assert len(outputs) == len(ORDERS)
    assert outputs[0].count("largest error") == (0 if name == "thread" else 4)
    assert len(set(outputs)) == 1


def counted(name, done) -> dict[int, int]:
    [process] = (future.result() for future in done[name])
    return dict(zip(TENSORS, map(int, process.stdout.split()), strict=True))


@pytest.mark.parametrize(("name", "large"), [("launches", True), ("old driver, launches", False)])
def test_launches(name, large, done):
    """As many as the cost model says, and the README, for any number of tensors."""
    from benchmarks.speed.cost_model import launches_of

    def readme(n: int) -> int:
        entries = 2 * math.ceil(n / 570) + math.ceil(n / 499) if large else 2 * math.ceil(n / 72) + math.ceil(n / 63)
        return 2 + entries + math.ceil(n / 180)

    launches = counted(name, done)
    assert launches == {n: launches_of("adam", n, large) for n in TENSORS}
    assert launches == {n: readme(n) for n in TENSORS}
    assert launches[62] == 6  # ResNet-18


# ---- drivers older than CUDA 12.1: launches of 4,096 bytes, or the emulation refuses them ----


def test_kernels_with_an_old_driver(done):
    for process in (future.result() for future in done["old driver"]):
        assert process.returncode == 0, process.stdout + process.stderr
        assert process.stdout.count("largest error") == 4


def test_python_with_an_old_driver(done):
    [process] = (future.result() for future in done["old driver, Python"])
    assert process.returncode == 0, process.stdout + process.stderr
    assert re.search(r"[1-9]\d* passed", process.stdout)


@pytest.mark.parametrize("change", [{"kOther = 64;": "kOther = 0;"}, {"kLarge = 32000;": "kLarge = 32800;"}])
def test_arguments_that_no_driver_takes_do_not_compile(change, tmp_path):
    command = [*sources(tmp_path / "changed", change), "-fsyntax-only"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert "static assertion failed" in done.stderr


def test_gpu_check_takes_another_backend_for_sound(done):
    """The emulated backend adds up in the order of a GPU: within gpu_check's bounds of the CPU's."""
    from tests.cuda.gpu.checks import BASES, CPU, Steps, assert_near, lists, parameters, take_steps

    [saved] = (future.result() for future in done["gpu_check"])
    norms = 0
    for steps, (base, options) in zip(torch.load(saved), BASES, strict=True):
        emulated = Steps(*steps)
        expected = take_steps(parameters(CPU, lists()["many"], DTYPE), base, **options)
        assert_near(emulated, expected, base.__name__)
        norms += sum(not torch.equal(a, b) for a, b in zip(emulated.norms, expected.norms, strict=True))
    assert norms > 0  # or it is not another order


@pytest.mark.parametrize("name", BUGS)
def test_planted_bugs_are_found(name, done):
    *_, report = BUGS[name]
    [process] = (future.result() for future in done[name])
    assert process.returncode != 0
    assert re.search(report, process.stdout + process.stderr)


def test_python_tests(done):
    """The Python tests of the CPU backend hold for the emulated one."""
    for process in (future.result() for future in done["Python"]):
        assert process.returncode == 0, process.stdout + process.stderr
        assert re.search(r"\d\d+ passed", process.stdout)
