"""The benchmark scripts run and write what they promise. How long anything takes is not looked at."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from benchmarks.speed import rivals
from tests.helpers.cases import assert_near, set_grads
from tests.helpers.paths import ROOT

pytestmark = pytest.mark.slow


def run(script: str, *flags: str) -> str:
    command = [sys.executable, "-m", f"benchmarks.speed.{script}", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_step(tmp_path):
    flags = ["--lists", "resnet18", "--bases", "adam", "--kinds", "sam", "asam", "--threads", "2"]
    printed = run("step", "--out", str(tmp_path), "--seconds", "0", *flags)
    results = json.loads((tmp_path / "step.json").read_text())["results"]
    assert [(r["base"], r["adaptive"]) for r in results] == [("adam", False), ("adam", True)]
    for r in results:
        assert r["tensors"] == 62
        assert r["rounds"] == 3
        assert r["floor_ms"] > 0
        assert {"FusedSAM", "ReferenceSAM", "foreach + fused base", "pytorch_optimizer SAM"} <= r["ms"].keys()
        assert {"sum", "copy, non-temporal", "triad, non-temporal"} <= r["bandwidth_gb_s"].keys()
    # Memory is no timing: the backup and nothing else.
    assert 1 <= results[0]["peak_extra"]["FusedSAM"] < 1.02
    assert "| resnet18 | ASAM + adam | 2 | 3 |" in printed
    assert (tmp_path / "floor.png").stat().st_size > 1000


def test_training(tmp_path):
    printed = run("training", "--out", str(tmp_path), "--seconds", "0", "--archs", "vgg16", "--widths", "2")
    network = json.loads((tmp_path / "train.json").read_text())["networks"][0]
    assert "FusedSAM, --ascent-fraction 0.25" in network["seconds"]
    assert "torchvision transforms, DataLoader" in printed


def test_features():
    """What the table says of FusedSAM; the probes of the others are asked of pytorch_optimizer's SAM alone."""
    printed = run("features")
    header, _, *rows = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("|")]
    assert header[0] == "FusedSAM"
    assert header[1].startswith("pytorch_optimizer")
    answers = {row[0]: row[1] for row in rows}
    assert int(answers.pop("operator calls a step, ResNet-18 + Adam").split()[0]) < 20
    assert len(answers) == 20
    assert not {name: words for name, words in answers.items() if not words.startswith("yes")}
    assert any(row[2].startswith("no") for row in rows)


def test_the_rivals_compute_the_same():
    """A rival that did less would be no rival: one step of each from the same weights and gradients."""
    for base, options in rivals.BASES.values():
        for adaptive in (False, True):
            ends = {}
            for name, make in rivals.RIVALS.items():
                g = torch.Generator().manual_seed(0)
                params = [torch.nn.Parameter(torch.randn(n, generator=g)) for n in (5, 300)]
                opt = make(params, base, adaptive, **options)
                for seed in range(2):
                    set_grads(params, 2 * seed)
                    opt.first_step()
                    ends.setdefault(f"{name}, perturbed", torch.cat([p.detach().clone() for p in params]))
                    set_grads(params, 2 * seed + 1)
                    opt.second_step()
                ends[name] = torch.cat([p.detach().clone() for p in params])
            for name, end in ends.items():
                reference = "ReferenceSAM, perturbed" if "perturbed" in name else "ReferenceSAM"
                assert_near(end, ends[reference], 1e-5, f"{name}, {base.__name__}, adaptive {adaptive}")
