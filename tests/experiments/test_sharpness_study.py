"""benchmarks/paper/sharpness_study.py on the networks of a tiny sweep."""

from __future__ import annotations

import argparse
import json

import pytest
import torch

import train
from benchmarks.paper import sharpness_study as study
from benchmarks.paper import table1

pytestmark = pytest.mark.slow

TINY = "--dataset digits --train-size 60 --width 8 --epochs 3 --batch-size 30 --eval-size 50 --threads 1 --seeds 0"
TINY += " --archs vgg16 --methods base sam msam"


def test_the_study_of_a_sweep(tmp_path, capsys):
    assert table1.main([*TINY.split(), "--keep-every", "1", "--out", str(tmp_path)]) == 0
    flags = ["--runs", str(tmp_path), "--threads", "1"]
    assert study.main([*flags, "--images", "60", "--every", "2", "--directions", "2"]) == 0
    held = json.loads((tmp_path / "sharpness.json").read_text())
    assert len(held) == 6
    rows = held["vgg16-adam-0"]
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    by_rho = {row["rho"]: row for row in rows[-1]["by_rho"]}
    assert by_rho[0.05]["first_order"] == pytest.approx(rows[-1]["first_order"], rel=1e-6)
    assert by_rho[0.05]["realised"] == pytest.approx(rows[-1]["realised"], rel=1e-3, abs=1e-6)
    assert by_rho[1.0]["first_order"] == pytest.approx(100 * by_rho[0.01]["first_order"])
    for name in ("sharpness_training.png", "sharpness_rho.png", "sharpness_loss.png"):
        assert (tmp_path / name).stat().st_size > 1000
    text = (tmp_path / "sharpness.md").read_text()
    assert text.count("| VGG16 | Adam + SAM |") == 3
    assert text.count("| VGG16 | Adam + Momentum-SAM |") == 2  # which records no sharpness in training
    assert "nan" not in text
    capsys.readouterr()
    assert study.main([*flags, "--images", "60", "--every", "5"]) == 1
    assert "has vgg16-adam+msam-0 in epochs [1, 2, 3], which --every 5 does not choose" in capsys.readouterr().err
    for flag in ("--images", "--directions"):
        assert study.main([*flags, "--every", "2", "--images", "60", "--directions", "2", flag, "30"]) == 1
        assert f"has vgg16-adam+msam-0 with {flag}" in capsys.readouterr().err
    for path in tmp_path.glob("*/*.pt"):
        path.unlink()
    (tmp_path / "sharpness.md").unlink()
    assert study.main([*flags, "--report-only"]) == 0
    assert (tmp_path / "sharpness.md").read_text() == text
    (tmp_path / "sharpness.json").unlink()
    capsys.readouterr()
    assert study.main(flags) == 1
    assert "train with table1.py --keep-every K" in capsys.readouterr().err


def test_where_the_proposition_holds():
    assert study.reach({0.01: 1.02, 0.1: 1.19, 1.0: 1.21, 2.0: 1.0}) == 0.1
    assert study.reach({0.01: 0.7}) is None


def test_the_highest_epoch():
    metrics = [{"sharpness": x} for x in (2.0, 5.0, 3.0)]
    result = study.Result("run", {"settings": {"measure_rho": 0.05, "epochs": 3}}, metrics)
    assert study.peak(result) == (2, pytest.approx(2.5))


def test_at_equal_loss():
    """The faster run is looked at where it came to the slower one's lowest loss."""

    def result(*losses_and_values):
        metrics = [{"train_loss": loss, "sharpness": value} for loss, value in losses_and_values]
        return study.Result("run", {"settings": {"measure_rho": 0.05, "epochs": len(metrics)}}, metrics)

    fast, slow = result((2.0, 9.0), (1.2, 8.0), (0.3, 7.0)), result((2.0, 6.0), (1.25, 4.0), (1.5, 5.0))
    assert study.at_equal_loss(fast, slow) == (1.25, 0.5)
    assert study.at_equal_loss(slow, fast) == (1.25, 2.0)


def test_the_batches_are_the_runs_own_images(tmp_path):
    """Normalised, so compared by their number and labels; full batches only."""
    flags = "--dataset digits --train-size 100 --batch-size 30 --seed 1"
    s = train.settle(train.parse(flags.split()))
    settings = {k: v for k, v in vars(s).items() if k not in train.FREE_ON_RESUME}
    result = study.Result("run", {"settings": settings})
    batches = study.batches_of(result, argparse.Namespace(images=80, data=None))
    assert [x.shape for x, _ in batches] == [(30, 3, 32, 32)] * 2
    train_split = train.load_data(s)["train"]
    normal = {x.numpy().tobytes() for x in train.Normalize(train_split.images)(train_split.images)}
    assert all(x.contiguous().numpy().tobytes() in normal for x in torch.cat([x for x, _ in batches]))
