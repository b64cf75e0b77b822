"""MACs of the layers whose cost no decision changes: linear layers, convolutions that are not followed."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

LINEAR = {F.linear}
CONVOLUTIONS = {torch.conv1d, torch.conv2d, torch.conv3d, F.conv1d, F.conv2d, F.conv3d}
TRANSPOSED = {
    *(torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d),
    *(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
}
FUNCTIONS = LINEAR | CONVOLUTIONS | TRANSPOSED


def fixed_macs(
    node: fx.Node, module: nn.Module | None, shapes: dict[str, tuple[int, ...] | None], images: int
) -> int | None:
    """MACs per image of a node, `module` if it calls one; None if it is no linear layer and no convolution.

    `images` is the batch for which the `shapes` are.
    """
    source, weight = operand(node, 0, "input"), operand(node, 1, "weight")
    before, after = (None if n is None else shapes.get(n.name) for n in (source, node))
    if before is None or after is None:
        return None
    if isinstance(module, nn.Linear):
        return entries(after, images) * module.in_features
    if isinstance(module, nn.modules.conv._ConvNd):
        shape: tuple[int, ...] | None = tuple(module.weight.shape)
        transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
    elif node.op == "call_function" and node.target in FUNCTIONS:
        shape = None if weight is None else shapes.get(weight.name)
        transposed = node.target in TRANSPOSED
    else:
        return None
    # An output, or an input where the convolution is transposed, meets the weight's axes but the first.
    return None if shape is None else entries(before if transposed else after, images) * math.prod(shape[1:])


def entries(shape: tuple[int, ...], images: int) -> int:
    """Elements that an image has in a tensor whose first axis holds one entry for each image, or several."""
    return math.prod(shape[1:]) * max(1, shape[0] // max(1, images))


def operand(node: fx.Node, place: int, name: str) -> fx.Node | None:
    """An argument of a call, given by place or by name, if it is a value of the graph."""
    value: Any = node.args[place] if len(node.args) > place else node.kwargs.get(name)
    return value if isinstance(value, fx.Node) else None
