"""SAM on a part of the parameters: on normalisation layers alone (SAM-ON)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from .distributed import is_dtensor
from .parameters import name_of

_LAYERS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_NAMES = re.compile(r"Norm(\dd)?$")  # of other libraries' classes: LlamaRMSNorm, T5LayerNorm, LayerNorm2d


def norm_only(model: nn.Module, *, rho: float, **options: Any) -> list[dict[str, Any]]:
    """Parameter groups in which SAM perturbs the weights and biases of normalisation layers, and nothing else.

    After Mueller et al., "Normalization Layers Are All That Sharpness-Aware Minimization Needs"
    (https://arxiv.org/abs/2306.04226). The base trains all parameters; those that are perturbed are about a thousandth
    of them, so the backup takes next to no memory. The best rho is several times that of SAM on all parameters.

    Args:
        model: whose parameters are to be trained. Layers of other libraries count if their class is called ...Norm.
        rho: of the normalisation layers.
        options: of both groups, such as ``weight_decay``.

    Returns:
        Two groups for FusedSAM or FusedMSAM, with the parameters' names: the normalisation layers', then all others
        with rho 0. Parameters that ask for no gradient are left out.

    Raises:
        ValueError: if no normalisation layer has parameters.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    layers = [m for m in model.modules() if isinstance(m, _LAYERS) or _NAMES.search(type(m).__name__)]
    of_norms: set[Tensor] = {p for layer in layers for p in layer.parameters(recurse=False)}
    if not any(p in of_norms for _, p in named):
        raise ValueError("model: expected normalisation layers with parameters that ask for gradients, found none")
    return [
        {
            "params": [(name, p) for name, p in named if (p in of_norms) is chosen],
            "rho": rho if chosen else 0.0,
            **options,
        }
        for chosen in (True, False)
        if chosen or any(p not in of_norms for _, p in named)
    ]


@contextmanager
def only_ascending(groups: Sequence[dict[str, Any]]) -> Iterator[None]:
    """Parameters of groups with rho 0 ask for no gradients, which spares the backward pass their computation.

    Not so where no other would ask for one: a backward pass without gradients is an error.

    Raises:
        RuntimeError: if one of them is a DTensor: FSDP2 would go on without its gradients.
    """
    resting = []
    for g, group in enumerate(groups):
        for i, p in enumerate(group["params"] if group["rho"] == 0 else ()):
            if is_dtensor(p):
                raise RuntimeError(f"lean_ascent: {name_of(groups, g, i)} is a DTensor, which is not supported")
            if p.requires_grad:
                resting.append(p)
    if not any(p.requires_grad for group in groups for p in group["params"] if group["rho"] > 0):
        resting = []
    try:
        try:
            for p in resting:
                p.requires_grad_(False)
            yield
        finally:
            for p in resting:
                p.requires_grad_(True)
    finally:
        for p in resting:  # an interrupt may have cut the loop above short
            p.requires_grad_(True)
