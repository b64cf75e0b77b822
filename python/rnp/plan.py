"""The flat plan a converted network runs in eval mode: a list of small functions around the registered operators.

Everything that does not depend on the images is settled when the plan is built: BatchNorms folded into scale and bias
tables, weights packed, which tails may stay undefined, where prefixes come from, when a tensor is let go. What is left
per layer is one operator call with its arguments already in place.

A value's *group* (N,) int32 1…k is the largest of some decisions' actions; its prefix is ceil(group · C / k). Tables
have a line 0 that is never used, so that a group is at once the `row` of its line.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rnp_kernels.max_pool2d  # noqa: F401 (registers the operator's fake kernel)

from . import graph as g
from .batchnorm import PrefixBatchNorm2d
from .fold import norm_table, tables, zero_tails

if TYPE_CHECKING:
    from .decider import Decider
    from .network import PrunedNetwork

MAX_POOL = torch.ops.rnp.max_pool2d.default
Group = frozenset[int] | None
NOTHING = 0  # slot of `values` and `prefixes` that always holds None


@dataclass
class Run:
    """What one execution of a plan carries along."""

    operator: Callable[..., tuple[Tensor, Tensor]]
    decide: Decider | None
    values: list[Any]
    prefixes: list[Tensor | None]


Instruction = Callable[[Run], None]


@dataclass
class Plan:
    """Instructions, and what they were made from: (registry, name, module or tensor, address, version) each."""

    instructions: list[Instruction]
    value_slots: int
    prefix_slots: int
    input_slot: int
    output_slot: int
    sources: list[tuple[dict[str, Any], str, Any, int, int]] = field(default_factory=list)

    def current(self) -> bool:
        """Whether every module, tensor, storage and version is still the one the plan was made from."""
        for registry, name, tensor, pointer, version in self.sources:
            now = registry.get(name)
            if now is not tensor or (pointer and (now.data_ptr() != pointer or _version(now) != version)):
                return False
        return True

    def run(self, images: Tensor, operator: Callable[..., Any], decide: Decider | None) -> Any:
        values: list[Any] = [None] * self.value_slots
        values[self.input_slot] = images
        run = Run(operator, decide, values, [None] * self.prefix_slots)
        if torch.compiler.is_compiling():
            for instruction in self.instructions:
                instruction(run)
        else:
            with torch._C._AutoDispatchBelowAutograd():  # autograd's Python layer costs more than a small convolution
                for instruction in self.instructions:
                    instruction(run)
        return values[self.output_slot]


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


class PlanBuilder:
    """Builds the plan for mixed actions, or with `full` the one in which every group is k and nobody is asked."""

    def __init__(self, network: PrunedNetwork, full: bool, features: bool) -> None:
        self.network, self.full, self.features = network, full, features and not full
        self.backbone, self.k = network.backbone, network.groups
        self.steps, self.values = network._steps, network._values
        self.states = [] if not self.features else network._states
        self.averages = self.find_averages()
        self.zero = zero_tails(self.steps, self.states, set(self.averages))
        self.slots: dict[str, int] = {}
        self.prefix_of: dict[tuple[frozenset[int], int | None], int] = {}
        self.instructions: list[Instruction] = []
        self.decided = 0
        self.pooled: dict[str, int] = {}
        self.next_value = self.next_prefix = 1
        self.sources: list[tuple[dict[str, Any], str, Any, int, int]] = []

    def find_averages(self) -> dict[str, bool]:
        """Global average pools that a convolution's pooled output replaces, and whether each keeps two dimensions of 1.

        That output is float32: not for float64.
        """
        convs = {step.output: step for step in self.steps if isinstance(step, g.ConvStep)}
        found: dict[str, bool] = {}
        for step in self.steps:
            if not isinstance(step, (g.ChannelwiseStep, g.OpaqueStep)) or len(step.inputs) != 1:
                continue
            conv = convs.get(step.inputs[0])
            if conv is None or self.backbone.get_submodule(conv.conv).weight.dtype is torch.float64:
                continue
            keep = g.is_global_mean(step.call)
            if step.call.op == "call_module":
                pool = self.backbone.get_submodule(step.call.target)
                keep = (type(pool) is nn.AdaptiveAvgPool2d and pool.output_size in (1, (1, 1), [1, 1])) or None
            if keep is not None:
                found[step.output] = keep
        return found

    # -- slots ---------------------------------------------------------------------------------------------------

    def slot(self, name: str) -> int:
        if name not in self.slots:
            self.slots[name] = self.next_value
            self.next_value += 1
        return self.slots[name]

    def group_slot(self, group: Group) -> int:
        """Slot of the group's tensor (N,) 1…k; emits the maximum that makes it, once."""
        if group is None or self.full:
            return NOTHING
        key = (group, None)
        if key not in self.prefix_of:
            # Reuse the largest maximum there is: the group of a residual stream grows by one decision at a time.
            known = [have for have, channels in self.prefix_of if channels is None and have < group]
            first = max(known, key=len)
            rest = self.group_slot(group - first)
            a, target = self.prefix_of[first, None], self.new_prefix(key)

            def maximum(run: Run) -> None:
                run.prefixes[target] = torch.maximum(run.prefixes[a], run.prefixes[rest])

            self.instructions.append(maximum)
        return self.prefix_of[key]

    def prefix_slot(self, group: Group, channels: int) -> int:
        """Slot of the prefix (N,) int32 for a map of `channels`; emits the look-up that makes it, once."""
        if group is None or self.full:
            return NOTHING
        key = (group, channels)
        if key not in self.prefix_of:
            source, target = self.group_slot(group), self.new_prefix(key)
            table = self.prefix_table(channels)

            def look_up(run: Run) -> None:
                run.prefixes[target] = table.index_select(0, run.prefixes[source])

            self.instructions.append(look_up)
        return self.prefix_of[key]

    def prefix_table(self, channels: int) -> Tensor:
        """Group 0…k → live channels (k + 1,) int32."""
        sizes = [0] + [g.prefix_size(a, channels, self.k) for a in range(1, self.k + 1)]
        return torch.tensor(sizes, dtype=torch.int32, device=self.device)

    def new_prefix(self, key: tuple[frozenset[int], int | None]) -> int:
        self.prefix_of[key] = self.next_prefix
        self.next_prefix += 1
        return self.prefix_of[key]

    # -- building ------------------------------------------------------------------------------------------------

    def build(self) -> Plan:
        self.device = next(self.backbone.parameters()).device
        last_use = {name: i for i, step in enumerate(self.steps) for name in step.inputs}
        with torch.no_grad():
            for i, step in enumerate(self.steps):
                if isinstance(step, g.ConvStep):
                    self.emit_conv(step)
                elif isinstance(step, g.NormStep):
                    self.emit_norm(step)
                elif isinstance(step, g.AddStep):
                    self.emit_add(step)
                else:
                    assert isinstance(step, (g.ChannelwiseStep, g.OpaqueStep))
                    self.emit_call(step)
                if step.output in self.states and step.output not in self.pooled:
                    self.emit_mean(step.output)
                self.emit_free([name for name in dict.fromkeys(step.inputs) if last_use[name] == i])
        plan = Plan(
            self.instructions, self.next_value, self.next_prefix, self.slot(self.network._input),
            self.slot(self.steps[-1].output), self.sources,
        )  # fmt: skip
        return plan

    def module(self, name: str) -> nn.Module:
        """The module, whose replacement the plan will notice."""
        owner, _, last = name.rpartition(".")
        registry = self.backbone.get_submodule(owner)._modules
        self.sources.append((registry, last, registry[last], 0, 0))
        return self.backbone.get_submodule(name)

    def watch(self, module: nn.Module) -> None:
        """Let the plan notice a change of the module's parameters or buffers."""
        for registry in (module._parameters, module._buffers):
            for name, t in registry.items():
                if name == "num_batches_tracked":
                    continue
                self.sources.append(
                    (registry, name, t, 0 if t is None else t.data_ptr(), 0 if t is None else _version(t))
                )

    def emit_decision(self, decision: int) -> None:
        """Ask for the action, unless that has been done."""
        if self.full or decision < self.decided:
            return
        assert decision == self.decided
        self.decided += 1
        target = self.new_prefix((frozenset([decision]), None))
        state = self.pooled[self.states[decision]] if self.features else NOTHING

        channels = self.network.decision_channels[decision]
        prefix, table = self.new_prefix((frozenset([decision]), channels)), self.prefix_table(channels)

        def decide(run: Run) -> None:
            decider = run.decide
            assert decider is not None
            run.prefixes[target] = action = decider(decision, run.values[state])
            known = decider.out_prefix
            run.prefixes[prefix] = table.index_select(0, action) if known is None else known

        self.instructions.append(decide)

    def emit_conv(self, step: g.ConvStep) -> None:
        conv = self.module(step.conv)
        norm = self.module(step.norm) if step.norm else None
        assert isinstance(conv, nn.Conv2d)
        if step.decision is not None:
            self.emit_decision(step.decision)
        self.watch(conv)
        if norm is not None:
            self.watch(norm)
        varies = step.in_group is not None and not self.full and isinstance(norm, PrefixBatchNorm2d)
        scale, bias = tables(conv, norm, varies, self.k)
        weight = conv.weight.detach()
        packed = torch.ops.rnp.pack_weight(weight, conv.groups) if weight.device.type == "cpu" else None
        x, y = self.slot(step.inputs[0]), self.slot(step.output)
        in_prefix = self.prefix_slot(step.in_group, conv.in_channels)
        out_prefix = self.prefix_slot(step.out_group, conv.out_channels)
        row = self.group_slot(step.in_group) if varies else NOTHING
        residual = self.slot(step.inputs[1]) if step.residual else NOTHING
        activation = "relu" if step.relu else "none"
        skip = out_prefix != NOTHING and not step.residual and step.output not in self.zero
        tail = "skip" if skip else "zero"
        averaged = any(s.output in self.averages and s.inputs[0] == step.output for s in self.steps)
        pooled = step.output in self.states or averaged
        stride, dilation, groups = list(conv.stride), list(conv.dilation), conv.groups
        left, right, top, bottom = conv._reversed_padding_repeated_twice
        padding = [top, bottom, left, right]
        if conv.padding_mode != "zeros":
            x = self.emit_pad(x, conv._reversed_padding_repeated_twice, conv.padding_mode)
            padding = [0, 0, 0, 0]
        mean = self.new_state(step.output) if pooled else NOTHING

        def convolve(run: Run) -> None:
            values, prefixes = run.values, run.prefixes
            output = run.operator(
                values[x], weight, bias, stride, padding, dilation, groups, prefixes[in_prefix], prefixes[out_prefix],
                scale, prefixes[row], values[residual], activation, tail, pooled, packed,
            )  # fmt: skip
            values[y] = output[0]
            if pooled:
                values[mean] = output[1]

        self.instructions.append(convolve)

    def new_state(self, name: str) -> int:
        self.pooled[name] = self.next_value
        self.next_value += 1
        return self.pooled[name]

    def emit_pad(self, x: int, amounts: list[int], mode: str) -> int:
        y = self.next_value
        self.next_value += 1

        def pad(run: Run) -> None:
            run.values[y] = F.pad(run.values[x], amounts, mode=mode)

        self.instructions.append(pad)
        return y

    def emit_mean(self, name: str) -> None:
        """The state where no convolution gives it along with its output."""
        x, y = self.slot(name), self.new_state(name)

        def mean(run: Run) -> None:
            run.values[y] = run.values[x].mean((2, 3), dtype=torch.float32)

        self.instructions.append(mean)

    def emit_norm(self, step: g.NormStep) -> None:
        norm = self.module(step.norm)
        assert isinstance(norm, PrefixBatchNorm2d)
        self.watch(norm)
        x, y = self.slot(step.inputs[0]), self.slot(step.output)
        scale, shift = norm_table(norm, self.k)
        group = self.group_slot(self.values[step.inputs[0]].group)
        full_scale, full_shift = (t[-1, :, None, None].clone() for t in (scale, shift))

        def normalise(run: Run) -> None:
            row = run.prefixes[group]
            if row is None:
                run.values[y] = torch.addcmul(full_shift, run.values[x], full_scale)
            else:
                a, b = (t.index_select(0, row)[:, :, None, None] for t in (scale, shift))
                run.values[y] = torch.addcmul(b, run.values[x], a)

        self.instructions.append(normalise)

    def emit_add(self, step: g.AddStep) -> None:
        a, b, y = self.slot(step.inputs[0]), self.slot(step.inputs[1]), self.slot(step.output)

        def add(run: Run) -> None:
            run.values[y] = run.values[a] + run.values[b]

        self.instructions.append(add)

    def emit_call(self, step: g.ChannelwiseStep | g.OpaqueStep) -> None:
        if step.output in self.averages:
            self.emit_average(step)
            return
        if self.emit_max_pool(step):
            return
        slots, y, call, backbone = [self.slot(n) for n in step.inputs], self.slot(step.output), step.call, self.backbone
        if call.op == "call_module" and call.args == (g.Arg(0),) and not call.kwargs:
            module, x = self.module(call.target), slots[0]

            def call_module(run: Run) -> None:
                run.values[y] = module(run.values[x])

            self.instructions.append(call_module)
            return

        def execute(run: Run) -> None:
            run.values[y] = call.run(backbone, [run.values[slot] for slot in slots], False)

        self.instructions.append(execute)

    def emit_max_pool(self, step: g.ChannelwiseStep | g.OpaqueStep) -> bool:
        """Max-pooling of the live channels only, where the operator does it: float32 on a CPU."""
        if not isinstance(step, g.ChannelwiseStep) or self.device.type != "cpu":
            return False
        pool = self.module(step.call.target) if step.call.op == "call_module" else step.call.as_max_pool()
        if type(pool) is not nn.MaxPool2d or pool.ceil_mode or g.pair(pool.dilation) != [1, 1]:
            return False
        kernel, padding = g.pair(pool.kernel_size), g.pair(pool.padding)
        stride = g.pair(pool.stride)
        x, y = self.slot(step.inputs[0]), self.slot(step.output)
        value = self.values[step.inputs[0]]
        prefix = self.prefix_slot(value.group, value.channels)
        tail = "zero" if step.output in self.zero else "skip"

        def max_pool(run: Run) -> None:
            feature_map = run.values[x]
            if feature_map.dtype is torch.float32:
                run.values[y] = MAX_POOL(feature_map, run.prefixes[prefix], kernel, stride, padding, tail)
            else:
                run.values[y] = pool(feature_map)

        self.instructions.append(max_pool)
        return True

    def emit_average(self, step: g.Step) -> None:
        """Global average pooling: the convolution before has given the means already."""
        x, y, mean = self.slot(step.inputs[0]), self.slot(step.output), self.pooled[step.inputs[0]]
        keep = self.averages[step.output]

        def average(run: Run) -> None:
            means = run.values[mean].to(run.values[x].dtype)
            run.values[y] = means[:, :, None, None] if keep else means

        self.instructions.append(average)

    def emit_free(self, names: list[str]) -> None:
        """Let the tensors go after their last use, so that the allocator can give their memory out again."""
        slots = [self.slot(name) for name in names]
        if not slots:
            return

        def free(run: Run) -> None:
            for slot in slots:
                run.values[slot] = None

        self.instructions.append(free)
