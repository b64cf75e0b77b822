"""Trace a CNN with torch.fx: its graph without in-place operations, and the shape of every value."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn


class Tracer(fx.Tracer):
    """torch.fx's tracer, for which every convolution and BatchNorm is a leaf, subclasses included."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        leaf = isinstance(m, (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase))
        return leaf or super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module, example: Tensor) -> tuple[fx.Graph, dict[str, tuple[int, ...] | None]]:
    """Return the graph of `model` in eval mode (in-place operations made functional) and the shape of every value."""
    try:
        graph = Tracer().trace(model)
    except Exception as error:
        raise ValueError(
            f"rnp.convert: torch.fx must be able to trace the model, and {type(model).__name__} cannot be traced: "
            f"{error}. Control flow that depends on tensors has to move out of forward(), or into a leaf module."
        ) from error
    placeholders = [n for n in graph.nodes if n.op == "placeholder" and n.users]
    if len(placeholders) != 1:
        raise ValueError(
            f"rnp.convert: forward() must take exactly one tensor, and {type(model).__name__} uses {len(placeholders)}"
        )
    make_functional(graph, model)
    shapes: dict[str, tuple[int, ...] | None] = {}

    class Shapes(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            shapes[n.name] = tuple(result.shape) if isinstance(result, Tensor) else None
            return result

    module = fx.GraphModule(model, graph)
    with torch.no_grad():
        Shapes(module).run(example)
    return graph, shapes


IN_PLACE_FUNCTIONS: dict[Any, Any] = {
    operator.iadd: operator.add,
    operator.imul: operator.mul,
    torch.relu_: torch.relu,
    F.relu_: F.relu,
}
IN_PLACE_METHODS = {"relu_": "relu", "add_": "add", "mul_": "mul"}
IN_PLACE_KEYWORD = (F.relu, F.relu6, F.leaky_relu, F.elu, F.silu, F.hardtanh, F.hardswish, F.dropout, F.dropout2d)
ALIASING_MODULES = (nn.Identity, nn.Dropout, nn.Dropout2d)


def make_functional(graph: fx.Graph, model: nn.Module) -> None:
    """Replace in-place operations: what a later node reads of the argument is the result of the operation.

    `out = relu_(x); return out + x` reads the rectified x twice, so the later uses of x become uses of `out`. Modules
    with an `inplace` flag are handled likewise; the caller runs them with the flag off.
    """
    position = {node: i for i, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        in_place = False
        if node.op == "call_function" and node.target in IN_PLACE_FUNCTIONS:
            node.target = IN_PLACE_FUNCTIONS[node.target]
            in_place = True
        elif node.op == "call_method" and node.target in IN_PLACE_METHODS:
            node.target = IN_PLACE_METHODS[node.target]
            in_place = True
        elif node.op == "call_function" and node.target in IN_PLACE_KEYWORD and node.kwargs.get("inplace"):
            node.kwargs = {**node.kwargs, "inplace": False}
            in_place = True
        elif node.op == "call_module":
            in_place = bool(getattr(model.get_submodule(node.target), "inplace", False))
        if not in_place:
            continue
        written = node.args[0]
        while isinstance(written, fx.Node):
            written.replace_all_uses_with(node, delete_user_cb=lambda user, at=position[node]: position[user] > at)
            aliases = written.op == "call_module" and isinstance(model.get_submodule(written.target), ALIASING_MODULES)
            written = written.args[0] if aliases else None
    graph.lint()
