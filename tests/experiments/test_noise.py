"""benchmarks/paper/noise.py and sweep.search: what is chosen, what is trained with it, and what the tables say."""

from __future__ import annotations

import json
import math
import statistics

import pytest
from scipy.stats import ttest_rel

from benchmarks.paper import noise, table1_report
from benchmarks.paper.runs import Result, pack
from benchmarks.paper.sweep import Grid, search, step_of

TINY = {"dataset": "digits", "arch": "mlp", "width": 8, "train_size": 60, "validate": 50, "batch_size": 30}


class FakeRun:
    """A run of one epoch that ended with a score; NaN: it diverged; None: it is not finished."""

    def __init__(self, score: float | None) -> None:
        self.name, self.score = "fake", score

    def finished(self) -> bool:
        return self.score is not None

    def result(self) -> Result:
        diverged = math.isnan(self.score)
        return Result(self.name, {}, [] if diverged else [{"val_acc": self.score}], "nan" if diverged else None)


@pytest.mark.parametrize(
    ("scores", "chosen", "tried"),
    [
        ({-1: 0.1, 0: 0.5, 1: 0.2}, 0, 3),
        ({-1: 0.1, 0: 0.5, 1: 0.6, 2: 0.7, 3: 0.4}, 2, 5),  # extended upwards while the best is at the edge
        ({-3: 0.2, -2: 0.9, -1: 0.8, 0: 0.5, 1: 0.2}, -2, 5),  # and downwards
        ({-1: 0.5, 0: 0.6, 1: 0.6}, 0, 3),  # the smallest of equal ones
        ({-1: 0.1, 0: 0.5, 1: math.nan}, 0, 3),  # one that diverged is never the best
        ({k: 0.1 * k for k in range(-1, 5)}, 4, 6),  # no further than three positions
    ],
)
def test_search(scores, chosen, tried):
    runs_at = {0.5 * step_of(k): FakeRun(score) for k, score in scores.items()}
    runs, value = search(Grid("rho", -1, 1, scale=0.5), lambda values: runs_at[values["rho"]], key="val_acc")
    assert value == {"rho": 0.5 * step_of(chosen)}
    assert len(runs) == tried


def test_search_waits_for_its_runs_and_says_when_all_diverged():
    grid, scores = Grid("lr", -1, 1), {step_of(-1): 0.1, step_of(0): None, step_of(1): 0.2}
    assert search(grid, lambda values: FakeRun(scores[values["lr"]]), key="val_acc")[1] == {}
    with pytest.raises(noise.train.RunError, match="no run of a grid came to an end: fake"):
        search(grid, lambda values: FakeRun(math.nan), key="val_acc")


def test_grids_tell_a_run_that_is_not_finished_from_one_that_diverged():
    def run(name: str, rho: float, *accuracies: float, failed: str | None = None) -> Result:
        settings = {"arch": "vgg16", "base": "adam", "rho": rho, "epochs": 2}
        return Result(name, {"settings": settings}, [{"val_acc": x, "test_acc": x} for x in accuracies], failed)

    grid = [
        run("grid/adam-40-sam-rho0.1", 0.1, 0.5),
        run("grid/adam-40-sam-rho0.3", 0.3, 0.1, failed="the training loss is nan"),
        run("grid/adam-40-sam-rho1", 1.0, 0.25, 0.75),
    ]
    [(key, runs)] = noise.grids_of(grid).items()
    assert noise.grid_row(*key, runs)[-1] == "0.1: not finished, 0.3: diverged, 1: 75.0%"
    [row] = table1_report.grid_rows(grid, "rho")
    assert row[-1] == "0.1: not finished, 0.3: diverged, 1: 75.00%"


def test_the_ladder():
    assert [step_of(k) for k in range(-4, 4)] == [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0]


def test_gain_is_the_paired_t_interval():
    base, other = {0: 0.5, 1: 0.61, 2: 0.58, 3: 0.4}, {2: 0.7, 1: 0.66, 0: 0.63, 9: 0.1}
    interval = ttest_rel([0.63, 0.66, 0.7], [0.5, 0.61, 0.58]).confidence_interval(0.95)
    assert noise.gain(base, other) == f"{100 * interval.low:+.1f} to {100 * interval.high:+.1f} (n = 3)"
    assert noise.gain(base, {0: 0.7}) == "-"  # one pair has no interval
    whole, cut = {0: 0.5, 1: 0.6, 2: 0.7}, {0: 0.5, 1: 0.7}
    assert noise.gain(cut, whole).endswith(" (n = 2)")
    assert "n" not in noise.gain(whole, cut)
    assert noise.gain({0: 0.5, 1: 0.6}, {0: 0.5003, 1: 0.6003}) == "+0.03 to +0.03"


@pytest.mark.slow
def test_a_whole_sweep(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(noise.PRESETS["digits"], "flags", TINY)
    trained = []
    train = noise.train.train
    monkeypatch.setattr(noise.train, "train", lambda s, **how: (trained.append(s), train(s, **how))[1])
    flags = [
        "--noise",
        "40",
        "--bases",
        "adam",
        "--methods",
        "base",
        "long",
        "sam",
        "--seeds",
        "0",
        "1",
        "--epochs",
        "1",
        "--threads",
        "1",
    ]
    live = tmp_path / "live"
    assert noise.main([*flags, "--max-runs", "3", "--out", str(live)]) == 0
    assert "no run of the table is finished yet" in capsys.readouterr().out
    assert noise.main(["--report-only", "--out", str(live)]) == 1
    assert "holds no finished runs" in capsys.readouterr().err
    assert noise.main([*flags, "--out", str(live)]) == 0
    assert len(trained) == len({s.out for s in trained})  # none was trained twice

    def last(run) -> dict:
        return json.loads((live / run / "metrics.jsonl").read_text().splitlines()[-1])

    # the learning rate is the best of the grid, and rho was chosen with it
    rates = {s.lr for s in trained if "-lr" in s.out}
    lr = max(sorted(rates), key=lambda value: last(f"grid/adam-40-lr{value:g}")["val_acc"])
    rhos = {s.rho for s in trained if "-sam-rho" in s.out}
    rho = max(sorted(rhos), key=lambda value: last(f"grid/adam-40-sam-rho{value:g}")["val_acc"])
    assert len(rates) >= 3
    assert len(rhos) >= 3
    final = {s.out.rsplit("/", 1)[1]: s for s in trained if "/grid/" not in s.out}
    assert sorted(final) == [f"adam-40-{method}-{seed}" for method in ("base", "long", "sam") for seed in (0, 1)]
    assert {s.lr for s in final.values()} == {lr}
    assert {name: s.rho for name, s in final.items() if s.rho} == {"adam-40-sam-0": rho, "adam-40-sam-1": rho}
    assert {s.epochs for name, s in final.items() if "long" in name} == {2}
    assert {s.seed for s in trained if "/grid/" in s.out}.isdisjoint({0, 1})
    assert {s.label_noise for s in trained} == {0.4}

    # a row of the table by hand
    text = (live / "noise.md").read_text()
    accuracies = [100 * last(f"adam-40-sam-{seed}")["test_acc"] for seed in (0, 1)]
    row = next(x for x in text.splitlines() if x.startswith("| SAM ") and f"| {rho:g} |" in x)
    assert f"| {statistics.mean(accuracies):.1f} ± {statistics.stdev(accuracies):.1f} |" in row
    assert (live / "noise-40.png").stat().st_size > 1000

    # from the packed runs the same table, and nothing is left to train
    packed = tmp_path / "packed"
    pack(live, packed)
    assert noise.main(["--report-only", "--out", str(packed)]) == 0
    assert (packed / "noise.md").read_text() == text
    before = len(trained)
    assert noise.main([*flags, "--out", str(packed)]) == 0
    assert len(trained) == before
