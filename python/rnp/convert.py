"""`rnp.convert`: turn a trained CNN into a `PrunedNetwork`, and say what was done with each layer and why."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from . import graph as g
from .analysis import Analysis
from .batchnorm import PrefixBatchNorm2d
from .fixed_macs import fixed_macs
from .macs import ConvCost, MacCounter
from .network import PrunedNetwork
from .tracing import Traced, trace


@dataclass
class Row:
    """One line of the report."""

    name: str
    action: str  # pruned, dense, followed, per in-prefix, one set, reads the prefix, ends the prefix or not counted
    reason: str


@dataclass
class Report:
    """What `convert` did with each layer, in the order of the graph. `str(report)` is a table."""

    rows: list[Row] = field(default_factory=list)

    def add(self, name: str, action: str, reason: str) -> None:
        self.rows.append(Row(name, action, reason))

    def __str__(self) -> str:
        wide = [max((len(getattr(row, key)) for row in self.rows), default=0) for key in ("name", "action")]
        return "\n".join(f"{r.name:<{wide[0]}}  {r.action:<{wide[1]}}  {r.reason}" for r in self.rows)


@torch.inference_mode(False)
def convert(model: nn.Module, example_input: Tensor, groups: int = 4) -> PrunedNetwork:
    """Return a `PrunedNetwork` whose convolutions run at a width chosen per sample; `model` is left as it is.

    `example_input` (N, C, H, W) fixes the resolution at which MACs are counted, matrix products and attention included;
    what torch has no formula for is "not counted" in the report. `groups` is k of RNP.md: an action 1…k
    makes ceil(action · C / k) output channels live. The parameters are copied; `network.report` says what became of
    each layer. They can be trained, also where this is called under `torch.inference_mode()`.

    A module that has forward hooks or forward pre-hooks is called as it is, on complete tensors, and stays dense: the
    report says so. Hooks registered later on modules of `network.backbone` are called only where the module itself
    is, not where fused calls have taken the place of convolutions, BatchNorms, activations and pooling.

    Raises ValueError where torch.fx cannot trace the model, where nothing in it can be pruned, where the model itself
    has forward hooks, and where it writes into a tensor in place in a way that has no counterpart which returns a new
    tensor, or that a view taken before would have to show.
    """
    if not isinstance(example_input, Tensor) or example_input.dim() != 4:
        raise ValueError("rnp.convert: example_input must be one tensor (N, C, H, W)")
    if groups < 1:
        raise ValueError(f"rnp.convert: groups must be at least 1, got {groups}")
    if g.hooked(model):
        raise ValueError(
            f"rnp.convert: the model must have no forward hooks of its own, and {type(model).__name__} has: the "
            "network would not call them. Remove them, and register them on the network"
        )
    backbone = copy.deepcopy(model).eval()
    network = Builder(backbone, trace(backbone, example_input), groups).build()
    return network.train(model.training)


class Builder(Analysis):
    """Walks the graph once and collects steps, decisions, MACs and the report."""

    def __init__(self, backbone: nn.Module, traced: Traced, k: int) -> None:
        super().__init__(backbone, traced)
        self.k = k
        self.report = Report()
        self.values: dict[str, g.Value] = {}
        self.steps: list[g.Step] = []
        self.costs: list[ConvCost] = []
        self.fixed_macs = 0
        self.layers: list[str] = []
        self.states: list[str] = []  # the value whose mean is the state of each decision
        self.producer: dict[str, g.Step] = {}
        self.decision_of: dict[fx.Node, int] = {}

    def build(self) -> PrunedNetwork:
        self.blocks = self.find_blocks()
        self.block_decision: dict[int, int] = {}
        chains = self.find_chains()
        inside = {n for chain, _ in chains.values() for n in chain[:-1]}
        for node in self.nodes:
            if node in inside:
                continue
            if node in chains:
                self.emit_conv(*chains[node])
            elif node.op == "placeholder":
                self.values[node.name] = g.Value(node.name, self.shapes.get(node.name))
                if node.users:
                    self.input = node.name
            else:
                self.emit_other(node)
        if not self.layers:
            raise ValueError(f"rnp.convert: no convolution can be pruned.\n{self.report}")
        self.replace_norms()
        counter = MacCounter(self.costs, self.fixed_macs, self.k, len(self.layers))
        return PrunedNetwork(
            self.backbone, self.steps, self.values, self.input, self.layers, self.states, self.k, counter, self.report,
            self.in_place,
        )  # fmt: skip

    def group(self, name: str) -> frozenset[int] | None:
        return self.values[name].group

    def define(self, step: g.Step, group: frozenset[int] | None, row_group: frozenset[int] | None) -> None:
        self.steps.append(step)
        self.producer[step.output] = step
        self.values[step.output] = g.Value(step.output, self.shapes.get(step.output), group, row_group)

    def emit_conv(self, chain: list[fx.Node], step: g.ConvStep) -> None:
        node = chain[0]
        conv = self.module(node)
        assert isinstance(conv, nn.Conv2d)
        step.in_group = self.group(step.inputs[0])
        if node in self.blocks:
            step.decision = self.decide(node)
            step.out_group = frozenset([step.decision])
            members = [n for n in self.blocks if self.blocks[n] == self.blocks[node]]
            why = f"decision {step.decision}" + (" (residual block)" if len(members) > 1 else "")
            self.report.add(node.target, "pruned", why)
        elif self.is_depthwise(node) and step.in_group is not g.FULL:
            step.follows, step.out_group = True, step.in_group
            self.report.add(node.target, "followed", "depthwise: as wide as its input")
        else:
            self.report.add(node.target, "dense", self.dense_reason(node) or "")
        if step.norm is not None:
            self.report_norm(step.norm, step.in_group)
        if step.residual:
            group = join(step.out_group, self.group(step.inputs[1]))
            self.define(step, group, group)
        else:
            self.define(step, step.out_group, step.in_group)
        shape = self.shapes[node.name]
        assert shape is not None
        per_pair = conv.kernel_size[0] * conv.kernel_size[1] * shape[2] * shape[3]
        self.costs.append(
            ConvCost(
                node.target, step.in_group, step.out_group, conv.in_channels, conv.out_channels, conv.groups, per_pair
            )
        )

    def report_norm(self, name: str, group: frozenset[int] | None) -> None:
        if group is g.FULL:
            self.report.add(name, "one set", "BatchNorm behind a full-width input")
        else:
            self.report.add(name, "per in-prefix", f"{self.k} sets of statistics and affine parameters")

    def decide(self, node: fx.Node) -> int:
        """Index of the decision for a convolution; the first of its block creates it."""
        block = self.blocks[node]
        if block not in self.block_decision:
            self.block_decision[block] = len(self.layers)
            members = [n.target for n in self.nodes if self.blocks.get(n) == block]
            self.layers.append(self.unique(common_name(members)))
            self.states.append(self.state_of(node.args[0].name))
        return self.block_decision[block]

    def unique(self, name: str) -> str:
        count = sum(1 for layer in self.layers if layer.split("#")[0] == name)
        return name if count == 0 else f"{name}#{count + 1}"

    def state_of(self, name: str) -> str:
        """Look back through pooling and dropout to the feature map whose mean is the state."""
        step = self.producer.get(name)
        while isinstance(step, g.ChannelwiseStep) and step.looks_through:
            name = step.inputs[0]
            step = self.producer.get(name)
        return name

    def emit_other(self, node: fx.Node) -> None:
        if self.is_sum(node):
            names = [arg.name for arg in node.args]
            group = join(self.group(names[0]), self.group(names[1]))
            self.define(g.AddStep(node.name, names), group, group)
            return
        call, names = g.Call.of(node)
        first = self.values[names[0]] if names else None
        if first is not None and self.is_norm(node) and (first.group, first.row_group) != (g.FULL, g.FULL):
            self.report_norm(node.target, first.row_group)
            step = g.NormStep(node.name, names, node.target, first.group, first.row_group)
            self.define(step, first.group, first.row_group)
            return
        looks_through = g.channelwise(node, self.backbone, self.shapes)
        if first is not None and looks_through is not None:
            step = g.ChannelwiseStep(node.name, names, call, looks_through)
            self.define(step, first.group, first.row_group)
            return
        ended = [name for name in names if self.group(name) is not g.FULL]
        if ended:
            module = self.module(node)
            what = type(module).__name__ if module is not None else getattr(node.target, "__name__", str(node.target))
            what += " with forward hooks" if module is not None and g.hooked(module) else ""
            where = str(node.target) if module is not None else node.name
            self.report.add(where, "ends the prefix", f"{what} reads all channels, tails as zeros")
        source = self.linear_source(node, names)
        if source is None:
            self.count_fixed(node)
        self.define(g.OpaqueStep(node.name, names, call, source), g.FULL, g.FULL)

    def linear_source(self, node: fx.Node, names: list[str]) -> str | None:
        """Of a linear layer on flattened channels that have a prefix: those, counted and reported. Otherwise None."""
        module = self.module(node)
        if type(module) is not nn.Linear or len(names) != 1 or g.hooked(module):
            return None
        source = g.flattened(names[0], self.producer, self.values, self.backbone)
        if source is None or self.group(source) is g.FULL:
            return None
        channels = self.values[source].channels
        positions = module.in_features // channels
        self.costs.append(
            ConvCost(node.target, self.group(source), g.FULL, channels, module.out_features, 1, positions)
        )
        self.report.add(node.target, "reads the prefix", "flattened channels beyond it are skipped")
        return source

    def count_fixed(self, node: fx.Node) -> None:
        """MACs of other linear layers, of convolutions that are not followed and of products that forward() spells."""
        module = self.module(node)
        called = str(node.target) if module is not None else node.name
        unknown = self.counter.without_formula.get(node.name)
        if unknown is not None:
            self.report.add(called, "not counted", f"there is no formula for the MACs of {', '.join(unknown)}")
        macs = fixed_macs(node, module, self.shapes, self.counter.macs)
        if macs == 0:
            return
        # Of what comes from the images, an image's share. The rest is the same for any number of them.
        self.fixed_macs += -(-macs // max(1, self.images)) if node.name in self.dependent else macs
        if isinstance(module, nn.modules.conv._ConvNd):
            self.report.add(called, "dense", self.unfollowed_reason(node, module))
        elif module is None:
            name = getattr(node.target, "__name__", node.target)
            self.report.add(called, "dense", f"a call of {name}() in forward() is not followed")
        elif not isinstance(module, nn.Linear):
            self.report.add(called, "dense", f"{type(module).__name__} is not followed")

    def replace_norms(self) -> None:
        """Give every BatchNorm that meets a varying in-prefix its k sets; one set where only the output varies."""
        rows: dict[str, int] = {}
        for step in self.steps:
            if isinstance(step, g.ConvStep) and step.norm:
                varying_in, varying_out = step.in_group is not g.FULL, step.out_group is not g.FULL
                if varying_in or varying_out:
                    rows[step.norm] = max(rows.get(step.norm, 1), self.k if varying_in else 1)
            if isinstance(step, g.NormStep):
                rows[step.norm] = max(rows.get(step.norm, 1), self.k if step.row_group is not g.FULL else 1)
        for name, count in rows.items():
            norm = self.backbone.get_submodule(name)
            if isinstance(norm, nn.BatchNorm2d):
                new = PrefixBatchNorm2d.from_batchnorm(norm, count)
                for other, module in list(self.backbone.named_modules(remove_duplicate=False)):
                    if module is norm:  # one module under two names stays one module
                        self.backbone.set_submodule(other, new)


def join(a: frozenset[int] | None, b: frozenset[int] | None) -> frozenset[int] | None:
    """The group of a sum: the larger, which is full if either is."""
    return None if a is None or b is None else a | b


def common_name(names: list[str]) -> str:
    """`layer1.0.conv1`, `layer1.0.conv2` → `layer1.0`; one name, or names with nothing in common → the first."""
    parts = [name.split(".") for name in names]
    common = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        common.append(level[0])
    return ".".join(common) or names[0]
