"""Train a CIFAR-10 network with FusedSAM, or with its plain base optimizer.

    python train.py --data DIR --arch resnet18 --base adam --out runs/adam-sam            # Adam + SAM
    python train.py --data DIR --arch resnet18 --base adam --rho 0 --out runs/adam        # Adam, sharpness recorded
    python train.py --data DIR --arch resnet18 --base adam --method msam --out runs/adam-msam    # Momentum-SAM
    python train.py --data DIR --arch resnet18 --base adam --out runs/adam-sam --resume   # go on after a kill
    python train.py --dataset digits --width 16 --epochs 5 --out runs/digits              # no download
    python train.py --report runs/adam runs/adam-sam                                      # side by side
    torchrun --nproc-per-node 2 train.py --data DIR --out runs/two                        # a batch shared by two

DIR holds torchvision's CIFAR-10 (it is downloaded there when absent) or 32x32 images as train/<class>/* and
test/<class>/*. A run's folder gets config.json, metrics.jsonl (one object an epoch) and checkpoint.pt.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import hashlib
import json
import math
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # before there is a group, which its default arguments would keep for ever
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import sam_fused
from sam_fused import FusedMSAM, FusedSAM, LambdaRho, late, norm_only
from sam_fused.extension import extension

# ---- settings ----

BASES = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
AMP = {"fp16": torch.float16, "bf16": torch.bfloat16}
CLASSES = 10
MOMENTUM = 0.9
LR_DECAY, LR_MILESTONES = 0.2, (0.3, 0.6, 0.8)  # the step decay of the paper's code: factor, fractions of the run

# What a recipe sets; a flag given by hand wins. "paper-text" is what the paper says and, where it is silent, what its
# code does (weight decay, momentum, step decay); "paper-code" is what the scripts behind its Table I do.
LR = {"sgd": 1e-3, "adam": 1e-3, "adamw": 1e-3}
WEIGHT_DECAY = {"sgd": 5e-4, "adam": 5e-4, "adamw": 1e-2}
RECIPES: dict[str, dict[str, Any]] = {
    "paper-text": {"rho": 0.05, "adaptive": False, "label_smoothing": 0.0, "lr": {**LR, "sgd": 0.1}},
    "paper-code": {"rho": 2.0, "adaptive": True, "label_smoothing": 0.1, "lr": LR},
}


def number(kind: type[int] | type[float], most: float = math.inf, zero: bool = False) -> Callable[[str], float]:
    """What parses a finite number of this kind that is > 0 (or with ``zero``, >= 0) and <= most."""

    def parsed(text: str) -> float:
        value = kind(text)
        if not 0 <= value < math.inf or value > most or (value == 0 and not zero):
            bounds = f">{'=' * zero} 0" + ("" if most == math.inf else f" and <= {most}")
            raise argparse.ArgumentTypeError(f"expected a number {bounds}, got {text}")
        return value

    parsed.__name__ = kind.__name__  # which argparse names where kind() fails
    return parsed


count, fraction = number(int), number(float, 1, zero=True)


def option(default: Any = None, **how: Any) -> Any:
    """A field of Settings that is a flag too. ``how`` is what argparse takes; ``group`` begins a group of the help."""
    return dataclasses.field(metadata={"default": default, **how})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that decides a run, and where it goes. Without a value of its own a flag takes the recipe's."""

    dataset: str = option("cifar10", choices=["cifar10", "digits"], group="data")
    data: str | None = option(metavar="DIR", help="where CIFAR-10 is, or is to be downloaded to")
    train_size: int | None = option(type=count, metavar="N", help="a seeded, class-balanced subset")
    eval_size: int | None = option(
        type=number(int, zero=True),
        metavar="N",
        help="test on N fixed images in all epochs but the last; 0: not at all",
    )
    holdout: int | None = option(type=count, metavar="N", help="test on N fixed training images, not trained on")
    validate: int | None = option(type=count, metavar="N", help="measure also on N training images, not trained on")
    label_noise: float = option(
        0.0, type=fraction, metavar="P", help="make this part of all but the test's labels wrong"
    )
    augment: bool = option(True, action=argparse.BooleanOptionalAction, help="random crops; of CIFAR-10 also mirrored")

    arch: str = option("resnet18", choices=["resnet18", "vgg16", "mlp"], group="network")
    width: int = option(64, type=count, help="channels of the first stage (64 in the paper); of mlp, hidden units")

    recipe: str = option(
        "paper-text",
        choices=sorted(RECIPES),
        group="optimizer",
        help="for options that are not given: the values of the paper's text, or of its code",
    )
    base: str = option("adam", choices=sorted(BASES))
    method: str = option("sam", choices=["sam", "msam"], help="msam: Momentum-SAM, in one pass; the recipe's rho x 10")
    rho: float = option(type=number(float, zero=True), help="0: the plain base, its sharpness at the recipe's rho")
    measure_rho: float  # the rho that the sharpness is recorded with: rho, or where that is 0 the recipe's
    adaptive: bool = option(action=argparse.BooleanOptionalAction, help="ASAM; start from --rho 0.5")
    lr: float = option(type=number(float))
    weight_decay: float = option(type=number(float, zero=True))
    label_smoothing: float = option(type=fraction)
    norm_only: bool = option(
        False, action="store_true", help="perturb normalisation layers alone; start from --rho 0.2"
    )
    sam_from: float = option(0.0, type=fraction, metavar="F", help="no SAM before this part of the run")
    sam_every: int = option(1, type=count, metavar="K", help="ascend in every K-th step only")
    ascent_fraction: float = option(1.0, type=number(float, 1), metavar="F", help="ascend from this part of the batch")

    epochs: int = option(200, type=count, group="run")
    batch_size: int = option(128, type=count, help="of all processes together")
    amp: str | None = option(choices=sorted(AMP), help="autocast; fp16 with a GradScaler")
    compile: bool = option(False, action="store_true", help="torch.compile the network")
    seed: int = option(0, type=int)
    device: str = option("cpu")
    threads: int = option(torch.get_num_threads(), type=count)
    keep_every: int | None = option(type=count, metavar="K", help="keep the weights of every K-th epoch")
    out: str = option("runs/last", metavar="DIR")


# Changing these does not make another run of it. config.json does not hold them.
FREE_ON_RESUME = {"data", "keep_every", "out"}
# Of a run that is older than an option.
DEFAULTS = {
    f.name: f.metadata["default"] for f in dataclasses.fields(Settings) if f.metadata and f.name not in FREE_ON_RESUME
}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--report", nargs="+", metavar="DIR", help="print finished runs side by side, and train nothing")
    group: argparse._ActionsContainer = p
    for field in dataclasses.fields(Settings):
        how = dict(field.metadata)
        if "group" in how:
            group = p.add_argument_group(how.pop("group"))
        if how:
            if how["default"] is not None and how["default"] is not False:
                how["help"] = f"{how.get('help', '')} (default: {how['default']})".lstrip()
            group.add_argument("--" + field.name.replace("_", "-"), **how)
    group.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out, if there is one")
    return p.parse_args(argv)


def settle(args: argparse.Namespace) -> Settings:
    """Fill in the recipe's values.

    Raises:
        ValueError: for options that do not go together.
    """
    recipe = {**RECIPES[args.recipe], "weight_decay": WEIGHT_DECAY}
    recipe |= {k: by_base[args.base] for k, by_base in recipe.items() if isinstance(by_base, dict)}
    if args.method == "msam":  # whose best radius is about ten times SAM's
        recipe["rho"] *= 10
    values = {f.name: getattr(args, f.name) for f in dataclasses.fields(Settings) if f.metadata}
    values |= {k: v for k, v in recipe.items() if values[k] is None}
    if args.method == "msam" and (args.sam_every != 1 or args.ascent_fraction != 1):
        raise ValueError("--sam-every and --ascent-fraction apply to SAM's first pass; --method msam has none")
    return Settings(**values, measure_rho=values["rho"] or recipe["rho"])


# ---- processes: torchrun starts them, and each takes its share of every batch ----


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def processes(s: Settings) -> Iterator[Settings]:
    """Join the processes that torchrun has started, if it has; yields the settings with this process's device."""
    if not dist.is_torchelastic_launched():
        yield s
        return
    if s.device == "cuda":
        s = dataclasses.replace(s, device=f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(s.device)
    dist.init_process_group("nccl" if s.device.startswith("cuda") else "gloo")
    try:
        yield s
    finally:
        gc.collect()  # the module and the optimizer, which keep the group, and with it threads that outlive Python
        dist.destroy_process_group()


def rank_0_first(f: Callable[[], Any]) -> Any:
    """f(), in the other processes once rank 0 is through and has left its files."""
    result = None if rank() else f()
    if dist.is_initialized():
        dist.barrier()
    return f() if rank() else result


# ---- data: decoded once, kept as one uint8 tensor on the device, augmented in whole batches there ----


class DataError(Exception):
    """The data cannot be had or is not as expected."""


class Split(NamedTuple):
    """images: uint8 [n, 3, 32, 32]; labels: int64 [n]; which of them are wrong on purpose: bool [n], if any are."""

    images: Tensor
    labels: Tensor
    wrong: Tensor | None = None

    def at(self, index: Any) -> Split:
        return Split(self.images[index], self.labels[index])

    def with_noise(self, share: float, generator: torch.Generator) -> Split:
        """A random ``share`` of the labels replaced by one of the other classes."""
        n = len(self.labels)
        wrong = torch.zeros(n, dtype=torch.bool)
        wrong[torch.randperm(n, generator=generator)[: round(share * n)]] = True
        others = (self.labels + torch.randint(1, CLASSES, (n,), generator=generator)) % CLASSES
        return Split(self.images, torch.where(wrong, others, self.labels), wrong)


def load_folder(root: Path) -> tuple[Split, Split]:
    """An image-folder tree, decoded once into a cache file beside it."""
    from torchvision.datasets import ImageFolder
    from torchvision.transforms.functional import pil_to_tensor

    folders = {part: ImageFolder(str(root / part), transform=pil_to_tensor) for part in ("train", "test")}
    classes, others = (folder.classes for folder in folders.values())
    if classes != others:
        raise DataError(f"{root}: train and test have different classes: {classes}, {others}")
    if len(classes) != CLASSES:
        raise DataError(f"{root}: expected {CLASSES} classes, got {len(classes)}: {classes}")
    files = [Path(path) for folder in folders.values() for path, _ in folder.samples]
    listing = "\n".join(f"{file} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files)
    key = hashlib.sha256(listing.encode()).hexdigest()
    cache = root / "decoded-uint8.pt"
    held = torch.load(cache, weights_only=True) if cache.exists() else {}
    if held.get("key") != key:
        held = {"key": key}
        for part, folder in folders.items():
            images = torch.empty(len(folder), 3, 32, 32, dtype=torch.uint8)
            for i, (image, _) in enumerate(tqdm(folder, desc=f"decode {part}", disable=None)):
                if image.shape != images.shape[1:]:
                    raise DataError(f"{folder.samples[i][0]}: expected 3 x 32 x 32 pixels, got {tuple(image.shape)}")
                images[i] = image
            held[part] = images, torch.tensor(folder.targets)
        try:
            save(cache, held)
        except OSError as error:
            print(f"{cache}: not cached ({error.strerror})", file=sys.stderr)
    return Split(*held["train"]), Split(*held["test"])


def load_cifar10(data: str | None) -> tuple[Split, Split]:
    root = Path(data or "data")
    if (root / "train").is_dir() and (root / "test").is_dir():
        return load_folder(root)
    from torchvision.datasets import CIFAR10

    try:
        parts = [CIFAR10(str(root), train=train, download=True) for train in (True, False)]
    except Exception as error:
        raise DataError(
            f"no CIFAR-10 in {str(root)!r}, and it could not be downloaded ({error}). Three ways to go on:\n"
            "  --data DIR where DIR holds torchvision's layout (cifar-10-batches-py), or is writable and the network "
            "is up\n"
            "  --data DIR where DIR holds 32x32 PNG or JPEG images as train/<class>/* and test/<class>/*\n"
            "  --dataset digits, which needs no download"
        ) from error
    train, test = (Split(torch.from_numpy(p.data.transpose(0, 3, 1, 2).copy()), torch.tensor(p.targets)) for p in parts)
    return train, test


def load_digits() -> tuple[Split, Split]:
    """scikit-learn's 1,797 8x8 digits, up-scaled to 32x32; a fixed fifth of each class is for testing."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).view(-1, 1, 8, 8) * (255 / 16)
    images = F.interpolate(images, size=32, mode="bilinear").round().to(torch.uint8).repeat(1, 3, 1, 1)
    train, test = train_test_split(range(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    digits = Split(images, torch.from_numpy(labels))
    return digits.at(train), digits.at(test)


def divide(split: Split, n: int, seed: int, flag: str) -> tuple[Split, Split]:
    """n examples, as many of each class as of any other but for a remainder; and the others."""
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for c in range(CLASSES):
        of_class = (split.labels == c).nonzero().flatten()
        want = n // CLASSES + (c < n % CLASSES)
        if want > len(of_class):
            raise DataError(f"{flag} {n}: expected at most {len(of_class)} of class {c}, would need {want}")
        chosen.append(of_class[torch.randperm(len(of_class), generator=generator)[:want]])
    index = torch.cat(chosen)
    return split.at(index), split.at(~torch.isin(torch.arange(len(split.labels)), index))


def load_data(s: Settings) -> dict[str, Split]:
    """train and test, and with --validate val."""
    train, test = load_digits() if s.dataset == "digits" else load_cifar10(s.data)
    if s.holdout is not None:
        test, train = divide(train, s.holdout, 0, "--holdout")
    splits = {"test": test}
    if s.validate is not None:
        splits["val"], train = divide(train, s.validate, s.seed, "--validate")
    if s.train_size is not None:
        train, _ = divide(train, s.train_size, s.seed, "--train-size")
    splits["train"] = train
    if s.label_noise:
        generator = torch.Generator().manual_seed(s.seed)
        for name in ("train", "val"):
            if name in splits:
                splits[name] = splits[name].with_noise(s.label_noise, generator)
    return {name: Split(*(t.to(s.device) for t in split if t is not None)) for name, split in splits.items()}


def augment(images: Tensor, generator: torch.Generator, flip: bool) -> Tensor:
    """RandomCrop(size, padding=4) and, if ``flip``, RandomHorizontalFlip() of each of uint8 [n, c, size, size]."""
    n, device = len(images), images.device
    top, left = torch.randint(0, 9, (2, n), generator=generator, device=device)
    windows = F.pad(images, (4, 4, 4, 4)).unfold(2, images.shape[2], 1).unfold(3, images.shape[3], 1)
    cropped = windows[torch.arange(n, device=device), :, top, left]
    if not flip:
        return cropped
    mirrored = torch.rand(n, generator=generator, device=device) < 0.5
    return torch.where(mirrored.view(-1, 1, 1, 1), cropped.flip(-1), cropped)


class Normalize:
    """To float32 with mean 0 and deviation 1 in each channel of the training set, channels_last."""

    def __init__(self, images: Tensor) -> None:
        counts = torch.stack([torch.bincount(c.flatten(), minlength=256) for c in images.transpose(0, 1)]).double()
        levels = torch.arange(256, dtype=torch.float64, device=images.device)
        mean = (counts @ levels) / counts.sum(1)
        deviation = ((counts @ levels.square()) / counts.sum(1) - mean.square()).sqrt()
        self.mean, self.deviation = mean.float().view(1, -1, 1, 1), deviation.float().view(1, -1, 1, 1)

    def __call__(self, images: Tensor) -> Tensor:
        return ((images.float() - self.mean) / self.deviation).contiguous(memory_format=torch.channels_last)


def batches(
    split: Split, size: int, generator: torch.Generator, flip: bool, crop: bool = True
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of batches in a random order, augmented if ``crop``; the last may be smaller.

    Each process gets its share of the very batches that one alone would get, so all draw the same random numbers.
    """
    order = torch.randperm(len(split.labels), generator=generator, device=generator.device)
    share = slice(rank(), None, world_size())
    for index in order.split(size):
        if len(index) >= world_size():
            images = split.images[index]
            yield (augment(images, generator, flip) if crop else images)[share], split.labels[index][share]


# ---- networks: the CIFAR forms of the paper's code ----


def resnet18(width: int) -> nn.Module:
    """ResNet-18 with a 3x3 stem and no max-pool; 11.17 M parameters at width 64."""
    from torchvision.models.resnet import BasicBlock, conv1x1, conv3x3

    channels = [width << stage for stage in (0, 0, 0, 1, 1, 2, 2, 3, 3)]
    layers: list[nn.Module] = [conv3x3(3, width), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    for before, after in pairwise(channels):
        stride = 1 if before == after else 2
        shortcut = None if before == after else nn.Sequential(conv1x1(before, after, stride), nn.BatchNorm2d(after))
        layers.append(BasicBlock(before, after, stride, shortcut))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], CLASSES))


def vgg16(width: int) -> nn.Module:
    """VGG16 with BatchNorm and a 512-512-10 head; 14.99 M parameters at width 64."""
    from torchvision.models.vgg import cfgs, make_layers

    channels = width * 8
    features = make_layers([c if c == "M" else c * width // 64 for c in cfgs["D"]], batch_norm=True)
    head = [nn.Linear(channels, channels), nn.ReLU(inplace=True), nn.Linear(channels, CLASSES)]
    return nn.Sequential(features, nn.Flatten(), *head)


def mlp(width: int) -> nn.Module:
    """Two hidden layers with BatchNorm."""
    sizes = (3 * 32 * 32, width), (width, width)
    hidden = [nn.Sequential(nn.Linear(*size, bias=False), nn.BatchNorm1d(width), nn.ReLU()) for size in sizes]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, CLASSES))


ARCHS = {"resnet18": resnet18, "vgg16": vgg16, "mlp": mlp}


@dataclass
class Parts:
    """What is trained and by what; all but ``net`` goes into the checkpoint."""

    model: nn.Module
    optimizer: FusedSAM | FusedMSAM
    scheduler: torch.optim.lr_scheduler.LRScheduler
    rho_schedule: LambdaRho
    scaler: torch.amp.GradScaler
    net: nn.Module  # what to call: the model, or its replicas

    def kept(self) -> dict[str, Any]:
        return {name: part for name, part in vars(self).items() if name != "net"}


def build(s: Settings) -> Parts:
    model = ARCHS[s.arch](s.width).to(s.device).to(memory_format=torch.channels_last)
    if s.compile:
        model.compile()
    net = DistributedDataParallel(model) if dist.is_initialized() else model
    scaler = torch.amp.GradScaler(s.device.split(":")[0], enabled=s.amp == "fp16")
    rho = s.rho if s.method == "msam" else s.measure_rho
    params = norm_only(model, rho=rho) if s.norm_only else model.parameters()
    options: dict[str, Any] = {"rho": rho, "adaptive": s.adaptive, "lr": s.lr, "weight_decay": s.weight_decay}
    if s.base == "sgd":
        options["momentum"] = MOMENTUM
    opt: FusedSAM | FusedMSAM
    if s.method == "msam":
        opt = FusedMSAM(params, BASES[s.base], model=net, **options)
    else:
        opt = FusedSAM(params, BASES[s.base], model=net, scaler=scaler, lean_ascent=s.norm_only, **options)
    milestones = [math.ceil(f * s.epochs) for f in LR_MILESTONES]
    scheduler = torch.optim.lr_scheduler.MultiStepLR(opt, milestones, LR_DECAY)
    start = round(s.sam_from * s.epochs, 6) if s.rho else 0  # the plain base is measured from the first epoch on
    return Parts(model, opt, scheduler, LambdaRho(opt, late(start)), scaler, net)


# ---- one epoch ----


class Pass(NamedTuple):
    """What one forward and backward pass left."""

    loss: Tensor
    correct: Tensor
    size: int


def train_step(s: Settings, parts: Parts, x: Tensor, y: Tensor, index: int) -> list[Pass]:
    """One step; returns its passes, SAM's at the unperturbed weights first."""
    opt, scaler = parts.optimizer, parts.scaler
    done: list[Pass] = []

    def forward_backward(size: int) -> Tensor:
        opt.zero_grad()
        with torch.autocast(x.device.type, AMP[s.amp] if s.amp else None, enabled=s.amp is not None):
            logits = parts.net(x[:size])
            loss = F.cross_entropy(logits, y[:size], label_smoothing=s.label_smoothing)
        scaler.scale(loss).backward()
        done.append(Pass(loss.detach(), (logits.detach().argmax(1) == y[:size]).sum(), size))
        return loss

    ascends = any(parts.rho_schedule.get_last_rho())
    if isinstance(opt, FusedSAM) and s.rho and index % s.sam_every == 0:
        part = max(min(2, len(x)), round(s.ascent_fraction * len(x)))  # BatchNorm needs two
        sizes = iter([part] * ascends + [len(x)])
        opt.step(lambda: forward_backward(next(sizes)))
    else:
        forward_backward(len(x))
        if isinstance(opt, FusedSAM) and ascends:
            opt.measure_sharpness()
        scaler.step(opt)
    scaler.update()
    return done


def train_epoch(s: Settings, parts: Parts, bar: tqdm, normalize: Normalize) -> dict[str, float | None]:
    """The means over the batches that ``bar`` gives."""
    loss = correct = rise = rises = torch.zeros((), device=s.device)
    seen = 0
    opt = parts.optimizer
    for index, (x, y) in enumerate(bar):
        first, *second = train_step(s, parts, normalize(x), y, index)
        loss = loss + first.loss * first.size
        correct = correct + first.correct
        seen += first.size
        if isinstance(opt, FusedSAM) and second and second[0].size == first.size:
            perturbed = opt.grad_norm.isfinite()  # after an overflow both passes are at the same weights
            rise = rise + torch.where(perturbed, second[0].loss - first.loss, 0)
            rises = rises + perturbed
        if index % 10 == 0:
            mean = loss.item() / seen
            check_loss(mean, f"at batch {index}")
            bar.set_postfix(loss=f"{mean:.3f}", acc=f"{correct.item() / seen:.3f}")
    sharpness = opt.mean_sharpness().item() if isinstance(opt, FusedSAM) else math.nan
    sums = torch.tensor([loss, correct, seen, sharpness, rise, rises], dtype=torch.float64, device=s.device)
    if dist.is_initialized():
        dist.all_reduce(sums)
    all_loss, all_correct, all_seen, all_sharpness, all_rise, all_rises = sums.tolist()
    mean = all_loss / all_seen
    check_loss(mean, "at the end of the epoch")
    return {
        "train_loss": mean,
        "train_acc": all_correct / all_seen,
        "sharpness": finite(all_sharpness / world_size()),
        "realised_sharpness": finite(all_rise / all_rises) if all_rises else None,
    }


def check_loss(mean: float, when: str) -> None:
    if not math.isfinite(mean):
        raise FloatingPointError(f"the training loss is {mean} {when}")


@torch.no_grad()
def evaluate(model: nn.Module, split: Split, normalize: Normalize) -> tuple[float, Tensor]:
    """The mean loss, and which images are taken for what their labels say: bool [n]."""
    model.eval()
    loss, right = 0.0, []
    for images, labels in zip(split.images.split(500), split.labels.split(500), strict=True):
        logits = model(normalize(images))
        loss += F.cross_entropy(logits, labels, reduction="sum").item()
        right.append(logits.argmax(1) == labels)
    return loss / len(split.labels), torch.cat(right)


def measure(model: nn.Module, splits: dict[str, Split], normalize: Normalize) -> dict[str, float | None]:
    """Loss and accuracy of test and val; of a training set with wrong labels, the accuracy on right and wrong ones."""
    out: dict[str, float | None] = {}
    for name in ("test", "val"):
        if name in splits:
            loss, right = evaluate(model, splits[name], normalize)
            out |= {f"{name}_loss": finite(loss), f"{name}_acc": right.float().mean().item()}
    wrong = splits["train"].wrong
    if wrong is not None:
        _, right = evaluate(model, splits["train"], normalize)
        of = {"clean_acc": right[~wrong], "memorised": right[wrong]}
        out |= {name: mine.float().mean().item() for name, mine in of.items() if len(mine)}
    return out


def finite(x: float) -> float | None:
    """x, or None, which JSON can say."""
    return x if math.isfinite(x) else None


# ---- a run and its folder ----


def save(path: Path, content: Any) -> None:
    """torch.save (or text, or bytes) by rename: there is always a whole file, also where several processes save it."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as f:
            if isinstance(content, str | bytes):
                f.write(content.encode() if isinstance(content, str) else content)
            else:
                torch.save(content, f)
            f.flush()
            os.fsync(f.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def environment(device: str = "cpu") -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    named = re.search("model name\\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "sam_fused": sam_fused.__version__,
        "cpu": named[1] if named else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "instruction_set": extension().cpu_isa(),
        "threads": torch.get_num_threads(),
        "processes": world_size(),
        "gpu": torch.cuda.get_device_name() if device.startswith("cuda") else None,
    }


def json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class RunError(Exception):
    """The run's folder is not as expected."""


def open_run(s: Settings, resume: bool) -> tuple[dict[str, Split], dict[str, Split], dict[str, Any] | None]:
    """Make the folder, or check that it holds this very run.

    Returns:
        The data, what is evaluated before the last epoch, and the run's checkpoint, if there is one.
    """
    out = Path(s.out)
    config, checkpoint = out / "config.json", out / "checkpoint.pt"
    settings = {k: v for k, v in dataclasses.asdict(s).items() if k not in FREE_ON_RESUME}
    content: dict[str, Any] = {"settings": settings, "environment": environment(s.device)}
    if not rank():  # the first process sees to the folder
        if not resume and (config.exists() or checkpoint.exists()):
            raise RunError(f"{out} holds a run already: add --resume to go on with it, or choose another --out")
        if config.exists():
            held: dict[str, Any] = json.loads(config.read_text())
            # each process perturbs by its own part of a batch
            was, now = ({**c["settings"], "processes": c["environment"].get("processes", 1)} for c in (held, content))
            for name, value in now.items():
                before = was.get(name, DEFAULTS.get(name, value))
                if before != value:
                    raise RunError(f"--resume: {out} was run with {name} = {before!r}, not {value!r}")
            done = len(json_lines(out / "metrics.jsonl"))
            if checkpoint.exists():
                machines = [held["environment"], *held.get("resumed_on", [])]
                if done < s.epochs and content["environment"] not in machines:
                    machines.append(content["environment"])
                content = {"settings": settings, "environment": machines[0], "resumed_on": machines[1:]}
            elif done:
                raise RunError(f"--resume: {out} has {done} of {s.epochs} epochs and no checkpoint.pt to go on from")
    splits = load_data(s)  # before the folder is made: a start that fails leaves nothing
    before_last = dict(splits)
    if s.eval_size == 0:
        del before_last["test"]
    elif s.eval_size:
        before_last["test"], _ = divide(splits["test"], s.eval_size, 0, "--eval-size")
    if not rank():
        out.mkdir(parents=True, exist_ok=True)
        for part in out.glob("*.part"):  # of a save that was killed
            part.unlink()
        save(config, json.dumps(content, indent=2) + "\n")
    kept = torch.load(checkpoint, weights_only=True, map_location="cpu") if checkpoint.exists() else None
    return splits, before_last, kept


def train(
    s: Settings, resume: bool = False, after_epoch: Callable[[dict[str, Any]], None] | None = None
) -> list[dict[str, Any]]:
    """Train, and leave config.json, metrics.jsonl and checkpoint.pt in ``s.out``; returns the metrics by epoch.

    With ``keep_every``, also weights-<epoch>.pt, the state_dict of the model. ``after_epoch`` gets each epoch's
    metrics, which are printed without it. In a process of torchrun's that is not the first, the metrics lack the test
    set's part.
    """
    torch.set_num_threads(s.threads)
    out = Path(s.out)
    splits, before_last, checkpoint = rank_0_first(lambda: open_run(s, resume))
    train_split = splits["train"]
    normalize = Normalize(train_split.images)
    torch.manual_seed(s.seed)  # of the network; the order of the images and their augmentation have a generator
    generator = torch.Generator(s.device).manual_seed(s.seed)
    parts = build(s)
    metrics: list[dict[str, Any]] = []
    if checkpoint:
        for name, part in parts.kept().items():
            part.load_state_dict(checkpoint[name])
        generator.set_state(checkpoint["random"]["data"])
        metrics = checkpoint["metrics"]
        if not rank():
            print(f"{out}: going on after epoch {len(metrics)} of {s.epochs}", flush=True)
            write_metrics(out, metrics)  # which the kill may have prevented
    one_epoch = partial(batches, train_split, s.batch_size, generator, flip=s.dataset == "cifar10", crop=s.augment)
    steps = math.ceil(len(train_split.labels) / s.batch_size)
    for epoch in range(len(metrics) + 1, s.epochs + 1):
        start, cpu_start, lr = time.perf_counter(), time.process_time(), parts.scheduler.get_last_lr()[0]
        parts.model.train()
        hidden = True if rank() else None  # None: where there is no terminal
        with tqdm(one_epoch(), f"epoch {epoch}/{s.epochs}", steps, leave=False, disable=hidden) as bar:
            row = train_epoch(s, parts, bar, normalize)
        row["train_cpu_seconds"] = time.process_time() - cpu_start  # of all threads, whatever else the machine does
        parts.scheduler.step()
        parts.rho_schedule.step()
        metrics.append({"epoch": epoch, "lr": lr, **row})
        if not all(t.isfinite().all() for t in (*parts.model.parameters(), *parts.model.buffers())):
            raise FloatingPointError(f"the weights are not finite after epoch {epoch}")
        if rank():
            continue
        last = epoch == s.epochs
        if last and s.method == "msam":  # until here BatchNorm's statistics are of the perturbed weights
            torch.optim.swa_utils.update_bn((normalize(images) for images, _ in one_epoch()), parts.model)
        metrics[-1] |= measure(parts.model, splits if last else before_last, normalize)
        metrics[-1]["seconds"] = time.perf_counter() - start
        states = {name: part.state_dict() for name, part in parts.kept().items()}
        if s.keep_every and epoch % s.keep_every == 0:  # before the checkpoint, after which no run comes back here
            save(out / f"weights-{epoch:04}.pt", states["model"])
        save(out / "checkpoint.pt", {**states, "random": {"data": generator.get_state()}, "metrics": metrics})
        write_metrics(out, metrics)
        if after_epoch:
            after_epoch(metrics[-1])
        else:
            print(line(metrics[-1], s.epochs), flush=True)
    return metrics


def write_metrics(out: Path, metrics: list[dict[str, Any]]) -> None:
    save(out / "metrics.jsonl", "".join(json.dumps(m) + "\n" for m in metrics))


# What an epoch's line and the report show, where it is measured: the key in metrics.jsonl, the title and the format.
COLUMNS = {
    "train_loss": ("train loss", ".4f"),
    "train_acc": ("train acc", ".2%"),
    "test_loss": ("test loss", ".4f"),
    "test_acc": ("test acc", ".2%"),
    "val_acc": ("val acc", ".2%"),
    "clean_acc": ("clean acc", ".2%"),
    "memorised": ("memorised", ".2%"),
    "sharpness": ("sharpness", ".4f"),
    "realised_sharpness": ("realised", ".4f"),
    "seconds": ("seconds", ".1f"),
}


def shown(m: dict[str, Any]) -> dict[str, str]:
    """The cells of an epoch by title."""
    measured = [(m[key], *column) for key, column in COLUMNS.items() if key in m]
    return {title: "-" if value is None else format(value, form) for value, title, form in measured}


def line(m: dict[str, Any], epochs: int) -> str:
    columns = "  ".join(f"{title} {cell:>6}" for title, cell in shown(m).items())
    return f"epoch {m['epoch']:3}/{epochs}  lr {m['lr']:<6.2g}  {columns}"


def aligned(rows: list[list[str]]) -> str:
    """A table in Markdown; its first row is the titles."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rule = ["-" * width for width in widths]
    return "\n".join(f"| {' | '.join(map(str.ljust, row, widths))} |" for row in (rows[0], rule, *rows[1:]))


def report(folders: list[str]) -> str:
    """A table of the last epoch of each run; the seconds are the mean of its epochs."""
    rows = []
    for folder in map(Path, folders):
        try:
            s = json.loads((folder / "config.json").read_text())["settings"]
            epochs = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
        except (OSError, ValueError, KeyError) as error:
            raise RunError(f"--report: {folder} holds no run: {error!r}") from error
        if not epochs:
            raise RunError(f"--report: {folder} holds no run that has finished an epoch")
        last = {**epochs[-1], "seconds": sum(m["seconds"] for m in epochs) / len(epochs)}
        kind = ("A" if s["adaptive"] else "") + s.get("method", "sam").upper()
        optimizer = s["base"] + (f" + {kind} {s['rho']:g}" if s["rho"] else "")
        done = f"{last['epoch']}/{s['epochs']}"
        rows.append({"run": folder.name, "optimizer": optimizer, "epochs": done, **shown(last)})
    titles = ["run", "optimizer", "epochs", *(title for title, _ in COLUMNS.values() if any(title in r for r in rows))]
    return aligned([titles, *([row.get(title, "-") for title in titles] for row in rows)])


def exit_status(program: str, call: Callable[[], object], interrupted: str) -> int:
    """Of a command that is ``call``: 0, 1 with the message of an error that is to be expected, or 130 by Ctrl-C."""
    try:
        call()
    except (DataError, RunError, FloatingPointError, ImportError, OSError, ValueError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\ninterrupted; {interrupted}", file=sys.stderr)
        return 130
    return 0


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)

    def run() -> None:
        if args.report:
            print(report(args.report))
        else:
            with processes(settle(args)) as settings:
                train(settings, args.resume)

    return exit_status("train.py", run, f"whole epochs are kept in {args.out}: add --resume to go on")


if __name__ == "__main__":
    sys.exit(main())
