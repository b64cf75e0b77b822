"""MACs of what no decision changes: linear layers, convolutions that are not followed, matrix products, attention.

They are counted while the graph runs on the example: by the formulas of `torch.utils.flop_counter` and the few below,
operator by operator, so that it does not matter how `forward()` spells a product. An operator that multiplies and has
no formula is noted by name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

LINEAR = {F.linear}
CONVOLUTIONS = {torch.conv1d, torch.conv2d, torch.conv3d, F.conv1d, F.conv2d, F.conv3d}
TRANSPOSED = {
    *(torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d),
    *(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
}
FUNCTIONS = LINEAR | CONVOLUTIONS | TRANSPOSED
FORMULAS = {  # what torch's own list lacks: shapes of the arguments → floating-point operations, two a MAC
    torch.ops.aten.mv: lambda matrix, *_, **__: 2 * math.prod(matrix),
    torch.ops.aten.addmv: lambda _, matrix, *__, **___: 2 * math.prod(matrix),
    torch.ops.aten.dot: lambda vector, *_, **__: 2 * math.prod(vector),
    torch.ops.aten.addbmm: lambda _, a, b, *__, **___: 2 * math.prod(a) * b[-1],
}
NAMESPACES = ("aten", "prim", "prims", "rnp")  # operators of others may do anything
WITHOUT_FORMULA = {  # operators of torch that multiply matrices
    *("_trilinear", "_cdist_forward", "mkldnn_rnn_layer", "_cudnn_rnn", "miopen_rnn", "_native_multi_head_attention"),
    *("_transformer_encoder_layer_fwd", "_int_mm", "_weight_int8pack_mm", "_weight_int4pack_mm", "mkldnn_linear"),
}


class Counter:
    """Counts the MACs of each node of a graph as it runs, inside of `with counter.on():`."""

    def __init__(self) -> None:
        self.macs: dict[str, int] = {}  # node → MACs for the whole batch, where there are any
        self.without_formula: dict[str, list[str]] = {}  # node → operators
        self.flops = FlopCounterMode(display=False, custom_mapping=FORMULAS)
        self.seen = Unknown()

    @contextmanager
    def on(self) -> Iterator[None]:
        """Attention runs as matrix products in here: its fused operators have no formulas."""
        fused = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with sdpa_kernel(SDPBackend.MATH), self.flops, self.seen:
                yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)

    @contextmanager
    def node(self, name: str) -> Iterator[None]:
        """What runs in here belongs to this node."""
        before, self.seen.names = self.flops.get_total_flops(), []
        yield
        macs = (self.flops.get_total_flops() - before) // 2
        if macs:
            self.macs[name] = macs
        if self.seen.names:
            self.without_formula[name] = list(dict.fromkeys(self.seen.names))


class Unknown(TorchDispatchMode):
    """Notes operators that multiply, or may, and have no formula."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func.name().partition("::")
        if namespace not in NAMESPACES or name.partition(".")[0] in WITHOUT_FORMULA:
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def fixed_macs(
    node: fx.Node, module: nn.Module | None, shapes: dict[str, tuple[int, ...] | None], counted: dict[str, int]
) -> int:
    """MACs of a node for the whole batch of which `shapes` and `counted` are; `module` if the node calls one.

    A convolution's are those of its shapes, whatever operators stand in for it.
    """
    if not isinstance(module, nn.modules.conv._ConvNd):
        return counted.get(node.name, 0)
    source = node.args[0] if node.args else node.kwargs.get("input")
    transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
    # An output, or an input where the convolution is transposed, meets the weight's axes but the first.
    shape = shapes.get(source.name if transposed and isinstance(source, fx.Node) else node.name)
    return counted.get(node.name, 0) if shape is None else math.prod(shape) * math.prod(module.weight.shape[1:])
