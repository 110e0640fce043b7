"""What one-pass SAM costs beside its base: the optimizer's part of a step, a whole training step, and memory.

    python -m benchmarks.speed.one_pass
    python -m benchmarks.speed.one_pass --lists resnet18 --threads 1 --no-training

All rivals run in one process, in another order in every round; a cell is the median of the rounds' ratios to
torch.optim.Adam(fused=True), with the interquartile range. HeavyBall's optimizers are measured where it is installed:
its MSAMLaProp takes a norm for each tensor, and SAMWrapper perturbs in a way of its own. Writes
one_pass.json and one_pass.md to --out.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import pytorch_optimizer
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import train
from sam_fused import FusedMSAM, FusedSAM

from ..tables import table
from .rivals import RHO, two_calls
from .step import peak_extra
from .timing import command_line, environment, environment_line, rounds_of
from .workloads import LISTS, parameters

BASE = "torch.optim.Adam, fused=True"
BATCH, WIDTH = 128, 16
LR = 1e-6  # so that no weight leaves where it is fast to compute


def heavyball() -> Any:
    try:
        return importlib.import_module("heavyball")
    except ImportError:
        return None


def steps(shapes: list[torch.Size], compiled: bool) -> dict[str, Callable[[], object]]:
    """The optimizer's part of a step, with gradients in place. Each has weights of its own."""

    def sam(params: list[nn.Parameter]) -> Callable[[], object]:
        return two_calls(FusedSAM(params, torch.optim.Adam, lr=LR, rho=RHO))

    def pytorch_optimizer_sam(params: list[nn.Parameter]) -> Callable[[], object]:
        return two_calls(pytorch_optimizer.SAM(params, torch.optim.Adam, rho=RHO, lr=LR, fused=True))

    makers: dict[str, Callable[[list[nn.Parameter]], Callable[..., object]]] = {
        BASE: lambda params: torch.optim.Adam(params, lr=LR, fused=True).step,
        "torch.optim.Adam": lambda params: torch.optim.Adam(params, lr=LR).step,
        "FusedMSAM": lambda params: FusedMSAM(params, torch.optim.Adam, lr=LR, rho=RHO).step,
        "FusedSAM, both halves": sam,
        "pytorch_optimizer SAM, fused=True, both halves": pytorch_optimizer_sam,
    }
    theirs = heavyball() if compiled else None
    if theirs is not None:
        makers["HeavyBall MSAMLaProp, compiled"] = lambda params: keeping_grads(
            params, theirs.MSAMLaProp(params, lr=LR).step
        )
        makers["HeavyBall SAMWrapper + AdamW, compiled, both halves"] = lambda params: keeping_grads(
            params, partial(theirs.SAMWrapper(params, theirs.AdamW(params, lr=LR)).step, lambda: torch.zeros(()))
        )
    return {name: make(parameters(shapes)) for name, make in makers.items()}


def keeping_grads(params: list[nn.Parameter], step: Callable[[], object]) -> Callable[[], object]:
    """For a step that takes the gradients away."""
    kept = [p.grad for p in params]

    def with_grads() -> object:
        for p, g in zip(params, kept, strict=True):
            p.grad = g
        return step()

    return with_grads


def training_steps() -> dict[str, Callable[[], object]]:
    """Forward, backward and step of ResNet-18; SAM's have two passes. Each has a network of its own."""
    x = torch.randn(BATCH, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    y = torch.randint(0, 10, (BATCH,))

    def steps_of(make: Callable[..., Any], **options: Any) -> Callable[[], object]:
        model = train.ARCHS["resnet18"](WIDTH).to(memory_format=torch.channels_last).train()
        params = list(model.parameters())
        opt = make(params, lr=LR, **options)

        def forward_backward() -> None:
            for p in params:
                p.grad = None
            F.cross_entropy(model(x), y).backward()

        if make is FusedSAM:
            return lambda: (forward_backward(), opt.first_step(), forward_backward(), opt.second_step())
        return lambda: (forward_backward(), opt.step())

    return {
        BASE: steps_of(torch.optim.Adam, fused=True),
        "torch.optim.Adam": steps_of(torch.optim.Adam),
        "FusedMSAM": steps_of(FusedMSAM, rho=RHO),
        "FusedSAM": steps_of(FusedSAM, rho=RHO),
    }


def summary(times: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """For each call, the median in milliseconds, and the quartiles of its ratio to BASE, round by round."""
    base = torch.tensor(times[BASE], dtype=torch.float64)
    quartiles = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    out = {}
    for name, values in times.items():
        mine = torch.tensor(values, dtype=torch.float64)
        low, middle, high = (mine / base).quantile(quartiles).tolist()
        out[name] = {"ms": mine.median().item() * 1e3, "ratio": middle, "low": low, "high": high}
    return out


def memory(shapes: list[torch.Size]) -> dict[str, float]:
    """Most bytes held beside the base's state, over the parameters' size."""
    params = parameters(shapes)
    size = 4 * sum(p.numel() for p in params)
    state = 2 * size + 4 * len(params)
    return {"FusedMSAM": peak_extra(lambda: FusedMSAM(params, torch.optim.Adam, rho=RHO).step, state) / size}


def markdown(results: list[dict], env: dict[str, object]) -> str:
    out = [environment_line(env), ""]
    for r in results:
        out += [
            f"{r['what']}, {r['threads']} thread{'s' * (r['threads'] > 1)}, n = {r['rounds']}"
            + (f", memory of FusedMSAM {r['memory']['FusedMSAM']:.3f} x the parameters" if "memory" in r else "")
            + ":",
            "",
            *table(
                ["", "ms", f"over {BASE}", "interquartile range"],
                [
                    (n, f"{s['ms']:.3f}", f"{s['ratio']:.3f}", f"{s['low']:.3f} to {s['high']:.3f}")
                    for n, s in r["steps"].items()
                ],
            ),
            "",
        ]
    return "\n".join(out)


def main() -> None:
    p = command_line(__doc__, 8, "a list")
    p.add_argument("--lists", nargs="+", choices=list(LISTS), default=["resnet18", "24x4M", "1000x100"])
    p.add_argument("--threads", nargs="+", type=int, default=sorted({1, torch.get_num_threads()}))
    p.add_argument("--rounds", type=int, default=60, help="at most; at least 20 are made")
    p.add_argument("--no-training", dest="training", action="store_false")
    p.add_argument("--no-compiled", dest="compiled", action="store_false", help="leave HeavyBall out")
    args = p.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    results, env = [], environment()
    limits = (min(20, args.rounds), args.rounds)

    def add(what: str, threads: int, times: dict[str, list[float]], **more: object) -> None:
        row = {"what": what, "threads": threads, "rounds": len(times[BASE]), "steps": summary(times), **more}
        results.append(row)
        (args.out / "one_pass.json").write_text(json.dumps({"environment": env, "results": results}, indent=1))
        (args.out / "one_pass.md").write_text(markdown(results, env))

    for threads in args.threads:
        torch.set_num_threads(threads)
        for name in tqdm(args.lists, desc=f"{threads} threads", disable=None):
            shapes = LISTS[name]()
            more = {"memory": memory(shapes)} if threads == args.threads[0] else {}
            calls = steps(shapes, args.compiled and len(shapes) < 100)  # torch.compile unrolls its loop over them
            add(f"step, {name}", threads, rounds_of(calls, args.seconds, limits), **more)
        if args.training:
            what = f"training step, ResNet-18 of width {WIDTH}, batch {BATCH}"
            add(what, threads, rounds_of(training_steps(), 2 * args.seconds, limits))
    print((args.out / "one_pass.md").read_text())


if __name__ == "__main__":
    main()
