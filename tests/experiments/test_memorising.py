"""benchmarks/paper/memorising.py: when a signal is first seen, and what the table says of it."""

from __future__ import annotations

import json

import pytest

from benchmarks.paper import memorising
from benchmarks.paper.runs import Result, pack, read_runs


def result(memorised: list[float], accuracy: list[float], sharpness: list[float]) -> Result:
    rows = zip(memorised, accuracy, sharpness, strict=True)
    metrics = [{"memorised": m, "val_acc": a, "sharpness": s, "test_acc": a} for m, a, s in rows]
    return Result("mlp-sgd-40-0", {"settings": {"measure_rho": 1.0, "epochs": len(metrics)}}, metrics)


def test_signals():
    r = result(
        memorised=[0.11, 0.05, 0.1, 0.19, 0.21, 0.5],
        accuracy=[0.4, 0.5, 0.48, 0.55, 0.53, 0.5],  # 2 points below the best, and then 5
        sharpness=[3.0, 1.0, 1.1, 1.3, 0.9, 2.0],
    )
    assert memorising.signals(r) == {"memorised": 5, "accuracy": 6, "sharpness": 4}
    assert memorising.order([r, r]) == "2, 0, 0"
    flat = result([0.1] * 3, [0.5, 0.6, 0.6], [1.0, 1.0, 0.9])
    assert memorising.signals(flat) == dict.fromkeys(memorising.SIGNALS)
    assert memorising.order([flat, r]) == "1, 0, 1"
    assert memorising.epochs_of([flat, flat], "accuracy") == "never"
    assert memorising.epochs_of([flat, r], "accuracy") == "6 (6 to 6), in 1 of 2"
    late = result([0.1] * 3, [0.6, 0.5, 0.6], [1.0, 1.0, 0.9])
    assert memorising.epochs_of([late, r], "accuracy") == "4 (2 to 6)"
    assert memorising.order([late]) == "0, 1, 0"


def test_the_table_names_what_it_leaves_out():
    whole, cut = (result([0.1] * 3, [0.5, 0.6, 0.6], [1.0, 1.0, 0.9]) for _ in range(2))
    for seed, r in enumerate((whole, cut)):
        r.name = f"mlp-sgd-40-{seed}"
        s = {"arch": "mlp", "base": "sgd", "label_noise": 0.4, "seed": seed, "dataset": "digits", "validate": 9}
        r.config["settings"] |= s
        r.config["environment"] = {"torch": "2", "cpu": "one", "threads": 1}
    cut.failed = "the training loss is nan"
    text = memorising.markdown([whole, cut])
    assert "| mlp | SGD | 40 % | 1 |" in text
    assert "Not in the tables: mlp-sgd-40-1, the training loss is nan." in text


@pytest.mark.slow
def test_a_study(tmp_path, capsys):
    out, packed = tmp_path / "live", tmp_path / "packed"
    flags = ["--networks", "mlp", "--seeds", "0", "1", "--epochs", "2"]
    assert memorising.main([*flags, "--out", str(out)]) == 0
    runs = {r.name: r for r in read_runs(out)}
    assert len(runs) == 8
    s = runs["mlp-adam-40-1"].settings
    assert (s["lr"], s["rho"], s["label_noise"], s["seed"], s["augment"]) == (0.001, 0, 0.4, 1, False)
    assert all(r.metrics[-1]["sharpness"] > 0 for r in runs.values())
    text = (out / "memorising.md").read_text()
    assert "| mlp | Adam | 40 % | 2 |" in text
    assert (out / "memorising.png").stat().st_size > 1000
    pack(out, packed)
    capsys.readouterr()
    assert memorising.main(["--report-only", "--out", str(packed)]) == 0
    assert (packed / "memorising.md").read_text() == text == capsys.readouterr().out[:-1]
    rows = [json.loads(x) for x in (out / "mlp-sgd-0-0" / "metrics.jsonl").read_text().splitlines()]
    assert "memorised" not in rows[-1]
    assert memorising.main(["--report-only", "--out", str(tmp_path)]) == 1
    assert "holds no finished runs" in capsys.readouterr().err
