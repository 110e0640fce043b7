"""The lists of parameters that steps are timed on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

import train


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


SMALL = 10**6  # fewer parameters than this fit into the caches, with all that a step needs of them


def parameters(shapes: list[torch.Size]) -> list[nn.Parameter]:
    """With gradients."""
    params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    return params
