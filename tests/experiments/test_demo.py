"""benchmarks/paper/demo.py: what it says of runs in which SAM won, lost and tied; and a whole small one."""

from __future__ import annotations

import pytest
import torch

import train
from benchmarks.paper import demo
from benchmarks.paper.demo import Outcome, closing


def made_up(name: str, accuracy: float, memorised: float = 0.1, seconds: float = 10.0) -> Outcome:
    return Outcome(name, [0.5, 0.97, accuracy], [0.0, 0.0, memorised], [0.1] * len(demo.RADII), seconds)


BASE = made_up("Adam", 0.70, 0.8)


def test_the_closing_sentence_where_sam_wins():
    text = closing(BASE, [made_up("Adam + SAM", 0.9, seconds=17)], 360)
    assert text == (
        "After the last epoch Adam has 70.0% of the test images right and gives back 80% of the wrong labels that it "
        "was trained on. Adam + SAM: 90.0%, 20.0 points better; 10% of the wrong labels, 1.7 times the time. "
        "So Adam + SAM helped in this run."
    )


def test_the_closing_sentence_where_sam_loses():
    text = closing(BASE, [made_up("Adam + SAM", 0.19)], 360)
    assert "Adam + SAM: 19.0%, 51.0 points worse;" in text
    assert text.endswith("So Adam + SAM did harm in this run.")


@pytest.mark.parametrize(("accuracy", "points"), [(0.72, "+2.0"), (0.70, "+0.0"), (0.66, "-4.0")])
def test_the_closing_sentence_where_they_tie(accuracy, points):
    text = closing(BASE, [made_up("Adam + SAM", accuracy)], 360)
    assert f"no clear difference ({points} points on 360 test images);" in text
    assert text.endswith("So Adam + SAM made no clear difference in this run.")


def test_two_standard_errors_are_a_difference():
    """Of 70 % and 78 %, n = 360: 2 sqrt((0.7 * 0.3 + 0.78 * 0.22) / 360) = 6.5 points; of 36, 20.6."""
    other = made_up("Adam + SAM", 0.78)
    assert demo.compared(BASE, other, 360)[0] == 1
    assert demo.compared(other, BASE, 360)[0] == -1
    assert demo.compared(BASE, other, 36)[0] == 0


def test_the_closing_sentence_tells_the_optimizers_apart():
    win, lose, tie = made_up("A", 0.9), made_up("B", 0.5), made_up("C", 0.7)
    assert closing(BASE, [lose, win, tie], 360).endswith(
        "So A helped; C made no clear difference; B did harm in this run."
    )
    assert closing(BASE, [win, made_up("B", 0.9)], 360).endswith("So A and B helped in this run.")


@pytest.mark.slow
def test_a_small_demo(tmp_path, monkeypatch, capsys):
    small = {**demo.SETTING, "train_size": 200, "width": 16, "epochs": 3, "threads": 1}
    monkeypatch.setattr(demo, "SETTING", small)
    assert demo.main(["--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("test accuracy ") == 4
    text = (tmp_path / "demo.md").read_text()
    assert text in printed
    assert str(tmp_path / "demo.png") in printed
    assert (tmp_path / "demo.png").stat().st_size > 10_000
    runs = demo.plan(tmp_path, 0)
    for name, run, row in zip(demo.METHODS, runs, text.splitlines()[2:], strict=False):
        metrics = run.result().metrics
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        best = max(m["test_acc"] for m in metrics)
        assert cells[:4] == [name, f"{metrics[-1]['test_acc']:.1%}", f"{best:.1%}", f"{metrics[-1]['memorised']:.1%}"]
    (tmp_path / "demo.md").unlink()
    assert demo.main(["--out", str(tmp_path)]) == 0  # of the runs that are there
    assert (tmp_path / "demo.md").read_text() == text


@pytest.mark.slow
def test_no_outcome_of_a_run_that_another_process_has_not_finished(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "SETTING", {**demo.SETTING, "train_size": 200, "width": 16, "epochs": 2, "threads": 1})
    *_, last = demo.plan(tmp_path, 1)

    def cut(row):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train.train(last.settings, after_epoch=cut)
    with last.locked() as mine:
        assert mine
        assert demo.main(["--out", str(tmp_path)]) == 1
    assert f"{last.folder}: 1 of 2 epochs" in capsys.readouterr().err
    assert not (tmp_path / "demo.md").exists()
    for path in last.folder.iterdir():
        path.unlink()
    with pytest.raises(train.RunError, match="not begun"):
        demo.outcome("", last)


@pytest.mark.slow
def test_the_loss_at_the_end_is_the_runs(tmp_path, monkeypatch):
    """Of its own training images and labels; at distance 0, what the network of the checkpoint has."""
    monkeypatch.setattr(demo, "SETTING", {**demo.SETTING, "train_size": 200, "width": 16, "epochs": 2, "threads": 1})
    runs = demo.plan(tmp_path, 0)
    demo.sweep(lambda: [runs], "demo")
    for name, run in zip(demo.METHODS, runs, strict=True):
        o = demo.outcome(name, run)
        split = train.load_data(run.settings)["train"]
        model = train.build(run.settings).model
        model.load_state_dict(torch.load(run.folder / "checkpoint.pt", weights_only=True)["model"])
        loss, _ = train.evaluate(model, split, train.Normalize(split.images))
        assert o.losses[0] == pytest.approx(loss, rel=1e-5)
        assert o.sharpness > 0
