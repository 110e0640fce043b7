"""What to run first on a machine with a GPU: builds for it, and checks and measures what only a GPU can show.

    make gpu-check OUT=results/gpu/h100.md   # installs nvcc and compute-sanitizer where they are missing, too
    python -m tests.cuda.gpu_check --out results/gpu/h100.md
    python -m tests.cuda.gpu_check --device cpu   # a dry run: what needs a GPU is skipped

Prints a report in Markdown, and ends with 1 if a check failed. A timing is a number in it, never a failure.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch

from tests.cuda.gpu import toolkit
from tests.helpers.paths import ROOT

Check = Callable[[torch.device, bool], str]


def run(command: list[str], **environment: str) -> str:
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)
    if done.returncode != 0:
        raise AssertionError(f"ended with {done.returncode}\n{(done.stdout + done.stderr)[-4000:]}")
    return done.stdout


def build(device: torch.device, quick: bool) -> str:
    toolkit.need_gpu(device)
    major, minor = torch.cuda.get_device_capability()
    start = time.perf_counter()
    command = [sys.executable, "setup.py", "build_ext", "--inplace", "--force"]
    run(command, SAM_FUSED_CUDA="1", TORCH_CUDA_ARCH_LIST=f"{major}.{minor}")
    return f"for compute capability {major}.{minor}, {time.perf_counter() - start:.0f} s"


def tests(device: torch.device, quick: bool) -> str:
    files = ["tests/optimizer/test_algorithm.py"] if quick else ["tests"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    return run(command, SAM_FUSED_TEST_DEVICE=device.type).strip().splitlines()[-1]


def sanitizer(tool: str) -> Check:
    def check(device: torch.device, quick: bool) -> str:
        toolkit.need_gpu(device)
        path = toolkit.find_sanitizer()
        if path is None:
            raise toolkit.Skip("there is no compute-sanitizer")
        me = [sys.executable, "-m", "tests.cuda.gpu_check", "--device", device.type, "--quick", "--only", *SANITIZED]
        command = toolkit.sanitizer_command(path, tool, me)
        return toolkit.sanitizer_summary(run(command, PYTORCH_NO_CUDA_MEMORY_CACHING="1"))

    return check


def later(module: str, name: str) -> Check:
    """Of a module that imports sam_fused, which ``build`` may have to build first."""

    def check(device: torch.device, quick: bool) -> str:
        return getattr(importlib.import_module(f"tests.cuda.gpu.{module}"), name)(device, quick)

    return check


#: What the sanitizers watch: every kernel, with small and large arguments, 16 bytes at a time and one by one.
SANITIZED = ["same_bits", "many_tensors", "misaligned_slices"]
CHECKS: dict[str, Check] = {
    "build": build,
    "tests": tests,
    **{
        name: later("checks", name)
        for name in (
            *SANITIZED,
            "large_tensor",
            "two_devices",
            "side_stream",
            "graph",
            "training_graph",
            "no_synchronisation",
            "launches",
        )
    },
    **{name: later("timings", name) for name in ("bandwidth", "rivals")},
    **{tool: sanitizer(tool) for tool in ("memcheck", "racecheck", "synccheck", "initcheck")},
}


class Report:
    """Lines, printed as they come and written to a file as well."""

    def __init__(self, out: Path | None) -> None:
        self.file = None
        if out:
            out.parent.mkdir(parents=True, exist_ok=True)
            self.file = out.open("w")

    def line(self, text: str = "") -> None:
        print(text, flush=True)
        if self.file:
            print(text, file=self.file, flush=True)


def where(device: torch.device) -> str:
    if device.type == "cpu":
        return "the CPU: a dry run"
    gpu = torch.cuda.get_device_properties(device)
    return f"{gpu.name} ({gpu.total_memory / 2**30:.0f} GiB, compute capability {gpu.major}.{gpu.minor})"


def commit() -> str:
    if not shutil.which("git"):
        return ""
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return f", commit {done.stdout.strip()}" if done.returncode == 0 else ""


def outcome(name: str, device: torch.device, quick: bool) -> tuple[str, str]:
    """What came of a check, and what there is to say."""
    try:
        return "ok", CHECKS[name](device, quick)
    except toolkit.Skip as reason:
        return "skipped", str(reason)
    except Exception as error:
        return "FAILED", f"{type(error).__name__}: {error}"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    p.add_argument("--quick", action="store_true", help="small tensors, few rounds, one test file")
    p.add_argument("--only", nargs="+", choices=list(CHECKS), default=list(CHECKS))
    p.add_argument("--out", type=Path, help="write the report there too: results/gpu/h100.md, say, to be committed")
    args = p.parse_args()
    if args.device == "cuda" and (reason := toolkit.obstacle()):
        p.exit(2, f"{reason}\n")
    device = torch.device(args.device)
    report = Report(args.out)
    report.line(f"torch {torch.__version__}, CUDA {torch.version.cuda}, on {where(device)}{commit()}")
    report.line("\n| check | outcome | |\n|---|---|---|")
    more, failed = [], False
    for name in args.only:
        result, text = outcome(name, device, args.quick)
        first, _, rest = text.partition("\n")
        report.line(f"| {name} | {result} | {first} |")
        failed |= result == "FAILED"
        if rest:
            more.append((name, f"```\n{rest}\n```" if result == "FAILED" else f"{first}\n\n{rest}"))
    for name, text in more:
        report.line(f"\n**{name}**: {text}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
