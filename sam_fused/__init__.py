"""Sharpness-Aware Minimization for PyTorch, fused in C++ over all parameter tensors."""

from .msam import FusedMSAM, ReferenceMSAM
from .sam import FusedSAM, ReferenceSAM
from .sharpness import Sharpness, loss_slice, measure_sharpness

__all__ = ["FusedMSAM", "FusedSAM", "ReferenceMSAM", "ReferenceSAM", "Sharpness", "loss_slice", "measure_sharpness"]
__version__ = "0.1.0"
