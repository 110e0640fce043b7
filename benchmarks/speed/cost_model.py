"""What a step should cost on a GPU: computed from bytes and launches, and not measured.

    python -m benchmarks.speed.cost_model

The time is bytes over the copy bandwidth of --gb-s, plus launches at --launch-us each, where the launches take longer.
FusedSAM's bytes and launches follow from csrc/cuda.cu (launches_of). The rivals' are counted from their own code, run
on tensors without memory: every ATen operator of a step, with the bytes of its tensors; a _foreach_ operator and a
fused base's update count as the launches that torch's multi-tensor kernels make of them. Prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..tables import table
from .floor import streams
from .rivals import BASES, RIVALS, two_calls, update_of
from .workloads import LISTS, of_model

# ---- the extension: csrc/cuda.cu ----

# Bytes of a launch's arguments, and those of them that are not tensors. A size between saves bytes and no launch.
SMALL, LARGE, OTHER = 4096, 32000, 64


def entry_bytes(pointers: int, ascent: bool) -> int:
    return 8 * pointers + 16 + (24 if ascent else 0)


def batches(tensors: int, entry: int, large: bool) -> int:
    """Launches for so many tensors of one dtype, whatever their sizes."""
    return math.ceil(tensors / (((LARGE if large else SMALL) - OTHER) // entry))


def launches_of(base: str, tensors: int, large: bool = True) -> int:
    """Of first_step and second_step, for tensors of one dtype and device in one group.

    ``large``: the driver is of CUDA 12.1 or later, which takes large arguments.
    """
    update = update_of(base)
    prepare = math.ceil(tensors / ((SMALL - OTHER - 16 * (8 * len(update.hyper) + 16)) // 16))
    norm = batches(tensors, entry_bytes(2, True), large) + 2  # the sums over chunks, their sum, the sharpness
    perturb, descent = entry_bytes(3, True), entry_bytes(3 + len(update.state), False)
    return norm + batches(tensors, perturb, large) + prepare + batches(tensors, descent, large)


# ---- the rivals: what they call ----

CHUNK, BLOCKS, TENSORS = 65536, 320, {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}  # torch's multi-tensor kernels


class Count(TorchDispatchMode):
    """Bytes read and written, and launches, of all operators that run under it."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.launches = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        schema = func._schema
        if schema.name == "aten::_local_scalar_dense":  # .item()
            return 1.0
        out = None if schema.name.startswith("aten::_fused") else func(*args, **(kwargs or {}))
        on_host = all(t.is_cpu for t in tree_leaves((args, out)) if isinstance(t, torch.Tensor))
        if func.is_view or on_host or schema.name in ("aten::empty_like", "aten::empty", "aten::detach"):
            return out
        if schema.name.startswith(("aten::_foreach", "aten::_fused")):
            lists = [a for a in args if isinstance(a, list) and a and isinstance(a[0], torch.Tensor)]
            made = [out] if isinstance(out, list) else []
            sizes = [t.numel() for t in lists[0]]
            depth = min(len(lists) + len(made), 5)
            chunks = sum(math.ceil(n / CHUNK) for n in sizes)
            self.launches += max(math.ceil(len(sizes) / TENSORS[depth]), math.ceil(chunks / BLOCKS))
        else:
            self.launches += 1
        for argument, value in zip(schema.arguments, args, strict=False):
            alias = argument.alias_info
            # The schema lets a fused update write the gradients, which it does under a grad_scale alone.
            writes = alias is not None and alias.is_write and argument.name != "grads"
            reads = not (writes and schema.name.endswith(("copy_", "zero_", "fill_")))
            for t in tree_leaves(value):
                if isinstance(t, torch.Tensor):
                    self.bytes += t.nbytes * (reads + writes)
        given_tensors = {id(t) for t in tree_leaves(args)}
        made = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and id(t) not in given_tensors]
        self.bytes += sum(t.nbytes for t in made)
        return out


def count(step: Callable[[], None]) -> Count:
    with Count():
        step()  # which makes the states
    with Count() as counted:
        step()
    return counted


# ---- the table ----


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(2048, 16, 8192, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 18)
    return nn.ModuleList([nn.Embedding(32000, 2048), encoder, nn.Linear(2048, 32000, bias=False)])


def vit_b16() -> nn.Module:
    from torchvision.models import vit_b_16

    return vit_b_16()


NETWORKS = {
    "ResNet-18": LISTS["resnet18"],
    "VGG16": LISTS["vgg16"],
    "ViT-B/16": lambda: of_model(vit_b16),
    "transformer": lambda: of_model(transformer),
}
#: The rivals, and the options that they have on a GPU by default.
COUNTED = {
    "pytorch_optimizer SAM": {"foreach": True},
    "pytorch_optimizer SAM, fused=True": {},
    "foreach + fused base": {},
}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--base", choices=list(BASES), default="adam")
    p.add_argument("--gb-s", type=float, default=3000, help="copy bandwidth; an H100 SXM has some 3,000 of its 3,350")
    p.add_argument("--launch-us", type=float, default=3.0, help="of the host, a kernel launch")
    p.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    args = p.parse_args()
    import pytorch_optimizer

    # What a rival does with a GPU's tensors, it is to do with those that stand for them.
    optimizer._get_fused_kernels_supported_devices = lambda: ["meta"]
    pytorch_optimizer.SAM.can_use_foreach = staticmethod(lambda *args, **kwargs: True)
    cls, options = BASES[args.base]
    rows = []
    for network in args.networks:
        shapes = NETWORKS[network]()
        numel = sum(s.numel() for s in shapes)
        label = f"{network}, {len(shapes)} tensors, {numel / 1e6:.1f} M"
        costs = {"FusedSAM": (launches_of(args.base, len(shapes)), streams(args.base, False) * 4 * numel)}
        for name, defaults in COUNTED.items():
            params = [nn.Parameter(torch.empty(s, device="meta")) for s in shapes]
            for q in params:
                q.grad = torch.empty_like(q)
            counted = count(two_calls(RIVALS[name](params, cls, False, **options, **defaults)))
            costs[name] = (counted.launches, counted.bytes)
        for name, (launches, moved) in costs.items():
            ms = max(moved / args.gb_s / 1e6, launches * args.launch_us / 1e3)
            rows.append((label, name, launches, f"{moved / 1e9:.3g}", f"{ms:.2f}"))
    print("\n".join(table(["network", "optimizer", "launches", "GB moved", "ms, computed"], rows)))


if __name__ == "__main__":
    main()
