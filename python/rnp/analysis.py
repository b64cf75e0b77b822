"""What the nodes of a traced CNN (tracing.py) are, before any step is made: convolutions, blocks, fused chains."""

from __future__ import annotations

from torch import fx, nn

from . import graph as g
from .fixed_macs import FUNCTIONS
from .tracing import Traced


class Analysis:
    """Questions about the traced graph of `backbone`."""

    def __init__(self, backbone: nn.Module, traced: Traced) -> None:
        self.backbone, self.shapes, self.batched = backbone, traced.shapes, traced.batched
        self.images, self.in_place = traced.images, traced.in_place
        self.dependent, self.counter = traced.dependent, traced.counter
        self.nodes = list(traced.graph.nodes)
        self.position = {node: i for i, node in enumerate(self.nodes)}

    def module(self, node: fx.Node) -> nn.Module | None:
        return self.backbone.get_submodule(node.target) if node.op == "call_module" else None

    def is_conv(self, node: fx.Node) -> bool:
        """A 2-D convolution whose forward is Conv2d's own, over maps of which each image has one."""
        module = self.module(node)
        if not isinstance(module, nn.Conv2d) or len(node.args) != 1 or node.kwargs:
            return False
        plain = type(module).forward is nn.Conv2d.forward or type(module).__name__ == "PrefixConv2d"
        source = node.args[0]
        if not plain or g.hooked(module) or not isinstance(source, fx.Node) or source.name not in self.batched:
            return False
        shape = self.shapes[source.name]
        return shape is not None and len(shape) == 4

    def is_norm(self, node: fx.Node) -> bool:
        module = self.module(node)
        return type(module) is nn.BatchNorm2d and module.running_mean is not None and not g.hooked(module)

    def is_depthwise(self, node: fx.Node) -> bool:
        conv = self.module(node)
        return isinstance(conv, nn.Conv2d) and conv.groups == conv.in_channels == conv.out_channels > 1

    def is_sum(self, node: fx.Node) -> bool:
        """The sum of two different feature maps."""
        return g.is_add(node, self.shapes, self.batched) and node.args[0] is not node.args[1]

    def dense_reason(self, node: fx.Node) -> str | None:
        """Why a convolution's output stays dense, or None."""
        conv = self.module(node)
        assert isinstance(conv, nn.Conv2d)
        if not self.has_convolution(node.args[0]):
            return "first convolution: no state before it"
        if conv.groups > 1:
            return f"grouped convolution (groups={conv.groups}): reads the prefix, writes all channels"
        if conv.out_channels == 1:
            return "one output channel"
        if self.reaches_output(node):
            return "its channels are the network's output"
        return None

    def unfollowed_reason(self, node: fx.Node, module: nn.Module) -> str:
        """Why a convolution runs as it is, outside of all prefixes."""
        if g.hooked(module):
            return "has forward hooks, so it is called itself"
        if node.args and isinstance(node.args[0], fx.Node) and node.args[0].name not in self.batched:
            return "its batch is not that of the images"
        return f"{type(module).__name__} is not followed"

    def has_convolution(self, node: fx.Node) -> bool:
        """Whether a convolution lies before (or at) `node`."""
        return any(isinstance(self.module(n), nn.modules.conv._ConvNd) for n in self.ancestors(node))

    def ancestors(self, node: fx.Node) -> set[fx.Node]:
        seen, stack = set(), [node]
        while stack:
            n = stack.pop()
            if n not in seen:
                seen.add(n)
                stack.extend(n.all_input_nodes)
        return seen

    def reaches_output(self, node: fx.Node) -> bool:
        """Whether the output is reached with nothing in between that mixes channels: a convolution that is not
        depthwise, or a linear layer."""
        seen, stack = set(), list(node.users)
        while stack:
            n = stack.pop()
            if n in seen:
                continue
            seen.add(n)
            if n.op == "output":
                return True
            mixes = isinstance(self.module(n), (nn.modules.conv._ConvNd, nn.Linear)) and not self.is_depthwise(n)
            if not mixes and not (n.op == "call_function" and n.target in FUNCTIONS):
                stack.extend(n.users)
        return False

    def find_blocks(self) -> dict[fx.Node, int]:
        """Prunable convolution → block. The convolutions on the branches that meet in one add share a block."""
        block: dict[fx.Node, int] = {}
        adds = [n for n in self.nodes if g.is_add(n, self.shapes, self.batched)]
        of_add: dict[fx.Node, int] = {}
        for add in adds:
            a, b = (self.ancestors(arg) for arg in add.args)
            inner = [arg for arg in add.args if arg in of_add and len(arg.users) == 1]  # x + f(x) + g(x): one block
            of_add[add] = of_add[inner[0]] if inner else len(of_add)
            for n in a ^ b:
                if self.is_conv(n) and n not in block and self.dense_reason(n) is None:
                    block[n] = of_add[add]
        for n in self.nodes:
            if self.is_conv(n) and n not in block and self.dense_reason(n) is None:
                block[n] = len(adds) + self.position[n]
        return block

    def find_chains(self) -> dict[fx.Node, tuple[list[fx.Node], g.ConvStep]]:
        """Last node of each fused chain → (nodes of the chain, its step). Later convolutions claim an add first."""
        chains: dict[fx.Node, tuple[list[fx.Node], g.ConvStep]] = {}
        taken: set[fx.Node] = set()
        for conv in reversed([n for n in self.nodes if self.is_conv(n)]):
            step = g.ConvStep(output="", inputs=[conv.args[0].name], conv=conv.target, conv_node=conv.name)
            chain = [conv]
            user = self.only_user(conv)
            if user is not None and self.is_norm(user):
                step.norm = user.target
                chain.append(user)
                user = self.only_user(user)
            if user is not None and user not in taken and self.is_sum(user):
                other = user.args[1] if user.args[0] is chain[-1] else user.args[0]
                step.residual = True
                step.inputs.append(other.name)
                taken.add(user)
                chain.append(user)
                user = self.only_user(user)
            if user is not None and g.is_relu(user, self.backbone):
                step.relu = True
                chain.append(user)
            step.output = chain[-1].name
            chains[chain[-1]] = (chain, step)
        return chains

    @staticmethod
    def only_user(node: fx.Node) -> fx.Node | None:
        return next(iter(node.users)) if len(node.users) == 1 else None
