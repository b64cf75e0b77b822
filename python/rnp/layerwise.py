"""A converted network layer by layer, differentiably: what `PrunedNetwork` runs where no plan of fused calls can.

`run_mixed` gives every sample its own actions; `run_path` gives all the same ones and computes on sliced tensors.
"""

from __future__ import annotations

from functools import reduce
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rnp_kernels
from rnp_kernels import training

from . import graph as g
from .batchnorm import PrefixBatchNorm2d
from .decider import Decider

if TYPE_CHECKING:
    from .network import PrunedNetwork


# -- every sample under actions of its own -------------------------------------------------------------------------


def run_mixed(network: PrunedNetwork, images: Tensor, decider: Decider) -> Any:
    """images (N, C, H, W) → the model's output, under the actions that `decider` takes on the way."""
    backbone, k = network.backbone, network.groups
    env: dict[str, Any] = {network._input: images}
    groups: dict[str, Tensor | None] = {network._input: None}  # (N,) int 1…k, None for full width
    means: dict[str, Tensor] = {}
    result = None
    for step in network._steps:
        if isinstance(step, g.ConvStep):
            if step.decision is not None and step.decision == len(decider.taken):
                name = network._states[step.decision]
                if decider.needs_features and name not in means:
                    means[name] = env[name].detach().mean((2, 3), dtype=torch.float32)
                decider(step.decision, means.get(name))
            result = _mixed_conv(network, step, env, groups, decider.taken)
        elif isinstance(step, g.NormStep):
            x, group = env[step.inputs[0]], groups[step.inputs[0]]
            row = None if step.row_group is None else reduce(torch.maximum, (decider.taken[d] for d in step.row_group))
            live = None if group is None else _live(group, x.shape[1], k)
            result = backbone.get_submodule(step.norm)(x, None if row is None else row - 1, live)
            groups[step.output] = group
        elif isinstance(step, g.AddStep):
            result = env[step.inputs[0]] + env[step.inputs[1]]
            groups[step.output] = _larger(groups[step.inputs[0]], groups[step.inputs[1]])
        else:
            assert isinstance(step, (g.ChannelwiseStep, g.OpaqueStep))
            result = step.call.run(backbone, [env[name] for name in step.inputs], network.training)
            groups[step.output] = groups[step.inputs[0]] if isinstance(step, g.ChannelwiseStep) else None
        env[step.output] = result
    return result


def _mixed_conv(
    network: PrunedNetwork,
    step: g.ConvStep,
    env: dict[str, Any],
    groups: dict[str, Tensor | None],
    taken: list[Tensor],
) -> Tensor:
    conv, norm = _modules(network, step)
    k = network.groups
    group_in = groups[step.inputs[0]]
    group_out = group_in if step.follows else (taken[step.decision] if step.decision is not None else None)
    x, padding = _padded(env[step.inputs[0]], conv)
    x = rnp_kernels.prefix_conv2d(
        x, conv.weight, conv.bias, conv.stride, padding, conv.dilation, conv.groups,
        in_prefix=None if group_in is None else _prefix(group_in, conv.in_channels, k),
        out_prefix=None if group_out is None else _prefix(group_out, conv.out_channels, k),
    )  # fmt: skip
    if isinstance(norm, PrefixBatchNorm2d):
        row = None if group_in is None else group_in - 1
        x = norm(x, row, None if group_out is None else _live(group_out, x.shape[1], k))
    elif norm is not None:
        x = norm(x)
    if step.residual:
        x = x + env[step.inputs[1]]
        group_out = _larger(group_out, groups[step.inputs[1]])
    groups[step.output] = group_out
    return F.relu(x) if step.relu else x


def _prefix(group: Tensor, channels: int, k: int) -> Tensor:
    """Groups (N,) 1…k → live channels (N,) int32."""
    return torch.div(group * channels + (k - 1), k, rounding_mode="floor").to(torch.int32)


def _live(group: Tensor, channels: int, k: int) -> Tensor:
    """Groups (N,) 1…k → (N, channels) bool, True where live."""
    return torch.arange(channels, device=group.device) < _prefix(group, channels, k)[:, None]


def _larger(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """The larger of two groups (N,); None is full width."""
    return None if a is None or b is None else torch.maximum(a, b)


# -- one path for the whole batch ----------------------------------------------------------------------------------


def run_path(network: PrunedNetwork, images: Tensor, path: list[int]) -> Any:
    """images (N, C, H, W) → the model's output with action path[l] at decision l for every image; sliced tensors."""
    backbone, k = network.backbone, network.groups
    env: dict[str, Any] = {network._input: images}
    group: dict[str, int] = {network._input: k}

    def full(name: str) -> Any:
        x = env[name]
        return x if group.get(name, k) == k else _pad_channels(x, network._values[name].channels)

    for step in network._steps:
        if isinstance(step, g.ConvStep):
            env[step.output], group[step.output] = _path_conv(network, step, env, group, path)
        elif isinstance(step, g.NormStep):
            group[step.output] = group[step.inputs[0]]
            norm = backbone.get_submodule(step.norm)
            row = norm.rows if step.row_group is None else max(path[decision] for decision in step.row_group)
            env[step.output] = norm.forward_slice(env[step.inputs[0]], row - 1)
        elif isinstance(step, g.AddStep):
            env[step.output] = _add_prefix(env[step.inputs[0]], env[step.inputs[1]])
            group[step.output] = max(group[step.inputs[0]], group[step.inputs[1]])
        elif isinstance(step, g.ChannelwiseStep):
            group[step.output] = group[step.inputs[0]]
            env[step.output] = step.call.run(backbone, [env[step.inputs[0]]], network.training)
        else:
            assert isinstance(step, g.OpaqueStep)
            inputs = [full(name) for name in step.inputs]
            env[step.output], group[step.output] = step.call.run(backbone, inputs, network.training), k
    return env[network._steps[-1].output]


def _path_conv(
    network: PrunedNetwork, step: g.ConvStep, env: dict[str, Any], group: dict[str, int], path: list[int]
) -> tuple[Tensor, int]:
    conv, norm = _modules(network, step)
    k = network.groups
    x, group_in = env[step.inputs[0]], group[step.inputs[0]]
    group_out = group_in if step.follows else (path[step.decision] if step.decision is not None else k)
    live_out = g.prefix_size(group_out, conv.out_channels, k)
    weight, conv_groups = conv.weight, conv.groups
    if step.follows:
        weight, conv_groups = weight[:live_out], live_out
    elif conv_groups > 1:
        x = _pad_channels(x, conv.in_channels)
    else:
        weight = weight[:live_out, : x.shape[1]]
    bias = None if conv.bias is None else conv.bias[:live_out]
    x, padding = _padded(x, conv)
    x = training.conv2d(x, weight, bias, conv.stride, padding, conv.dilation, conv_groups)
    if norm is not None:
        x = norm.forward_slice(x, min(group_in, norm.rows) - 1) if isinstance(norm, PrefixBatchNorm2d) else norm(x)
    if step.residual:
        x = _add_prefix(x, env[step.inputs[1]])
        group_out = max(group_out, group[step.inputs[1]])
    return (F.relu(x) if step.relu else x), group_out


def _pad_channels(x: Tensor, channels: int) -> Tensor:
    """(N, r, …) → (N, channels, …) with a zero tail."""
    missing = channels - x.shape[1]
    return x if missing == 0 else F.pad(x, (0, 0) * (x.dim() - 2) + (0, missing))


def _add_prefix(a: Tensor, b: Tensor) -> Tensor:
    """Sum of two prefixes (N, r, H, W), (N, s, H, W) of one map; the result has max(r, s) channels."""
    if a.shape[1] < b.shape[1]:
        a, b = b, a
    r = b.shape[1]
    return a + b if r == a.shape[1] else torch.cat([a[:, :r] + b, a[:, r:]], 1)


# -- both ----------------------------------------------------------------------------------------------------------


def _modules(network: PrunedNetwork, step: g.ConvStep) -> tuple[Any, nn.Module | None]:
    """The step's convolution and its normalisation."""
    norm = network.backbone.get_submodule(step.norm) if step.norm else None
    return network.backbone.get_submodule(step.conv), norm


def _padded(x: Tensor, conv: nn.Conv2d) -> tuple[Tensor, Any]:
    """The input, padded already where the mode is not zeros, and the padding that is left for the convolution."""
    if conv.padding_mode == "zeros":
        return x, conv.padding
    return F.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode), 0
