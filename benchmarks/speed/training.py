"""Whole training steps, and the input pipeline, in images per second.

    python -m benchmarks.speed.training
    python -m benchmarks.speed.training --archs resnet18 --widths 64    # a round takes half a minute

Batches of 128 random images of CIFAR-10's size; the optimizers take turns in one process, in another order every
round, and each is compared with one forward and backward pass round by round. Writes train.json and train.md to --out.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import train
from sam_fused import FusedSAM, norm_only

from ..tables import table
from . import timing
from .rivals import RIVALS

BATCH = 128
IMAGES = 5120
PASS = "forward + backward"


def variants(arch: str, width: int) -> dict[str, Callable[[], object]]:
    """One training step of each optimizer, on the same network and batch; sam_every 2 does two steps.

    FusedMSAM, which keeps the weights perturbed from step to step, has a network of its own.
    """
    flags = ["--arch", arch, "--width", str(width), "--base", "adam", "--lr", "1e-6"]
    model = train.build(train.settle(train.parse(flags))).model.train()
    x = torch.randn(BATCH, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    y = torch.randint(0, 10, (BATCH,))
    params = list(model.parameters())

    def forward_backward() -> None:
        for p in params:
            p.grad = None
        F.cross_entropy(model(x), y).backward()

    def plain(**options) -> Callable[[], object]:
        opt = torch.optim.Adam(params, lr=1e-6, **options)
        return lambda: (forward_backward(), opt.step())

    def rival(name: str) -> Callable[[], object]:
        opt = RIVALS[name](params, torch.optim.Adam, False, lr=1e-6)
        return lambda: (forward_backward(), opt.first_step(), forward_backward(), opt.second_step())

    def ours(*more: str, steps: int = 1) -> Callable[[], object]:
        s = train.settle(train.parse([*flags, *more]))
        parts = train.build(s)
        if s.method == "sam":
            groups = norm_only(model, rho=s.rho) if s.norm_only else params
            opt = FusedSAM(groups, lr=s.lr, rho=s.rho, lean_ascent=s.norm_only, scaler=parts.scaler)
            parts = dataclasses.replace(parts, model=model, net=model, optimizer=opt)
        return lambda: [train.train_step(s, parts, x, y, i) for i in range(steps)]

    return {
        PASS: forward_backward,
        "Adam": plain(),
        "Adam, fused=True": plain(fused=True),
        **{n: rival(n) for n in RIVALS if n != "FusedSAM"},
        "FusedSAM": ours(),
        "FusedMSAM": ours("--method", "msam"),
        "FusedSAM, --ascent-fraction 0.25": ours("--ascent-fraction", "0.25"),
        "FusedSAM, --norm-only": ours("--norm-only"),
        "FusedSAM, --sam-every 2": ours("--sam-every", "2", steps=2),
    }


def pipelines(n: int = IMAGES) -> dict[str, Callable[[], object]]:
    """One epoch of augmented, normalized batches over n images: train.py's, and the paper's code's."""
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset
    from torchvision import transforms

    images = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8)
    labels = torch.randint(0, 10, (n,))
    normalize = train.Normalize(images)
    generator = torch.Generator().manual_seed(0)
    per_sample = transforms.Compose(
        [
            transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize((0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)),
        ]
    )
    pixels = images.permute(0, 2, 3, 1).contiguous().numpy()

    class PerSample(Dataset):
        """As torchvision.datasets.CIFAR10: an array in memory, an image at a time."""

        def __len__(self) -> int:
            return n

        def __getitem__(self, i: int) -> tuple[Tensor, int]:
            return per_sample(Image.fromarray(pixels[i])), labels[i]

    def loader(workers: int) -> Callable[[], object]:
        data = DataLoader(PerSample(), BATCH, shuffle=True, num_workers=workers, persistent_workers=workers > 0)
        return lambda: [x for x, _ in data]

    return {
        "train.py": lambda: [
            normalize(x) for x, _ in train.batches(train.Split(images, labels), BATCH, generator, flip=True)
        ],
        "torchvision transforms, DataLoader": loader(0),
        "torchvision transforms, DataLoader, 2 workers": loader(2),
    }


def network(arch: str, width: int, rounds: int) -> dict:
    calls = variants(arch, width)
    calls[PASS]()  # oneDNN's plans; an optimizer's first step weighs little beside the passes
    cell = timing.measure(calls, rounds, PASS, warm_up=0)
    cell["ms"] = {n: [ms / 2 for ms in times] if "sam-every" in n else times for n, times in cell["ms"].items()}
    size = sum(p.numel() for p in train.ARCHS[arch](width).parameters())
    return {"arch": arch, "width": width, "parameters": size, **cell}


def rows(cell: dict, images: int) -> list[list[str]]:
    return [[n, f"{images / timing.median(cell, n) * 1e3:.0f}", timing.ratio_words(cell, n, 3)] for n in cell["ms"]]


def markdown(networks: list[dict], inputs: dict, env: dict[str, object]) -> str:
    def heading(what: str, cell: dict) -> list[str]:
        reason = timing.disturbed(cell)
        return [f"{what}, n = {timing.rounds(cell)}" + (f" (disturbed: {reason})" if reason else "") + ":", ""]

    out = [timing.environment_line(env), "", "Images a second, medians; ratios: median and interquartile range.", ""]
    for r in networks:
        what = f"{r['arch']}, width {r['width']} ({r['parameters'] / 1e6:.2f} M parameters), batch {BATCH}"
        out += heading(what, r)
        out += [*table(["step", "images/s", "time over one forward + backward"], rows(r, BATCH)), ""]
    out += heading("Input pipeline alone", inputs)
    out += table(["", "images/s", "time over train.py's"], rows(inputs, IMAGES))
    return "\n".join(out) + "\n"


def main() -> None:
    p = timing.command_line(__doc__)
    p.add_argument("--archs", nargs="+", choices=list(train.ARCHS), default=["resnet18", "vgg16"])
    p.add_argument("--widths", nargs="+", type=int, default=[16])
    args = p.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    networks, env = [], timing.environment()
    inputs = timing.measure(pipelines(), args.rounds, "train.py", warm_up=1)
    inputs["others"] = None  # its own workers would be among them
    for width in args.widths:
        for arch in tqdm(args.archs, desc=f"width {width}", disable=None):
            networks.append(network(arch, width, args.rounds))
            result = {"environment": env, "networks": networks, "input": inputs}
            (args.out / "train.json").write_text(json.dumps(result))
            (args.out / "train.md").write_text(markdown(networks, inputs, env))
    print((args.out / "train.md").read_text())
    timing.conclude([*networks, inputs])


if __name__ == "__main__":
    main()
