"""The rivals: the dense model as stock torch runs it, and the fastest of these.

On a CPU ``F.conv2d`` repacks its weights at every call, so the honest rival is oneDNN with weights packed once, what
Inductor's freezing does. BatchNorm is folded, ReLU and the residual add are fused into the convolution.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn.utils.fusion import fuse_conv_bn_eval

from rnp.batchnorm import PrefixBatchNorm2d
from rnp.measure import interleaved, median
from rnp.network import PrunedNetwork
from rnp.tracing import view_as_reshape

_RELU_FUNCTIONS = (F.relu, torch.relu, torch.relu_)
_ADD_FUNCTIONS = (operator.add, operator.iadd, torch.add)


class PrepackedConv2d(nn.Module):
    """A convolution by oneDNN with its weights packed once, optionally + residual, then ReLU. Inference on a CPU only.

    Args:
        conv: the convolution, zero padding given as integers.
        input_size: (N, C, H, W) for which oneDNN picks its layout (other sizes work, perhaps slower).
        relu: apply ReLU to the result.
    """

    def __init__(self, conv: nn.Conv2d, input_size: torch.Size, relu: bool) -> None:
        super().__init__()
        if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            raise ValueError(f"PrepackedConv2d: zero padding in integers is needed, got {conv}")
        self.geometry = (list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups)
        self.relu = relu
        self.bias = conv.bias
        weight = conv.weight.detach()
        self.packed = torch.ops.mkldnn._reorder_convolution_weight(weight, *self.geometry, list(input_size))

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if residual is None:
            attribute = "relu" if self.relu else "none"
            return torch.ops.mkldnn._convolution_pointwise(
                input, self.packed, self.bias, *self.geometry, attribute, [], ""
            )
        unary = "relu" if self.relu else None
        return torch.ops.mkldnn._convolution_pointwise.binary(
            input, residual, self.packed, self.bias, *self.geometry, "add", 1.0, unary, [], None
        )


def dense_model(pruned: PrunedNetwork) -> nn.Module:
    """The dense network inside a converted one, of the original class: its weights, and full width's BatchNorm."""
    model = copy.deepcopy(pruned.backbone)
    made: dict[int, nn.BatchNorm2d] = {}  # a module under two names stays one module
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, PrefixBatchNorm2d):
            if id(module) not in made:
                made[id(module)] = _full_width_norm(module)
            model.set_submodule(name, made[id(module)])
    for name in pruned._in_place:  # forward() may count on it
        model.get_submodule(name).inplace = True
    return model.eval()


def _full_width_norm(norm: PrefixBatchNorm2d) -> nn.BatchNorm2d:
    """The last row of a BatchNorm kept per in-prefix, as a plain one."""
    plain = nn.BatchNorm2d(norm.num_features, norm.eps, norm.momentum, norm.affine)
    plain = plain.to(device=norm.running_mean.device, dtype=norm.running_mean.dtype)
    with torch.no_grad():
        for name in ("weight", "bias", "running_mean", "running_var"):
            if getattr(norm, name) is not None:
                getattr(plain, name).copy_(getattr(norm, name)[-1])
        plain.num_batches_tracked.copy_(norm.num_batches_tracked[-1].max())
    return plain


def eager(model: nn.Module) -> nn.Module:
    """A copy in eval mode, channels_last."""
    return copy.deepcopy(model).eval().to(memory_format=torch.channels_last)


class Contiguous(nn.Module):
    """A copy in eval mode that runs on contiguous (N, C, H, W), for a forward() whose views channels_last has not."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).eval().to(memory_format=torch.contiguous_format)

    def forward(self, images: Tensor) -> Any:
        return self.model(images.contiguous())


def folded(model: nn.Module) -> fx.GraphModule:
    """:func:`eager` with every BatchNorm behind a convolution folded into it (torch.fx must trace the model).

    A view becomes a reshape, which is the same where the view exists.
    """
    graph_module = fx.symbolic_trace(eager(model))
    view_as_reshape(graph_module.graph)
    modules = dict(graph_module.named_modules())
    for node in list(graph_module.graph.nodes):
        if node.op != "call_module" or not isinstance(modules[node.target], nn.BatchNorm2d):
            continue
        source = node.args[0]
        if source.op != "call_module" or not isinstance(modules[source.target], nn.Conv2d) or len(source.users) > 1:
            continue
        if sum(other.target == source.target for other in graph_module.graph.nodes) > 1:
            continue  # a shared convolution
        fused = fuse_conv_bn_eval(modules[source.target], modules[node.target])
        graph_module.set_submodule(source.target, fused)
        modules[source.target] = fused
        node.replace_all_uses_with(source)
        graph_module.graph.erase_node(node)
    graph_module.delete_all_unused_submodules()
    graph_module.recompile()
    return graph_module.to(memory_format=torch.channels_last)


def prepacked(model: nn.Module, example: Tensor) -> fx.GraphModule:
    """:func:`folded` with every convolution a :class:`PrepackedConv2d`, ReLU and residual add fused into it."""
    if example.device.type != "cpu":
        raise ValueError(f"prepacked: oneDNN runs on a CPU, got device {example.device}")
    graph_module = folded(model)
    with torch.no_grad():
        ShapeProp(graph_module).propagate(example)
    modules = dict(graph_module.named_modules())
    order = {node: index for index, node in enumerate(graph_module.graph.nodes)}

    def conv_of(node: object) -> nn.Conv2d | None:
        ours = isinstance(node, fx.Node) and node.op == "call_module"
        found = modules[node.target] if ours else None
        return found if isinstance(found, nn.Conv2d) else None

    def single_user(node: fx.Node, test: Callable[[fx.Node], bool]) -> fx.Node | None:
        user = next(iter(node.users)) if len(node.users) == 1 else None
        return user if user is not None and test(user) else None

    def is_relu(node: fx.Node) -> bool:
        if node.op == "call_module":
            return isinstance(modules[node.target], nn.ReLU)
        return (node.op == "call_function" and node.target in _RELU_FUNCTIONS) or (
            node.op == "call_method" and node.target in ("relu", "relu_")
        )

    def is_add(node: fx.Node) -> bool:
        if node.op != "call_function" or node.target not in _ADD_FUNCTIONS or len(node.args) != 2 or node.kwargs:
            return False
        shapes = [getattr(arg.meta.get("tensor_meta"), "shape", None) for arg in node.all_input_nodes]
        return len(shapes) == 2 and shapes[0] == shapes[1] is not None

    fused_by_add: set[fx.Node] = set()
    for node in list(graph_module.graph.nodes):  # an add takes the convolution that is computed last
        if is_add(node):
            convs = [arg for arg in node.args if conv_of(arg) is not None and len(arg.users) == 1]
            if convs:
                fused_by_add.add(max(convs, key=order.__getitem__))
    for node in list(graph_module.graph.nodes):
        conv = conv_of(node)
        if conv is None:
            continue
        end, residual = node, None
        if node in fused_by_add:
            end = next(iter(node.users))
            residual = end.args[1] if end.args[0] is node else end.args[0]
        relu = single_user(end, is_relu)
        size = node.args[0].meta["tensor_meta"].shape
        name = f"{node.target.replace('.', '_')}_prepacked_{order[node]}"
        graph_module.add_submodule(name, PrepackedConv2d(conv, size, relu is not None))
        last = relu if relu is not None else end
        with graph_module.graph.inserting_before(last):
            arguments = (node.args[0],) if residual is None else (node.args[0], residual)
            packed = graph_module.graph.call_module(name, arguments)
        packed.meta = dict(last.meta)  # its shape, for the convolutions that read it
        last.replace_all_uses_with(packed)
        for dead in dict.fromkeys((last, end, node)):
            graph_module.graph.erase_node(dead)
    graph_module.delete_all_unused_submodules()
    graph_module.graph.lint()
    graph_module.recompile()
    return graph_module


def rounding(truth: Tensor) -> float:
    """By how much a network's output may differ where the same sums are taken in another order."""
    return (1e-4 if truth.dtype == torch.float32 else 2e-2) * float(truth.abs().max())


@dataclass
class StockPath:
    """The fastest stock path for a model, see :func:`best_stock_path`."""

    name: str  # "eager", "folded" or "prepacked"; "contiguous" where the model does not run in channels_last
    module: nn.Module  # call it under torch.inference_mode() on channels_last images
    seconds: dict[str, float] = field(default_factory=dict)  # median seconds of every candidate on the example
    rejected: dict[str, str] = field(default_factory=dict)  # why a candidate does not run or is not correct


def best_stock_path(model: nn.Module, example: Tensor, rounds: int = 7) -> StockPath:
    """The fastest way in which stock torch runs ``model``: each candidate is checked against it first, then timed.

    A model that cannot run in channels_last (its forward() takes views) runs contiguous instead of eager.

    Args:
        model: the dense network; it is not modified.
        example: (N, C, H, W) real images at the batch size of interest.
        rounds: timed rounds, interleaved; the median decides.
    """
    example = example.to(memory_format=torch.channels_last)
    candidates: dict[str, nn.Module] = {"eager": eager(model)}
    rejected: dict[str, str] = {}
    makers: dict[str, Callable[[], nn.Module]] = {
        "folded": lambda: folded(model),
        "prepacked": lambda: prepacked(model, example),
    }
    try:
        with torch.inference_mode():
            truth = candidates["eager"](example)
    except RuntimeError as failure:  # forward() takes a view that channels_last has not
        rejected["eager"] = f"{type(failure).__name__}: {failure}"
        candidates = {"contiguous": Contiguous(model)}
        with torch.inference_mode():
            truth = candidates["contiguous"](example)
    tolerance = rounding(truth)
    for name, make in makers.items():
        try:
            module = make()
            with torch.inference_mode():
                error = float((module(example) - truth).abs().max())
        except Exception as failure:  # a model that fx cannot trace, a build without oneDNN: the reason is kept
            rejected[name] = f"{type(failure).__name__}: {failure}"
            continue
        if error <= tolerance:
            candidates[name] = module
        else:
            rejected[name] = f"differs from the eager model by {error:.3g}, allowed are {tolerance:.3g}"
    with torch.inference_mode():
        calls = {name: (lambda module=module: module(example)) for name, module in candidates.items()}
        times = interleaved(calls, rounds, warmup=2, device=example.device)
    seconds = {name: median(values) for name, values in times.items()}
    best = min(seconds, key=seconds.__getitem__)
    return StockPath(best, candidates[best], seconds, rejected)
