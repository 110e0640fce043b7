"""What the tests of FusedSAM and of ReferenceSAM share. It imports sam_fused, which conftest.py may not do first."""

from __future__ import annotations

import pytest
import torch

from sam_fused import FusedMSAM, FusedSAM, ReferenceMSAM, ReferenceSAM
from sam_fused.around import Around
from tests.helpers.cases import MIXED_TOLERANCE, TOLERANCE, assert_near, assert_same_state, clones, set_grads

both = pytest.mark.parametrize("cls", [FusedSAM, ReferenceSAM])


def snapshot(params):
    return [(p.detach().clone(), p.data_ptr(), p.stride()) for p in params]


def assert_untouched(params, before) -> None:
    for i, (p, (value, pointer, stride)) in enumerate(zip(params, before, strict=True)):
        assert torch.equal(p, value), f"params[{i}]"
        assert p.data_ptr() == pointer
        assert p.stride() == stride


def copy_over(to: Around, source: Around) -> None:
    """Make the reference go on from the extension's parameters and state."""
    for mine, theirs in zip(to.param_groups, source.param_groups, strict=True):
        for p, q in zip(mine["params"], theirs["params"], strict=True):
            p.data.copy_(q.data)
            for key, value in source.state.get(q, {}).items():
                if isinstance(value, torch.Tensor):
                    to.state[p][key].copy_(value)


def lockstep(groups, base, options, steps=12, skips=(), **sam):
    """Run both over the same gradients; ``skips`` holds, in turn, the indices without a gradient in either pass."""
    flat = [p for g in groups for p in g["params"]]
    twins = iter(clones(flat))
    twin_groups = [{**g, "params": [next(twins) for _ in g["params"]]} for g in groups]
    fused = FusedSAM(groups, base, **options, **sam)
    reference = ReferenceSAM(twin_groups, base, **options, **sam)
    others = [p for g in twin_groups for p in g["params"]]
    dtypes = {p.dtype for p in flat}
    tolerance = TOLERANCE if len(dtypes) == 1 else MIXED_TOLERANCE
    for step in range(steps):
        first, second = skips[step % len(skips)] if skips else (frozenset(), frozenset())
        where = f"step {step}"
        before = [p.detach().clone() for p in flat]
        for params in (flat, others):
            set_grads(params, 2 * step + (step // 2) % 2, first)
        fused.first_step()
        reference.first_step()
        norm = min(max(tolerance[d] for d in dtypes), 1e-6)
        assert_near(fused.grad_norm / reference.grad_norm, torch.ones((), dtype=torch.float64), norm, where)
        assert_near(fused.sharpness / reference.sharpness, torch.ones((), dtype=torch.float64), norm, where)
        for i, (p, q) in enumerate(zip(flat, others, strict=True)):
            assert_near(p.detach(), q.detach(), tolerance[p.dtype], f"{where}, perturbed params[{i}]")
            if i in first:
                assert torch.equal(p, before[i]), f"{where}: params[{i}] has no gradient and moved"
        for params in (flat, others):
            set_grads(params, 1000 + step, second)
        fused.second_step()
        reference.second_step()
        assert_same_state(fused, reference, tolerance, where)
        for i in second:
            assert torch.equal(flat[i], before[i]), f"{where}: params[{i}] was not restored"
        if dtypes != {torch.float64}:  # in float64 all steps accumulate; elsewhere each is compared by itself
            copy_over(reference, fused)
    assert_near(fused.mean_sharpness(), reference.mean_sharpness(), 1e-6, "mean sharpness")
    return fused


def lockstep_in_one_pass(groups, base, options, steps=12, skips=(), **msam):
    """Run FusedMSAM and ReferenceMSAM over the same gradients; ``skips`` holds, in turn, indices without a gradient."""
    flat = [p for g in groups for p in g["params"]]
    twins = iter(clones(flat))
    twin_groups = [{**g, "params": [next(twins) for _ in g["params"]]} for g in groups]
    fused = FusedMSAM(groups, base, **options, **msam)
    reference = ReferenceMSAM(twin_groups, base, **options, **msam)
    others = [p for g in twin_groups for p in g["params"]]
    dtypes = {p.dtype for p in flat}
    tolerance = TOLERANCE if len(dtypes) == 1 else MIXED_TOLERANCE
    for step in range(steps):
        for params in (flat, others):
            set_grads(params, step, skips[step % len(skips)] if skips else frozenset())
        fused.step()
        reference.step()
        for i, (p, q) in enumerate(zip(flat, others, strict=True)):
            assert_near(p.detach(), q.detach(), tolerance[p.dtype], f"step {step}, perturbed params[{i}]")
        if dtypes != {torch.float64} or step % 3 == 2:  # in float64 all steps accumulate; elsewhere each is by itself
            perturbed = [p.detach().clone() for p in flat]
            fused.eval()
            reference.eval()
            assert_same_state(fused, reference, tolerance, f"step {step}")
            if dtypes != {torch.float64}:
                copy_over(reference, fused)
            fused.train()
            reference.train()
            for i, (p, before) in enumerate(zip(flat, perturbed, strict=True)):
                assert torch.equal(p, before), f"step {step}: params[{i}] is not where it was before eval and train"
    return fused
