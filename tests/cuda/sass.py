"""What the CUDA compiler made of each kernel: registers, local memory, and its instructions."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Instruction:
    address: int
    guarded: bool  # by a predicate
    name: str  # such as LDG.E.128
    operands: str


@dataclass(frozen=True)
class Kernel:
    registers: int
    local_bytes: int  # of a thread's stack and local memory
    code: tuple[Instruction, ...]

    def __str__(self) -> str:
        return f"{self.registers} registers, {self.local_bytes} local bytes, wide accesses {self.wide()}"

    def count(self, name: str) -> int:
        """Of instructions whose name begins so."""
        return sum(i.name.startswith(name) for i in self.code)

    def wide(self) -> str:
        """Loads and stores of 16 bytes in their order, each an L or an S."""
        return "".join(i.name[0] for i in self.code if re.fullmatch(r"(LDG|STG)\S*\.128\S*", i.name))

    def fewest(self, counted: str, start: int, end: str) -> int | None:
        """Of instructions whose name begins with ``counted`` on any way from code[start] to one that does with ``end``.

        None if no way leads there.
        """
        at = {instruction.address: k for k, instruction in enumerate(self.code)}
        best = {start: 0}
        todo = [start]
        ends = []
        while todo:
            k = todo.pop()
            if self.code[k].name.startswith(end):
                ends.append(best[k])
                continue
            for following in self._after(k, at):
                cost = best[k] + self.code[following].name.startswith(counted)
                if cost < best.get(following, cost + 1):
                    best[following] = cost
                    todo.append(following)
        return min(ends, default=None)

    def _after(self, k: int, at: dict[int, int]) -> Iterator[int]:
        instruction = self.code[k]
        jumps = instruction.name in ("BRA", "EXIT", "RET")
        if instruction.name == "BRA" and (target := re.search(r"0x[0-9a-f]+", instruction.operands)):
            yield at[int(target[0], 16)]
        if (not jumps or instruction.guarded) and k + 1 < len(self.code):
            yield k + 1


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
    line = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][.\w]*)([^;]*);")
    out = {}
    for (mangled, registers, stack, local), name in zip(resources, names, strict=True):
        short = name.replace("(anonymous namespace)::", "").replace("sam::", "").replace("void ", "")
        instructions = (
            Instruction(int(address, 16), bool(guard), name, operands)
            for address, guard, name, operands in line.findall(code[mangled])
        )
        out[short.split("(", 1)[0]] = Kernel(int(registers), int(stack) + int(local), tuple(instructions))
    return out
