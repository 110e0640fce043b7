"""What can be said of the CUDA build without a GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sam_fused import _C
from sam_fused.bases import UPDATE_BY_NAME
from tests.cuda import sass
from tests.helpers.paths import ROOT

pytestmark = pytest.mark.slow
STREAMS = {  # read and written, by kernel
    "norm_kernel": (1, 0),
    "perturb_kernel": (2, 2),
    "restore_kernel": (1, 1),
    "update_kernel": (2, 1),
}
WIDTHS = {"float": 4, "BFloat16": 8, "Half": 8}  # numbers in 16 bytes, of those that a norm converts to double


def check(name: str, kernel: sass.Kernel, where: str) -> None:
    """Raises if a kernel's machine code is slower than it has to be."""
    where = f"{where}, {name}: {kernel}"
    assert kernel.local_bytes == 0, where
    assert kernel.count("LDL") == kernel.count("STL") == 0, where
    # A multiprocessor's 65,536 have room for four blocks of 256 threads; for three of those with five vectors of eight
    # numbers, and for two in float64.
    five = re.search(r"(BFloat16|Half), (AdamBase<true>|RmspropBase<true, true>)", name)
    assert kernel.registers <= (128 if "double" in name else 80 if five else 64), where
    kind, arguments = re.match(r"(\w+)(.*)", name).groups()
    wide = kernel.wide()
    reads, writes = STREAMS.get(kind, (0, 0))
    assert wide.count("L") >= reads, where
    assert wide.count("S") >= writes, where
    if kind in ("norm_kernel", "perturb_kernel", "restore_kernel"):
        assert re.fullmatch("((L{4})+S*)+", wide), where  # four reads on their way before the first write
    width = next((w for dtype, w in WIDTHS.items() if dtype in arguments), None)
    if kind == "norm_kernel" and width:
        # The squares of a vector, of four without T and two with it, are added up in float, and converted once.
        squares = [k for k, instruction in enumerate(kernel.code) if instruction.name.startswith("FFMA")]
        assert len(squares) >= 6 * (width - 1), where
        for k in squares:
            assert kernel.fewest("F2F.F64.F32", k, "DADD") == 1, where


@pytest.mark.skipif(not _C.has_cuda, reason="built without CUDA")
@pytest.mark.skipif(sass.tools() is None, reason="needs cuobjdump, nvdisasm and c++filt")
def test_machine_code():
    path = sass.tools()
    binary = Path(_C.__file__)
    archs = sass.archs(binary, path)
    assert archs
    for arch in archs:
        kernels = sass.kernels(binary, path, arch)
        assert sum(name.startswith("update_kernel") for name in kernels) == len(UPDATE_BY_NAME) * 4 * 3  # types, sizes
        for name, kernel in kernels.items():
            check(name, kernel, arch)


def setup(**environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "--name"]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)


def test_without_a_toolkit(tmp_path):
    """One line says that CUDA is left out; asked for by name it is an error."""
    done = setup(CUDA_HOME=str(tmp_path), SAM_FUSED_CUDA="")
    assert done.returncode == 0, done.stderr
    notice = [line for line in done.stderr.splitlines() if line.startswith("sam_fused: building without CUDA kernels")]
    assert len(notice) == 1
    done = setup(CUDA_HOME=str(tmp_path), SAM_FUSED_CUDA="1")
    assert done.returncode != 0
    assert re.search("SAM_FUSED_CUDA=1, but (no nvcc of CUDA|this torch is built)", done.stderr)
    assert "without CUDA" not in setup(CUDA_HOME=str(tmp_path), SAM_FUSED_CUDA="0").stderr


def toolkit(home: Path, script: str, mode: int = 0o755) -> Path:
    """What the build takes for a CUDA toolkit in ``home``, with ``script`` as its nvcc, which is returned."""
    for folder in ("bin", "include", "lib64"):
        (home / folder).mkdir()
    (home / "include" / "cuda_runtime_api.h").touch()
    (home / "lib64" / "libcudart.so").touch()
    nvcc = home / "bin" / "nvcc"
    nvcc.write_text(script)
    nvcc.chmod(mode)
    return nvcc


@pytest.mark.skipif(torch.version.cuda is None, reason="needs a torch with CUDA")
def test_a_toolkit_of_another_version(tmp_path):
    nvcc = toolkit(tmp_path, "#!/bin/sh\necho Cuda compilation tools, release 9.1, V9.1.85\n")
    done = setup(CUDA_HOME=str(tmp_path), SAM_FUSED_CUDA="1")
    assert done.returncode != 0
    assert f"torch's version; {nvcc} is of CUDA 9.1" in done.stderr


REFUSES = f"""#!/bin/sh
[ $1 = --version ] && exec echo release {torch.version.cuda}
echo error: unsupported GNU version >&2
exit 1
"""


@pytest.mark.skipif(torch.version.cuda is None, reason="needs a torch with CUDA")
@pytest.mark.parametrize(
    ("script", "mode", "reason"),
    [
        ("#!/no/such/shell\n", 0o755, "does not run"),
        ("#!/bin/sh\n", 0o644, "does not run"),
        (REFUSES, 0o755, "compiles nothing: error: unsupported GNU version"),
    ],
)
def test_a_toolkit_that_does_not_work(tmp_path, script, mode, reason):
    nvcc = toolkit(tmp_path, script, mode)
    done = setup(CUDA_HOME=str(tmp_path), SAM_FUSED_CUDA="")
    assert done.returncode == 0, done.stderr
    assert "sam_fused: building without CUDA kernels: no nvcc of CUDA" in done.stderr
    assert f"; {nvcc} {reason}" in done.stderr


NVCC_13 = "75 80 86 87 88 89 90 100 110 103 120 121"


@pytest.mark.skipif(torch.version.cuda is None, reason="needs a torch with CUDA")
@pytest.mark.parametrize(
    ("gpus", "nvcc", "expected"),
    [
        ("sm_75 sm_80 sm_86 sm_90 sm_100 sm_120", NVCC_13, "7.5;8.0;9.0;10.0;12.0+PTX"),
        ("sm_75 sm_80 sm_90 sm_100 sm_110 sm_120 compute_120", NVCC_13, "7.5;8.0;9.0;10.0;11.0;12.0+PTX"),
        ("sm_50 sm_60 sm_70 sm_75 sm_80 sm_86 sm_90", "50 52 60 70 72 75 80 86 89 90", "7.0;7.5;8.0;9.0+PTX"),
        ("sm_80 sm_90 sm_100 sm_120", "70 75 80 86 89 90", "8.0;9.0+PTX"),  # an older nvcc: PTX for the rest
        ("sm_89 sm_90a", NVCC_13, "8.0;9.0+PTX"),
        ("sm_60", NVCC_13, None),
    ],
)
def test_architectures(gpus, nvcc, expected, tmp_path):
    """Those of torch, by its oldest GPU of each kind, which nvcc knows."""
    codes = "".join(f"sm_{code}\\n" for code in nvcc.split())
    toolkit(tmp_path, f"#!/bin/sh\n[ $1 = --version ] && echo release {torch.version.cuda}, || printf '{codes}'\n")
    program = (
        "import runpy, sys, torch\n"
        f"torch._C._cuda_getArchFlags = lambda: {gpus!r}\n"
        "sys.argv = ['setup.py', '--name']\n"
        "runpy.run_path('setup.py', run_name='__main__')\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TORCH_CUDA_ARCH_LIST"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**environment, "CUDA_HOME": str(tmp_path), "SAM_FUSED_CUDA": "1"},
        capture_output=True,
        text=True,
    )
    if expected:
        assert done.returncode == 0, done.stderr
        assert f"sam_fused: CUDA kernels for {expected}, by {tmp_path}" in done.stderr
    else:
        assert done.returncode != 0
        assert "the kernels need compute capability 7.0; torch is built for sm_60" in done.stderr


def test_nonsense():
    done = setup(SAM_FUSED_CUDA="yes")
    assert done.returncode != 0
    assert "SAM_FUSED_CUDA: expected 0 or 1, got 'yes'" in done.stderr


def test_cost_model():
    command = [sys.executable, "-m", "benchmarks.speed.cost_model", "--networks", "ResNet-18"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    table = dict(re.findall(r"^\| ResNet-18[^|]* \| ([^|]*) \| (.*) \|$", done.stdout, re.MULTILINE))
    assert table["FusedSAM"] == "6 | 0.536 | 0.18"  # 12 streams of 4 bytes for 11.17 M parameters
    # 15 streams: a norm (1), two copies (4), an addition (3), Adam (7); the norm's own launches are two more
    assert table["foreach + fused base"].split(" | ")[1] in ("0.67", "0.715")
