"""What SAM implementations do, asked of each: a Markdown table of FusedSAM beside its rivals.

    python -m benchmarks.speed.features
    python -m benchmarks.speed.features --davda54 sam.py   # of the davda54/sam repository, which is on no index

A probe uses a library as its own documentation does, looks at what came out, and answers "yes" or "no" and a few words;
an exception is a no.
"""

from __future__ import annotations

import argparse
import copy
import pickle
import textwrap
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytorch_optimizer
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import sam_fused.fused
import train
from sam_fused import FusedSAM

from ..tables import table
from .rivals import davda54_sam


@dataclass(frozen=True)
class Library:
    """``make(params, base, **options)`` constructs; ``extras`` are those of our options that it has too."""

    name: str
    make: Callable[..., Any]
    extras: tuple[str, ...] = ()
    gradients_first: bool = False  # whether step(closure) wants the first gradients made by the caller

    def __call__(self, params: Any, base: type = torch.optim.Adam, lr: float = 0.1, **options: Any) -> Any:
        ours = {"model", "scaler"} - set(self.extras)
        return self.make(params, base, lr=lr, **{k: v for k, v in options.items() if k not in ours})

    def step(self, opt: Any, closure: Callable[[], Any]) -> Any:
        if self.gradients_first:
            closure()
        return opt.step(closure)


def libraries(davda54: Path | None) -> list[Library]:
    found = [Library("FusedSAM", FusedSAM, ("model", "scaler"))]
    if davda54 is not None:
        found.append(Library("davda54/sam", davda54_sam(davda54), gradients_first=True))
    found.append(
        Library(f"pytorch_optimizer {version('pytorch_optimizer')}", pytorch_optimizer.SAM, gradients_first=True)
    )
    return found


# ---- what the probes share ----


def tensors(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    g = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=g)) for shape in shapes or [(4, 3), (5,)]]


def give_gradients(params: list[nn.Parameter], seed: int, scale: float = 1.0) -> None:
    g = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = (scale * torch.randn(p.shape, generator=g)).to(p.dtype)


def two_calls(opt: Any, params: list[nn.Parameter], seed: int) -> None:
    give_gradients(params, 2 * seed)
    opt.first_step()
    give_gradients(params, 2 * seed + 1)
    opt.second_step()


def values(params: Any) -> Tensor:
    return torch.cat([p.detach().flatten().clone() for p in params])


def answer(ok: bool, otherwise: str, words: str = "") -> str:
    return f"no: {otherwise}" if not ok else f"yes, {words}" if words else "yes"


class Interrupted(Exception):
    pass


class Count(TorchDispatchMode):
    """Counts the ATen operators that are called, and the calls into this package's extension."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.own = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func.name()] += 1
        return func(*args, **kwargs or {})

    def __enter__(self):
        count, extension = self, sam_fused.fused._C

        class Counted:
            def __getattr__(self, name: str) -> Any:
                count.own += 1
                return getattr(extension, name)

        self.extension = extension
        sam_fused.fused._C = Counted()
        return super().__enter__()

    def __exit__(self, *error):
        sam_fused.fused._C = self.extension
        return super().__exit__(*error)


@contextmanager
def one_process_group():
    """Distributed training with one rank, which needs no second process to show who handles what."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


# ---- the probes ----


def in_place(lib: Library) -> str:
    params = tensors()
    opt = lib(params, torch.optim.SGD, lr=0.0)
    before, pointers = values(params), [p.data_ptr() for p in params]
    two_calls(opt, params, 0)
    if not torch.equal(values(params), before):
        return "no: other values"
    return answer(pointers == [p.data_ptr() for p in params], "the storage is another one")


def missing_gradient(lib: Library) -> str:
    params = tensors()
    opt = lib(params, torch.optim.SGD, lr=0.0)
    before = values(params)
    give_gradients(params, 0)
    opt.first_step()
    give_gradients(params, 1)
    params[1].grad = None
    opt.second_step()
    return answer(torch.equal(values(params), before), "it stays perturbed")


def exception(lib: Library) -> str:
    params = tensors()
    opt = lib(params)
    before = values(params)
    calls = 0

    def closure() -> None:
        nonlocal calls
        calls += 1
        give_gradients(params, calls)
        if calls == 2:
            raise Interrupted

    try:
        lib.step(opt, closure)
    except Interrupted:
        return answer(torch.equal(values(params), before), "they stay perturbed")
    return "no: the second pass was never run"


def standard_closure(lib: Library) -> str:
    params = tensors()
    opt = lib(params)
    calls = []

    def closure() -> Tensor:
        opt.zero_grad()
        loss = sum(p.square().sum() for p in params)
        loss.backward()
        calls.append(loss.item())
        return loss

    closure()  # another batch, as in every step but the first
    calls.clear()
    loss = opt.step(closure)
    if len(calls) != 2:
        return f"no: it needs a backward pass before it, and makes {len(calls)}; returns {loss}"
    return answer(loss is not None and loss.item() == calls[0], f"it returns {loss}")


def scaler_step(lib: Library) -> str:
    params = tensors()
    amp = torch.amp.GradScaler("cpu", init_scale=8.0)
    amp.scale(torch.zeros(1))
    opt = lib(params, scaler=amp)
    other = tensors()
    plain = lib(other)
    for seed in range(2):
        two_calls(plain, other, seed)
        give_gradients(params, 2 * seed, amp.get_scale())
        opt.first_step()
        give_gradients(params, 2 * seed + 1, amp.get_scale())
        amp.step(opt)
        amp.update()
    return answer(torch.allclose(values(params), values(other)), "other weights than without a scaler")


def overflow(lib: Library) -> str:
    harmed = []
    for when in (1, 2):
        torch.manual_seed(0)
        model = nn.Linear(3, 4)
        amp = torch.amp.GradScaler("cpu", init_scale=8.0)
        opt = lib(model.parameters(), scaler=amp)
        before = values(model.parameters())
        for half in (1, 2):
            opt.zero_grad()
            amp.scale(model(torch.ones(2, 3)).square().mean()).backward()
            if half == when:
                model.bias.grad[1] = torch.inf
            if half == 1:
                opt.first_step()
            elif "scaler" in lib.extras:
                amp.step(opt)
            else:
                opt.second_step()  # scaler.step raises
        after = values(model.parameters())
        if not torch.equal(after, before):
            lost = (~after.isfinite()).sum()
            harmed.append(f"inf in pass {when}: {lost} of {len(before)} weights not finite")
    return answer(not harmed, "; ".join(harmed))


def keeps_moments(lib: Library) -> str:
    params, others = tensors(), tensors()
    opt = lib(params)
    for seed in range(3):
        two_calls(opt, params, seed)
    saved = copy.deepcopy(opt.state_dict())
    with torch.no_grad():
        for p, q in zip(others, params, strict=True):
            p.copy_(q)
    other = lib(others)
    other.load_state_dict(saved)
    for seed in range(3, 6):
        two_calls(opt, params, seed)
        two_calls(other, others, seed)
    lost = not any("exp_avg" in state for state in saved["state"].values())
    return answer(torch.equal(values(params), values(others)), "the moments are not in it" if lost else "other weights")


def plain_checkpoint(lib: Library) -> str:
    params = tensors()
    plain = torch.optim.Adam(params, lr=0.1)
    give_gradients(params, 0)
    plain.step()
    opt = lib(params)
    opt.load_state_dict(plain.state_dict())
    two_calls(opt, params, 1)
    state = opt.base_optimizer.state.get(params[0], {})
    return answer(float(state.get("step", 0)) == 2, "the moments are dropped")


def save_perturbed(lib: Library) -> str:
    params = tensors()
    opt = lib(params)
    give_gradients(params, 0)
    opt.first_step()
    try:
        size = sum(v.numel() for s in opt.state_dict()["state"].values() for v in s.values() if torch.is_tensor(v))
    except RuntimeError:
        return "yes"
    return f"no: saved, {size} values of backup in it"


def scheduler(lib: Library) -> str:
    params, others = tensors(), tensors()
    opt, plain = lib(params, torch.optim.Adam), torch.optim.Adam(others, lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mine, theirs = (torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=5) for o in (opt, plain))
        for seed in range(4):
            two_calls(opt, params, seed)
            give_gradients(others, 2 * seed + 1)
            plain.step()
            mine.step()
            theirs.step()
    return answer(torch.allclose(values(params), values(others)), "not the plain base's schedule")


def batchnorm(lib: Library) -> str:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    x = torch.randn(8, 3)
    opt = lib(model.parameters(), model=model)

    def closure() -> Tensor:
        opt.zero_grad()
        loss = model(x).square().mean() + model[0](x).square().mean()
        loss.backward()
        return loss

    lib.step(opt, closure)
    moved = model[1].num_batches_tracked.item()
    return answer(moved == 1, f"{moved} times, unless switched off and on by hand")


def layouts(lib: Library) -> str:
    """A channels_last weight whose gradient is contiguous; the base as it is, and with torch's fused kernel."""

    def run(form: torch.memory_format, fused: bool) -> Tensor:
        (w,) = tensors((4, 3, 5, 5))
        w = nn.Parameter(w.detach().to(memory_format=form))
        opt = lib([w], fused=fused)
        for seed in range(2):
            two_calls(opt, [w], seed)
        return w.detach().contiguous()

    wrong = [
        name
        for name, fused in (("", False), ("with fused=True", True))
        if not torch.allclose(run(torch.channels_last, fused), run(torch.contiguous_format, False), atol=1e-5)
    ]
    return answer(not wrong, f"wrong numbers {' and '.join(wrong)}")


def bfloat16(lib: Library) -> str:
    """How much of eps is left, along eps, once w + eps is rounded."""
    torch.manual_seed(0)
    params = list(train.resnet18(64).bfloat16().parameters())
    opt = lib(params)
    before = values(params).double()
    give_gradients(params, 0)
    eps = torch.cat([p.grad.flatten() for p in params]).double()
    eps *= 0.05 / eps.norm()
    opt.first_step()
    kept = ((values(params).double() - before) @ eps / (eps @ eps)).item()
    return answer(abs(kept - 1) < 0.05, f"{100 * kept:.0f} % of the perturbation gets through the rounding")


def sharpness(lib: Library) -> str:
    params = tensors()
    opt = lib(params)
    give_gradients(params, 0)
    norm = torch.cat([p.grad.flatten() for p in params]).norm()
    opt.first_step()
    return answer(torch.allclose(opt.sharpness.float(), 0.05 * norm), "another value")


def synchronisation(lib: Library) -> str:
    """With SGD as the base: Adam's own step counters are read too, and lie on the host."""
    params = tensors()
    opt = lib(params, torch.optim.SGD)
    two_calls(opt, params, 0)
    with Count() as count:
        opt.first_step()
        opt.second_step()
    reads = count.calls["aten::_local_scalar_dense"]
    return answer(reads == 0, f"{reads} values read")


def calls_a_step(lib: Library) -> str:
    params = list(train.resnet18(8).parameters())
    opt = lib(params)
    for seed in range(3):  # states, cached lists
        two_calls(opt, params, seed)
    with Count() as count:
        opt.first_step()
        opt.second_step()
    total = sum(count.calls.values())
    return f"{total} ATen" + (f" + {count.own} own" if count.own else "")


def dtensor(lib: Library) -> str:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    with one_process_group():
        torch.manual_seed(0)
        model = fully_shard(nn.Linear(3, 4), mesh=init_device_mesh("cpu", (1,)))
        params = list(model.parameters())
        opt = lib(params, torch.optim.SGD, lr=0.0)
        before = [p.to_local().detach().clone() for p in params]

        def unmoved() -> bool:
            return all(torch.equal(p.to_local(), b) for p, b in zip(params, before, strict=True))

        for half in (opt.first_step, opt.second_step):
            opt.zero_grad()
            model(torch.ones(2, 3)).square().sum().backward()
            half()
            if half == opt.first_step and unmoved():
                return "no: nothing is perturbed"
        return answer(unmoved(), "the weights stay perturbed, without an error")


def m_sharpness(lib: Library) -> str:
    with one_process_group():
        torch.manual_seed(0)
        model = nn.parallel.DistributedDataParallel(nn.Linear(3, 4))
        passes: list[int] = []

        def reduce(state, bucket):
            passes[-1] += 1
            done = torch.futures.Future()
            done.set_result(bucket.buffer())
            return done

        model.register_comm_hook(None, reduce)
        opt = lib(model.parameters(), model=model)

        def closure() -> Tensor:
            passes.append(0)
            opt.zero_grad()
            loss = model(torch.ones(2, 3)).square().sum()
            loss.backward()
            return loss

        lib.step(opt, closure)
        synced = [i for i, n in enumerate(passes, start=1) if n]
        return answer(synced == [2], f"gradients are averaged in pass {' and '.join(map(str, synced))}")


def groups(lib: Library) -> str:
    params = tensors()
    opt = lib([{"params": params[:1], "rho": 0.1}, {"params": params[1:], "rho": 0.4}])
    before = [p.detach().clone() for p in params]
    give_gradients(params, 0)
    opt.first_step()
    rhos = [((p - b) / p.grad).mean().item() for p, b in zip(params, before, strict=True)]
    return answer(abs(rhos[1] / rhos[0] - 4) < 1e-3, "one rho for all")


def asam(lib: Library) -> str:
    params = tensors()
    opt = lib(params, adaptive=True)
    before = values(params)
    give_gradients(params, 0)
    g = torch.cat([p.grad.flatten() for p in params])
    opt.first_step()
    eps = 0.05 * before.square() * g / (before * g).norm()
    return answer(torch.allclose(values(params), before + eps), "another perturbation")


def copies(lib: Library) -> str:
    params = tensors()
    opt = lib(params)
    two_calls(opt, params, 0)
    broken = []
    for name, duplicate in (("deepcopy", copy.deepcopy), ("pickle", lambda x: pickle.loads(pickle.dumps(x)))):
        try:
            others, other = duplicate((params, opt))
            mine, same = duplicate((params, opt))
            two_calls(other, others, 1)
            two_calls(same, mine, 1)
            if torch.equal(values(others), values(params)):
                broken.append(f"{name} does not train its weights")
        except (AttributeError, KeyError, pickle.PicklingError) as error:
            broken.append(f"{name}: {type(error).__name__}")
    if not broken:
        two_calls(opt, params, 1)
        broken = [] if torch.equal(values(params), values(others)) else ["the copy goes elsewhere"]
    return answer(not broken, ", ".join(broken))


PROBES: dict[str, Callable[[Library], str]] = {
    "weights restored in place, bit for bit": in_place,
    "a tensor without a gradient in pass 2 is restored": missing_gradient,
    "an exception in pass 2 of `step(closure)` restores the weights": exception,
    "`step(closure)` makes both passes and returns the loss": standard_closure,
    "`scaler.step(opt)` of a GradScaler finishes the step": scaler_step,
    "an overflow in either pass leaves the weights as they were": overflow,
    "a checkpoint resumes bit-identically": keeps_moments,
    "a checkpoint of the plain base loads": plain_checkpoint,
    "saving while perturbed is refused": save_perturbed,
    "an LR scheduler (OneCycleLR) on the optimizer itself": scheduler,
    "BatchNorm statistics move once per step": batchnorm,
    "channels_last weight, contiguous gradient": layouts,
    "bfloat16 parameters, ResNet-18, random gradients": bfloat16,
    "sharpness": sharpness,
    "no value read back to the host in a step": synchronisation,
    "operator calls per step, ResNet-18 + Adam": calls_a_step,
    "FSDP2 (DTensor) parameters": dtensor,
    "m-sharpness under DDP without `no_sync` by hand": m_sharpness,
    "groups with their own rho": groups,
    "ASAM": asam,
    "deepcopy and pickle": copies,
}


def ask(probe: Callable[[Library], str], library: Library) -> str:
    try:
        return probe(library)
    except Exception as error:
        return "no: " + textwrap.shorten(f"{type(error).__name__}: {error}", 60, placeholder=" ...").replace("|", "\\|")


def answers(found: list[Library]) -> list[str]:
    rows = [(name, *(ask(probe, library) for library in found)) for name, probe in PROBES.items()]
    return table(["", *(library.name for library in found)], rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--davda54", type=Path, metavar="PATH", help="sam.py of davda54/sam")
    torch.manual_seed(0)
    print("\n".join([f"torch {torch.__version__}", "", *answers(libraries(parser.parse_args().davda54))]))
