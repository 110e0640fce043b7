"""The optimizer's part of a SAM step, first_step + second_step with gradients in place, beside the rivals.

    python -m benchmarks.speed.step                                          # everything
    python -m benchmarks.speed.step --lists resnet18 --bases adam --threads 2

All rivals run in one process, one after the other in every round and in another order each time, so that what else the
machine does meets them alike; a cell is the median over the rounds. Writes step.json, step.md and floor.png to --out.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from pytest_benchmark.stats import Stats
from torch import nn
from tqdm import tqdm

import train
from sam_fused import FusedSAM

from .floor import Bandwidth, streams
from .rivals import BASES, RIVALS, two_calls

# ---- parameter lists ----


def of_model(build: Callable[[], nn.Module]) -> list[torch.Size]:
    with torch.device("meta"):
        return [p.shape for p in build().parameters()]


def vit_s16() -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(224, 16, num_layers=12, num_heads=6, hidden_dim=384, mlp_dim=1536)


LISTS: dict[str, Callable[[], list[torch.Size]]] = {
    "resnet18": lambda: of_model(lambda: train.resnet18(64)),
    "vgg16": lambda: of_model(lambda: train.vgg16(64)),
    "vit_s16": lambda: of_model(vit_s16),
    "1000x100": lambda: [torch.Size([100])] * 1000,
    "24x4M": lambda: [torch.Size([1 << 22])] * 24,
}


# ---- measuring ----


def parameters(shapes: list[torch.Size]) -> list[nn.Parameter]:
    params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


def interleaved(
    calls: dict[str, Callable[[], object]], seconds: float, rounds: tuple[int, int], warm_up: int = 2
) -> dict[str, Stats]:
    """Time each call once a round: at least and at most ``rounds`` rounds, and none begins after ``seconds``.

    Every round has an order of its own: what a call leaves in the caches then meets all the others alike.
    """
    stats = {name: Stats() for name in calls}
    order = list(calls.items())
    shuffle = random.Random(0).shuffle
    for call in calls.values():  # states, caches, cached lists
        for _ in range(warm_up):
            call()
    start = time.perf_counter()
    gc.collect()
    gc.disable()  # or one rival's garbage is collected in the next one's time
    try:
        for done in range(rounds[1]):
            if done >= rounds[0] and time.perf_counter() - start > seconds:
                break
            shuffle(order)
            for name, call in order:
                t = time.perf_counter()
                call()
                stats[name].update(time.perf_counter() - t)
    finally:
        gc.enable()
    return stats


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


def environment() -> dict[str, object]:
    env = {**train.environment(), "pytorch_optimizer": version("pytorch_optimizer")}
    return {k: v for k, v in env.items() if v is not None}


def markdown(results: list[dict], env: dict[str, object]) -> str:
    out = [", ".join(f"{k} {v}" for k, v in env.items()), ""]
    names = ["pytorch_optimizer SAM", "pytorch_optimizer SAM, fused=True", "foreach + fused base", "ReferenceSAM"]
    out += [
        "Milliseconds (median), and how many times FusedSAM's time that is.",
        "",
        "| list | optimizer | threads | rounds | FusedSAM | " + " | ".join(names) + " | time / floor |",
        "|" + "---|" * (6 + len(names)),
    ]
    for r in results:
        ours = r["ms"]["FusedSAM"]["median"]
        cells = [
            f"{r['ms'][n]['median']:.2f} ({r['ms'][n]['median'] / ours:.1f}x)" if n in r["ms"] else "" for n in names
        ]
        floor = f"{ours / r['floor_ms']:.2f}" if "floor_ms" in r else ""
        kind = f"{'ASAM' if r['adaptive'] else 'SAM'} + {r['base']}"
        spread = f"{ours:.2f} ± {r['ms']['FusedSAM']['iqr'] / 2:.2f}"
        row = [r["list"], kind, str(r["threads"]), str(r["rounds"]), spread, *cells, floor]
        out.append("| " + " | ".join(row) + " |")
    out += [
        "",
        "Without SAM:",
        "",
        "| list | base | threads | torch, fused=True | FusedSAM.step() |",
        "|---|---|---|---|---|",
    ]
    for r in results:
        if r["adaptive"]:
            continue
        theirs, ours = (r["ms"][f"no SAM: {n}"]["median"] for n in ("torch fused base", "FusedSAM.step()"))
        out.append(f"| {r['list']} | {r['base']} | {r['threads']} | {theirs:.2f} ({theirs / ours:.1f}x) | {ours:.2f} |")
    if any("peak_extra" in r for r in results):
        out += ["", "Peak extra memory of a step, over the parameters' size:", ""]
        out += ["| list | " + " | ".join(RIVALS) + " |", "|" + "---|" * (1 + len(RIVALS))]
        for r in results:
            if "peak_extra" in r:
                cells = [f"{r['peak_extra'][n]:.3f}" if n in r["peak_extra"] else "" for n in RIVALS]
                out.append(f"| {r['list']} | " + " | ".join(cells) + " |")
    return "\n".join(out) + "\n"


def plot_floor(results: list[dict], path: Path) -> None:
    """Time over floor, a bar for each list, optimizer and thread count."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    bars = [r for r in results if "floor_ms" in r]
    if not bars:
        return
    names = [f"{'ASAM' if r['adaptive'] else 'SAM'} + {r['base']}, {r['threads']} thr." for r in bars]
    kinds, lists = list(dict.fromkeys(names)), list(dict.fromkeys(r["list"] for r in bars))
    figure, axes = plt.subplots(figsize=(10, 4.5), layout="constrained")
    axes.set_prop_cycle(color=plt.get_cmap("tab20").colors)
    for k, kind in enumerate(kinds):
        of_kind = [(r, lists.index(r["list"])) for r, name in zip(bars, names, strict=True) if name == kind]
        x = [i + (k - (len(kinds) - 1) / 2) * 0.8 / len(kinds) for _, i in of_kind]
        axes.bar(x, [r["ms"]["FusedSAM"]["median"] / r["floor_ms"] for r, _ in of_kind], 0.8 / len(kinds), label=kind)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(
        ylabel="time / floor", title="FusedSAM: first_step + second_step over the least time for its memory traffic"
    )
    axes.set_xticks(range(len(lists)), lists)
    axes.legend(fontsize=7, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.1))
    figure.savefig(path, dpi=120)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--lists", nargs="+", choices=list(LISTS), default=list(LISTS))
    p.add_argument("--bases", nargs="+", choices=list(BASES), default=list(BASES))
    p.add_argument("--kinds", nargs="+", choices=["sam", "asam"], default=["sam", "asam"])
    p.add_argument("--threads", nargs="+", type=int, default=sorted({1, torch.get_num_threads()}))
    p.add_argument("--rounds", type=int, default=100, help="at most")
    p.add_argument("--seconds", type=float, default=1, help="a configuration may take, once it has had 3 rounds")
    p.add_argument("--no-memory", dest="memory", action="store_false")
    p.add_argument("--out", type=Path, default=Path("runs/bench"))
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
