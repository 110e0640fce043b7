"""What a user installs."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_source_distribution_builds_by_itself(tmp_path):
    """It has every source, header and marker that the build and type checkers ask for."""
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path), "sdist", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {f"csrc/{p.name}" for p in (ROOT / "csrc").iterdir()}
    modules = {f"sam_fused/{p.name}" for p in (ROOT / "sam_fused").glob("*.py")}
    assert sources | modules | {"sam_fused/py.typed", "LICENSE", "README.md", "pyproject.toml", "setup.py"} <= names


def test_the_reference_never_imports_the_extension():
    program = (
        "import sys, torch\n"
        "sys.modules['sam_fused._C'] = None\n"
        "import sam_fused.reference as reference\n"
        "w = torch.nn.Parameter(torch.ones(2)); w.grad = torch.ones(2)\n"
        "opt = reference.ReferenceSAM([w]); opt.first_step(); opt.second_step()\n"
        "source = open(reference.__file__).read()\n"
        "assert '_C' not in source and 'torch.ops' not in source\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
