"""What a plan settles once: BatchNorms as tables of scale and bias, and which tails have to be zero."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from . import graph as g
from .batchnorm import PrefixBatchNorm2d

SHAPE_ONLY = {"size", "dim", "numel"}  # methods that look at no element


def tables(
    conv: nn.Conv2d, norm: nn.Module | None, varies: bool, dtype: torch.dtype | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """Scale and bias of convolution + BatchNorm: (C_out,) each, or (k + 1, C_out) where the in-prefix `varies`.

    Folded in `dtype`, or in that of the parameters.
    """
    bias = conv.bias if conv.bias is None or dtype is None else conv.bias.to(dtype)
    if norm is None:
        return None, bias
    if dtype is not None:
        norm = copy.deepcopy(norm).to(dtype)
    if isinstance(norm, PrefixBatchNorm2d):
        scale, shift = norm.table()
        if not varies:
            scale, shift = scale[-1], shift[-1]
    else:
        assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None and norm.running_var is not None
        scale = torch.rsqrt(norm.running_var + norm.eps)
        scale = scale if norm.weight is None else scale * norm.weight
        shift = -norm.running_mean * scale
        shift = shift if norm.bias is None else shift + norm.bias
    if bias is not None:
        shift = shift + scale * bias
    if varies:
        scale, shift = (torch.cat([t[:1], t]) for t in (scale, shift))
    return scale.contiguous(), shift.contiguous()


def norm_table(norm: PrefixBatchNorm2d, k: int, by_row: bool, by_group: bool) -> tuple[Tensor, Tensor]:
    """Scale and shift of a BatchNorm on its own, 0 beyond the prefix.

    Line row · (k + 1) + group of them, for a row 1…k and a group 1…k of which one may not vary and is then left out.
    """
    tables = norm.table()
    sizes = torch.tensor([0] + [g.prefix_size(i, norm.num_features, k) for i in range(1, k + 1)])
    live = (torch.arange(norm.num_features) < sizes[:, None]).to(tables[0])  # (k + 1, C)
    rows = (torch.cat([t[:1], t]) if by_row else t[-1:] for t in tables)
    scale, shift = ((t[:, None] * (live if by_group else live[-1:])).flatten(0, 1) for t in rows)
    return scale, shift


def zero_tails(steps: list[g.Step], states: list[str], averages: set[str]) -> set[str]:
    """Names of the values whose tail has to be zero, because a reader does not know the prefix.

    `averages` are the outputs of global pools that a convolution's pooled output replaces: they read no feature map.
    """
    produced = {step.output: step for step in steps}
    needed = {name for name in states if not isinstance(produced.get(name), g.ConvStep)}
    for step in reversed(steps):
        if step.output in averages:
            continue
        if isinstance(step, g.ConvStep):
            needed.update(step.inputs[1:])
        elif isinstance(step, (g.ChannelwiseStep, g.NormStep)):
            if step.output in needed:
                needed.update(step.inputs)
        elif not (isinstance(step, g.OpaqueStep) and step.call.op == "call_method" and step.call.target in SHAPE_ONLY):
            needed.update(step.inputs)
    return needed


def find_averages(steps: list[g.Step], backbone: nn.Module) -> dict[str, bool]:
    """Global average pools that a convolution's pooled output replaces, and whether each keeps two dimensions of 1.

    That output is float32: not for float64.
    """
    convs = {step.output: step for step in steps if isinstance(step, g.ConvStep)}
    found: dict[str, bool] = {}
    for step in steps:
        if not isinstance(step, (g.ChannelwiseStep, g.OpaqueStep)) or len(step.inputs) != 1:
            continue
        conv = convs.get(step.inputs[0])
        if conv is None or backbone.get_submodule(conv.conv).weight.dtype is torch.float64:
            continue
        keep = g.is_global_mean(step.call)
        if step.call.op == "call_module":
            pool = backbone.get_submodule(step.call.target)
            global_pool = type(pool) is nn.AdaptiveAvgPool2d and pool.output_size in (1, (1, 1), [1, 1])
            keep = (global_pool and not g.hooked(pool)) or None
        if keep is not None:
            found[step.output] = keep
    return found
