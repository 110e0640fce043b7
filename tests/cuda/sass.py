"""What the CUDA compiler made of each kernel: registers, local memory, and how wide its loads and stores are."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from collections import Counter
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Kernel:
    registers: int
    local_bytes: int  # of a thread's stack and local memory
    instructions: Counter[str]  # of loads and stores, such as LDG.E.128


def tools() -> str | None:
    """A PATH with cuobjdump, nvdisasm and c++filt; triton's wheel carries the first two."""
    triton = Path(sysconfig.get_path("purelib")) / "triton" / "backends" / "nvidia" / "bin"
    path = os.pathsep.join([os.environ["PATH"], "/usr/local/cuda/bin", str(triton)])
    return path if all(shutil.which(tool, path=path) for tool in ("cuobjdump", "nvdisasm", "c++filt")) else None


def _run(path: str, *command: str, text: str | None = None) -> str:
    environment = {**os.environ, "PATH": path}
    return subprocess.run(command, env=environment, input=text, check=True, capture_output=True, text=True).stdout


def archs(binary: Path, path: str) -> list[str]:
    """The architectures that the extension has machine code for."""
    return sorted(set(re.findall(r"\.(sm_\d+\w?)\.cubin", _run(path, "cuobjdump", "-lelf", str(binary)))))


def kernels(binary: Path, path: str, arch: str) -> dict[str, Kernel]:
    """The kernels of a built extension for ``arch``, by name, such as update_kernel<float, AdamBase<false>, 4096>."""
    usage = _run(path, "cuobjdump", "-res-usage", "-arch", arch, str(binary))
    resources = re.findall(r"Function (\S+?):\s*\n\s*REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    names = _run(path, "c++filt", text="\n".join(name for name, *_ in resources)).splitlines()
    parts = re.split(r"\n\s*Function : (\S+)", _run(path, "cuobjdump", "-sass", "-arch", arch, str(binary)))
    code = dict(zip(parts[1::2], parts[2::2], strict=True))
    access = re.compile(r"\*/\s+(?:@!?U?P\w+\s+)?((?:LDG|STG|LDL|STL)[.\w]*)")
    out = {}
    for (mangled, registers, stack, local), name in zip(resources, names, strict=True):
        short = name.replace("(anonymous namespace)::", "").replace("sam::", "").replace("void ", "")
        out[short.split("(", 1)[0]] = Kernel(
            int(registers), int(stack) + int(local), Counter(access.findall(code[mangled]))
        )
    return out
