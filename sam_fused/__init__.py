"""Sharpness-Aware Minimization for PyTorch, fused in C++ over all parameter tensors."""

from .optimizer import FusedSAM
from .reference import ReferenceSAM

__all__ = ["FusedSAM", "ReferenceSAM"]
__version__ = "0.1.0"
