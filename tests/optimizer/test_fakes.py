"""Tracing without the tensors' memory, and so without a GPU: fakes of CUDA parameters beside rows on the CPU."""

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
from tests.integrations.test_compile import operators, operators_arguments

CALLED = ["grad_sq_norm", "sharpness_", "perturb_", "restore_", "perturb_", "restore_step_"]
devices = pytest.mark.parametrize("device", ["cpu", "cuda:0", "cuda:1"])


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
    values = [node.meta["val"] for node in graph.nodes if isinstance(node.meta.get("val"), Tensor)]
    # ascent and hyper alone stay on the CPU
    assert sum(str(v.device) != device for v in values) in (0, 2)


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
