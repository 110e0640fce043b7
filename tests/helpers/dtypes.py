"""The types of parameters that the extension has kernels for."""

import torch

FULL = (torch.float32, torch.float64)
HALF = (torch.bfloat16, torch.float16)
DTYPES = (*FULL, *HALF)
