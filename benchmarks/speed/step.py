"""The optimizer's part of a SAM step, first_step + second_step with gradients in place, beside the rivals.

    python -m benchmarks.speed.step                                          # everything
    python -m benchmarks.speed.step --lists resnet18 --bases adam --threads 2

All rivals run in one process, one after the other in every round and in another order each time, so that what else the
machine does meets them alike; a cell is the median over the rounds. Writes step.json, step.md and floor.png to --out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from sam_fused import FusedSAM

from ..plots import figure, plt
from ..tables import table
from .floor import Bandwidth, streams
from .rivals import BASES, RIVALS, two_calls
from .timing import command_line, environment, environment_line, interleaved
from .workloads import LISTS, parameters

# ---- measuring ----


def peak_extra(make: Callable[[], Callable[[], None]], state_bytes: int) -> int:
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


def run(name: str, base: str, adaptive: bool, threads: int, args: argparse.Namespace) -> dict:
    torch.set_num_threads(threads)
    shapes = LISTS[name]()
    numel = sum(s.numel() for s in shapes)
    cls, options = BASES[base]
    params = parameters(shapes)
    chosen = {n: make for n, make in RIVALS.items() if not (n == "ReferenceSAM" and numel > 1.2e7)}
    calls = {n: two_calls(make(params, cls, adaptive, **options)) for n, make in chosen.items()}
    calls["no SAM: torch fused base"] = cls(params, fused=True, **options).step
    calls["no SAM: FusedSAM.step()"] = FusedSAM(params, cls, rho=0.0, **options).step
    bandwidth = Bandwidth(min(numel, 1 << 25)) if numel > 1e6 else None  # beyond any cache is enough
    if bandwidth:
        calls |= {f"bandwidth: {n}": call for n, (call, _) in bandwidth.kernels.items()}
    stats = interleaved(calls, args.seconds, (3, args.rounds), warm_up=2 if numel < 2e7 else 1)
    result = {
        "list": name,
        "tensors": len(shapes),
        "numel": numel,
        "base": base,
        "adaptive": adaptive,
        "threads": threads,
        "rounds": stats["FusedSAM"].rounds,
        "ms": {n: {"median": s.median * 1e3, "iqr": s.iqr * 1e3, "min": s.min * 1e3} for n, s in stats.items()},
    }
    if bandwidth:
        speed = {n: moved / stats[f"bandwidth: {n}"].median / 1e9 for n, (_, moved) in bandwidth.kernels.items()}
        best = max(speed, key=speed.get)
        result["bandwidth_gb_s"] = speed
        result["best_kernel"] = best
        result["floor_ms"] = streams(base, adaptive) * 4 * numel / speed[best] / 1e6
    if args.memory and base == "adam" and not adaptive:
        state = 2 * 4 * numel + 4 * len(shapes)
        result["peak_extra"] = {
            n: peak_extra(lambda make=make: two_calls(make(params, cls, adaptive, **options)), state) / (4 * numel)
            for n, make in chosen.items()
        }
    return result


# ---- reporting ----


def kind_of(r: dict) -> str:
    return f"{'ASAM' if r['adaptive'] else 'SAM'} + {r['base']}"


def step_row(r: dict, rivals: list[str]) -> list[str]:
    ms = {n: x["median"] for n, x in r["ms"].items()}
    ours = ms["FusedSAM"]
    spread = f"{ours:.2f} ± {r['ms']['FusedSAM']['iqr'] / 2:.2f}"
    theirs = [f"{ms[n]:.2f} ({ms[n] / ours:.1f}x)" if n in ms else "" for n in rivals]
    floor = f"{ours / r['floor_ms']:.2f}" if "floor_ms" in r else ""
    return [r["list"], kind_of(r), str(r["threads"]), str(r["rounds"]), spread, *theirs, floor]


def plain_row(r: dict) -> list[str]:
    theirs, ours = (r["ms"][f"no SAM: {n}"]["median"] for n in ("torch fused base", "FusedSAM.step()"))
    return [r["list"], r["base"], str(r["threads"]), f"{theirs:.2f} ({theirs / ours:.1f}x)", f"{ours:.2f}"]


def markdown(results: list[dict], env: dict[str, object]) -> str:
    rivals = ["pytorch_optimizer SAM", "pytorch_optimizer SAM, fused=True", "foreach + fused base", "ReferenceSAM"]
    out = [
        environment_line(env),
        "",
        "Milliseconds (median), and how many times FusedSAM's time that is.",
        "",
        *table(
            ["list", "optimizer", "threads", "rounds", "FusedSAM", *rivals, "time / floor"],
            [step_row(r, rivals) for r in results],
        ),
        "",
        "Without SAM:",
        "",
        *table(
            ["list", "base", "threads", "torch, fused=True", "FusedSAM.step()"],
            [plain_row(r) for r in results if not r["adaptive"]],
        ),
    ]
    extra = [(r["list"], r["peak_extra"]) for r in results if "peak_extra" in r]
    if extra:
        out += ["", "Peak extra memory of a step, over the parameters' size:", ""]
        out += table(["list", *RIVALS], [[n, *(f"{x[k]:.3f}" if k in x else "" for k in RIVALS)] for n, x in extra])
    return "\n".join(out) + "\n"


def plot_floor(results: list[dict], path: Path) -> None:
    """Time over floor, a bar for each list, optimizer and thread count."""
    bars = [r for r in results if "floor_ms" in r]
    if not bars:
        return
    names = [f"{kind_of(r)}, {r['threads']} thr." for r in bars]
    kinds, lists = list(dict.fromkeys(names)), list(dict.fromkeys(r["list"] for r in bars))
    with figure(path, 1, 1, size=(10, 4.5), dpi=120) as (_, axes):
        axes.set_prop_cycle(color=plt.get_cmap("tab20").colors)
        width = 0.8 / len(kinds)
        for k, kind in enumerate(kinds):
            of_kind = [r for r, name in zip(bars, names, strict=True) if name == kind]
            x = [lists.index(r["list"]) + (k - (len(kinds) - 1) / 2) * width for r in of_kind]
            axes.bar(x, [r["ms"]["FusedSAM"]["median"] / r["floor_ms"] for r in of_kind], width, label=kind)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set(
            ylabel="time / floor", title="FusedSAM: first_step + second_step over the least time for its memory traffic"
        )
        axes.set_xticks(range(len(lists)), lists)
        axes.legend(fontsize=7, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.1))


def main() -> None:
    p = command_line(__doc__, 1, "a configuration")
    p.add_argument("--lists", nargs="+", choices=list(LISTS), default=list(LISTS))
    p.add_argument("--bases", nargs="+", choices=list(BASES), default=list(BASES))
    p.add_argument("--kinds", nargs="+", choices=["sam", "asam"], default=["sam", "asam"])
    p.add_argument("--threads", nargs="+", type=int, default=sorted({1, torch.get_num_threads()}))
    p.add_argument("--rounds", type=int, default=100, help="at most")
    p.add_argument("--no-memory", dest="memory", action="store_false")
    args = p.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    plan = [
        (name, base, kind == "asam", threads)
        for name in args.lists
        for base in args.bases
        for kind in args.kinds
        for threads in args.threads
    ]
    results, env = [], environment()
    for config in tqdm(plan, disable=None):
        results.append(run(*config, args))
        (args.out / "step.json").write_text(json.dumps({"environment": env, "results": results}, indent=1))
        (args.out / "step.md").write_text(markdown(results, env))
    plot_floor(results, args.out / "floor.png")
    print((args.out / "step.md").read_text())


if __name__ == "__main__":
    main()
