"""In-place operations of a traced graph made functional, so that no value changes once it is there.

What a later node reads of a tensor that was written in place is the result of the operation: `out = relu_(x); return
out + x` reads the rectified x twice. So the operation becomes the one that returns a new tensor, and the later uses of
x become uses of `out`. Where the graph would not mean the same, ValueError names the node and says why.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .fold import SHAPE_ONLY
from .graph import hooked
from .plan import version_of

OPERATORS: dict[Any, Callable[..., Any]] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    operator.ifloordiv: operator.floordiv,
    operator.imod: operator.mod,
    operator.ipow: operator.pow,
    operator.imatmul: operator.matmul,
    operator.iand: operator.and_,
    operator.ior: operator.or_,
    operator.ixor: operator.xor,
    operator.ilshift: operator.lshift,
    operator.irshift: operator.rshift,
}
NO_COUNTERPART = {"bernoulli_", "resize_", "resize_as_"}  # without the underscore these do something else
SHAPE_ATTRIBUTES = {"shape", "ndim", "dtype", "device"}
REMEDY = "Write it as an operation that returns a new tensor: x = x.clamp(min=0), not x.clamp_(min=0)"


Kind = tuple[torch.Size, torch.dtype]
Form = tuple[Any, tuple[Any, ...], dict[str, Any]]  # target, args and kwargs of a node


@dataclass
class Write:
    """What running a node that is spelled as in-place showed, where it ran on a tensor."""

    returned: bool  # the tensor it wrote, itself
    changed: bool
    of_state: bool  # the tensor belongs to the model
    kind: Kind | None  # of the result
    sharing: tuple[fx.Node, ...]  # values in the same memory that are read later


def make_functional(graph: fx.Graph, model: nn.Module, example: Tensor) -> dict[str, Kind | None]:
    """Rewrite `graph` and turn the `inplace` flags of the model's modules off.

    Runs the graph on `example` first, a copy the caller can spare, where there is anything to rewrite: only that shows
    what shares memory. Returns the shape and type that the result of each rewritten node must have. Raises ValueError
    where the rewritten graph would not mean the same. What has no functional form stays: see `Shapes` in tracing.py.
    """
    spelled = [node for node in graph.nodes if functional_form(node, model) is not None]
    writes: dict[fx.Node, Write] = {}
    if spelled:
        recorder = Recorder(fx.GraphModule(model, graph), model, spelled)
        recorder.run(example)
        writes = recorder.writes
    rewriter = Rewriter(graph, model)
    for node, write in writes.items():
        rewriter.rewrite(node, write)
    for name in flagged(model):
        model.get_submodule(name).inplace = False
    graph.lint()
    return {node.name: write.kind for node, write in writes.items()}


# -- finding -------------------------------------------------------------------------------------------------------


def flagged(model: nn.Module) -> list[str]:
    """Names of the modules whose `inplace` flag is on, and can be turned off."""
    return [name for name, module in model.named_modules() if vars(module).get("inplace", False)]


def written_by(node: fx.Node) -> Any:
    """What an in-place node writes to."""
    return node.args[0] if node.args else node.kwargs.get("input")


def functional_form(node: fx.Node, model: nn.Module) -> Form | None:
    """Of a node that is spelled as in-place; None of all others and where there is no such form."""
    if not isinstance(written_by(node), fx.Node):
        return None
    target: Any = None
    if node.op == "call_module":
        target = node.target if getattr(model.get_submodule(node.target), "inplace", False) else None
    elif node.op == "call_method":
        target = method_counterpart(node.target)
    elif node.op == "call_function":
        target = function_counterpart(node.target)
        place = flag_position(node.target)
        if target is None and place is not None and place < len(node.args) and node.args[place]:
            return node.target, (*node.args[:place], False, *node.args[place + 1 :]), node.kwargs
        if target is None and node.kwargs.get("inplace"):
            return node.target, node.args, {**node.kwargs, "inplace": False}
    return None if target is None else (target, node.args, node.kwargs)


def in_place_name(name: str) -> bool:
    """`relu_`, but not `__iadd__`: those replay as they are, and are refused."""
    return name.endswith("_") and not name.endswith("__") and name not in NO_COUNTERPART


def method_counterpart(name: str) -> str | None:
    """`clamp_` → `clamp`, if tensors have that method."""
    return name[:-1] if in_place_name(name) and callable(getattr(Tensor, name[:-1], None)) else None


def function_counterpart(target: Any) -> Callable[..., Any] | None:
    """`torch.clamp_` → `torch.clamp`, `operator.iadd` → `operator.add`."""
    if target in OPERATORS:
        return OPERATORS[target]
    name = getattr(target, "__name__", "")
    for owner in (torch, F):
        if in_place_name(name) and getattr(owner, name, None) is target:
            return getattr(owner, name[:-1], None)
    return None


def flag_position(target: Any) -> int | None:
    """Which argument of a function is `inplace`; None if it has none that Python can see."""
    try:
        names = list(inspect.signature(target).parameters)
    except (TypeError, ValueError):
        return None
    return names.index("inplace") if "inplace" in names else None


# -- running -------------------------------------------------------------------------------------------------------


class Recorder(fx.Interpreter):
    """Runs the graph as it was traced, and notes what the nodes `spelled` as in-place do to tensors."""

    def __init__(self, module: fx.GraphModule, model: nn.Module, spelled: list[fx.Node]) -> None:
        super().__init__(module)
        self.spelled, self.writes = set(spelled), dict[fx.Node, Write]()
        self.state = {memory(t) for t in state(model).values()}

    def run_node(self, n: fx.Node) -> Any:
        tensor = self.env[written_by(n)] if n in self.spelled else None
        if not isinstance(tensor, Tensor):  # or a number, a size, a list: replayed as it is
            return super().run_node(n)
        place, version = memory(tensor), version_of(tensor)
        # The interpreter lets go of what nobody reads any more, so these are the values read from here on.
        sharing = tuple(o for o, v in self.env.items() if any(memory(t) == place for t in tensors_in(v)))
        result = super().run_node(n)
        changed = version_of(tensor) != version
        self.writes[n] = Write(result is tensor, changed, place in self.state, kind_of(result), sharing)
        return result


def kind_of(value: Any) -> Kind | None:
    """Shape and type; None of what is no tensor."""
    return (value.shape, value.dtype) if isinstance(value, Tensor) else None


def state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, but for those that a lazy module makes at its first call."""
    found = (*model.named_parameters(), *model.named_buffers())
    return {name: tensor for name, tensor in found if not nn.parameter.is_lazy(tensor)}


def memory(tensor: Tensor) -> Any:
    """What tells storages apart, empty ones too."""
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else id(tensor)


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)


# -- rewriting -----------------------------------------------------------------------------------------------------


class Rewriter:
    """Rewrites in-place nodes in the order of the graph."""

    def __init__(self, graph: fx.Graph, model: nn.Module) -> None:
        self.model = model
        self.position = {node: i for i, node in enumerate(graph.nodes)}
        self.origin: dict[fx.Node, fx.Node] = {}  # values that are one tensor under several names: the first of them
        self.names: dict[fx.Node, list[fx.Node]] = {}
        for node in graph.nodes:
            module = model.get_submodule(node.target) if node.op == "call_module" else None
            identity = type(module) is nn.Identity and not hooked(module)
            self.join(node, node.args[0] if identity and node.args else node)

    def join(self, node: fx.Node, source: fx.Node) -> None:
        """`node`, with all its names, is the tensor `source` once more."""
        first = self.origin.get(source, node)
        names = self.names.pop(self.origin[node]) if node in self.origin else [node]
        self.names.setdefault(first, []).extend(names)
        self.origin.update(dict.fromkeys(names, first))

    def rewrite(self, node: fx.Node, write: Write) -> None:
        written = written_by(node)
        if write.changed and not write.returned:
            self.refuse(node, "what it returns is not the tensor that it wrote")
        if write.changed and write.of_state:
            self.refuse(node, "that is a parameter or buffer of the model, so that one call would change the next")
        if write.returned:
            self.check_views(node, self.origin[written], write.sharing)
            for name in list(self.names[self.origin[written]]):
                name.replace_all_uses_with(node, delete_user_cb=lambda user: self.later(user, node))
            self.join(node, written)
        form = functional_form(node, self.model)
        assert form is not None
        node.target, node.args, node.kwargs = form

    def check_views(self, node: fx.Node, written: fx.Node, sharing: tuple[fx.Node, ...]) -> None:
        """Refuse where another value in the same memory is read later: it would lack what was written."""
        for origin in {self.origin[other] for other in sharing} - {written}:
            for name in self.names[origin]:
                for reader in name.users:
                    if self.later(reader, node) and not shape_only(reader):
                        self.refuse(node, f"{reader.name!r} reads {name.name!r}, in the same memory, afterwards")

    def later(self, user: fx.Node, node: fx.Node) -> bool:
        return self.position[user] > self.position[node]

    def refuse(self, node: fx.Node, why: str) -> None:
        raise ValueError(refusal(node, self.model, why))


def shape_only(node: fx.Node) -> bool:
    """Whether a node looks at no element of what it reads."""
    if node.op == "call_method":
        return node.target in SHAPE_ONLY
    return node.op == "call_function" and node.target is getattr and node.args[1] in SHAPE_ATTRIBUTES


def refusal(node: fx.Node, model: nn.Module, why: str) -> str:
    """What to tell of a node that writes into its argument."""
    if node.op == "call_module":
        what = f"module {node.target!r} ({type(model.get_submodule(node.target)).__name__})"
    else:
        what = f"{getattr(node.target, '__name__', node.target)} (node {node.name!r})"
    return f"rnp.convert: {what} writes into a tensor in place, and {why}. {REMEDY}"
