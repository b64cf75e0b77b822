"""Trace a CNN with torch.fx: its graph without in-place operations, and the shape of every value."""

from __future__ import annotations

import operator
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from .fixed_macs import Counter
from .in_place import OPERATORS, Kind, flagged, kind_of, make_functional, refusal, state, tensors_in
from .plan import version_of

Shape = tuple[int, ...]


class Proxy(fx.Proxy):
    """torch.fx's proxy, whose `x += y` would be `x = x + y`: another tensor, where x has other names."""

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})


def _augmented(target: Callable[..., Any]) -> Callable[[Proxy, Any], fx.Proxy]:
    return lambda self, other: self.tracer.create_proxy("call_function", target, (self, other), {})


for target in OPERATORS:
    setattr(Proxy, f"__{target.__name__}__", _augmented(target))


class Tracer(fx.Tracer):
    """torch.fx's tracer, for which every convolution and BatchNorm is a leaf, subclasses included."""

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        leaf = isinstance(m, (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase))
        return leaf or super().is_leaf_module(m, module_qualified_name)


@dataclass
class Traced:
    """A functional graph, and what running it on the example showed."""

    graph: fx.Graph
    images: int  # in the example
    shapes: dict[str, Shape | None]  # of every value; None: not a tensor
    batched: set[str]  # values that come from the images and have an entry for each
    dependent: set[str]  # values that come from the images
    counter: Counter  # MACs of every node for the whole example
    in_place: list[str]  # modules whose `inplace` flag was on


class Shapes(fx.Interpreter):
    """Runs a functional graph and notes shapes. Raises ValueError where a node writes into what it reads all the same.

    `kinds`: the shape and type that results must have. `counter` counts MACs on the way.
    """

    def __init__(
        self, module: fx.GraphModule, kinds: dict[str, Kind | None] | None = None, counter: Counter | None = None
    ) -> None:
        super().__init__(module)
        self.kinds = {} if kinds is None else kinds
        self.counter = counter
        self.shapes: dict[str, Shape | None] = {}

    def run_node(self, n: fx.Node) -> Any:
        read = list(tensors_in(self.fetch_args_kwargs_from_env(n)))
        versions = [version_of(t) for t in read]
        with nullcontext() if self.counter is None else self.counter.node(n.name):
            result = super().run_node(n)
        if [version_of(t) for t in read] != versions:
            self.refuse(n, "rnp.convert knows no operation that returns its result instead")
        kind = kind_of(result)
        if self.kinds.get(n.name, kind) != kind:
            self.refuse(n, "otherwise the result would have another shape or type")
        self.shapes[n.name] = None if kind is None else tuple(kind[0])
        return result

    def refuse(self, node: fx.Node, why: str) -> None:
        self.extra_traceback = False  # the message is complete
        raise ValueError(refusal(node, self.module, why))


def trace(model: nn.Module, example: Tensor) -> Traced:
    """Trace `model`, in eval mode, without in-place operations; turns the `inplace` flags of its modules off.

    Raises ValueError where torch.fx cannot trace it, where it takes more than one tensor, and where something writes
    in place that cannot be replaced by an operation which returns a new tensor.
    """
    versions = {name: version_of(tensor) for name, tensor in state(model).items()}
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
    for name, tensor in state(model).items():
        if version_of(tensor) != versions.get(name):
            raise ValueError(
                f"rnp.convert: forward() must leave the model as it is, and {type(model).__name__} writes into {name!r}"
            )
    in_place = flagged(model)
    view_as_reshape(graph)
    with torch.inference_mode(False), torch.no_grad():  # inference tensors do not count what is written into them
        kinds = make_functional(graph, model, example.clone())
        module = fx.GraphModule(model, graph)
        counter = Counter()
        run = Shapes(module, kinds, counter)
        with counter.on():
            run.run(example.clone())
        dependent = dependents(graph, placeholders[0])
        found = batched(module, dependent, run.shapes, example)
        return Traced(graph, len(example), run.shapes, found, dependent, counter, in_place)


def view_as_reshape(graph: fx.Graph) -> None:
    """Let sizes be changed by `reshape`: a network's maps are channels_last, of which few views exist."""
    for node in graph.nodes:
        if node.op != "call_method" or node.target not in ("view", "view_as"):
            continue
        sizes = (*node.args[1:], *node.kwargs.values())
        if not any(isinstance(size, torch.dtype) for size in sizes):
            node.target = "reshape" if node.target == "view" else "reshape_as"
            node.args, node.kwargs = (node.args[0], *sizes), {}


def dependents(graph: fx.Graph, images: fx.Node) -> set[str]:
    """Names of the values that come from the images."""
    dependent = {images}
    for node in graph.nodes:
        if dependent.intersection(node.all_input_nodes):
            dependent.add(node)
    return {node.name for node in dependent}


def batched(module: fx.GraphModule, dependent: set[str], shapes: dict[str, Shape | None], example: Tensor) -> set[str]:
    """Of the `dependent` values, the names of those that have an entry for each image along their first axis.

    With an example of one image, what has one entry for all of them looks the same: a second run tells.
    """
    count = example.shape[0]
    if count == 1:
        run = Shapes(module)
        try:
            run.run(example.new_zeros((2, *example.shape[1:])))
            shapes, count = run.shapes, 2
        except Exception:  # the model takes one image at a time, so there is no difference to tell
            shapes, count = shapes, 1
    found = ((name, shapes.get(name)) for name in dependent)
    return {name for name, shape in found if shape and shape[0] == count}
