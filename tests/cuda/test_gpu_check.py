"""gpu_check.py without a GPU: a dry run on the CPU, and what needs the hardware with its answers written down."""

from __future__ import annotations

import ctypes
import itertools
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import sam_fused.buckets
import sam_fused.fused
from sam_fused import _C
from tests.helpers.paths import ROOT

CPU = torch.device("cpu")
GPU_ONLY = {"build", "launches", "memcheck", "racecheck", "synccheck", "initcheck"}


@pytest.fixture
def modules(monkeypatch):
    """gpu_check and its parts, for which the CPU is a GPU."""
    from tests.cuda import gpu_check
    from tests.cuda.gpu import checks, timings, toolkit

    for module in (checks, toolkit):
        monkeypatch.setattr(module, "need_gpu", lambda device: None)
    return types.SimpleNamespace(gpu_check=gpu_check, checks=checks, timings=timings, toolkit=toolkit)


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_dry_run(tmp_path):
    out = tmp_path / "gpu" / "report.md"
    done = command("-m", "tests.cuda.gpu_check", "--device", "cpu", "--quick", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    assert out.read_text() == done.stdout
    outcomes = dict(re.findall(r"^\| (\w+) \| (\w+) \|", done.stdout, re.MULTILINE))
    ran = {
        *("tests", "same_bits", "many_tensors", "misaligned_slices", "large_tensor", "two_devices", "side_stream"),
        *("graph", "training_graph", "no_synchronisation", "bandwidth", "rivals"),
    }
    expected = {**dict.fromkeys(ran, "ok"), **dict.fromkeys(GPU_ONLY, "skipped")}
    assert {name: outcomes.get(name) for name in expected} == expected
    for header in ("| float32 | GB/s | ms | host µs |", "| tensors | optimizer | ms | host µs |"):
        assert header in done.stdout


# ---- a wrong backend is noticed ----


class Drifting:
    """The extension, but that its perturbation is never the same twice. Restoring takes all of it back."""

    def __init__(self) -> None:
        self.counter = itertools.count()

    def __getattr__(self, name):
        return getattr(_C, name)

    def Rows(self, params, *args, **lists):
        self.first = params[0]
        return _C.Rows(params, *args, **lists)

    def perturb_(self, *args, **hook):
        _C.perturb_(*args, **hook)
        self.first.add_(next(self.counter))


@pytest.mark.parametrize(("check", "message"), [("same_bits", "differs from run to run"), ("graph", "replays differ")])
def test_a_wrong_perturbation_is_noticed(check, message, modules, monkeypatch):
    drifting = Drifting()
    for module in (sam_fused.buckets, sam_fused.fused):
        monkeypatch.setattr(module, "_C", drifting)
    with pytest.raises(AssertionError, match=message):
        getattr(modules.checks, check)(CPU, quick=True)


def test_another_device_may_round_otherwise_and_no_more(modules):
    checks = modules.checks

    def steps(dtype=torch.float32, **changes):
        norm, w = torch.tensor(3.0, dtype=torch.float64), torch.ones(5, dtype=dtype)
        return checks.Steps([norm, norm], [[w], [w]], [w])._replace(**changes)

    def norms(*errors):
        return [torch.tensor(3.0, dtype=torch.float64) * (1 + e) for e in errors]

    eps = torch.finfo(torch.float32).eps
    for dtype, first in ((torch.float64, 30 * 2.0**-52), (torch.float32, 2.0**-23), (torch.float16, 2.0**-22)):
        checks.assert_near(steps(dtype, norms=norms(first, 0)), steps(dtype), "steps")
        with pytest.raises(AssertionError, match="norm 0"):
            checks.assert_near(steps(dtype, norms=norms(1.1 * first + 1e-12, 0)), steps(dtype), "steps")
    assert checks.assert_near(steps(norms=norms(0, 2 * eps)), steps(), "steps") == 0
    assert checks.assert_near(steps(weights=[torch.ones(5) + 2 * eps]), steps(), "steps") == 2
    wrong = [
        ({"norms": norms(0, 5 * eps)}, "norm 1"),
        ({"norms": norms(float("nan"), 0)}, "norm 0"),
        ({"perturbed": [[torch.ones(5)], [torch.ones(5) + 8 * eps]]}, "weights are 8 eps"),
        ({"weights": [torch.full((5,), float("nan"))]}, "weights are nan eps"),
    ]
    for changes, message in wrong:
        with pytest.raises(AssertionError, match=message):
            checks.assert_near(steps(**changes), steps(), "steps")


# ---- launches ----


def profiled(calls: list[list[str]]):
    """In the place of torch.profiler.profile: the events of one step after the other, among what else a profile has."""
    steps = iter(calls)

    class Profile:
        def __init__(self, **options):
            self.calls = next(steps)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def events(self):
            device, host = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
            annotation = "Optimizer.step#FusedSAM.step"  # on the device too, where it spans the kernels
            kernels = [("void sam::norm_kernel<float, 4096>", device)] * sum("Launch" in c for c in self.calls)
            events = [(annotation, host), (annotation, device), *kernels, *((c, host) for c in self.calls)]
            events += [("cudaDeviceSynchronize", host), ("cudaStreamIsCapturing", host)]
            return [types.SimpleNamespace(name=name, device_type=where) for name, where in events]

    return Profile


@pytest.mark.parametrize(("driver", "many"), [(13000, 19), (12000, 69)])
def test_launches_are_calls_of_the_runtime(driver, many, modules, monkeypatch):
    def get_version(pointer) -> int:
        pointer._obj.value = driver
        return 0

    cuda, load = types.SimpleNamespace(cuDriverGetVersion=get_version), ctypes.CDLL
    monkeypatch.setattr(ctypes, "CDLL", lambda name, *a, **k: cuda if name == "libcuda.so.1" else load(name, *a, **k))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    sound = [["cudaLaunchKernel"] * 6, ["cudaLaunchKernelExC"] * many]
    monkeypatch.setattr(torch.profiler, "profile", profiled(sound))
    said = modules.checks.launches(CPU, quick=True)
    assert said == f"6 for 62 tensors, {many} for 1300 tensors with Adam, as the model says"
    for wrong in (["cudaLaunchKernel"] * 7, [*["cudaLaunchKernel"] * 6, "cudaMemcpyAsync"]):
        monkeypatch.setattr(torch.profiler, "profile", profiled([wrong]))
        with pytest.raises(AssertionError, match="resnet18: expected 6 launches and no copy"):
            modules.checks.launches(CPU, quick=True)


# ---- timings ----


def test_several_calls_an_event_pair(modules, monkeypatch):
    """40 ms between two events, whatever the host takes."""
    recorded = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            recorded.append(calls)

        def synchronize(self):
            pass

        def elapsed_time(self, other):
            return 40.0

    calls = 0

    def call():
        nonlocal calls
        calls += 1

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    time = modules.timings.timed(torch.device("cuda"), call, rounds=3)
    between = [b - a for a, b in zip(recorded[::2], recorded[1::2], strict=True)]
    assert between == [modules.timings.CALLS] * 3
    assert modules.timings.CALLS >= 5
    assert time.ms == 40.0 / modules.timings.CALLS
    assert time.host_us > 0


# ---- compute-sanitizer ----


def write_sanitizer(folder: Path, says: str, status: int = 0, names: str = "--kernel-name", run: bool = False) -> Path:
    """A compute-sanitizer that keeps what it is called with and says what it is told; it may run it, too."""
    folder.mkdir(exist_ok=True)
    path = folder / "compute-sanitizer"
    path.write_text(
        f"""#!/bin/sh
if [ "$1" = --help ]; then echo "  {names} arg   key1=val1"; exit 0; fi
printf '%s\\n' "$@" > {folder}/arguments
while [ "$1" != {sys.executable} ]; do shift; done
echo ========= COMPUTE-SANITIZER
{'"$@"' if run else "true"} > {folder}/output || exit 1
echo "========= {says}"
exit {status}
"""
    )
    path.chmod(0o755)
    return path


FILTER = ["--kernel-name", "kns=sam"]
OPTIONS = {
    "memcheck": ["--report-api-errors", "no", *FILTER],
    "racecheck": FILTER,
    "synccheck": FILTER,
    "initcheck": [],  # it must see torch's own fills
}
SUMMARIES = {"racecheck": "RACECHECK SUMMARY: {} hazards displayed ({} errors, 0 warnings)"}


@pytest.mark.slow
@pytest.mark.parametrize("tool", OPTIONS)
def test_sanitizer(tool, modules, monkeypatch, tmp_path):
    summary = SUMMARIES.get(tool, "ERROR SUMMARY: {} errors")
    clean = summary.format(0, 0)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    write_sanitizer(tmp_path, clean, run=tool == "memcheck")
    check = modules.gpu_check.sanitizer(tool)
    assert check(CPU, quick=True) == clean
    arguments = (tmp_path / "arguments").read_text().split()
    mine = arguments.index(sys.executable)
    assert arguments[:mine] == ["--tool", tool, "--error-exitcode", "9", *OPTIONS[tool]]
    names = arguments[arguments.index("--only") + 1 :]
    assert names == modules.gpu_check.SANITIZED
    if tool != "memcheck":
        return
    outcomes = dict(re.findall(r"^\| (\w+) \| (\w+) \|", (tmp_path / "output").read_text(), re.MULTILINE))
    assert outcomes == {"check": "outcome", **dict.fromkeys(names, "ok")}


@pytest.mark.parametrize(
    ("says", "status"),
    [
        ("ERROR SUMMARY: 2 errors", 9),
        ("RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)", 0),
        ("Error: Target application terminated before first instrumented API call", 255),
        ("nothing", 0),
    ],
)
def test_what_a_sanitizer_finds_is_a_failure(says, status, modules, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setitem(modules.gpu_check.CHECKS, "memcheck", modules.gpu_check.sanitizer("memcheck"))
    write_sanitizer(tmp_path, says, status)
    result, text = modules.gpu_check.outcome("memcheck", CPU, True)
    assert result == "FAILED"
    assert says in text


def test_the_older_name_of_the_filter(modules, tmp_path):
    path = write_sanitizer(tmp_path, "", names="--kernel-regex")
    assert modules.toolkit.sanitizer_command(path, "synccheck", ["program"])[-3:] == [
        "--kernel-regex",
        "kns=sam",
        "program",
    ]


def test_no_sanitizer_is_no_failure(modules, monkeypatch):
    monkeypatch.setattr(modules.toolkit, "find_sanitizer", lambda: None)
    assert modules.gpu_check.outcome("memcheck", CPU, True) == ("skipped", "there is no compute-sanitizer")


def test_the_sanitizer_is_looked_for(modules, monkeypatch, tmp_path):
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    there = write_sanitizer(tmp_path / "bin", "")
    assert modules.toolkit.find_sanitizer() == there


# ---- what make gpu-check installs ----


def install(toolkit, monkeypatch, cuda="13.0", gpu=True, compiler=False, sanitizer=False) -> list[str] | None:
    """The packages that it asks pip for."""
    installed = []

    def pip(arguments, check):
        assert arguments[:4] == [sys.executable, "-m", "pip", "install"]
        assert check
        installed.extend(arguments[4:])

    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(toolkit, "compiler_is_missing", lambda: None if compiler else "no nvcc of CUDA 13 is found")
    monkeypatch.setattr(toolkit, "find_sanitizer", lambda: Path("compute-sanitizer") if sanitizer else None)
    monkeypatch.setattr(toolkit.subprocess, "run", pip)
    toolkit.install()
    return installed


def test_what_is_missing_is_installed(modules, monkeypatch):
    toolkit = modules.toolkit
    everything = "cuda-toolkit[nvcc,cudart,cccl,crt,sanitizer]==13.0.*"
    assert install(toolkit, monkeypatch) == [everything]
    assert install(toolkit, monkeypatch, cuda="13.2", compiler=True) == ["cuda-toolkit[sanitizer]==13.2.*"]
    assert install(toolkit, monkeypatch, sanitizer=True) == ["cuda-toolkit[nvcc,cudart,cccl,crt]==13.0.*"]
    assert install(toolkit, monkeypatch, compiler=True, sanitizer=True) == []


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        ({"cuda": None}, 2, r"this torch \(.*\) is built without CUDA"),
        ({"gpu": False}, 2, r"there is no GPU that torch can use"),
        ({"cuda": "12.8"}, 2, r"packages of CUDA 12 have no nvcc.*toolkit 12\.8, and set CUDA_HOME"),
        ({"cuda": "12.8", "compiler": True}, 0, r"no compute-sanitizer"),
    ],
)
def test_what_cannot_be_installed(options, status, message, modules, monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        install(modules.toolkit, monkeypatch, **options)
    assert ended.value.code == status
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("arguments", [("-m", "tests.cuda.gpu.toolkit"), ("-m", "tests.cuda.gpu_check")], ids=" ".join)
def test_without_a_gpu_nothing_is_done(arguments):
    done = command(*arguments)
    assert done.returncode == 2
    assert re.search("there is no GPU|is built without CUDA", done.stderr)
    assert done.stdout == ""
