"""What `torch.utils.flop_counter.FlopCounterMode` counts for the operators: as much as for conv2d.

That is the dense work of the layer at full width. A counter sees shapes alone, and prefixes are values on the device;
what a call with prefixes really needs are the MACs that `rnp` reports. Like torch, for groups > 1 it counts the
gradient of the weight as if every output channel had one for every input channel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

from .triton.operators import SUFFIX

_FAMILIES = ("", SUFFIX)


def _packets(name: str) -> list[Any]:
    return [getattr(torch.ops.rnp, name + family) for family in _FAMILIES]


def _transposed(shape: Sequence[int]) -> list[int]:
    return [shape[1], shape[0], *shape[2:]]


@register_flop_formula(_packets("prefix_conv2d"))
def _prefix_conv2d(input: Sequence[int], weight: Sequence[int], *_: Any, out_shape: Any, **__: Any) -> int:
    return conv_flop_count(input, weight, out_shape[0])


@register_flop_formula(_packets("prefix_conv2d_input_grad"))
def _input_grad(grad_output: Sequence[int], weight: Sequence[int], *_: Any, out_shape: Any, **__: Any) -> int:
    return conv_flop_count(grad_output, weight, out_shape, transposed=True)


@register_flop_formula([*_packets("prefix_conv2d_weight_grad"), torch.ops.rnp.conv2d_weight_grad])
def _weight_grad(grad_output: Sequence[int], input: Sequence[int], *_: Any, out_shape: Any, **__: Any) -> int:
    return conv_flop_count(_transposed(input), _transposed(grad_output), _transposed(out_shape))
