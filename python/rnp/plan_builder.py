"""Builds the plan of a converted network (plan.py): one instruction a layer, with its arguments already in place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rnp_kernels.linear  # registers its operator's fake kernel, as the next one does
import rnp_kernels.max_pool2d

from . import graph as g
from .batchnorm import PrefixBatchNorm2d
from .fold import find_averages, norm_table, tables, zero_tails
from .plan import Plan, Run, Source, watch
from .plan_slots import NOTHING, PlanSlots
from .segments import Constants, Instruction, Native, Slot, Table, Transformed, Written, release

if TYPE_CHECKING:
    from .network import PrunedNetwork

LINEAR = torch.ops.rnp.linear.default
MAX_POOL = torch.ops.rnp.max_pool2d.default


class PlanBuilder(PlanSlots):
    """Builds the plan for mixed actions, or with `full` the one in which every group is k and nobody is asked.

    `features`: the policy wants the pooled features. `agent`: the arguments, layer by layer, of an agent that decides
    inside the segments; `traced` then keeps its actions.
    """

    def __init__(
        self,
        network: PrunedNetwork,
        full: bool,
        features: bool,
        agent: list[tuple[Tensor, ...]] | None = None,
        traced: bool = False,
    ) -> None:
        first = next(network.backbone.parameters())
        native = first.is_cpu and first.dtype is torch.float32  # what the segments' operator takes
        super().__init__(network.groups, full, first.device, native, at_once=not (native or features or full))
        self.network, self.backbone, self.features = network, network.backbone, features and not full
        self.agent, self.traced = agent, traced
        self.steps, self.values = network._steps, network._values
        self.states = [] if not self.features else network._states
        self.averages = find_averages(self.steps, self.backbone)
        self.zero = zero_tails(self.steps, self.states, set(self.averages))
        self.decided = 0
        self.pooled: dict[str, int] = {}
        self.hidden = NOTHING  # the agent's state after the last decision
        self.sources: list[Source] = []

    # -- building ------------------------------------------------------------------------------------------------

    def build(self) -> Plan:
        for step in self.steps:
            if self.is_identity(step):
                self.alias[step.output] = self.root(step.inputs[0])
        last_use = {self.root(name): i for i, step in enumerate(self.steps) for name in step.inputs}
        decisions = len(self.network.layers)
        with torch.no_grad():
            if not self.features:  # a policy that looks at nothing is asked before the first layer
                for decision in range(decisions):
                    self.emit_decision(decision)
            asked = len(self.instructions)
            for i, step in enumerate(self.steps):
                if step.output in self.alias:
                    continue
                if isinstance(step, g.ConvStep):
                    self.emit_conv(step)
                    self.emit_flattened_prefixes()
                elif isinstance(step, g.NormStep):
                    self.emit_norm(step)
                elif isinstance(step, g.AddStep):
                    self.emit_add(step)
                else:
                    assert isinstance(step, (g.ChannelwiseStep, g.OpaqueStep))
                    self.emit_call(step)
                if step.output in self.states and step.output not in self.pooled:
                    self.emit_mean(step.output)
                names = dict.fromkeys(self.root(name) for name in step.inputs)
                self.emit_free([name for name in names if last_use[name] == i])
            actions = [] if self.full else [self.prefix_of[frozenset([d]), None] for d in range(decisions)]
            self.emit_all_prefixes(asked, actions)
        return Plan(
            self.instructions, self.next_value, self.next_prefix, self.slot(self.network._input),
            self.slot(self.steps[-1].output), actions, self.agent, self.traced, self.sources,
        )  # fmt: skip

    def emit_flattened_prefixes(self) -> None:
        """Prefixes that linear layers will read, as soon as they are decided: inside a segment, not behind the last."""
        for step in self.steps:
            if isinstance(step, g.OpaqueStep) and step.channels_of is not None:
                value = self.values[step.channels_of]
                if self.native and value.group is not None and max(value.group) < self.decided:
                    self.prefix_slot(value.group, value.channels)

    def is_identity(self, step: g.Step) -> bool:
        """Dropout, in eval mode, and nn.Identity."""
        if not isinstance(step, (g.ChannelwiseStep, g.OpaqueStep)) or step.call.op != "call_module":
            return False
        if step.call.args != (g.Arg(0),) or step.call.kwargs:
            return False
        module = self.module(step.call.target)
        return type(module) in (nn.Identity, nn.Dropout, nn.Dropout2d) and not g.hooked(module)

    def module(self, name: str) -> nn.Module:
        """The module, whose replacement the plan will notice."""
        owner, _, last = name.rpartition(".")
        registry = self.backbone.get_submodule(owner)._modules
        self.sources.append(Source(registry, last, registry[last]))
        return self.backbone.get_submodule(name)

    def emit_decision(self, decision: int) -> None:
        """Ask for the action, unless that has been done."""
        if self.full or decision < self.decided:
            return
        assert decision == self.decided
        self.decided += 1
        if self.agent is not None:
            self.emit_agent(decision, self.agent[decision])
            return
        target = self.new_prefix((frozenset([decision]), None))
        if not self.features:

            def ask(run: Run) -> None:
                assert run.decide is not None
                run.prefixes[target] = run.decide(decision, None)

            self.emit(ask, [])
            return
        state = self.pooled[self.states[decision]]
        channels = self.network.decision_channels[decision]
        prefix, table = self.new_prefix((frozenset([decision]), channels)), self.prefix_table(channels)

        def decide(run: Run) -> None:
            decider = run.decide
            assert decider is not None
            run.prefixes[target] = action = decider(decision, run.values[state])
            known = decider.out_prefix
            run.prefixes[prefix] = table.index_select(0, action) if known is None else known

        self.emit(decide, [Slot("vector", state)])

    def emit_agent(self, decision: int, arguments: tuple[Tensor, ...]) -> None:
        """A decision of an agent inside a segment. `arguments`: what `agent_step` takes between previous and shift."""
        before = self.prefix_of.get((frozenset([decision - 1]), None), NOTHING)
        target = self.new_prefix((frozenset([decision]), None))
        channels = self.network.decision_channels[decision]
        prefix = self.new_prefix((frozenset([decision]), channels))
        code, size = arguments[2].shape
        columns, hidden = arguments[4].shape[1], arguments[5].shape[1]
        state = Slot("vector", self.pooled[self.states[decision]], size)
        previous = Slot("index", before if columns > code else NOTHING, self.k)
        old, new = Slot("vector", self.hidden, hidden), self.new_value()
        operands: list[Any] = [
            state, old, previous, Written(Slot("vector", new, hidden)), Written(Slot("index", target, self.k)),
            Written(Slot("index", prefix, channels)), Constants(arguments), size, code, hidden, columns, self.k,
            channels,
        ]  # fmt: skip
        self.hidden = new

        def outside(run: Run) -> None:
            raise RuntimeError("PrunedNetwork: this plan runs in segments only")

        self.emit(outside, [state, old, previous], Native("decide", operands))

    def emit_conv(self, step: g.ConvStep) -> None:
        conv = self.module(step.conv)
        norm = self.module(step.norm) if step.norm else None
        assert isinstance(conv, nn.Conv2d)
        if step.decision is not None:
            self.emit_decision(step.decision)
        self.sources += watch(conv)
        if norm is not None:
            self.sources += watch(norm)
        varies = step.in_group is not None and not self.full and isinstance(norm, PrefixBatchNorm2d)
        # A GPU's kernels read tables in float32: in half precision each call would convert them first.
        wide = self.device.type != "cpu" and conv.weight.dtype.itemsize == 2
        scale, bias = tables(conv, norm, varies, torch.float32 if wide else None)
        weight = conv.weight.detach()
        packed, transforms = self.network._packed(step.conv, conv)
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
        mean = NOTHING
        if pooled:
            mean = self.pooled[step.output] = self.new_value()

        def convolve(run: Run) -> None:
            values, prefixes = run.values, run.prefixes
            winograd = None if transforms is None else transforms.get(values[x].shape[2:])
            output = run.operator(
                values[x], weight, bias, stride, padding, dilation, groups, prefixes[in_prefix], prefixes[out_prefix],
                scale, prefixes[row], values[residual], activation, tail, pooled, packed, winograd,
            )  # fmt: skip
            values[y] = output[0]
            if pooled:
                values[mean] = output[1]

        reads = [Slot("map", x), Slot("map", residual), Slot("index", in_prefix, conv.in_channels),
                 Slot("index", out_prefix, conv.out_channels), Slot("index", row, self.k)]  # fmt: skip
        native = None
        # A plain call may take torch's own convolution where that is faster, which the segments' operator never does.
        if packed is not None and packed.is_cpu and (norm is not None or step.relu or step.residual or pooled):
            native = Native("conv", [
                reads[0], reads[1], Written(Slot("map", y)), *reads[2:],
                Written(Slot("vector", mean, conv.out_channels)), Constants([packed]), Transformed(transforms),
                Table(scale), Table(bias),
                self.k + 1 if varies else 0, conv.in_channels, conv.out_channels, groups, *conv.kernel_size, *stride,
                *padding, *dilation, int(step.relu), int(skip),
            ])  # fmt: skip
        self.emit(convolve, reads, native)

    def emit_pad(self, x: int, amounts: list[int], mode: str) -> int:
        y = self.new_value()

        def pad(run: Run) -> None:
            run.values[y] = F.pad(run.values[x], amounts, mode=mode)

        self.emit(pad, [Slot("map", x)])
        return y

    def emit_mean(self, name: str) -> None:
        """The state where no convolution gives it along with its output."""
        x, y = self.slot(name), self.new_value()
        self.pooled[name] = y

        def mean(run: Run) -> None:
            run.values[y] = run.values[x].mean((2, 3), dtype=torch.float32)

        self.emit(mean, [Slot("map", x)])

    def emit_norm(self, step: g.NormStep) -> None:
        norm = self.module(step.norm)
        assert isinstance(norm, PrefixBatchNorm2d)
        self.sources += watch(norm)
        x, y = self.slot(step.inputs[0]), self.slot(step.output)
        scale, shift = norm_table(norm, self.k, step.row_group is not None, step.group is not None)
        full_scale, full_shift = (t[-1, :, None, None].clone() for t in (scale, shift))
        row, group, lines = self.group_slot(step.row_group), self.group_slot(step.group), self.k + 1
        if step.row_group is not None and step.row_group == step.group:
            scale, shift, group = scale[:: lines + 1], shift[:: lines + 1], NOTHING

        def normalise(run: Run) -> None:
            rows, groups = run.prefixes[row], run.prefixes[group]
            line = rows if groups is None else groups if rows is None else torch.add(groups, rows, alpha=lines)
            if line is None:
                run.values[y] = torch.addcmul(full_shift, run.values[x], full_scale)
            else:
                a, b = (t.index_select(0, line)[:, :, None, None] for t in (scale, shift))
                run.values[y] = torch.addcmul(b, run.values[x], a)

        self.emit(normalise, [Slot("map", x), Slot("index", row, self.k), Slot("index", group, self.k)])

    def emit_add(self, step: g.AddStep) -> None:
        a, b, y = (self.map(name) for name in (*step.inputs, step.output))

        def add(run: Run) -> None:
            run.values[y.number] = run.values[a.number] + run.values[b.number]

        self.emit(add, [a, b], Native("add", [a, b, Written(y)]))

    def emit_call(self, step: g.ChannelwiseStep | g.OpaqueStep) -> None:
        if step.output in self.averages:
            self.emit_average(step)
            return
        if self.emit_max_pool(step):
            return
        slots, y, call, backbone = [self.slot(n) for n in step.inputs], self.slot(step.output), step.call, self.backbone
        reads = [Slot("map", slot) for slot in slots]
        if call.op == "call_module" and call.args == (g.Arg(0),) and not call.kwargs:
            module, x = self.module(call.target), slots[0]

            def call_module(run: Run) -> None:
                run.values[y] = module(run.values[x])

            if self.native and type(module) is nn.Linear:
                self.emit_linear(module, x, y, getattr(step, "channels_of", None))
            else:
                self.emit(call_module, reads)
            return

        def execute(run: Run) -> None:
            run.values[y] = call.run(backbone, [run.values[slot] for slot in slots], False)

        self.emit(execute, reads)

    def emit_linear(self, module: nn.Linear, x: int, y: int, channels_of: str | None) -> None:
        """A linear layer; with `channels_of`, only the inputs from the live channels of that value are read."""
        reads, prefix, channel_inputs = [Slot("map", x)], NOTHING, 1
        if channels_of is not None:
            value = self.values[channels_of]
            prefix, channel_inputs = self.prefix_slot(value.group, value.channels), module.in_features // value.channels
            reads.append(Slot("index", prefix, value.channels))

        def linear(run: Run) -> None:
            values = run.values[x]
            if takes_linear(module, values):
                run.values[y] = LINEAR(values, module.weight, module.bias, run.prefixes[prefix], channel_inputs)
            else:
                run.values[y] = module(values)

        self.emit(linear, reads)

    def emit_max_pool(self, step: g.ChannelwiseStep | g.OpaqueStep) -> bool:
        """Max-pooling of the live channels only, where the operator does it: see `rnp_kernels.max_pool2d.takes`."""
        if not isinstance(step, g.ChannelwiseStep) or not rnp_kernels.max_pool2d.runs_on(self.device):
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
            if rnp_kernels.max_pool2d.takes(feature_map):
                run.values[y] = MAX_POOL(feature_map, run.prefixes[prefix], kernel, stride, padding, tail)
            else:
                run.values[y] = pool(feature_map)

        reads = [Slot("map", x), Slot("index", prefix, value.channels)]
        written = Written(Slot("map", y))
        operands = [reads[0], written, reads[1], *kernel, *stride, *padding, int(tail == "skip")]
        self.emit(max_pool, reads, Native("max_pool", operands))
        return True

    def emit_average(self, step: g.Step) -> None:
        """Global average pooling: the convolution before has given the means already."""
        y, mean, keep = self.slot(step.output), self.pooled[step.inputs[0]], self.averages[step.output]
        dtype = next(self.backbone.parameters()).dtype

        def average(run: Run) -> None:
            means = run.values[mean].to(dtype)
            run.values[y] = means[:, :, None, None] if keep else means

        self.emit(average, [Slot("vector", mean)])

    def emit_free(self, names: list[str]) -> None:
        """Let the tensors go after their last use, so that the allocator can give their memory out again."""
        slots = [self.slot(name) for name in names]
        if slots:
            self.instructions.append(Instruction(release(slots), frees=slots))


def takes_linear(module: nn.Linear, x: Tensor) -> bool:
    """Whether `rnp::linear` may stand in for the module: eager float32, and nobody listens to its calls."""
    return (
        x.dim() == 2
        and x.dtype is torch.float32
        and module.weight.dtype is torch.float32
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and not module._forward_hooks
        and not module._forward_pre_hooks
    )
