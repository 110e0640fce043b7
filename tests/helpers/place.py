"""Where the tests run, see conftest.py.

Does not import sam_fused: conftest.py, which imports this, chooses its backend.
"""

from __future__ import annotations

import os

import pytest
import torch

PLACE = os.environ.get("SAM_FUSED_TEST_DEVICE", "cpu")  # see conftest.py
DEVICE = torch.device("cuda:0" if PLACE == "cuda" else "cpu")
#: The test files that run on every device; the others are about what is around the arithmetic.
DEVICE_TESTS = [
    "optimizer/test_parity.py",
    "optimizer/test_msam_parity.py",
    "optimizer/test_msam.py",
    "optimizer/test_checkpoints.py",
    "optimizer/test_ops.py",
    "optimizer/test_algorithm.py",
    "optimizer/test_restoring.py",
    "optimizer/test_protocol.py",
    "optimizer/test_changes.py",
    "optimizer/test_errors.py",
    "optimizer/test_devices.py",
    "optimizer/test_rounding.py",
    "optimizer/test_torch_optim.py",
    "optimizer/test_batchnorm.py",
    "integrations/test_grad_scaler.py",
    "integrations/test_schedulers.py",
    "cuda/test_capturable.py",
    "cuda/test_launch_errors.py",
]
on_the_cpu = pytest.mark.skipif(PLACE != "cpu", reason="is about the CPU backend")
