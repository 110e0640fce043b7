"""Every Python block of the documentation runs, with the names that its reader would have.

A block whose first line is ``# torchrun --nproc-per-node N`` is a script of its own and runs in N processes.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch

from sam_fused import FusedSAM
from tests.docs.pages import blocks
from tests.helpers.paths import ROOT

TORCHRUN = re.compile(r"# torchrun --nproc-per-node (\d+)\n")
SCRIPTS = {at: block.text for at, block in blocks("python").items() if TORCHRUN.match(block.text)}
SNIPPETS = {at: block for at, block in blocks("python").items() if at not in SCRIPTS}


@pytest.mark.filterwarnings("error:.*without SAM")
@pytest.mark.parametrize("at", SNIPPETS)
def test_snippet(at, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(10, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
    names = {
        "torch": torch,
        "FusedSAM": FusedSAM,
        "device": "cpu",
        "model": model,
        "x": torch.randn(8, 10),
        "y": torch.randint(2, (8,)),
        "loss_fn": torch.nn.functional.cross_entropy,
        "opt": FusedSAM(model.parameters()),
    }
    block = SNIPPETS[at]
    exec(compile("\n" * (block.line - 1) + block.text, str(ROOT / block.page), "exec"), names)
    opt = names["opt"]
    opt = getattr(opt, "optimizer", opt)
    assert not (opt.perturbed and isinstance(opt, FusedSAM))


@pytest.mark.slow
@pytest.mark.parametrize("at", SCRIPTS)
def test_script(at, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPTS[at])
    number = TORCHRUN.match(SCRIPTS[at])[1]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", number, str(script)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


def test_the_blocks_are_found():
    assert len(SNIPPETS) >= 12
    assert len(SCRIPTS) >= 2
