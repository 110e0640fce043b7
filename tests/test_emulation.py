"""The CUDA backend's own source, run on the CPU (tests/emulation): its results, its races, and that they are found."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.cases import DEVICE_TESTS, on_the_cpu
from tests.emulation.build import SMALL, kernels

pytestmark = on_the_cpu
ROOT = Path(__file__).parents[1]
ORDERS = ("0", "1", "5")  # of threads and blocks: as numbered, from the end, random

#: name: (sanitizers, changes to csrc/cuda.cu)
SOUND = {
    "plain": ("", {}),
    "address, undefined": ("address,undefined", SMALL),
    "thread": ("thread", SMALL),
}
#: name: (sanitizers, changes to csrc/cuda.cu, what must be reported)
BUGS = {
    "a missing barrier": (
        "",
        {"  if (lane == 0) sums[warp] = x;\n  __syncthreads();\n": "  if (lane == 0) sums[warp] = x;\n"},
        r"grad_sq_norm: row 0",
    ),
    "a read past the end": (
        "address",
        {**SMALL, "i < n - body; i += kThreads": "i <= n - body; i += kThreads"},
        r"heap-buffer-overflow.*\n.*READ of size",
    ),
    "a misaligned vector": (
        "alignment",
        {**SMALL, "% 16 != offset) head = n;": "% 16 != offset) continue;"},
        r"misaligned address",
    ),
    "shared memory used again without a barrier": (
        "thread",
        {**SMALL, "  const double total = block_sum(sum, sums);\n  if (threadIdx.x == 0) partial": (
            "  const double total = block_sum(sum, sums) + block_sum(-sum, sums);\n  if (threadIdx.x == 0) partial"
        )},
        r"ThreadSanitizer: data race",
    ),
    "a sum over blocks that is not atomic": (
        "thread",
        {**SMALL, "partial[share.entry.index + share.chunk] = total;": "partial[share.entry.index] += total;"},
        r"ThreadSanitizer: data race",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def workers():
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield pool


@pytest.fixture(scope="module")
def programs(workers, tmp_path_factory) -> dict[str, Future[Path]]:
    folder = tmp_path_factory.mktemp("kernels")
    variants = {name: what[:2] for name, what in {**SOUND, **BUGS}.items()}
    return {
        name: workers.submit(kernels, folder / str(i), *variant) for i, (name, variant) in enumerate(variants.items())
    }


def run(program: Path, order: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    options = {"EMULATION_ORDER": order, "ASAN_OPTIONS": "detect_stack_use_after_return=0"}
    return subprocess.run([program, *arguments], capture_output=True, text=True, env={**os.environ, **options})


@pytest.mark.parametrize("name", SOUND)
def test_kernels(name, programs, workers):
    """Within one unit in the last place of the correctly rounded result, and clean, whatever the order of threads."""
    program = programs[name].result()
    quick = ["quick"] if name == "thread" else []
    outcomes = []
    for done in workers.map(lambda order: run(program, order, *quick), ORDERS):
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stderr == ""
        outcomes.append(done.stdout)
    assert outcomes[0].count("largest error") == (0 if quick else 4)
    assert len(set(outcomes)) == 1


def test_launches(programs, monkeypatch):
    """As many as the cost model says, for any number of tensors."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from cost_model import launches_of

    tensors = [1, 62, 63, 64, 72, 73, 200, 499, 500, 1000, 2000]
    counted = run(programs["plain"].result(), "0", *map(str, tensors)).stdout.split()
    assert [int(n) for n in counted] == [launches_of("adam", n) for n in tensors]
    assert int(counted[1]) == 6  # ResNet-18


@pytest.mark.parametrize("name", BUGS)
def test_planted_bugs_are_found(name, programs):
    *_, report = BUGS[name]
    done = run(programs[name].result(), "0", *(["quick"] if "thread" in BUGS[name][0] else []))
    assert done.returncode != 0
    assert re.search(report, done.stdout + done.stderr)


def test_python_tests(workers):
    """The Python tests of the CPU backend hold for the emulated one."""

    def pytest_run(files: list[str]) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "not ReferenceSAM"]
        environment = {**os.environ, "SAM_FUSED_TEST_DEVICE": "emulated", "OMP_NUM_THREADS": "1"}
        paths = [str(ROOT / "tests" / file) for file in files]
        return subprocess.run([*command, *paths], cwd=ROOT, capture_output=True, text=True, env=environment)

    for done in workers.map(pytest_run, (DEVICE_TESTS[:1], DEVICE_TESTS[1:])):  # about half the time each
        assert done.returncode == 0, done.stdout + done.stderr
        assert re.search(r"\d\d+ passed", done.stdout)
