"""What a user installs."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import tarfile

import pytest

import sam_fused
from sam_fused import _C
from sam_fused.extension import BUILD_COMMAND
from tests.helpers.paths import ROOT


@pytest.mark.slow
def test_the_source_distribution_builds_by_itself(tmp_path):
    """It has every source, header and marker that the build and type checkers ask for."""
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path), "sdist", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    with tarfile.open(tmp_path / f"sam_fused-{sam_fused.__version__}.tar.gz") as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {f"csrc/{p.name}" for p in (ROOT / "csrc").iterdir()}
    modules = {f"sam_fused/{p.name}" for p in (ROOT / "sam_fused").glob("*.py*") if p.is_file()}
    assert sources | modules | {"sam_fused/py.typed", "LICENSE", "README.md", "pyproject.toml", "setup.py"} <= names


def test_the_stub_of_the_extension_names_what_it_has():
    names, functions = set(), []
    for node in ast.parse((ROOT / "sam_fused" / "_C.pyi").read_text()).body:
        if isinstance(node, ast.ClassDef):
            names.add(node.name)
            functions += [(node.name, f) for f in node.body if isinstance(f, ast.FunctionDef) and not f.decorator_list]
        elif isinstance(node, ast.FunctionDef):
            names.add(node.name)
            functions.append(("", node))
        elif isinstance(node, ast.AnnAssign):
            names.add(node.target.id)
    for owner, node in functions:
        written = getattr(getattr(_C, owner) if owner else _C, node.name).__doc__  # by pybind11
        arguments = written.partition(") ->")[0]
        assert arguments.count(": ") == len([*node.args.posonlyargs, *node.args.args]), node.name
    assert names == {name for name in dir(_C) if not name.startswith("__")}


@pytest.mark.slow
def test_the_reference_never_imports_the_extension():
    program = (
        "import sys, torch\n"
        "sys.modules['sam_fused._C'] = None\n"
        "import sam_fused, sam_fused.reference as reference\n"
        "w = torch.nn.Parameter(torch.ones(2)); w.grad = torch.ones(2)\n"
        "opt = sam_fused.ReferenceSAM([w]); opt.first_step(); opt.second_step()\n"
        "source = open(reference.__file__).read()\n"
        "assert '_C' not in source and 'torch.ops' not in source\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", [["train.py", "--dataset", "digits"], ["-m", "pytest", "tests/optimizer/test_package.py"]]
)
def test_a_source_tree_that_is_not_built_says_what_to_do(command, tmp_path):
    """Python takes it rather than the sam_fused that is installed."""
    tree = tmp_path / "tree"
    for name in ("sam_fused", "tests"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("_C.*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "train.py"):
        shutil.copy(ROOT / name, tree)
    # An editable installation has a finder that finds the extension for any sam_fused; it is not what is tested here.
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if '__editable__' not in getattr(f, '__module__', '')]\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, *command], cwd=tree, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode != 0
    assert f"Build it in {tree}, the source tree," in done.stderr
    assert f"with: {BUILD_COMMAND}" in done.stderr
    assert "Traceback" not in done.stderr
