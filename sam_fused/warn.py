"""Warnings that name the line of the user's code."""

from __future__ import annotations

import os
import sys
import warnings
from types import FrameType

import torch
from torch._compile import _disable_dynamo

_INSIDE = tuple(os.path.dirname(file) + os.sep for file in (__file__, torch.__file__))


@_disable_dynamo
def warn(message: str) -> None:
    """A UserWarning at the innermost call that is neither in this package nor in torch.

    Schedulers and hooks put wrappers of torch around ``step``, so no constant stacklevel fits.
    """
    frame: FrameType | None = sys._getframe(1)
    stacklevel = 2
    while frame is not None and frame.f_code.co_filename.startswith(_INSIDE):
        frame, stacklevel = frame.f_back, stacklevel + 1
    warnings.warn(message, stacklevel=stacklevel)
