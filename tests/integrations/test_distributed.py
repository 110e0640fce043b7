"""Two processes: DistributedDataParallel's replicas, and the shards of DTensors and FSDP2."""

from __future__ import annotations

import copy
import io
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import Replicate, Shard
from torch.nn.parallel import DistributedDataParallel

from sam_fused import FusedMSAM, FusedSAM, ReferenceMSAM, ReferenceSAM
from sam_fused.distributed import sum_over_shards
from tests.helpers.cases import assert_near
from tests.helpers.networks import batch, fsdp, loss_of, take_step, uneven
from tests.helpers.pair import full
from tests.helpers.sam import assert_untouched, both, snapshot

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")
OPTIONS = {"rho": 0.5, "lr": 0.05}


def shard(step: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = batch(step)
    return x[rank::2], y[rank::2]


def assert_ranks_agree(params) -> None:
    """Bit for bit."""
    for p in params:
        both = [torch.empty_like(p) for _ in range(2)]
        dist.all_gather(both, p.detach().contiguous())
        assert torch.equal(both[0], both[1])


def assert_same_weights(model, expected, tolerance, what) -> None:
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        assert_near(full(p), q.detach(), tolerance, what)


# ---- DistributedDataParallel ----


class AveragedShards:
    """In one process: SAM by each shard alone, and the base's step with the mean of the shards' second gradients."""

    def __init__(self, base, **options) -> None:
        self.model = uneven()
        self.base = base(self.model.parameters(), lr=OPTIONS["lr"], **options)
        self.sharpness = [0.0, 0.0]

    def step(self, step: int, adaptive: bool) -> None:
        gradients = []
        for rank in range(2):
            alone = copy.deepcopy(self.model)
            ascent = ReferenceSAM(alone.parameters(), torch.optim.SGD, lr=0.0, rho=OPTIONS["rho"], adaptive=adaptive)
            x, y = shard(step, rank)
            loss_of(alone, x, y).backward()
            ascent.first_step(zero_grad=True)
            self.sharpness[rank] = ascent.sharpness.item()
            loss_of(alone, x, y).backward()
            gradients.append([p.grad for p in alone.parameters()])
        for p, *parts in zip(self.model.parameters(), *gradients, strict=True):
            p.grad = torch.stack(parts).mean(0)
        self.base.step()


def m_sharpness(base, adaptive, form) -> None:
    rank = dist.get_rank()
    model = DistributedDataParallel(uneven())
    given = torch.compile(model, backend="eager") if form == "compiled" else model
    opt = FusedSAM(model.parameters(), base, adaptive=adaptive, model=given, **OPTIONS)
    expected = AveragedShards(base)
    for step in range(4):
        x, y = shard(step, rank)
        if form == "two calls":
            with model.no_sync():
                loss_of(model, x, y).backward()
            opt.first_step(zero_grad=True)
            loss_of(model, x, y).backward()
            opt.second_step(zero_grad=True)
        else:
            take_step(opt, model, x, y)
        expected.step(step, adaptive)
        assert_ranks_agree(model.parameters())
        assert_same_weights(model, expected.model, 1e-12, f"step {step}")
        assert_near(
            opt.sharpness,
            torch.tensor(expected.sharpness[rank], dtype=torch.float64),
            1e-12,
            "the rank's own sharpness",
        )


@pytest.mark.parametrize("base", [torch.optim.Adam, torch.optim.Adagrad], ids=lambda b: b.__name__)
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("form", ["closure", "two calls", "compiled"])
def test_ddp_perturbs_by_each_rank_alone(pair, base, adaptive, form):
    pair(m_sharpness, base, adaptive, form)


def global_perturbation(cls) -> None:
    model, alone = DistributedDataParallel(uneven()), uneven()
    opt = cls(model.parameters(), torch.optim.Adam, model=model, sync_perturbation=True, **OPTIONS)
    expected = ReferenceSAM(alone.parameters(), torch.optim.Adam, **OPTIONS)
    for step in range(4):
        take_step(opt, model, *shard(step, dist.get_rank()))
        take_step(expected, alone, *batch(step))
        assert_ranks_agree(model.parameters())
        assert_same_weights(model, alone, 1e-10, f"step {step}")
        assert_near(opt.sharpness, expected.sharpness, 1e-10, "sharpness of the whole batch")


@both
def test_ddp_sync_perturbation_is_sam_on_the_whole_batch(pair, cls):
    pair(global_perturbation, cls)


def static_graph() -> None:
    model = DistributedDataParallel(uneven(), static_graph=True)
    before = snapshot(model.parameters())
    opt = FusedSAM(model.parameters(), torch.optim.SGD, model=model, **OPTIONS)
    x, y = shard(0, dist.get_rank())
    with pytest.raises(RuntimeError, match=r"model: DistributedDataParallel with static_graph=True.*sync_perturbation"):
        take_step(opt, model, x, y)
    assert_untouched(model.parameters(), before)
    opt = FusedSAM(model.parameters(), torch.optim.SGD, model=model, sync_perturbation=True, **OPTIONS)
    alone = uneven()
    expected = ReferenceSAM(alone.parameters(), torch.optim.SGD, **OPTIONS)
    for step in range(3):
        take_step(opt, model, *shard(step, dist.get_rank()))
        take_step(expected, alone, *batch(step))
        assert_same_weights(model, alone, 1e-10, f"step {step}")


def test_ddp_with_a_static_graph(pair):
    pair(static_graph)


def overflow_on_one_rank(base, form) -> None:
    """Rank 1 overflows in its first pass, which rank 0 cannot see in its own gradients."""
    model = DistributedDataParallel(uneven().float())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    opt = FusedSAM(model.parameters(), base, model=model, scaler=scaler, **OPTIONS)

    def run(step: int, bad: bool) -> None:
        x, y = (t.float() for t in shard(step, dist.get_rank()))

        def closure():
            opt.zero_grad()
            loss = loss_of(model, x, y)
            overflows = bad and not opt.perturbed and dist.get_rank() == 1
            scaler.scale(loss * float("inf") if overflows else loss).backward()
            return loss

        if form == "closure":
            opt.step(closure)
        else:
            with model.no_sync():
                closure()
            opt.first_step()
            closure()
            scaler.step(opt)
        scaler.update()

    run(0, bad=False)
    before = [p.detach().clone() for p in model.parameters()]
    run(1, bad=True)
    assert scaler.get_scale() == 512.0
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    run(2, bad=False)
    assert not torch.equal(next(model.parameters()), before[0])
    assert_ranks_agree(model.parameters())


@pytest.mark.parametrize("form", ["closure", "two calls"])
@pytest.mark.parametrize("base", [torch.optim.Adam, torch.optim.Adagrad], ids=lambda b: b.__name__)
def test_ddp_an_overflow_on_one_rank_skips_the_step_on_all(pair, base, form):
    pair(overflow_on_one_rank, base, form)


# ---- FSDP2 and DTensors ----


def fsdp_steps(base, adaptive, options) -> None:
    model, alone = fsdp(), uneven()
    opt = FusedSAM(model.parameters(), base, adaptive=adaptive, model=model, **OPTIONS, **options)
    expected = ReferenceSAM(alone.parameters(), base, adaptive=adaptive, **OPTIONS, **options)
    for step in range(4):
        take_step(opt, model, *shard(step, dist.get_rank()))
        take_step(expected, alone, *batch(step))
        assert_same_weights(model, alone, 1e-10, f"step {step}")
        assert_near(opt.sharpness, expected.sharpness, 1e-10, "sharpness over all shards")
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        for key, value in expected.state[q].items():
            assert_near(full(opt.state[p][key]), value, 1e-10, key)
            assert key == "step" or opt.state[p][key].placements == p.placements


def fsdp1(use_orig_params) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(uneven(), use_orig_params=use_orig_params, device_id=torch.device("cpu"))
    for cls in (FusedSAM, ReferenceSAM):
        with pytest.raises(ValueError, match=r"FullyShardedDataParallel are not supported.*fully_shard"):
            cls(model.parameters(), torch.optim.SGD, **OPTIONS)


@pytest.mark.parametrize("use_orig_params", [False, True])
def test_fsdp1_is_refused(pair, use_orig_params):
    """Each process would perturb by the norm of its own shard."""
    pair(fsdp1, use_orig_params)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize(
    ("base", "options"),
    [(torch.optim.Adam, {}), (torch.optim.SGD, {"momentum": 0.9}), (torch.optim.Adagrad, {})],
    ids=["adam", "sgd", "adagrad"],
)
def test_fsdp2_is_sam_on_the_whole_batch(pair, base, adaptive, options):
    pair(fsdp_steps, base, adaptive, options)


def fsdp_restores() -> None:
    model = fsdp()
    opt = FusedSAM(model.parameters(), torch.optim.Adam, **OPTIONS)
    loss_of(model, *shard(0, dist.get_rank())).backward()
    parts = [p.to_local().detach() for p in model.parameters()]
    before = [(part.clone(), part.data_ptr()) for part in parts]
    versions = [p._version for p in model.parameters()]
    opt.first_step()
    assert all(not torch.equal(p, b) for p, (b, _) in zip(parts, before, strict=True) if p.numel())
    assert all(p._version > v for p, v in zip(model.parameters(), versions, strict=True))
    with pytest.raises(RuntimeError, match="perturbed"):
        opt.state_dict()
    opt.restore()
    for p, (value, pointer) in zip(model.parameters(), before, strict=True):
        assert torch.equal(p.to_local(), value)
        assert p.to_local().data_ptr() == pointer


def test_fsdp2_shards_are_perturbed_and_restored_in_place(pair):
    pair(fsdp_restores)


def fsdp_checkpoint(cls, folder) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    def fresh():
        model = fsdp()
        return model, cls(model.parameters(), torch.optim.Adam, model=model, **OPTIONS)

    model, opt = fresh()
    for step in range(2):
        take_step(opt, model, *shard(step, dist.get_rank()))
    torch.save(opt.state_dict(), io.BytesIO())
    for held, copied in zip(opt.state.values(), copy.deepcopy(opt.state_dict())["state"].values(), strict=True):
        assert all(torch.equal(full(copied[key]), full(value)) for key, value in held.items())
    weights, state = get_state_dict(model, opt)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)
    other, resumed = fresh()
    warnings.filterwarnings("error", message=".*without SAM")
    resumed.param_groups[0]["rho"] = 0.01  # which the checkpoint overwrites
    weights, state = get_state_dict(other, resumed)
    held = {"model": weights, "optimizer": state}
    dcp.load(held, checkpoint_id=folder)
    set_state_dict(other, resumed, model_state_dict=held["model"], optim_state_dict=held["optimizer"])
    assert resumed.param_groups[0]["rho"] == OPTIONS["rho"]
    for step in range(2, 5):
        for m, o in ((model, opt), (other, resumed)):
            if cls is FusedMSAM:
                backward(o, m, *shard(step, dist.get_rank()))
                o.step()
            else:
                take_step(o, m, *shard(step, dist.get_rank()))
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(p.to_local(), q.to_local())
            for key, value in opt.state[p].items():
                assert torch.equal(full(resumed.state[q][key]), full(value)), key


@pytest.mark.parametrize("cls", [FusedSAM, FusedMSAM])
def test_fsdp2_goes_on_from_a_distributed_checkpoint(cls, pair, tmp_path):
    pair(fsdp_checkpoint, cls, str(tmp_path))


def fsdp_overflow() -> None:
    model = fsdp()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    opt = FusedSAM(model.parameters(), torch.optim.Adam, scaler=scaler, **OPTIONS)
    for half in range(2):  # in either pass, on one rank's shard alone
        before = [full(p).clone() for p in model.parameters()]
        scale = scaler.get_scale() if half else 1024.0
        for now in range(2):
            opt.zero_grad()
            scaler.scale(loss_of(model, *shard(half, dist.get_rank()))).backward()
            if now == half and dist.get_rank() == 0:
                next(model.parameters()).grad.to_local().view(-1)[0] = float("inf")
            opt.first_step() if not opt.perturbed else scaler.step(opt)
        scaler.update()
        assert scaler.get_scale() == scale / 2
        assert all(torch.equal(full(p), b) for p, b in zip(model.parameters(), before, strict=True))


def test_fsdp2_an_overflow_on_one_shard_skips_the_step(pair):
    pair(fsdp_overflow)


def dtensor_steps(base, adaptive) -> None:
    """Sharded, replicated and plain-local parameters on a mesh of 1 x 2; a gradient that is placed otherwise."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (1, 2))
    places = [(Replicate(), Shard(0)), (Replicate(), Shard(1)), (Replicate(), Replicate()), (Shard(0), Replicate())]
    plain = [nn.Parameter(torch.randn(5, 3, dtype=torch.float64)) for _ in (*places, None)]
    mine = [nn.Parameter(distribute_tensor(p.detach().clone(), mesh, at)) for p, at in zip(plain, places, strict=False)]
    mine.append(nn.Parameter(plain[-1].detach().clone()))
    opt = FusedSAM(mine, base, adaptive=adaptive, **OPTIONS)
    expected = ReferenceSAM(plain, base, adaptive=adaptive, **OPTIONS)
    for _ in range(3):
        for half in range(2):
            for p, q in zip(mine, plain, strict=True):
                q.grad = torch.randn(5, 3, dtype=torch.float64)
                p.grad = distribute_tensor(q.grad, mesh, p.placements) if isinstance(p, DTensor) else q.grad.clone()
            mine[0].grad = DTensor.from_local(plain[0].grad / 2, mesh, (Replicate(), Partial()))
            for o in (opt, expected):
                o.first_step() if half == 0 else o.second_step()
            assert_near(opt.sharpness, expected.sharpness, 1e-12, "sharpness")
            for i, (p, q) in enumerate(zip(mine, plain, strict=True)):
                assert_near(full(p), q.detach(), 1e-12, f"params[{i}], half {half}")


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("base", [torch.optim.Adam, torch.optim.SGD], ids=lambda b: b.__name__)
def test_dtensors_of_any_placement(pair, base, adaptive):
    pair(dtensor_steps, base, adaptive)


def dtensor_errors() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    partial = nn.Parameter(DTensor.from_local(torch.ones(3), mesh, (Partial(),)))
    with pytest.raises(ValueError, match=r"param_groups\[0\]\['params'\]\[0\]: expected a DTensor that is sharded"):
        FusedSAM([partial])
    p = nn.Parameter(distribute_tensor(torch.ones(4), mesh, (Shard(0),)))
    p.grad = distribute_tensor(torch.ones(4), mesh, (Shard(0),))
    opt = ReferenceSAM([p])
    with pytest.raises(TypeError, match="ReferenceSAM does not take DTensors; FusedSAM does"):
        opt.first_step()


def test_norms_of_offloaded_shards_are_summed_where_the_processes_talk(monkeypatch):
    """With FSDP2's CPU offload the shards are on the CPU, and NCCL serves the GPU alone."""
    moves = []

    class Squares:
        device = torch.device("cpu")

        def to(self, device):
            moves.append(str(device))
            return self

    monkeypatch.setattr(dist, "all_reduce", lambda t, group: moves.append(group))
    mesh = SimpleNamespace(device_type="cuda", get_group=lambda dim: f"group {dim}")
    sum_over_shards(Squares(), (mesh, (Shard(0), Replicate())))
    assert moves == ["cuda", "group 0", "cpu"]


def test_what_dtensors_cannot_do_is_said(pair):
    pair(dtensor_errors)


def no_ascent() -> None:
    """The one pass of a rho of 0 is over the whole batch."""
    model, alone = replicated(), uneven()
    opt = FusedSAM(model.parameters(), torch.optim.Adam, model=model, rho=0.0, lr=OPTIONS["lr"])
    expected = torch.optim.Adam(alone.parameters(), lr=OPTIONS["lr"])
    for step in range(3):
        take_step(opt, model, *shard(step, dist.get_rank()))
        take_step(expected, alone, *batch(step))
        assert_ranks_agree(model.parameters())
        assert_same_weights(model, alone, 1e-10, f"step {step}")


def test_ddp_without_an_ascent_is_the_base_on_the_whole_batch(pair):
    pair(no_ascent)


# ---- one pass ----


def backward(opt, model, x, y) -> None:
    opt.zero_grad()
    loss_of(model, x, y).backward()


def one_pass(make, base, adaptive, options) -> None:
    """The ranks' weights agree bit for bit, and are those of one process with the whole batch."""
    model, alone = make(), uneven()
    opt = FusedMSAM(model.parameters(), base, adaptive=adaptive, model=model, **OPTIONS, **options)
    expected = ReferenceMSAM(alone.parameters(), base, adaptive=adaptive, **OPTIONS, **options)
    for step in range(6):
        backward(opt, model, *shard(step, dist.get_rank()))
        opt.step()
        backward(expected, alone, *batch(step))
        expected.step()
        assert_same_weights(model, alone, 1e-10, f"step {step}, perturbed")
        if make is not fsdp:
            assert_ranks_agree(model.parameters())
        if step % 3 == 2:  # an evaluation and a checkpoint
            expected.eval()
            model.eval()
            with torch.no_grad():
                loss = loss_of(model, *batch(step))
                assert_near(loss, loss_of(alone, *batch(step)), 1e-10, "loss at the clean weights")
            model.state_dict()
            assert_same_weights(model, alone, 1e-10, f"step {step}, clean")
            model.train()
            expected.train()


def replicated() -> nn.Module:
    return DistributedDataParallel(uneven())


ONE_PASS = pytest.mark.parametrize(
    ("base", "options"),
    [(torch.optim.Adam, {}), (torch.optim.SGD, {"momentum": 0.9}), (torch.optim.NAdam, {})],
    ids=["adam", "sgd", "nadam"],
)


@pytest.mark.parametrize("adaptive", [False, True])
@ONE_PASS
@pytest.mark.parametrize("make", [replicated, fsdp], ids=["ddp", "fsdp2"])
def test_one_pass_is_msam_on_the_whole_batch(pair, make, base, adaptive, options):
    pair(one_pass, make, base, adaptive, options)


def whole_fsdp() -> nn.Module:
    """The root has the parameters, and keeps what it has gathered after a forward pass."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    return fully_shard(uneven(), mesh=init_device_mesh("cpu", (2,)))


def restored_before_backward(cls) -> None:
    model = whole_fsdp()
    opt = cls(model.parameters(), torch.optim.Adam, model=model, **OPTIONS)
    for step in range(2):
        take_step(opt, model, *shard(step, dist.get_rank()))

    def evaluated() -> torch.Tensor:
        model.eval()
        with torch.no_grad():
            loss = loss_of(model, *batch(9))
        model.train()
        return loss

    expected = evaluated()
    if cls is FusedSAM:
        backward(opt, model, *shard(2, dist.get_rank()))
        opt.first_step()
    loss_of(model, *batch(0))  # where an error ends a step
    opt.restore()
    assert torch.equal(evaluated(), expected)


@pytest.mark.parametrize("cls", [FusedSAM, FusedMSAM])
def test_fsdp2_evaluates_at_the_clean_weights_after_restore(cls, pair):
    pair(restored_before_backward, cls)


def kept_after_backward() -> None:
    model, alone = whole_fsdp(), uneven()
    model.set_reshard_after_backward(False)
    opt = FusedSAM(model.parameters(), torch.optim.Adam, model=model, **OPTIONS)
    expected = ReferenceSAM(alone.parameters(), torch.optim.Adam, **OPTIONS)
    for step in range(3):
        take_step(opt, model, *shard(step, dist.get_rank()))
        take_step(expected, alone, *batch(step))
        model.reshard()  # as whoever keeps gathered weights must do after a step, with every optimizer
        assert_same_weights(model, alone, 1e-10, f"step {step}")


def test_fsdp2_without_resharding_after_backward(pair):
    """With model= the second pass sees the perturbed weights all the same."""
    pair(kept_after_backward)


def one_pass_communicates_once() -> int:
    model = replicated()
    calls = []
    model.register_comm_hook(None, lambda _, bucket: calls.append(bucket) or averaged(bucket))
    opt = FusedMSAM(model.parameters(), torch.optim.Adam, model=model, **OPTIONS)
    for step in range(3):
        take_step(opt, model, *shard(step, dist.get_rank()))
    return len(calls)


def averaged(bucket):
    work = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
    return work.then(lambda future: future.value()[0] / dist.get_world_size())


def test_one_pass_has_one_all_reduce_a_step(pair):
    assert pair(one_pass_communicates_once) == [3, 3]
