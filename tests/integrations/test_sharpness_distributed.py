"""measure_sharpness and loss_slice in two processes: as one process with all the batches has it."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sam_fused import FusedSAM, loss_slice, measure_sharpness
from sam_fused.sharpness import KINDS
from tests.helpers.networks import batch, fsdp, loss_of, uneven
from tests.helpers.pair import full

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo"),
]
LOSS = nn.functional.mse_loss
RHO = 0.3


def batches(rank: int | None = None, dtype=torch.float64) -> list:
    """Two of different sizes for each process; all four for None."""
    of = [[(batch(0), 0, 7), (batch(1), 0, 2)], [(batch(0), 7, 16), (batch(1), 2, 16)]]
    parts = of[0] + of[1] if rank is None else of[rank]
    return [(x[a:b].to(dtype), y[a:b].to(dtype)) for (x, y), a, b in parts]


def values(model, data, adaptive: bool, seed: int = 0) -> list[float]:
    options = {"adaptive": adaptive, "eta": 0.01}
    g = torch.Generator().manual_seed(seed)
    measured = [measure_sharpness(model, LOSS, data, RHO, kind, generator=g, directions=3, **options) for kind in KINDS]
    numbers = [x for value, error in measured for x in (value, error) if x is not None]
    return numbers + loss_slice(model, LOSS, data, [-0.2, 0.0, 0.2], **options)


def both_agree(numbers: list[float]) -> None:
    mine = torch.tensor(numbers, dtype=torch.float64)
    first = mine.clone()
    dist.broadcast(first, 0)
    assert torch.equal(mine, first)


def sharded(adaptive: bool, form: str) -> None:
    """Twice over, with other generators in the other process; between them and after them it can be trained."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    rank = dist.get_rank()
    if form == "layers":
        model = fsdp()
    elif form == "compiled":
        model = torch.compile(fsdp(), backend="eager")
    else:
        shape = {"root": (2,), "replicated and sharded": (2, 1), "sharded in one": (1, 2)}[form]
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
        model = fully_shard(uneven(), mesh=mesh)
    alone = uneven()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    held = [(p, p.grad, full(p).clone()) for p in model.parameters()]
    expected = values(alone, batches(), adaptive)
    for _ in range(2):
        found = values(model, batches(rank), adaptive, seed=5 * rank)
        assert found == pytest.approx(expected, rel=1e-9)
        both_agree(found)
    params = list(model.parameters())
    assert len(params) == len(held)
    for p, (q, grad, value) in zip(params, held, strict=True):
        assert p is q
        assert p.grad is grad
        assert torch.equal(full(grad), torch.ones_like(value))
        assert torch.equal(full(p), value)
    model.zero_grad()
    loss_of(model, *batches(rank)[0]).backward()
    FusedSAM(model.parameters(), torch.optim.SGD, lr=0.1).step()
    changed = [full(p) for p in model.parameters()]
    alone.load_state_dict(dict(zip(alone.state_dict(), changed, strict=True)))
    expected = values(alone, batches(), adaptive)
    assert values(model, batches(rank), adaptive, seed=5 * rank) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("form", ["layers", "root", "replicated and sharded", "sharded in one", "compiled"])
def test_fsdp2(pair, form):
    pair(sharded, form != "root", form)


def partly_sharded() -> None:
    """What FSDP2 does not manage is a replica in each process."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = uneven()
    fully_shard(model[2], mesh=init_device_mesh("cpu", (2,)))
    rank = dist.get_rank()
    expected = values(uneven(), batches(), False)
    assert values(model, batches(rank), False, seed=rank) == pytest.approx(expected, rel=1e-9)


def test_parameters_beside_fsdp2(pair):
    pair(partly_sharded)


def tensor_parallel(with_fsdp: bool) -> None:
    """Both processes have the same batches."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "tensor"))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    expected = values(model, batches(), True)
    parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    if with_fsdp:
        fully_shard(model, mesh=mesh["data"])
    assert values(model, batches(), True, seed=dist.get_rank()) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("with_fsdp", [False, True])
def test_tensor_parallel(pair, with_fsdp):
    pair(tensor_parallel, with_fsdp)


def replicas(adaptive: bool, form: str) -> None:
    rank = dist.get_rank()
    model = DistributedDataParallel(uneven(), gradient_as_bucket_view=True)
    given = torch.compile(model, backend="eager") if form == "compiled" else model
    loss_of(model, *batches(rank)[0]).backward()
    model.eval()
    model(batches(rank)[0][0])  # waits for a backward that does not come
    model.train()
    held = [(p, p.grad, p.grad.clone(), p.detach().clone()) for p in model.parameters()]
    expected = values(uneven(), batches(), adaptive)
    found = values(given, batches(rank), adaptive, seed=5 * rank)
    assert found == pytest.approx(expected, rel=1e-9)
    both_agree(found)
    own = values(model.module, batches(rank), adaptive)
    assert own == pytest.approx(values(uneven(), batches(rank), adaptive), rel=1e-9)
    for p, grad, value, weight in held:
        assert p.grad is grad
        assert torch.equal(grad, value)
        assert torch.equal(p, weight)
    model.zero_grad()
    loss_of(model, *batches(rank)[0]).backward()
    for p in model.parameters():
        both_agree(p.grad.flatten().tolist())


@pytest.mark.parametrize("form", ["plain", "compiled"])
def test_ddp(pair, form):
    pair(replicas, form == "plain", form)


def buffers_of_replicas() -> None:
    """DDP's own forward copies the first process's buffers to the others."""
    rank = dist.get_rank()
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()
    model = DistributedDataParallel(layers)
    model.module[1].running_mean.fill_(rank)
    before = [b.clone() for b in model.buffers()]
    both_agree(values(model, [batches(rank)[0]], False))
    assert all(torch.equal(b, a) for b, a in zip(model.buffers(), before, strict=True))


def test_ddp_leaves_the_buffers_alone(pair):
    pair(buffers_of_replicas)


def refusals() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    rank = dist.get_rank()
    for model in (fsdp(), DistributedDataParallel(uneven())):
        for some in (batches(rank)[: 1 + rank], batches(rank)[:rank]):
            with pytest.raises(ValueError, match="batches: expected as many in every process"):
                measure_sharpness(model, LOSS, some, RHO)
    with pytest.raises(ValueError, match="expected a DistributedDataParallel around all of it, got one inside, '0'"):
        measure_sharpness(nn.Sequential(DistributedDataParallel(uneven())), LOSS, batches(rank), RHO)
    half = fully_shard(uneven().bfloat16(), mesh=init_device_mesh("cpu", (2,)))
    with pytest.raises(
        ValueError, match=r"model: 0\.weight: expected a DTensor of float32 or float64, got torch.bfloat16"
    ):
        measure_sharpness(half, LOSS, batches(rank, torch.bfloat16), RHO)
    model = fsdp()
    model.set_requires_gradient_sync(False)
    with pytest.raises(RuntimeError, match="FSDP2 gave no parameter a gradient"):
        measure_sharpness(model, LOSS, batches(rank), RHO)


def test_what_cannot_be_measured_is_said(pair):
    pair(refusals)


def fsdp1() -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(uneven(), device_id=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"FullyShardedDataParallel \(FSDP1\) is not supported; use fully_shard"):
        measure_sharpness(model, LOSS, batches(dist.get_rank()), RHO)


def test_fsdp1_is_refused(pair):
    pair(fsdp1)


class Fails(Exception):
    pass


def raises_in(kind: str) -> None:
    """In the loss, at every call, in both processes: FSDP2's parameters are shards again, with the same values."""
    rank, model = dist.get_rank(), fsdp()
    held = [(p, full(p).clone()) for p in model.parameters()]
    for at in range(1, 9):
        calls = 0

        def loss_fn(output, y, at=at):
            nonlocal calls
            calls += 1
            if calls == at:
                raise Fails
            return LOSS(output, y)

        try:
            measure_sharpness(model, loss_fn, batches(rank), RHO, kind, directions=2)
        except Fails:
            pass
        else:
            assert calls < at
        for p, (q, value) in zip(model.parameters(), held, strict=True):
            assert p is q
            assert torch.equal(full(p), value)
            assert p.grad is None
    expected = measure_sharpness(uneven(), LOSS, batches(), RHO, "realised").value
    assert measure_sharpness(model, LOSS, batches(rank), RHO, "realised").value == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_fsdp2_after_an_exception(pair, kind):
    pair(raises_in, kind)
