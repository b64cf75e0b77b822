"""`PrunedNetwork`: a converted CNN whose convolutions run at a width chosen for each sample on its way through."""

from __future__ import annotations

import math
from operator import index
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import has_torch_function_unary

from rnp_kernels import backends, cuda_library, reference
from rnp_kernels.packing import LayerTransforms, PackedWeight
from rnp_kernels.triton.operators import PREFIX_CONV2D as TRITON

from . import graph as g
from . import layerwise
from .actions import check_integers, check_range
from .agent import Agent
from .batchnorm import PrefixBatchNorm2d
from .decider import Decider, trace_of
from .macs import Cap, MacCounter
from .plan import Plan
from .plan_builder import PlanBuilder
from .policies import FullWidth, Policy, check_policy

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
    differentiably, in train mode with the batch statistics of live samples.

    In eval mode a sample's features and actions are the same bits alone and in any batch, as far as this package's
    operators make them. What torch computes in between need not be: element-wise functions through exponentials (SiLU,
    GELU, sigmoid, softmax …) may round the last elements of a tensor otherwise than those before, matrix products,
    attention, bilinear resizing and convolutions that are not followed may sum in another order for another batch, and
    whatever looks at several images at once depends on them, as does a BatchNorm with `track_running_stats=False`.

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
        in_place: list[str],
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
        self._in_place = in_place  # modules whose `inplace` flag the model had on
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
        check_policy(value, self)
        self._modules.pop("agent", None)
        self.__dict__["_policy"] = None
        if isinstance(value, nn.Module):
            super().__setattr__("agent", value)
        else:
            self.__dict__["_policy"] = value

    # -- budget --------------------------------------------------------------------------------------------------

    def macs(self, actions: Tensor) -> Tensor:
        """Exact MACs of the backbone for actions (N, L), integers in 1…k → (N,) int64.

        Raises TypeError for other numbers, ValueError for another shape and, on the CPU, for values out of 1…k.
        """
        if actions.dim() == 2 and actions.shape[1] == len(self.layers):  # else the counter says what is wrong
            check_integers(actions, "macs: actions")
            check_range(actions, self.groups, "macs: actions")
        return self.counter.count(actions)

    def set_budget(self, penalty_shift: float = 0.0, max_macs: float | None = None) -> None:
        """Δp of RNP for the agent, and a cap on every image's MACs (the policy's own included) as a share of the dense.

        Raises ValueError where `penalty_shift` is not finite, where `max_macs` is not in (0, 1], or where even action 1
        at every decision exceeds it. The budget is then as it was.
        """
        if not math.isfinite(penalty_shift):
            raise ValueError(f"set_budget: penalty_shift must be finite, got {penalty_shift}")
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
            result = layerwise.run_mixed(self, images.contiguous(memory_format=torch.channels_last), decider)
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
        if not conv.weight.is_cpu and (
            not conv.weight.is_cuda
            or backends.resolve_on(conv.weight.device) != "cuda"
            or torch.cuda.is_current_stream_capturing()
        ):
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

    def forward_path(self, images: Tensor, path: list[int] | tuple[int, ...]) -> Any:
        """Run every image under the same actions `path` (L ints in 1…k), on physically sliced tensors.

        Differentiable; equal to `forward` under `Fixed(path)`. A BatchNorm in train mode uses batch statistics and
        updates the running statistics of the in-prefix in use, for the channels that are live.
        """
        try:
            path = [index(a) for a in path]
        except TypeError:
            raise TypeError(f"forward_path: path must be integers, got {path}") from None
        if len(path) != len(self.layers) or not all(1 <= a <= self.groups for a in path):
            raise ValueError(f"forward_path: path must be {len(self.layers)} actions in 1…{self.groups}, got {path}")
        return layerwise.run_path(self, images.contiguous(memory_format=torch.channels_last), path)


def operator_for(images: Tensor) -> Any:
    """torch.ops.rnp.prefix_conv2d, Triton's or the reference, as the backend in force says; same arguments."""
    name = backends.resolve(images)
    if name == "cuda" and not torch.compiler.is_compiling():
        cuda_library.follow_tf32()  # as the function in front of the operator would
    return {"reference": reference_operator, "triton": TRITON}.get(name, OPERATOR)


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
