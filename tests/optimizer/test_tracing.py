"""Tracing the operators.

Mostly without the tensors' memory, and so without a GPU: fakes of CUDA parameters beside rows on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

import sam_fused  # noqa: F401  (the operators)

CALLED = ["grad_sq_norm", "sharpness_", "perturb_", "restore_", "perturb_", "restore_step_"]
devices = pytest.mark.parametrize("device", ["cpu", "cuda:0", "cuda:1"])
ops = torch.ops.sam_fused


def operators(params, grads, backups, state, steps, ascent, total, hyper):
    sq = ops.grad_sq_norm(params, grads, ascent, [1, 1])
    measured = torch.empty_like(total[:1].expand(3))
    ops.sharpness_(sq, ascent, measured, total)
    norm = measured.select(0, 2)  # [2] would look for a fake's GPU, in torch 2.6
    ops.perturb_(params, grads, backups, norm, ascent, [1, 1])
    moved = [p.clone() for p in params]
    ops.restore_(params, backups)
    ops.perturb_(params, grads, backups, norm, ascent, [1, 1])
    ops.restore_step_("adam", params, grads, backups, state, steps, hyper, [1, 1], [])
    return measured, moved


def operators_arguments(device: str = "cpu"):
    g = torch.Generator().manual_seed(0)
    tensors = [[torch.randn(n, generator=g).to(device) for n in (5, 40)] for _ in range(3)]
    state = [torch.zeros(n, device=device) for n in (5, 40) * 2]
    steps = [torch.zeros((), device=device) for _ in range(2)]
    ascent = torch.tensor([[0.5, 0.0, 0.0], [0.2, 0.1, 1.0]], dtype=torch.float64)
    hyper = torch.tensor([[0.1, 0.0, 0.0, 0.9, 0.999, 1e-8, 0.0]] * 2, dtype=torch.float64)
    return *tensors, state, steps, ascent, torch.zeros(2, device=device).double(), hyper


def fake_arguments(device: str) -> tuple[FakeTensorMode, tuple]:
    mode = FakeTensorMode()
    with mode:
        return mode, operators_arguments(device)


@devices
def test_what_they_return(device):
    mode, arguments = fake_arguments(device)
    with mode:
        measured, moved = operators(*arguments)
    assert (measured.shape, measured.dtype, str(measured.device)) == ((3,), torch.float64, device)
    assert [(p.shape, p.dtype, str(p.device)) for p in moved] == [((n,), torch.float32, device) for n in (5, 40)]


def traced(mode: FakeTensorMode, arguments: tuple) -> GraphModule:
    with mode:
        return make_fx(operators)(*arguments)


def export(arguments: tuple) -> torch.export.ExportedProgram:
    class Step(torch.nn.Module):
        def forward(self, *args):
            return operators(*args)

    return torch.export.export(Step(), arguments)


def exported(mode: FakeTensorMode, arguments: tuple) -> GraphModule:
    return export(arguments).graph_module


def compiled(mode: FakeTensorMode, arguments: tuple) -> GraphModule:
    graphs = []

    def backend(graph: GraphModule, example_inputs: list[Tensor]) -> Callable:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    with mode:
        torch.compile(operators, fullgraph=True, backend=backend)(*arguments)
    torch._dynamo.reset()
    return graphs[0]


@devices
@pytest.mark.parametrize("trace", [traced, exported, compiled], ids=lambda t: t.__name__)
def test_every_tracer_sees_the_operators(trace, device):
    graph = trace(*fake_arguments(device)).graph
    targets = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert [t.split(".")[1] for t in targets if t.startswith("sam_fused")] == CALLED
    found = [node.meta.get("val", node.meta.get("example_value")) for node in graph.nodes]
    values = [v for v in found if isinstance(v, Tensor)]
    assert values
    # ascent and hyper alone stay on the CPU
    assert sum(str(v.device) != device for v in values) == (0 if device == "cpu" else 2)


@devices
def test_they_can_be_functionalized(device):
    """As every backend of torch.compile asks: nothing is written to, what was is returned."""
    _, arguments = fake_arguments(device)
    graph = export(arguments).run_decompositions({}).graph
    nodes = [node for node in graph.nodes if "auto_functionalized" in str(node.target)]
    assert [str(node.args[0]).split(".")[1] for node in nodes] == CALLED[1:]
    values = [v for node in nodes for v in tree_leaves(node.meta["val"]) if isinstance(v, Tensor)]
    assert values
    assert {str(v.device) for v in values} == {device}


def test_the_operators_trace():
    eager, traced = operators_arguments(), operators_arguments()
    expected = operators(*eager)
    torch._dynamo.reset()
    compiled = torch.compile(operators, fullgraph=True, backend="aot_eager")
    actual = compiled(*traced)
    torch._dynamo.reset()
    assert torch.equal(actual[0], expected[0])
    for mine, theirs in zip([actual[1], *traced[:5]], [expected[1], *eager[:5]], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
