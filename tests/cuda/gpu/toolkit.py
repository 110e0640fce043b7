"""What checks on a GPU need: a GPU, an nvcc of torch's CUDA version, and compute-sanitizer.

python -m tests.cuda.gpu.toolkit   # installs what is missing by pip, into this Python's environment
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from tests.helpers.paths import ROOT

COMPILER = ("nvcc", "cudart", "cccl", "crt")  # extras of pip's cuda-toolkit
ERROR = 9  # the sanitizer's exit status for what it found


class Skip(Exception):
    """Why a check is not made."""


def need_gpu(device: torch.device) -> None:
    if device.type != "cuda":
        raise Skip("needs a GPU")


def obstacle() -> str | None:
    """Why nothing can be checked on this machine's GPU, if nothing can."""
    if torch.version.cuda is None:
        return (
            f"this torch ({torch.__version__}) is built without CUDA: install one with it (pytorch.org/get-started) "
            f"into {sys.prefix}; --device cpu is a dry run"
        )
    if not torch.cuda.is_available():
        return "there is no GPU that torch can use; --device cpu is a dry run"
    return None


# ---- installing ----


def compiler_is_missing() -> str | None:
    """Why setup.py cannot build the CUDA kernels, if it cannot."""
    environment = {**os.environ, "SAM_FUSED_CUDA": "1"}
    command = [sys.executable, "setup.py", "--name"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["setup.py failed"])[-1]


def find_sanitizer() -> Path | None:
    """compute-sanitizer: on PATH, in the toolkit of CUDA_HOME, beside torch, where pip puts it, or in /usr/local."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    beside_torch = Path(torch.__file__).parents[1] / "nvidia"
    homes = [*([Path(named)] if named else []), *sorted(beside_torch.glob("cu[0-9]*")), Path("/usr/local/cuda")]
    found = [shutil.which("compute-sanitizer"), *(shutil.which(home / "bin" / "compute-sanitizer") for home in homes)]
    return next((Path(path) for path in found if path), None)


def missing() -> list[str]:
    """The extras of pip's cuda-toolkit that this machine lacks."""
    reason = compiler_is_missing()
    if reason:
        print(reason, file=sys.stderr)
    return [*(COMPILER if reason else ()), *(() if find_sanitizer() else ("sanitizer",))]


def install() -> None:
    """Install what is missing. Exits with 2 and the reason where that is not possible."""
    if reason := obstacle():
        print(reason, file=sys.stderr)
        sys.exit(2)
    extras = missing()
    major, minor = torch.version.cuda.split(".")[:2]
    if extras and int(major) < 13:
        print(
            f"pip's packages of CUDA {major} have no nvcc and no compute-sanitizer: install NVIDIA's CUDA toolkit "
            f"{major}.{minor}, and set CUDA_HOME to where it is",
            file=sys.stderr,
        )
        sys.exit(2 if "nvcc" in extras else 0)  # without the sanitizer its checks are skipped
    if extras:
        what = f"cuda-toolkit[{','.join(extras)}]=={major}.{minor}.*"
        subprocess.run([sys.executable, "-m", "pip", "install", what], check=True)


# ---- compute-sanitizer ----


def sanitizer_command(path: Path, tool: str, program: list[str]) -> list[str]:
    """The program under one of compute-sanitizer's tools.

    A filter leaves torch's own kernels out, but not where initcheck must see that they fill what ours read; calls that
    fail by design, as torch makes them to ask whether a stream is ready, are no errors.
    """
    known = subprocess.run([path, "--help"], capture_output=True, text=True)
    names = "--kernel-name" if "--kernel-name " in known.stdout else "--kernel-regex"  # the older name
    options = ["--tool", tool, "--error-exitcode", str(ERROR)]
    if tool == "memcheck":
        options += ["--report-api-errors", "no"]
    if tool != "initcheck":
        options += [names, "kns=sam"]
    return [str(path), *options, *program]


def sanitizer_summary(output: str) -> str:
    """What the tool counted. Raises AssertionError with the output if it counted anything, or nothing at all."""
    summaries = re.findall(r"^=+ (.*SUMMARY: (\d+) .*)$", output, re.MULTILINE)
    assert summaries, f"no summary in\n{output[-4000:]}"
    assert all(int(count) == 0 for _, count in summaries), output[-4000:]
    return summaries[-1][0]


if __name__ == "__main__":
    install()
