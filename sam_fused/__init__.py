"""Sharpness-Aware Minimization for PyTorch, fused in C++ over all parameter tensors."""

from .sam import FusedSAM, ReferenceSAM
from .sharpness import Sharpness, loss_slice, measure_sharpness

__all__ = ["FusedSAM", "ReferenceSAM", "Sharpness", "loss_slice", "measure_sharpness"]
__version__ = "0.1.0"
