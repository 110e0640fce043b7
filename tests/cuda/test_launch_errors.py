"""A kernel launch that fails loses no weights. The emulation makes any launch fail, which no GPU does when asked."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

import pytest
import torch
from torch import nn

from sam_fused import FusedSAM
from tests.helpers.cases import generator, set_grads
from tests.helpers.dtypes import DTYPES
from tests.helpers.place import PLACE

pytestmark = pytest.mark.skipif(PLACE != "emulated", reason="is about the emulated backend")
FAILS_IN = "EMULATION_FAILS_IN"


def parameters(dtypes: tuple[torch.dtype, ...]) -> list[nn.Parameter]:
    values = torch.randn(20, 3, generator=generator(0), dtype=torch.float64)
    return [nn.Parameter(row.to(dtypes[i % len(dtypes)])) for i, row in enumerate(values)]


def fails(half: Callable[[], None]) -> bool:
    try:
        half()
    except RuntimeError as error:
        if "kernel launch" not in str(error):
            raise
        return True
    return False


@pytest.mark.parametrize("earlier", [0, 2], ids=["first step", "third step"])
@pytest.mark.parametrize("dtypes", [DTYPES[:1], DTYPES], ids=["one type", "four types"])
@pytest.mark.parametrize("name", ["ascent", "descent"])
def test_every_launch(name, dtypes, earlier, monkeypatch):
    """A failed ascent restores the weights, and after a failed descent restore() does. Types have launches each."""
    params = parameters(dtypes)
    opt = FusedSAM(params, torch.optim.Adam, lr=0.1, rho=0.5)

    def ascent() -> None:
        set_grads(params, seed=1)
        opt.first_step()

    def descent() -> None:
        set_grads(params, seed=2)
        opt.second_step()

    for _ in range(earlier):
        ascent()
        descent()
    before = [p.detach().clone() for p in params]
    for k in count():
        if name == "descent":
            ascent()
        monkeypatch.setenv(FAILS_IN, str(k))
        failed = fails(ascent if name == "ascent" else descent)
        monkeypatch.delenv(FAILS_IN)
        if not failed:
            break
        assert opt.perturbed == (name == "descent")
        opt.restore()
        assert all(torch.equal(p, w) for p, w in zip(params, before, strict=True)), f"launch {k}"
    # Norms, their sum, the sharpness and perturbing; or preparing and updating.
    assert k == (2 * len(dtypes) + 2 if name == "ascent" else 1 + len(dtypes))
