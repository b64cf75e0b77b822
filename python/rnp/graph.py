"""A traced CNN (tracing.py) as a list of steps whose channel prefixes can be followed.

A *value* is the result of a node of the graph, known by the node's name. A *step* computes one value from others. The
steps that matter are `ConvStep` (a convolution with what folds into it: BatchNorm, residual add, ReLU), `NormStep` (a
BatchNorm on its own), `AddStep`, `ChannelwiseStep` (whatever treats channels one by one and keeps a zero tail zero) and
`OpaqueStep` (everything else: it sees complete tensors with zero tails, and ends the prefix).
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

FULL: frozenset[int] | None = None  # the group of a value that always has its full width


@dataclass
class Value:
    """A tensor: its shape for the example, and the decisions whose maximum is its group (None: full width).

    `row_group`: the same of the input of the convolution that made it, which names the set of a BatchNorm behind it. A
    sum has no such convolution: there it is `group`.
    """

    name: str
    shape: tuple[int, ...] | None
    group: frozenset[int] | None = FULL
    row_group: frozenset[int] | None = FULL

    @property
    def channels(self) -> int:
        assert self.shape is not None
        return self.shape[1]


@dataclass
class Step:
    """Compute the value `output` from the values `inputs`."""

    output: str
    inputs: list[str]


@dataclass
class ConvStep(Step):
    """inputs[0] → convolution → BatchNorm → + inputs[1] (the residual) → ReLU, whichever of these are present."""

    conv: str = ""
    norm: str | None = None
    residual: bool = False
    relu: bool = False
    decision: int | None = None  # index of the decision that sets the output's group
    follows: bool = False  # depthwise: the output's group is the input's
    conv_node: str = ""

    in_group: frozenset[int] | None = FULL
    out_group: frozenset[int] | None = FULL  # of the convolution itself, before a residual is added


@dataclass
class NormStep(Step):
    """A BatchNorm on its own: behind a sum (pre-activation networks), an activation, a value that others read too.

    `group` and `row_group` are those of its input: which channels are live, and which set normalises them.
    """

    norm: str = ""
    group: frozenset[int] | None = FULL
    row_group: frozenset[int] | None = FULL


@dataclass
class AddStep(Step):
    """inputs[0] + inputs[1]: takes the larger prefix."""

    relu: bool = False


@dataclass(frozen=True)
class Arg:
    """Stands for `inputs[index]` in the arguments of a call."""

    index: int


@dataclass
class Call:
    """A node of the graph, free of references to modules, so that a network can be copied and pickled."""

    op: str
    target: Any
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, node: fx.Node) -> tuple[Call, list[str]]:
        """Return the call and the names of the values it reads."""
        names: list[str] = []

        def stand_in(n: fx.Node) -> Any:
            if n.name not in names:
                names.append(n.name)
            return Arg(names.index(n.name))

        args = fx.node.map_arg(node.args, stand_in)
        kwargs = fx.node.map_arg(node.kwargs, stand_in)
        target = PICKLABLE.get(node.target, node.target) if node.op == "call_function" else node.target
        return cls(node.op, target, _plain(args), _plain(kwargs)), names

    def run(self, root: nn.Module, inputs: list[Any], training: bool) -> Any:
        """Execute on `inputs`; modules and attributes are found below `root`. Functional dropout obeys `training`."""
        args = _fill(self.args, inputs)
        kwargs = _fill(self.kwargs, inputs)
        if self.op == "call_module":
            return root.get_submodule(self.target)(*args, **kwargs)
        if self.op == "call_method":
            return getattr(args[0], self.target)(*args[1:], **kwargs)
        if self.op == "get_attr":
            owner, _, name = self.target.rpartition(".")
            return getattr(root.get_submodule(owner), name)
        if self.op == "output":
            return args[0]
        if self.target in (F.dropout, F.dropout2d) and kwargs.get("training") is False:
            kwargs["training"] = training
        return self.target(*args, **kwargs)

    def as_max_pool(self) -> nn.MaxPool2d | None:
        """The module that does what a call of `F.max_pool2d` does, or None where this is no such call."""
        if self.op != "call_function" or self.target not in MAX_POOL_FUNCTIONS:
            return None
        names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
        options = dict(zip(names, self.args[1:], strict=False)) | self.kwargs
        plain = all(name in names and not isinstance(value, Arg) for name, value in options.items())
        return nn.MaxPool2d(**options) if plain and "kernel_size" in options else None


def _plain(value: Any) -> Any:
    """fx's immutable containers → tuple, list, dict."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        items = [_plain(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _fill(value: Any, inputs: list[Any]) -> Any:
    if isinstance(value, Arg):
        return inputs[value.index]
    if isinstance(value, dict):
        return {key: _fill(item, inputs) for key, item in value.items()}
    if isinstance(value, tuple):
        items = [_fill(item, inputs) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, slice):
        return slice(*(_fill(item, inputs) for item in (value.start, value.stop, value.step)))
    return [_fill(item, inputs) for item in value] if isinstance(value, list) else value


@dataclass
class ChannelwiseStep(Step):
    """A call that treats every channel by itself and keeps zeros. `looks_through`: a state is taken before it."""

    call: Call = field(default_factory=lambda: Call("", ""))
    looks_through: bool = False


@dataclass
class OpaqueStep(Step):
    """A call on complete tensors. `channels_of`: a linear layer whose inputs are the channels of that value, flattened;
    what lies beyond the value's prefix is 0 and need not be read."""

    call: Call = field(default_factory=lambda: Call("", ""))
    channels_of: str | None = None


# Functions that torch makes on the fly, and the ones behind them that pickle finds by name.
PICKLABLE = {F.max_pool2d: F._max_pool2d, F.adaptive_max_pool2d: F._adaptive_max_pool2d}
MAX_POOL_FUNCTIONS = (F.max_pool2d, torch.max_pool2d, F._max_pool2d)


def pair(value: int | tuple[int, ...] | list[int]) -> list[int]:
    """An int or one or two of them → [vertical, horizontal]."""
    return [value, value] if isinstance(value, int) else [value[0], value[-1]]


# What keeps a prefix: channel-wise, f(0) = 0. The second set leaves the mean over positions (nearly) alone.
ACTIVATIONS = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.ELU,
    nn.CELU,
    nn.SELU,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Hardswish,
    nn.Tanh,
)
SPATIAL = (
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
    nn.Dropout,
    nn.Dropout2d,
    nn.Identity,
    nn.ZeroPad2d,
    nn.ReflectionPad2d,
    nn.ReplicationPad2d,
    nn.Upsample,
)
ACTIVATION_FUNCTIONS = {
    F.relu,
    torch.relu,
    F.relu6,
    F.leaky_relu,
    F.elu,
    F.gelu,
    F.silu,
    F.hardswish,
    torch.tanh,
    F.mish,
}
SPATIAL_FUNCTIONS = {
    *MAX_POOL_FUNCTIONS,
    F.avg_pool2d,
    F.adaptive_avg_pool2d,
    F.adaptive_max_pool2d,
    F.dropout,
    F.dropout2d,
    F.interpolate,
}
ACTIVATION_METHODS = {"relu", "tanh"}
SPATIAL_METHODS = {"contiguous", "clone"}
ADD_FUNCTIONS = {operator.add, torch.add}
RELU_FUNCTIONS = {F.relu, torch.relu}


def hooked(module: nn.Module) -> bool:
    """Whether forward hooks listen to the module, so that it has to be called itself, on complete tensors."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def is_relu(node: fx.Node, model: nn.Module) -> bool:
    """Whether `node` is a plain ReLU, in whatever spelling."""
    if node.op == "call_module":
        module = model.get_submodule(node.target)
        return type(module) is nn.ReLU and not hooked(module)
    if node.op == "call_function":
        return node.target in RELU_FUNCTIONS
    return node.op == "call_method" and node.target == "relu"


def is_add(node: fx.Node, shapes: dict[str, tuple[int, ...] | None], batched: set[str]) -> bool:
    """Whether `node` adds two 4-D feature maps of one shape, both with an entry for each image, with no scaling."""
    spelled = (node.op == "call_function" and node.target in ADD_FUNCTIONS) or (
        node.op == "call_method" and node.target == "add"
    )
    if not spelled or len(node.args) != 2 or node.kwargs or not all(isinstance(a, fx.Node) for a in node.args):
        return False
    if not all(arg.name in batched for arg in node.args):
        return False  # a position embedding and the like: broadcast over the images
    a, b = (shapes.get(arg.name) for arg in node.args)
    return a is not None and a == b and len(a) == 4


def channelwise(node: fx.Node, model: nn.Module, shapes: dict[str, tuple[int, ...] | None]) -> bool | None:
    """None: not channel-wise. Else whether a state is taken before it (pooling, dropout: True) or not (activations)."""
    x = node.args[0] if node.args else None
    if not isinstance(x, fx.Node) or x.name not in shapes:
        return None
    before, after = shapes[x.name], shapes.get(node.name)
    if before is None or after is None or len(before) != 4 or len(after) != 4 or before[1] != after[1]:
        return None
    if any(isinstance(a, fx.Node) for a in [*node.args[1:], *node.kwargs.values()]):
        return None
    if node.op == "call_module":
        module = model.get_submodule(node.target)
        if getattr(module, "return_indices", False) or hooked(module):
            return None
        if isinstance(module, SPATIAL):
            return True
        return False if isinstance(module, ACTIVATIONS) else None
    if node.op == "call_function":
        if node.target in SPATIAL_FUNCTIONS:
            return True
        scaled = node.target in (operator.mul, operator.truediv) and isinstance(node.args[1], (int, float))
        return False if node.target in ACTIVATION_FUNCTIONS or scaled else None
    if node.op == "call_method":
        return True if node.target in SPATIAL_METHODS else (False if node.target in ACTIVATION_METHODS else None)
    return None


FLATTENING = {torch.flatten, torch.reshape, nn.Flatten, "flatten", "reshape", "view"}


def flattened(name: str, producer: dict[str, Step], values: dict[str, Value], backbone: nn.Module) -> str | None:
    """The 4-D value whose channels, each with all its positions, are the features of `name` (N, F); or None.

    Looks back through dropout and ReLU, which keep zeros.
    """
    while isinstance(step := producer.get(name), OpaqueStep):
        module = backbone.get_submodule(step.call.target) if step.call.op == "call_module" else None
        if module is not None and hooked(module):
            return None
        what = step.call.target if module is None else type(module)
        before = step.inputs[0] if step.inputs else None
        if before is None or before not in values:
            return None
        shape, features = values[before].shape, values[name].shape
        if shape is None or features is None or len(features) != 2:
            return None
        if len(shape) == 4:
            flat = what in FLATTENING and math.prod(shape[1:]) == features[1]
            return before if flat or is_global_mean(step.call) is False else None
        if what not in (nn.Dropout, nn.Identity, nn.ReLU, F.dropout, F.relu, torch.relu, "relu"):
            return None
        name = before
    return None


def is_global_mean(call: Call) -> bool | None:
    """None: `call` is not the mean of its one input over all positions. Else whether it keeps the two dimensions."""
    if call.op == "call_function" and call.target is F.adaptive_avg_pool2d:
        size = call.args[1] if len(call.args) > 1 else call.kwargs.get("output_size")
        return True if size in (1, (1, 1), [1, 1]) else None
    means = (call.op == "call_method" and call.target == "mean") or (call.op, call.target) == (
        "call_function",
        torch.mean,
    )
    if not means or not call.args or set(call.kwargs) - {"dim", "keepdim"} or len(call.args) > 2:
        return None
    dims = call.args[1] if len(call.args) > 1 else call.kwargs.get("dim")
    if not isinstance(dims, (tuple, list)) or sorted(d % 4 for d in dims) != [2, 3]:
        return None
    return bool(call.kwargs.get("keepdim", False))


def prefix_size(action: int, channels: int, k: int) -> int:
    """Channels that action 1…k leaves live: r = ceil(action · C / k)."""
    return math.ceil(action * channels / k)
