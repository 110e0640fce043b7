"""Where the tests run. SAM_FUSED_TEST_DEVICE is one of

- cpu: the default,
- cuda: the same tests with every tensor on the GPU,
- emulated: tensors on the CPU, and the CUDA backend compiled for the CPU (tests/cuda/emulation) in place of the CPU's.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch: OpenMP's threads would spin in each other's way
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

from tests.helpers.place import DEVICE, DEVICE_TESTS, PLACE

if PLACE != "cpu":
    HERE = Path(__file__).parent
    collect_ignore = [p for p in HERE.rglob("test_*.py") if p.relative_to(HERE).as_posix() not in DEVICE_TESTS]

if PLACE == "emulated":
    from tests.cuda.emulation.build import extension

    assert "sam_fused" not in sys.modules, "the emulated backend must be there before sam_fused is imported"
    sys.modules["sam_fused._C"] = extension()
elif PLACE == "cuda":
    if not torch.cuda.is_available():
        pytest.exit("SAM_FUSED_TEST_DEVICE is cuda, and there is no GPU", returncode=1)
    torch.set_default_device(DEVICE)
elif PLACE != "cpu":
    pytest.exit(f"SAM_FUSED_TEST_DEVICE: expected cpu, cuda or emulated, got {PLACE!r}", returncode=1)

from sam_fused.extension import extension as built  # only now that the backend is chosen

try:
    built()
except ImportError as error:
    pytest.exit(str(error), returncode=1)
