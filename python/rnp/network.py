"""`PrunedNetwork`: a converted CNN whose convolutions run at a width chosen for each sample on its way through."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import has_torch_function_unary

import rnp_kernels
from rnp_kernels import backends, reference
from rnp_kernels.packing import LayerTransforms, PackedWeight
from rnp_kernels.triton.operators import PREFIX_CONV2D as TRITON

from . import graph as g
from .agent import Agent
from .batchnorm import PrefixBatchNorm2d
from .decider import Decider, trace_of
from .macs import Cap, MacCounter
from .plan import Plan
from .plan_builder import PlanBuilder
from .policies import FullWidth, Policy

if TYPE_CHECKING:
    from .convert import Report

MODAL = (PrefixBatchNorm2d, nn.BatchNorm2d, nn.Dropout, nn.Dropout2d)  # what a plan takes to be in eval mode
OPERATOR = _OPERATOR = torch.ops.rnp.prefix_conv2d.default


class PrunedNetwork(nn.Module):
    """Made by `rnp.convert`. `policy` decides the widths; `backbone` holds the parameters, under their own names.

    The state of a decision is the mean over positions of the feature map that the decision's first convolution reads,
    taken before any pooling layer in between, so that the convolution which makes the map gives its mean along with it.

    In eval mode without gradients (no_grad, or frozen parameters) a flat plan of fused operator calls runs; it is made
    at the first call and again when a parameter, buffer or module has changed. Otherwise every layer runs by itself,
    differentiably, in train mode with the batch statistics of live samples. A sample's features and actions are the
    same bits alone and in any batch.

    After one call in eval mode, `torch.compile(network, fullgraph=True)` and `torch.export.export` (dynamic batch size
    included) give one static graph whose actions depend on the images. It keeps the parameters it was made from.
    """

    def __init__(
        self,
        backbone: nn.Module,
        steps: list[g.Step],
        values: dict[str, g.Value],
        input_name: str,
        layers: list[str],
        states: list[str],
        groups: int,
        counter: MacCounter,
        report: Report,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.groups, self.layers, self.report = groups, layers, report
        self.feature_sizes = [values[name].channels for name in states]
        convs = {step.decision: step for step in reversed(steps) if isinstance(step, g.ConvStep)}
        self.decision_channels = [backbone.get_submodule(convs[d].conv).out_channels for d in range(len(layers))]
        self.dense_macs = counter.dense
        self.counter = counter
        self.policy = FullWidth()
        self.penalty_shift, self.max_macs = 0.0, None
        self._steps, self._values, self._input, self._states = steps, values, input_name, states
        self._cap = Cap(counter)
        self._plans: dict[tuple[bool, ...], Plan] = {}
        self._packs: dict[str, tuple[PackedWeight, LayerTransforms | None]] = {}
        self._modal = [m for m in backbone.modules() if isinstance(m, MODAL)]

    # -- policy --------------------------------------------------------------------------------------------------

    @property
    def policy(self) -> Policy:
        """Who decides. A policy that is a module (an Agent) is registered as the submodule `agent` and moves along."""
        return self._modules.get("agent") or self._policy

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "policy":
            super().__setattr__(name, value)
            return
        for needed in ("start", "act", "needs_features"):
            if not hasattr(value, needed):
                raise TypeError(
                    f"PrunedNetwork.policy: {type(value).__name__} has no `{needed}`; see rnp.policies.Policy"
                )
        self._modules.pop("agent", None)
        self.__dict__["_policy"] = None
        if isinstance(value, nn.Module):
            super().__setattr__("agent", value)
        else:
            self.__dict__["_policy"] = value

    # -- budget --------------------------------------------------------------------------------------------------

    def macs(self, actions: Tensor) -> Tensor:
        """Exact MACs of the backbone for actions (N, L) in 1…k → (N,) int64."""
        return self.counter.count(actions)

    def set_budget(self, penalty_shift: float = 0.0, max_macs: float | None = None) -> None:
        """Δp of RNP for the agent, and a cap on every image's MACs (the policy's own included) as a share of the dense.

        Raises ValueError where `max_macs` is not in (0, 1], or where even action 1 at every decision exceeds it.
        """
        if max_macs is not None:
            if not 0 < max_macs <= 1:
                raise ValueError(f"set_budget: max_macs must lie in (0, 1], got {max_macs}")
            self._allowance(max_macs)
        self.penalty_shift, self.max_macs = float(penalty_shift), max_macs

    def _allowance(self, max_macs: float) -> int:
        """MACs the backbone may spend on an image under the cap."""
        own = getattr(self.policy, "macs_per_image", 0)
        allowance = int(max_macs * self.dense_macs) - own
        if self.counter.cheapest > allowance:
            least = (self.counter.cheapest + own) / self.dense_macs
            raise ValueError(f"set_budget: max_macs {max_macs} is below the least possible here, {least:.4f}")
        return allowance

    # -- mixed actions -------------------------------------------------------------------------------------------

    def forward(self, images: Tensor, return_trace: bool | str = False) -> Any:
        """images (N, C, H, W) → the model's output; with `return_trace` (True or "features") also a
        `rnp.Trace`.

        In eval mode without gradients the flat plan of plan.py runs; otherwise every module, differentiably.
        """
        want_features, traced = return_trace == "features", bool(return_trace)
        policy = self.policy
        if images.dim() != 4:
            raise ValueError(f"PrunedNetwork: images must be (N, C, H, W), got {tuple(images.shape)}")
        if self.training or self._differentiates(images) or any(m.training for m in self._modal):
            decider = Decider(self, images, want_features)
            result = self._differentiable(images.contiguous(memory_format=torch.channels_last), decider)
            return (result, decider.trace()) if traced else result
        operator = operator_for(images)
        segmented = takes_segments(images) and operator is _OPERATOR
        if not segmented:
            images = images.contiguous(memory_format=torch.channels_last)
        agent = agent_arguments(self, images) if segmented and not want_features else None
        if agent is not None:
            plan = self._plan(False, True, agent, traced)
            run = plan.run_segments(images, operator, None, self.penalty_shift)
            result = run.values[plan.output_slot]
            return (result, trace_of(self, plan.actions(run), None)) if traced else result
        if not traced and self.max_macs is None and type(policy) is FullWidth:
            plan, decider = self._plan(full=True, features=False), None
        else:
            plan = self._plan(full=False, features=policy.needs_features or want_features)
            decider = Decider(self, images, want_features)
        if segmented:
            result = plan.run_segments(images, operator, decider, 0.0).values[plan.output_slot]
        else:
            result = plan.run(images, operator, decider)
        return (result, decider.trace()) if traced and decider is not None else result

    def _differentiates(self, images: Tensor) -> bool:
        return torch.is_grad_enabled() and (
            images.requires_grad or any(p.requires_grad for p in self.backbone.parameters())
        )

    def _plan(
        self, full: bool, features: bool, agent: list[tuple[Tensor, ...]] | None = None, traced: bool = False
    ) -> Plan:
        """The plan in use, made again where a parameter, buffer or module has changed."""
        key = (full, features, agent is not None, agent is not None and traced)
        plan = self._plans.get(key)
        if torch.compiler.is_compiling():
            if plan is None:
                raise RuntimeError("PrunedNetwork: run it once in eval mode before torch.compile or torch.export")
            return plan
        if plan is None or plan.agent is not agent or not plan.current():
            plan = PlanBuilder(self, full, features, agent, traced).build()
            self._plans[key] = plan
            if agent is not None:
                self._plan(full, features)  # what torch.compile and torch.export trace
        return plan

    def _packed(self, name: str, conv: nn.Conv2d) -> tuple[Tensor | None, LayerTransforms | None]:
        """A convolution's packed weights, and those for Winograd, shared by all plans; None where there can be none."""
        if not conv.weight.is_cpu:
            return None, None
        kept = self._packs.get(name)
        if kept is None or not kept[0].belongs_to(conv.weight, conv.groups):
            transforms = None
            if LayerTransforms.possible(conv.weight, conv.stride, conv.dilation, conv.groups):
                padding = [0] * 4
                if conv.padding_mode == "zeros":
                    left, right, top, bottom = conv._reversed_padding_repeated_twice
                    padding = [top, bottom, left, right]
                transforms = LayerTransforms(conv.weight, conv.stride, padding, conv.dilation, conv.groups)
            kept = self._packs[name] = (PackedWeight(conv.weight, conv.groups), transforms)
        return kept[0].data, kept[1]

    def train(self, mode: bool = True) -> PrunedNetwork:
        self.refresh()
        return super().train(mode)

    def refresh(self) -> None:
        """Drop what is derived from the parameters: packed and transformed weights, tables.

        Needed only after a change made through `tensor.data` in place, which torch does not count; every other change
        is noticed.
        """
        self._plans, self._packs = {}, {}

    forget_transformed_weight = refresh  # as rnp_kernels.forget_transformed_weights calls it

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_plans": {}, "_packs": {}}

    def _differentiable(self, images: Tensor, decider: Decider) -> Any:
        env: dict[str, Any] = {self._input: images}
        groups: dict[str, Tensor | None] = {self._input: None}
        means: dict[str, Tensor] = {}
        result = None
        for step in self._steps:
            if isinstance(step, g.ConvStep):
                if step.decision is not None and step.decision == len(decider.taken):
                    name = self._states[step.decision]
                    if decider.needs_features and name not in means:
                        means[name] = env[name].detach().mean((2, 3), dtype=torch.float32)
                    decider(step.decision, means.get(name))
                result = self._mixed_conv(step, env, groups, decider.taken)
            elif isinstance(step, g.NormStep):
                group = groups[step.inputs[0]]
                assert group is not None
                x = env[step.inputs[0]]
                result = self.backbone.get_submodule(step.norm)(x, group - 1, self._live(group, x.shape[1]))
                groups[step.output] = group
            elif isinstance(step, g.AddStep):
                result = env[step.inputs[0]] + env[step.inputs[1]]
                groups[step.output] = larger(groups[step.inputs[0]], groups[step.inputs[1]])
            else:
                assert isinstance(step, (g.ChannelwiseStep, g.OpaqueStep))
                result = step.call.run(self.backbone, [env[name] for name in step.inputs], self.training)
                groups[step.output] = groups[step.inputs[0]] if isinstance(step, g.ChannelwiseStep) else None
            env[step.output] = result
        return result

    def _prefix(self, group: Tensor, channels: int) -> Tensor:
        k = self.groups
        return torch.div(group * channels + (k - 1), k, rounding_mode="floor").to(torch.int32)

    def _live(self, group: Tensor, channels: int) -> Tensor:
        return torch.arange(channels, device=group.device) < self._prefix(group, channels)[:, None]

    def _mixed_conv(
        self, step: g.ConvStep, env: dict[str, Any], groups: dict[str, Tensor | None], taken: list[Tensor]
    ) -> Tensor:
        conv = self.backbone.get_submodule(step.conv)
        norm = self.backbone.get_submodule(step.norm) if step.norm else None
        group_in = groups[step.inputs[0]]
        group_out = group_in if step.follows else (taken[step.decision] if step.decision is not None else None)
        in_prefix = None if group_in is None else self._prefix(group_in, conv.in_channels)
        out_prefix = None if group_out is None else self._prefix(group_out, conv.out_channels)
        x, padding = env[step.inputs[0]], conv.padding
        if conv.padding_mode != "zeros":
            x, padding = F.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode), 0
        x = rnp_kernels.prefix_conv2d(
            x, conv.weight, conv.bias, conv.stride, padding, conv.dilation, conv.groups,
            in_prefix=in_prefix, out_prefix=out_prefix,
        )  # fmt: skip
        if isinstance(norm, PrefixBatchNorm2d):
            row = torch.full((x.shape[0],), norm.rows - 1, device=x.device) if group_in is None else group_in - 1
            live = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
            x = norm(x, row, live if group_out is None else self._live(group_out, x.shape[1]))
        elif norm is not None:
            x = norm(x)
        if step.residual:
            x = x + env[step.inputs[1]]
            group_out = larger(group_out, groups[step.inputs[1]])
        groups[step.output] = group_out
        return F.relu(x) if step.relu else x

    # -- one path for the whole batch ----------------------------------------------------------------------------

    def forward_path(self, images: Tensor, path: list[int] | tuple[int, ...]) -> Any:
        """Run every image under the same actions `path` (L ints in 1…k), on physically sliced tensors.

        Differentiable; equal to `forward` under `Fixed(path)`. A BatchNorm in train mode uses batch statistics and
        updates the running statistics of the in-prefix in use, for the channels that are live.
        """
        path = [int(a) for a in path]
        if len(path) != len(self.layers) or not all(1 <= a <= self.groups for a in path):
            raise ValueError(f"forward_path: path must be {len(self.layers)} actions in 1…{self.groups}, got {path}")
        k = self.groups
        env: dict[str, Any] = {self._input: images.contiguous(memory_format=torch.channels_last)}
        group: dict[str, int] = {self._input: k}

        def full(name: str) -> Any:
            x = env[name]
            if group.get(name, k) == k:
                return x
            return pad_channels(x, self._values[name].channels)

        for step in self._steps:
            if isinstance(step, g.ConvStep):
                env[step.output], group[step.output] = self._path_conv(step, env, group, path)
            elif isinstance(step, g.NormStep):
                group[step.output] = group[step.inputs[0]]
                norm = self.backbone.get_submodule(step.norm)
                env[step.output] = norm.forward_slice(env[step.inputs[0]], group[step.inputs[0]] - 1)
            elif isinstance(step, g.AddStep):
                env[step.output] = add_prefix(env[step.inputs[0]], env[step.inputs[1]])
                group[step.output] = max(group[step.inputs[0]], group[step.inputs[1]])
            elif isinstance(step, g.ChannelwiseStep):
                group[step.output] = group[step.inputs[0]]
                env[step.output] = step.call.run(self.backbone, [env[step.inputs[0]]], self.training)
            else:
                assert isinstance(step, g.OpaqueStep)
                inputs = [full(name) for name in step.inputs]
                env[step.output], group[step.output] = step.call.run(self.backbone, inputs, self.training), k
        return env[self._steps[-1].output]

    def _path_conv(
        self, step: g.ConvStep, env: dict[str, Any], group: dict[str, int], path: list[int]
    ) -> tuple[Tensor, int]:
        k = self.groups
        conv = self.backbone.get_submodule(step.conv)
        x, group_in = env[step.inputs[0]], group[step.inputs[0]]
        group_out = group_in if step.follows else (path[step.decision] if step.decision is not None else k)
        live_out = g.prefix_size(group_out, conv.out_channels, k)
        weight, conv_groups = conv.weight, conv.groups
        if step.follows:
            weight, conv_groups = weight[:live_out], live_out
        elif conv_groups > 1:
            x = pad_channels(x, conv.in_channels)
        else:
            weight = weight[:live_out, : x.shape[1]]
        bias = None if conv.bias is None else conv.bias[:live_out]
        padding = conv.padding
        if conv.padding_mode != "zeros":
            x, padding = F.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode), 0
        x = F.conv2d(x, weight, bias, conv.stride, padding, conv.dilation, conv_groups)
        if step.norm is not None:
            norm = self.backbone.get_submodule(step.norm)
            x = norm.forward_slice(x, min(group_in, norm.rows) - 1) if isinstance(norm, PrefixBatchNorm2d) else norm(x)
        if step.residual:
            x = add_prefix(x, env[step.inputs[1]])
            group_out = max(group_out, group[step.inputs[1]])
        return (F.relu(x) if step.relu else x), group_out


def operator_for(images: Tensor) -> Any:
    """torch.ops.rnp.prefix_conv2d, Triton's or the reference, as the backend in force says; same arguments."""
    return {"reference": reference_operator, "triton": TRITON}.get(backends.resolve(images), OPERATOR)


def takes_segments(images: Tensor) -> bool:
    """Whether whole runs of layers may go to one operator: eager, float32, on a CPU, nobody listening in between."""
    return (
        not torch.compiler.is_compiling()
        and images.is_cpu
        and images.dtype is torch.float32
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._is_tracing()
        and not has_torch_function_unary(images)
    )


def agent_arguments(network: PrunedNetwork, images: Tensor) -> list[tuple[Tensor, ...]] | None:
    """What an agent that decides inside the segments hands over; None if it explores, is capped or of another kind."""
    agent = network.policy
    if not isinstance(agent, Agent) or agent.epsilon > 0 or network.max_macs is not None:
        return None
    if type(agent).act is not Agent.act or type(agent).start is not Agent.start:
        return None
    return agent._fused_arguments(images.device)


def reference_operator(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int,
    in_prefix: Tensor | None, out_prefix: Tensor | None, scale: Tensor | None, row: Tensor | None,
    residual: Tensor | None, activation: str, tail: str, pooled: bool, packed: Tensor | None,
    winograd: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    return reference.prefix_conv2d(
        input, weight, bias, stride, padding, dilation, groups, in_prefix=in_prefix, out_prefix=out_prefix, scale=scale,
        row=row, residual=residual, activation=activation, tail=tail, pooled=pooled,
    )  # fmt: skip


def larger(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """The larger of two groups (N,); None is full width."""
    return None if a is None or b is None else torch.maximum(a, b)


def pad_channels(x: Tensor, channels: int) -> Tensor:
    """(N, r, …) → (N, channels, …) with a zero tail."""
    missing = channels - x.shape[1]
    return x if missing == 0 else F.pad(x, (0, 0) * (x.dim() - 2) + (0, missing))


def add_prefix(a: Tensor, b: Tensor) -> Tensor:
    """Sum of two prefixes (N, r, H, W), (N, s, H, W) of one map; the result has max(r, s) channels."""
    if a.shape[1] < b.shape[1]:
        a, b = b, a
    r = b.shape[1]
    return a + b if r == a.shape[1] else torch.cat([a[:, :r] + b, a[:, r:]], 1)
