"""Sharpness-Aware Minimization for PyTorch, fused in C++ over all parameter tensors."""

from .groups import norm_only
from .msam import FusedMSAM, ReferenceMSAM
from .sam import FusedSAM, ReferenceSAM
from .schedule import LambdaRho, at_random, late, warm_up
from .sharpness import Sharpness, loss_slice, measure_sharpness

__all__ = [
    "FusedMSAM",
    "FusedSAM",
    "LambdaRho",
    "ReferenceMSAM",
    "ReferenceSAM",
    "Sharpness",
    "at_random",
    "late",
    "loss_slice",
    "measure_sharpness",
    "norm_only",
    "warm_up",
]
__version__ = "0.1.0"
