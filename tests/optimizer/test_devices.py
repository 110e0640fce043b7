"""Parameters on several devices. (One device stands in for both.)"""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import sam_fused.buckets
import sam_fused.fused
from sam_fused import _C, FusedMSAM, FusedSAM
from tests.helpers.cases import awkward, set_grads
from tests.helpers.sam import assert_untouched, lockstep, lockstep_in_one_pass, snapshot


def respelled(device: torch.device) -> torch.device:
    """The same device, unequal: with its index, or without."""
    return torch.device(device.type, 0) if device.index is None else torch.device(device.type)


def alternate_places(monkeypatch):
    """Every second parameter is taken to be on another device; returns the places by the id of the parameter."""
    places = {}

    def place(p):
        return places.setdefault(id(p), (respelled(p.device) if len(places) % 2 else p.device, None))

    monkeypatch.setattr(sam_fused.buckets, "place_of", place)
    return places


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_alternate_places_are_where_the_tensors_are(device, monkeypatch):
    """Or the tests that use them could not pass on a GPU."""
    places = alternate_places(monkeypatch)
    with FakeTensorMode():
        params = [torch.empty(2, device=device) for _ in range(2)]
        here, there = (sam_fused.buckets.place_of(p) for p in params)
        assert here != there
        assert there[0].type == here[0].type == params[1].device.type
    assert len(places) == 2


def test_several_devices(monkeypatch):
    """Parameters on two devices go into two calls, with one norm. (One device stands in for both.)"""
    places = alternate_places(monkeypatch)
    lockstep([{"params": awkward(torch.float64)}], torch.optim.Adam, {}, skips=[({0}, {4, 5}), ({6}, {1})], steps=6)
    assert len(places) > 2


def test_several_devices_in_one_pass(monkeypatch):
    """From backup to backup, with the norm of both."""
    alternate_places(monkeypatch)
    opt = lockstep_in_one_pass([{"params": awkward(torch.float64)}], torch.optim.Adam, {}, steps=6, rho=0.5)
    assert all(plan.advances and len(plan.descent) == 2 for plan in opt._arithmetic._plans.values())


@pytest.mark.parametrize("cls", [FusedSAM, FusedMSAM])
def test_a_perturbation_that_fails_halfway_is_undone(cls, monkeypatch):
    alternate_places(monkeypatch)
    params = awkward(torch.float32)
    opt = cls(params, rho=1.0)
    set_grads(params, 0)
    if cls is FusedMSAM:
        opt.step()
        opt.eval()
    before = snapshot(params)
    perturb, calls = sam_fused.fused._C.perturb_, []

    class Failing:
        def __getattr__(self, name):
            return getattr(_C, name)

        def perturb_(self, *args, **hook):
            calls.append(args)
            if len(calls) == 2:
                raise MemoryError
            perturb(*args, **hook)

    monkeypatch.setattr(sam_fused.fused, "_C", Failing())
    with pytest.raises(MemoryError):
        opt.first_step() if cls is FusedSAM else opt.train()
    assert len(calls) == 2
    assert not opt.perturbed
    assert_untouched(params, before)
