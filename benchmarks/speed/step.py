"""The optimizer's part of a step, with gradients in place: FusedSAM beside its rivals.

    python -m benchmarks.speed.step                                     # everything
    python -m benchmarks.speed.step --lists resnet18 --threads 2        # a part
    python -m benchmarks.speed.step --davda54 sam.py                    # with davda54/sam, which is on no index
    python -m benchmarks.speed.step --report-only                       # step.md and step.png of step.json

A cell is a list of parameters, a base, SAM or ASAM, and a number of threads, in a process of its own. There all rivals
run, each once a round and in another order every round, with nothing in the caches, as after a forward and a backward
pass; each is compared with FusedSAM round by round. Steps that fit into the caches are measured there too, when they
are made a second time at once. HeavyBall's are measured where it is installed. A cell that was disturbed is measured
anew, up to twice. Writes step.json (every time that was taken), step.md and step.png to --out. A run with a cell that
was disturbed all the same says so and exits with 1.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from sam_fused import FusedMSAM, FusedSAM

from ..plots import bars, figure
from ..tables import table
from . import rivals, timing
from .floor import Floor
from .rivals import BASES, RHO, RIVALS, two_calls
from .workloads import LISTS, SMALL, parameters

Make = Callable[[], Callable[[], object]]

OURS = "FusedSAM"
HEAVYBALL = "HeavyBall SAMWrapper + AdamW, compiled", "HeavyBall MSAMLaProp, compiled"
PLAIN = "base", "base, fused=True"
TWO_PASSES = [*(n for n in RIVALS if n != OURS), "davda54/sam", HEAVYBALL[0]]
OTHERS = ["FusedMSAM", HEAVYBALL[1], *PLAIN, "FusedSAM, rho=0"]
CHART = {"resnet18": "ResNet-18, 62 tensors", "1000x100": "1000 tensors of 100"}

# ---- measuring ----


def makers(
    shapes: list[torch.Size], base: str, adaptive: bool, davda54: type | None, compiled: bool
) -> dict[str, Make]:
    """Each makes an optimizer and returns its step.

    Those that restore the weights in place, or have no SAM, share them. davda54/sam gives a parameter other memory in
    every step, for which FusedSAM would have to look anew.
    """
    cls, options = BASES[base]
    params = parameters(shapes)

    def own() -> list[nn.Parameter]:
        copies = [nn.Parameter(p.detach().clone()) for p in params]
        for copy, p in zip(copies, params, strict=True):
            copy.grad = p.grad
        return copies

    found: dict[str, Make] = {
        n: lambda make=make: two_calls(make(params, cls, adaptive, **options)) for n, make in RIVALS.items()
    }
    if davda54 is not None:
        moving = own()
        found["davda54/sam"] = lambda: two_calls(davda54(moving, cls, rho=RHO, adaptive=adaptive, **options))
    one_pass = own()
    found |= {
        "FusedMSAM": lambda: FusedMSAM(one_pass, cls, rho=RHO, adaptive=adaptive, **options).step,
        PLAIN[0]: lambda: cls(params, **options).step,
        PLAIN[1]: lambda: cls(params, fused=True, **options).step,
        "FusedSAM, rho=0": lambda: FusedSAM(params, cls, rho=0.0, **options).step,
    }
    theirs = rivals.heavyball() if compiled else None
    for name, passes in zip(HEAVYBALL, (2, 1), strict=True):
        if theirs is not None:
            found[name] = lambda passes=passes: rivals.heavyball_step(theirs, own(), passes, **options)
    return found


def peak_extra(make: Make, state_bytes: int) -> int:
    """Most bytes that making the optimizer and two steps hold at once, less the base's state."""
    with torch.profiler.profile(profile_memory=True) as profile:
        step = make()
        step()
        step()
    held = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak - state_bytes


def run(name: str, base: str, adaptive: bool, threads: int, args: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(threads)
    davda54 = rivals.davda54_sam(args.davda54) if args.davda54 else None
    shapes = LISTS[name]()
    numel, plainest = sum(s.numel() for s in shapes), (base, adaptive) == ("adam", False)
    # torch.compile unrolls HeavyBall's loops over the tensors, and does so again for another number of threads.
    compiled = args.heavyball and name == "resnet18" and plainest and threads == max(args.threads)
    made = makers(shapes, base, adaptive, davda54, compiled)
    floor = Floor(numel, base, adaptive)
    calls: dict[str, Callable[[], object]] = {**{n: make() for n, make in made.items()}, "floor": floor}
    measured = timing.measure(calls, args.rounds, OURS, cold=True, again=numel < SMALL)
    for part in (measured, measured.get("again")):
        if part:
            del part["ms"]["floor"]
    cell = {
        "list": name,
        "tensors": len(shapes),
        "numel": numel,
        "base": base,
        "adaptive": adaptive,
        "threads": threads,
    }
    cell |= {"floor_ms": round(floor.ms, 4), **measured}
    if args.memory and plainest and threads == args.threads[0]:
        state = 2 * 4 * numel + 4 * len(shapes)
        # davda54/sam frees memory that the profiler has not seen allocated, and does not count.
        counted = [n for n in made if n in (*RIVALS, "FusedMSAM")]
        cell["peak_extra"] = {n: peak_extra(made[n], state) / (4 * numel) for n in counted}
    return cell


# ---- reporting ----


def kind_of(cell: dict) -> str:
    return f"{'ASAM' if cell['adaptive'] else 'SAM'} + {cell['base']}"


def comparison(cells: list[dict], names: list[str], more: dict[str, Callable[[dict], str]]) -> list[str]:
    """A row a cell: milliseconds and the ratio to FusedSAM's of those of ``names`` that were measured."""
    names = [n for n in names if any(n in c["ms"] for c in cells)]

    def entry(cell: dict, name: str) -> str:
        return f"{timing.median(cell, name):.2f}: {timing.ratio_words(cell, name)}" if name in cell["ms"] else ""

    rows = [
        [c["list"], kind_of(c), c["threads"], timing.rounds(c), f"{timing.median(c, OURS):.2f}"]
        + [column(c) for column in more.values()]
        + [entry(c, n) for n in names]
        for c in cells
    ]
    return table(["list", "optimizer", "threads", "n", OURS, *more, *names], rows)


def markdown(content: dict[str, Any]) -> str:
    cells = content["cells"]
    missing = [n for n in ("davda54/sam", HEAVYBALL[0]) if not any(n in c["ms"] for c in cells)]
    how = {"davda54/sam": "--davda54 FILE", HEAVYBALL[0]: "pip install heavyball"}
    out = [
        timing.environment_line(content["environment"]),
        "",
        "Milliseconds with nothing in the caches, as after a forward and a backward pass, and how many times "
        "FusedSAM's that is: median and interquartile range of the n rounds' ratios. Floor: the least time for the "
        "same reads and writes (benchmarks/speed/floor.py).",
        "",
        *(f"Not measured: {n} ({how[n]}).\n" for n in missing),
        "Two passes, first_step and second_step:",
        "",
        *comparison(
            cells,
            TWO_PASSES,
            {"time / floor": lambda c: f"{timing.median(c, OURS) / c['floor_ms']:.2f}", "disturbed": timing.disturbed},
        ),
        "",
        "One pass, and the base without SAM:",
        "",
        *comparison(cells, OTHERS, {}),
    ]
    again = [{**c, **c["again"]} for c in cells if "again" in c]
    if again:
        out += ["", "Made again at once, with everything in the caches:", ""]
        out += comparison(again, [*TWO_PASSES, *OTHERS], {})
    extra = [(c["list"], c["peak_extra"]) for c in cells if "peak_extra" in c]
    if extra:
        names = list(dict.fromkeys(n for _, x in extra for n in x))
        out += ["", "Peak extra memory of a step beside the base's state, over the parameters' size:", ""]
        out += table(["list", *names], [[n, *(f"{x[k]:.3f}" if k in x else "" for k in names)] for n, x in extra])
    return "\n".join(out) + "\n"


def chart(content: dict[str, Any], path: Path) -> None:
    """Milliseconds of SAM + Adam with the most threads, for the lists of CHART that were measured."""
    labels = {
        OURS: "FusedSAM",
        "FusedMSAM": "FusedMSAM (one pass)",
        "foreach + fused base": "_foreach_ + fused Adam",
        "pytorch_optimizer SAM, fused=True": "pytorch_optimizer SAM,\nfused=True",
        "pytorch_optimizer SAM": "pytorch_optimizer SAM",
        "davda54/sam": "davda54/sam",
        PLAIN[1]: "Adam(fused=True), no SAM",
    }
    cells = [c for c in content["cells"] if c["list"] in CHART and kind_of(c) == "SAM + adam"]
    cells = [c for c in cells if c["threads"] == max(c["threads"] for c in cells)]
    if not cells:
        return
    names = [n for n in labels if all(n in c["ms"] for c in cells)]
    env = content["environment"]
    with figure(path, 1, len(cells), size=(8, 3.4), dpi=200, sharey=True, squeeze=False) as (drawn, panels):
        for axes, cell in zip(panels[0], cells, strict=True):
            ms = [timing.median(cell, n) for n in names]
            times = [timing.ratio(cell, n)[1] for n in names]
            words = [
                f"{x:.3g} ms" + ("" if n == OURS else f" ({t:.1f}x)") for n, x, t in zip(names, ms, times, strict=True)
            ]
            colours = [
                {OURS: "tab:blue", "FusedMSAM": "tab:cyan", PLAIN[1]: "tab:gray"}.get(n, "tab:orange") for n in names
            ]
            bars(axes, [labels[n] for n in names], ms, words, colours)
            axes.set_title(CHART[cell["list"]], fontsize=11)
        numbers = " and ".join(dict.fromkeys(str(timing.rounds(c)) for c in cells))
        drawn.suptitle("The optimizer's part of a SAM + Adam step, milliseconds: less is better", fontsize=12)
        drawn.supxlabel(
            f"{env['cpu']}, {env['instruction_set']}, threads: {cells[0]['threads']}, torch {env['torch']}. Medians, "
            f"n = {numbers}; (x): median ratio to FusedSAM"
            + ("; DISTURBED" if any(map(timing.disturbed, cells)) else ""),
            fontsize=8,
        )


def report(content: dict[str, Any], out: Path) -> None:
    (out / "step.md").write_text(markdown(content))
    chart(content, out / "step.png")


def main() -> None:
    p = timing.command_line(__doc__)
    charted = " and ".join(CHART)
    p.add_argument("--lists", nargs="+", choices=list(LISTS), default=list(LISTS))
    p.add_argument("--bases", nargs="+", choices=list(BASES), help=f"default: adam; for {charted} all")
    p.add_argument("--kinds", nargs="+", choices=["sam", "asam"], help=f"default: sam; with adam for {charted} both")
    p.add_argument("--threads", nargs="+", type=int, default=sorted({1, torch.get_num_threads()}))
    p.add_argument("--davda54", type=Path, metavar="FILE", help="sam.py of davda54/sam")
    p.add_argument("--no-heavyball", dest="heavyball", action="store_false")
    p.add_argument("--no-memory", dest="memory", action="store_false")
    p.add_argument("--report-only", action="store_true", help="make step.md and step.png of the step.json in --out")
    args = p.parse_args()
    if args.report_only:
        content = json.loads((args.out / "step.json").read_text())
        report(content, args.out)
    else:
        args.out.mkdir(parents=True, exist_ok=True)
        if args.davda54:
            rivals.davda54_sam(args.davda54)  # an error comes at once
        plan = [
            (name, base, kind == "asam", threads)
            for name in args.lists
            for base in args.bases or (BASES if name in CHART else ["adam"])
            for kind in args.kinds or (["sam", "asam"] if name in CHART and base == "adam" else ["sam"])
            for threads in args.threads
        ]
        content = {"environment": timing.environment(), "cells": []}
        for config in tqdm(plan, disable=None):
            content["cells"].append(timing.alone(run, *config, args))
            (args.out / "step.json").write_text(json.dumps(content))
            report(content, args.out)
    print((args.out / "step.md").read_text())
    timing.conclude(content["cells"])


if __name__ == "__main__":
    main()
