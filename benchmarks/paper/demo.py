"""What SAM is for, in a minute: 40 % of the training labels are wrong, and a plain optimizer learns them by heart.

    python -m benchmarks.paper.demo --out runs/demo

Trains a small network on scikit-learn's digits with Adam, Adam + SAM and Adam + Momentum-SAM; the labels of the test
set are right. train.py does the training, and its folders are in --out. The network, the learning rate and each rho are
those of a trial with another seed that looked at this test set: the demo is an illustration, and noise.py the
experiment. The same command goes on with a demo that was cut. Writes demo.md and demo.png to --out.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import train
from sam_fused import loss_slice

from ..plots import band, figure, legend_above
from .sweep import Run, sweep

SETTING: dict[str, Any] = {
    "dataset": "digits",
    "label_noise": 0.4,
    "no_augment": True,
    "arch": "mlp",
    "width": 256,
    "epochs": 40,
    "base": "adam",
    "lr": 0.003,
    "threads": 1,  # the numbers then do not depend on how many cores there are
}
RHO = 1.0
METHODS: dict[str, dict[str, Any]] = {
    "Adam": {"rho": 0},
    "Adam + SAM": {"rho": RHO},
    "Adam + Momentum-SAM": {"method": "msam", "rho": 5},
}
RADII = [RHO * (i / 10) for i in range(21)]


def plan(out: Path, seed: int) -> list[Run]:
    return [
        Run.of(out, name.lower().replace(" ", ""), {}, {**SETTING, **flags, "seed": seed})
        for name, flags in METHODS.items()
    ]


# ---- what came out ----


@dataclass
class Outcome:
    """Of one optimizer: shares by epoch, the training loss at the end at each of RADII, and the time it took."""

    name: str
    test_acc: list[float]
    memorised: list[float]
    losses: list[float]
    seconds: float

    @property
    def sharpness(self) -> float:
        """By how much the loss rises within RHO."""
        return self.losses[RADII.index(RHO)] - self.losses[0]


def outcome(name: str, run: Run) -> Outcome:
    """Of a finished run. The loss is over all its training images and labels, wrong ones included, in eval mode."""
    s, result = run.settings, run.result()
    if result.why_not:
        raise train.RunError(f"{run.folder}: {result.why_not}")
    split = train.load_data(s)["train"]
    model = train.ARCHS[s.arch](s.width).eval()
    model.load_state_dict(torch.load(run.folder / "checkpoint.pt", weights_only=True)["model"])
    batch = train.Normalize(split.images)(split.images), split.labels
    return Outcome(
        name,
        [m["test_acc"] for m in result.metrics],
        [m["memorised"] for m in result.metrics],
        loss_slice(model, F.cross_entropy, [batch], RADII),
        sum(m["seconds"] for m in result.metrics),
    )


TITLES = ["", "test accuracy", "in the best epoch", "wrong labels memorised", "sharpness", "seconds"]


def cells(o: Outcome) -> list[str]:
    accuracies = [f"{o.test_acc[-1]:.1%}", f"{max(o.test_acc):.1%}"]
    return [o.name, *accuracies, f"{o.memorised[-1]:.1%}", f"{o.sharpness:.3f}", f"{o.seconds:.1f}"]


def compared(base: Outcome, other: Outcome, images: int) -> tuple[int, str]:
    """1, 0 or -1 as ``other`` is better, as good or worse after the last epoch, and the words for it.

    Within two standard errors of the difference, by the number of test ``images``, they are as good.
    """
    difference = other.test_acc[-1] - base.test_acc[-1]
    variance = sum(o.test_acc[-1] * (1 - o.test_acc[-1]) for o in (base, other)) / images
    points = f"{100 * abs(difference):.1f} points"
    if abs(difference) <= 2 * variance**0.5:
        return 0, f"no clear difference ({100 * difference:+.1f} points on {images} test images)"
    return (1, f"{points} better") if difference > 0 else (-1, f"{points} worse")


def closing(base: Outcome, others: list[Outcome], images: int) -> str:
    """What is seen, in a few sentences."""
    said = [
        f"After the last epoch {base.name} has {base.test_acc[-1]:.1%} of the test images right and gives back "
        f"{base.memorised[-1]:.0%} of the wrong labels that it was trained on."
    ]
    verdicts: dict[int, list[str]] = {1: [], 0: [], -1: []}
    for other in others:
        sign, words = compared(base, other, images)
        verdicts[sign].append(other.name)
        said.append(
            f"{other.name}: {other.test_acc[-1]:.1%}, {words}; {other.memorised[-1]:.0%} of the wrong labels, "
            f"{other.seconds / base.seconds:.1f} times the time."
        )
    ends = {1: "helped", 0: "made no clear difference", -1: "did harm"}
    said.append("So " + "; ".join(f"{' and '.join(names)} {ends[sign]}" for sign, names in verdicts.items() if names))
    return " ".join(said) + " in this run."


def draw(outcomes: list[Outcome], path: Path) -> None:
    with figure(path, 1, 3, size=(10, 3.7), dpi=160) as (drawn, (accuracy, memorised, loss)):
        for i, o in enumerate(outcomes):
            band(accuracy, [[100 * x for x in o.test_acc]], f"C{i}-", o.name)
            band(memorised, [[100 * x for x in o.memorised]], f"C{i}-", o.name)
            loss.plot(RADII, [x - o.losses[0] for x in o.losses], f"C{i}-", linewidth=1.3, label=o.name)
        accuracy.set(title="test accuracy, %", xlabel="epoch")
        memorised.set(title="wrong labels memorised, %", xlabel="epoch")
        loss.set(title="rise of the training loss at the end", xlabel="distance along the ascent direction")
        for axes in (accuracy, memorised, loss):
            axes.grid(alpha=0.3)
        legend_above(drawn)


def report(runs: list[Run], out: Path) -> str:
    """Write demo.md and demo.png to ``out``; returns the text."""
    outcomes = [outcome(name, run) for name, run in zip(METHODS, runs, strict=True)]
    s, env = runs[0].settings, runs[0].result().environment
    images = len(train.load_data(s)["test"].labels)
    load = os.getloadavg()[1]  # the mean of five minutes
    draw(outcomes, out / "demo.png")
    text = f"""{train.aligned([TITLES, *map(cells, outcomes)])}

{s.dataset}, {s.label_noise:.0%} of the training labels wrong; {s.arch} of width {s.width}, {s.epochs} epochs, batch
{s.batch_size}, seed {s.seed}; torch {env["torch"]}, {env["cpu"]}, threads: {env["threads"]}. Sharpness: the rise of
the training loss at distance {RHO:g} along its gradient. Seconds: wall time; the machine's load was {load:.1f}, its
cores are {env["cores"]}.

{closing(outcomes[0], outcomes[1:], images)}
"""
    train.save(out / "demo.md", text)
    return text


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="DIR")
    p.add_argument("--seed", type=int, default=1)
    args = p.parse_args(argv)

    def run() -> None:
        runs = plan(args.out, args.seed)
        sweep(lambda: [runs], "demo")
        print("\n" + report(runs, args.out) + f"\nThe curves: {args.out / 'demo.png'}")

    return train.exit_status("demo.py", run, "the same command goes on")


if __name__ == "__main__":
    sys.exit(main())
