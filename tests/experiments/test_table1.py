"""benchmarks/paper/table1.py: sweeps of tiny runs that are shared, cut, skipped, chosen from and reported."""

from __future__ import annotations

import csv
import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.paper import runs, table1, table1_report
from tests.helpers.paths import ROOT

pytestmark = pytest.mark.slow
TINY = "--dataset digits --train-size 60 --width 2 --epochs 2 --batch-size 30 --eval-size 50 --holdout 60 --threads 1"
SMALL = [*TINY.split(), "--archs", "vgg16", "--bases", "adam"]


@pytest.fixture
def trained(monkeypatch):
    """The names of the runs that were trained, in order."""
    names, train = [], table1.train.train

    def recorded(s, **options):
        names.append(Path(s.out).name)
        return train(s, **options)

    monkeypatch.setattr(table1.train, "train", recorded)
    return names


def test_a_whole_sweep(trained, tmp_path, capsys):
    # ResNet-18 in channels_last of width 2 or 4 corrupts the heap in torch 2.14.1's oneDNN on AVX2.
    flags = [*TINY.split(), "--width", "8", "--seeds", "0", "1", "--out", str(tmp_path)]
    assert table1.main([*flags, "--epochs", "1"]) == 0
    assert len(trained) == 16
    assert "16 of 16 runs, 00:00 left" in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "table1.csv").open()))
    assert [(r["network"], r["optimizer"], r["n"]) for r in rows] == [
        (arch, optimizer, "2") for arch in ("resnet18", "vgg16") for optimizer in ("sgd", "sgd+sam", "adam", "adam+sam")
    ]
    by_hand = [
        100 * json.loads((tmp_path / f"vgg16-adam+sam-{seed}" / "metrics.jsonl").read_text())["test_acc"]
        for seed in (0, 1)
    ]
    assert float(rows[-1]["mean"]) == pytest.approx(sum(by_hand) / 2)
    assert float(rows[-1]["std"]) == pytest.approx(abs(by_hand[0] - by_hand[1]) / 2**0.5)
    assert (tmp_path / "figure1.png").stat().st_size > 1000
    assert (tmp_path / "figure2.png").stat().st_size > 1000


def test_the_large_preset(trained, tmp_path, monkeypatch):
    """Momentum-SAM beside SAM, the test set seen once, and a grid that grows while its best value is at its edge."""
    flags = ["--preset", "large", "--recipe", "fair", *SMALL, "--eval-size", "0", "--validate", "40"]
    flags += ["--seeds", "0", "1", "--epochs", "3", "--grid-epochs", "2", "--out", str(tmp_path)]
    train = table1.train.train

    def smallest_wins(s, **options):
        metrics = train(s, **options)
        if s.holdout:
            value = s.rho or s.lr
            metrics[-1]["test_acc"] = 1 / (1 + value) if value >= 1e-4 else 0.0
            table1.train.write_metrics(Path(s.out), metrics)
        return metrics

    monkeypatch.setattr(table1.train, "train", smallest_wins)
    assert table1.main(flags) == 0
    lr, sam, msam = ("vgg16-adam-lr", "vgg16-adam+sam-rho", "vgg16-adam+msam-rho")
    values = {
        name: sorted(float(x.removeprefix(name)) for x in trained if x.startswith(name)) for name in (lr, sam, msam)
    }
    assert values[lr] == [3e-5, 1e-4, 3e-4, 1e-3, 3e-3]
    assert values[sam] == [0.0005, 0.0015, 0.005, 0.015, 0.05, 0.15]  # three steps down, and no more
    assert values[msam] == [0.005, 0.015, 0.05, 0.15, 0.5, 1.5]
    results = {r.name: r for r in runs.read_runs(tmp_path)}
    for optimizer, rho in (("adam", 0), ("adam+sam", 0.0005), ("adam+msam", 0.005)):
        for seed in (0, 1):
            r = results[f"vgg16-{optimizer}-{seed}"]
            assert (r.settings["lr"], r.settings["rho"], r.settings["amp"]) == (1e-4, rho, "bf16")
            assert [("val_acc" in m, "test_acc" in m) for m in r.metrics] == [(True, False)] * 2 + [(True, True)]
    grid = [r for r in results.values() if r.in_grid]
    assert {(len(r.metrics), r.settings["holdout"], r.settings["seed"]) for r in grid} == {(2, 60, table1.GRID_SEED)}
    rows = {(r["network"], r["optimizer"]): r for r in csv.DictReader((tmp_path / "table1.csv").open())}
    row = rows["vgg16", "adam+msam"]
    mine = [100 * results[f"vgg16-adam+msam-{seed}"].metrics[-1]["test_acc"] for seed in (0, 1)]
    assert (row["n"], row["paper_mean"]) == ("2", "")
    assert float(row["mean"]) == pytest.approx(sum(mine) / 2)
    text = (tmp_path / "table1.md").read_text()
    assert "| VGG16 | Adam + Momentum-SAM | - |" in text
    assert "ResNet-18" not in text  # of which there are no runs
    assert "40 images held out for the accuracy by epoch, tested after the last epoch only, bf16 autocast" in text
    assert "0.0005: " in text


def test_the_preset_of_all_images_chooses_by_the_large_one_s_runs(tmp_path):
    """It begins with those that were run for results/large-fair, and trains on all images only in its table."""
    assert runs.main(["--grids", str(ROOT / "results" / "large-fair"), str(tmp_path)]) == 0
    flags = ["--preset", "all", "--recipe", "fair", "--archs", "vgg16", "--bases", "adam", "--out", str(tmp_path)]
    rates, rhos, last = table1.plan(table1.parse(flags))
    assert all(run.finished() for run in rates + rhos)
    found = {run.settings.lr for run in last}, {(run.settings.method, run.settings.rho) for run in last}
    assert found == ({0.001}, {("sam", 0), ("sam", 0.0015), ("msam", 0.05)})
    assert {(run.settings.train_size, run.settings.validate, run.settings.epochs) for run in last} == {(None, None, 30)}
    assert len(last) == 9
    assert not any(run.finished() for run in last)


def test_packing_loses_no_runs(tmp_path, capsys):
    """A folder with some of the runs does not take the place of all of them."""
    large, to = ROOT / "results" / "large-fair", tmp_path / "to"
    assert runs.main([str(large), str(to)]) == 0
    before = (to / runs.PACKED).read_bytes()
    assert runs.main(["--grids", str(large), str(to)]) == 1
    assert "has 36 runs that would be lost, such as resnet18-adam" in capsys.readouterr().err
    assert (to / runs.PACKED).read_bytes() == before


def test_packing_loses_no_diverged_run(tmp_path, capsys):
    settings = {"epochs": 1, "seed": 0}
    for name in ("one", "other"):
        (tmp_path / "live" / name).mkdir(parents=True)
        (tmp_path / "live" / name / "config.json").write_text(json.dumps({"settings": settings, "environment": {}}))
        (tmp_path / "live" / name / "failed.txt").write_text("the training loss is nan")
    flags = [str(tmp_path / "live"), str(tmp_path / "to")]
    assert runs.main(flags) == 0
    for path in (tmp_path / "live" / "other").iterdir():
        path.unlink()
    assert runs.main(flags) == 1
    assert "has 1 runs that would be lost, such as other" in capsys.readouterr().err


def test_finished_runs_are_skipped_also_without_their_checkpoint(trained, tmp_path, capsys):
    flags = [*SMALL, "--seeds", "0", "--out", str(tmp_path)]
    assert table1.main([*flags, "--max-runs", "1"]) == 0
    (tmp_path / "vgg16-adam-0" / "checkpoint.pt").unlink()
    assert table1.main(flags) == 0
    assert trained == ["vgg16-adam-0", "vgg16-adam+sam-0"]
    table = (tmp_path / "table1.md").read_text()
    (tmp_path / "table1.md").unlink()
    assert table1.main(["--report-only", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "table1.md").read_text() == table
    assert len(trained) == 2
    capsys.readouterr()
    assert table1.main([*flags, "--width", "4"]) == 1
    assert "was run with width = 2, not 4" in capsys.readouterr().err


def test_a_sweep_goes_on_from_runs_jsonl(trained, tmp_path, capsys):
    """The runs that stand in it are skipped, the others trained; the tables are those of the folders."""
    live, packed = tmp_path / "live", tmp_path / "packed"
    flags = [*SMALL, "--recipe", "fair", "--seeds", "0"]
    assert table1.main([*flags, "--max-runs", "7", "--out", str(live)]) == 0
    (live / "grid" / "vgg16-adam-lr0.001" / "failed.txt").write_text("the training loss is nan\n")
    assert runs.main([str(live), str(packed)]) == 0
    assert [path.name for path in packed.iterdir()] == ["runs.jsonl.gz"]
    for held, first in zip(runs.read_runs(packed), runs.read_runs(live), strict=True):
        assert (held.name, held.config, held.failed) == (first.name, first.config, first.failed)
        for row, at_first in zip(held.metrics, first.metrics, strict=True):
            assert row == {k: pytest.approx(x, rel=1e-7) if x is not None else None for k, x in at_first.items()}
    del trained[:]
    assert table1.main([*flags, "--out", str(packed)]) == 0
    assert trained == ["vgg16-adam+sam-0"]
    assert table1.main([*flags, "--out", str(live)]) == 0
    tables = [(out / "table1.md").read_text() for out in (live, packed)]
    assert tables[0] == tables[1]
    assert runs.main([str(packed), str(packed)]) == 0  # what was trained comes to what was packed
    assert len(gzip.decompress((packed / runs.PACKED).read_bytes()).splitlines()) == 8 + 8 * 2 + 1
    capsys.readouterr()
    assert table1.main([*flags, "--width", "4", "--out", str(packed)]) == 1
    assert "was run with width = 2, not 4" in capsys.readouterr().err


@pytest.mark.parametrize("line", ["{", "[]", '{"epoch": 1}', '{"run": "vgg16-adam-1", "epoch": 1}'])
def test_a_bad_line_of_runs_jsonl(line, tmp_path, capsys):
    text = '{"run": "vgg16-adam-0", "config": {}}\n' + line + "\n"
    (tmp_path / runs.PACKED).write_bytes(gzip.compress(text.encode()))
    assert table1.main(["--report-only", "--out", str(tmp_path)]) == 1
    assert "runs.jsonl.gz, line 2: expected a JSON object with a run's name" in capsys.readouterr().err


def test_a_file_of_runs_that_is_cut(tmp_path, capsys):
    whole = gzip.compress(b'{"run": "vgg16-adam-0", "config": {}}\n')
    for content in (whole[:-4], b"{}"):
        (tmp_path / runs.PACKED).write_bytes(content)
        assert table1.main(["--report-only", "--out", str(tmp_path)]) == 1
        assert "runs.jsonl.gz: expected a gzip file" in capsys.readouterr().err


def test_a_cut_run_goes_on(trained, tmp_path, monkeypatch, capsys):
    flags = [*SMALL, "--seeds", "0", "--out", str(tmp_path)]
    evaluate, calls = table1.train.evaluate, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluate(*args)

    monkeypatch.setattr(table1.train, "evaluate", interrupted)
    assert table1.main(flags) == 130
    assert "the same command goes on" in capsys.readouterr().err
    first = (tmp_path / "vgg16-adam-0" / "metrics.jsonl").read_text()
    table1.main([*flags, "--dry-run"])
    assert "1 of 2 epochs" in capsys.readouterr().out
    assert table1.main(flags) == 0
    assert trained == ["vgg16-adam-0", "vgg16-adam-0", "vgg16-adam+sam-0"]
    rows = (tmp_path / "vgg16-adam-0" / "metrics.jsonl").read_text()
    assert rows.startswith(first)  # the seconds with it: the first epoch was not trained again
    assert rows.count("\n") == 2


def test_a_run_that_another_process_has_is_left_to_it(trained, tmp_path, capsys):
    flags = [*SMALL, "--seeds", "0", "1", "--out", str(tmp_path)]
    run = table1.plan(table1.parse(flags))[-1][0]
    with run.locked() as mine:
        assert mine
        assert table1.main(flags) == 0
        assert run.name == "vgg16-adam-0"
        assert trained == ["vgg16-adam+sam-0", "vgg16-adam-1", "vgg16-adam+sam-1"]
        table1.main([*flags, "--dry-run"])
        assert "to do, with a process" in capsys.readouterr().out
    assert table1.main(flags) == 0
    assert trained[3:] == ["vgg16-adam-0"]


def test_two_processes_share_a_sweep(tmp_path):
    command = [sys.executable, "-m", "benchmarks.paper.table1", *SMALL, "--out", str(tmp_path), "--recipe", "fair"]
    both = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = "".join(process.communicate(timeout=120)[0] for process in both)
    assert [process.returncode for process in both] == [0, 0]
    names = [line.split(":")[0] for line in printed.splitlines() if " runs, " in line]
    assert len(names) == len(set(names)) == 12


def test_the_fair_recipe_takes_the_best_of_its_grids(trained, tmp_path, capsys):
    flags = [*SMALL, "--recipe", "fair", "--seeds", "0", "--out", str(tmp_path)]
    assert table1.main([*flags, "--max-runs", "3"]) == 0
    assert "no run of the table is finished yet" in capsys.readouterr().out
    for lr, accuracy in (("0.0003", 0.3), ("0.001", 0.2), ("0.003", 0.9)):
        path = tmp_path / "grid" / f"vgg16-adam-lr{lr}" / "metrics.jsonl"
        rows = [json.loads(x) for x in path.read_text().splitlines()]
        rows[-1]["test_acc"] = accuracy
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert {run.settings.lr for run in table1.plan(table1.parse(flags))[1]} == {3e-3}
    table1.main([*flags, "--max-runs", "3"])
    (tmp_path / "grid" / "vgg16-adam+sam-rho0.05" / "failed.txt").write_text("the training loss is nan\n")
    stages = table1.plan(table1.parse(flags))
    assert [len(stage) for stage in stages] == [3, 3, 2]
    base, sam = (run.settings for run in stages[2])
    (tmp_path / "grid" / "vgg16-adam-lr0.003" / "metrics.jsonl").rename(tmp_path / "kept")
    stages = table1.plan(table1.parse(flags))  # a learning rate that is not chosen yet is compared with no run's
    assert [len(stage) for stage in stages] == [3, 3, 2]
    assert not stages[0][2].finished()
    (tmp_path / "kept").rename(tmp_path / "grid" / "vgg16-adam-lr0.003" / "metrics.jsonl")
    assert (base.lr, base.rho, base.holdout) == (3e-3, 0, None)
    assert sam.lr == 3e-3
    assert sam.rho in (0.015, 0.15)
    assert {run.settings.holdout for run in stages[0] + stages[1]} == {60}
    assert base.seed not in {run.settings.seed for run in stages[0] + stages[1]}
    table1.main(flags)
    assert len(trained) == 8
    text = (tmp_path / "table1.md").read_text()
    assert "# Table I, recipe fair" in text
    assert "0.0003: 30.00%, 0.001: 20.00%, 0.003: 90.00%" in text


def test_a_run_that_diverges_does_not_end_the_sweep(trained, tmp_path, monkeypatch, capsys):
    epoch = table1.train.train_epoch

    def train_epoch(s, *args):
        if s.rho == 0:
            raise FloatingPointError("the training loss is nan at batch 0")
        return epoch(s, *args)

    monkeypatch.setattr(table1.train, "train_epoch", train_epoch)
    flags = [*SMALL, "--seeds", "0", "--out", str(tmp_path)]
    assert table1.main(flags) == 0
    assert table1.main(flags) == 0
    assert trained == ["vgg16-adam-0", "vgg16-adam+sam-0"]
    printed = capsys.readouterr().out
    assert "vgg16-adam-0: the training loss is nan" in printed
    assert "Not in the tables: vgg16-adam-0, the training loss is nan at batch 0." in printed


def made_up(seed: int, epochs: int = 3, failed: str | None = None, test_loss: float | None = 1.0) -> runs.Result:
    settings = {"arch": "vgg16", "base": "sgd", "rho": 0.0, "lr": 0.1, "seed": seed, "epochs": 3}
    settings["measure_rho"] = 0.05
    environment = {"torch": "2", "cpu": "one", "threads": 1}
    row = {"train_loss": 1.0, "train_acc": 0.5, "test_loss": test_loss, "test_acc": 0.5, "sharpness": 0.1}
    config = {"settings": settings, "environment": environment}
    return runs.Result(f"vgg16-sgd-{seed}", config, [row] * epochs, failed)


def test_figures_show_the_runs_of_the_table():
    """While there are none, those that have begun."""
    whole, diverged, begun = made_up(0), made_up(1, 2, "the training loss is nan"), made_up(2, 1)
    assert table1_report.drawable([whole, diverged, begun]) == {("vgg16", "sgd"): [whole]}
    assert table1_report.drawable([diverged, begun]) == {("vgg16", "sgd"): [diverged, begun]}


def test_a_test_loss_that_is_not_finite():
    [row] = table1_report.last_epoch_rows([made_up(0), made_up(1, test_loss=None)], 0.05)
    assert row == ["VGG16", "SGD", "0.1", "-", "1.000", "50.0%", "-", "0.1000"]


def test_a_sweep_that_tests_after_the_last_epoch_only(tmp_path):
    assert table1.main([*SMALL, "--seeds", "0", "--eval-size", "0", "--out", str(tmp_path)]) == 0
    assert ", tested after the last epoch only;" in (tmp_path / "table1.md").read_text()
    assert (tmp_path / "figure1.png").stat().st_size > 1000


def test_the_paper_preset_is_the_papers(capsys):
    for recipe, rho, lr in (("paper-text", 0.05, 0.1), ("paper-code", 2.0, 1e-3)):
        runs = table1.plan(table1.parse(["--preset", "paper", "--recipe", recipe]))[-1]
        assert len(runs) == 24
        assert len({run.folder for run in runs}) == 24
        s = next(run.settings for run in runs if run.name == "resnet18-sgd+sam-2")
        assert (s.width, s.epochs, s.batch_size, s.train_size, s.holdout) == (64, 200, 128, None, None)
        assert (s.rho, s.lr, s.seed) == (rho, lr, 2)


def test_the_paired_interval():
    """By hand: differences 1, 2, 6; mean 3, deviation sqrt(7); t(0.975, 2) = 4.3027."""
    base = table1_report.Cell("vgg16", "sgd", {0: 10.0, 1: 20.0, 2: 30.0, 3: 99.0})
    sam = table1_report.Cell("vgg16", "sgd+sam", {0: 11.0, 1: 22.0, 2: 36.0})
    n, mean, (low, high) = table1_report.paired(base, sam)
    assert (n, mean) == (3, 3)
    assert (low, high) == (pytest.approx(3 - 4.302653 * (7 / 3) ** 0.5), pytest.approx(3 + 4.302653 * (7 / 3) ** 0.5))


def test_an_empty_folder(tmp_path, capsys):
    assert table1.main(["--report-only", "--out", str(tmp_path)]) == 1
    assert "holds no runs" in capsys.readouterr().err
