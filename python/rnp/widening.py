"""Growth (*ours*): full width made to compute what a narrower uniform width computes, as the start for training it.

What the new channels give to live ones becomes 0, at one place each, so that gradients reach both sides of it:

- a convolution's or linear layer's weights from new input channels into live outputs; the weights of new outputs keep
  their initial values;
- a new channel that a sum adds to a live one of the other map: scale and shift of its BatchNorm, or the weights and
  bias of its convolution where it has none.

So the output stays the same to rounding. It may change where new channels reach live ones in another way:

- a difference of maps, a sum that is no plain `+`, or one of concatenated maps;
- a BatchNorm behind a concatenation, or an activation with f(0) ≠ 0: they made a constant of what was not computed;
- normalisation, softmax or attention over channels, and linear layers over maps that are not flattened;
- a convolution that is called several times, at full width and at others;
- weights that are parametrized, or that forward() takes itself.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rnp import graph as g
from rnp.batchnorm import PrefixBatchNorm2d
from rnp.network import PrunedNetwork

CONVOLUTION, TRANSPOSED = nn.modules.conv._ConvNd, nn.modules.conv._ConvTransposeNd


def widen(network: PrunedNetwork, action: int, images: Tensor, labels: Tensor) -> None:
    """Make full width compute what the uniform ``action`` computes.

    BatchNorm of every wider in-prefix takes over the set of this one. Which channels are live follows from the action.
    Behind a concatenation and the like they are no prefix: there the gradient of this one batch tells, since weights
    from what was not computed have none.
    """
    network.zero_grad(set_to_none=True)
    logits = network.forward_path(images, [action] * len(network.layers))
    F.cross_entropy(logits.float(), labels).backward()
    with torch.no_grad():
        for module in network.backbone.modules():
            if isinstance(module, PrefixBatchNorm2d):
                for tensor in (module.weight, module.bias, *module.buffers(recurse=False)):
                    if tensor is not None and len(tensor) > action:  # one set where the in-prefix never changes
                        tensor[action:] = tensor[action - 1].clone()
        widening = Widening(network, action)
        widening.cut()
        widening.silence_sums()
    network.zero_grad(set_to_none=True)


class Widening:
    """Walks the steps of a network after a backward pass at the uniform `action`."""

    def __init__(self, network: PrunedNetwork, action: int) -> None:
        self.backbone, self.steps, self.values = network.backbone, network._steps, network._values
        self.action, self.k = action, network.groups
        self.producer = {step.output: step for step in self.steps}

    def live(self, group: frozenset[int] | None, channels: int) -> int:
        """How many channels the action made live."""
        return channels if group is None else g.prefix_size(self.action, channels, self.k)

    def live_of(self, name: str) -> int:
        return self.live(self.values[name].group, self.values[name].channels)

    # -- weights from new channels -------------------------------------------------------------------------------

    def cut(self) -> None:
        """Zero the weights from new input channels into live outputs."""
        scattered: set[str] = set()  # values whose live channels are no prefix
        for step in self.steps:
            module = None
            if isinstance(step, g.ConvStep):
                module = self.backbone.get_submodule(step.conv)
            elif isinstance(step, g.OpaqueStep) and step.call.op == "call_module":
                module = self.backbone.get_submodule(step.call.target)
            layer = isinstance(module, (nn.Linear, CONVOLUTION))
            unknown = any(name in scattered for name in (step.inputs[:1] if layer else step.inputs))
            narrow = isinstance(step, g.OpaqueStep) and any(self.values[n].group is not None for n in step.inputs)
            if layer and module.weight.grad is not None:
                self.cut_layer(step, module, unknown or narrow)
            carried = step.inputs[1:] if layer else step.inputs
            if any(name in scattered for name in carried) or (narrow and not layer):
                scattered.add(step.output)

    def cut_layer(self, step: g.Step, module: nn.Module, unknown: bool) -> None:
        weight, groups = module.weight, getattr(module, "groups", 1)
        if isinstance(module, TRANSPOSED):  # (in, out / groups, …)
            if unknown:
                weight[(weight.grad == 0).flatten(1).all(1)] = 0
            return
        outputs, inputs = weight.shape[0], weight.shape[1] * groups
        new = torch.zeros(inputs, dtype=torch.bool, device=weight.device)
        known = step.channels_of if isinstance(step, g.OpaqueStep) else step.inputs[0]
        live_outputs = outputs
        if isinstance(step, g.ConvStep):
            live_outputs = self.live(step.out_group, outputs)
        if known is not None and self.values[known].group is not None:
            positions = inputs // self.values[known].channels  # of each channel, where they are flattened
            new[self.live_of(known) * positions :] = True
        elif unknown:
            used = (weight.grad != 0).flatten(2).any(2) if weight.dim() > 2 else weight.grad != 0
            new = ~used.view(groups, outputs // groups, -1).any(1).flatten()
        into = new.view(groups, -1).repeat_interleave(outputs // groups, 0)  # (out, in / groups)
        into[live_outputs:] = False
        weight[into] = 0

    # -- new channels that are added to live ones ----------------------------------------------------------------

    def silence_sums(self) -> None:
        for step in self.steps:
            if isinstance(step, g.AddStep):
                a, b = (self.live_of(name) for name in step.inputs)
                self.silence(step.inputs[0], a, b)
                self.silence(step.inputs[1], b, a)
            elif isinstance(step, g.ConvStep) and step.residual:
                a = self.live(step.out_group, self.values[step.output].channels)
                b = self.live_of(step.inputs[1])
                self.silence_conv(step, a, b)
                self.silence(step.inputs[1], b, a)

    def silence(self, name: str, first: int, last: int) -> None:
        """Make the channels first … last − 1 of a value 0, none of which is live."""
        step = self.producer.get(name)
        if first >= last or step is None:
            return
        if isinstance(step, g.ConvStep):
            self.silence_conv(step, first, last)
            if step.residual:
                self.silence(step.inputs[1], first, last)
        elif isinstance(step, g.NormStep):
            if not self.silence_norm(step.norm, first, last):
                self.silence(step.inputs[0], first, last)
        elif isinstance(step, (g.AddStep, g.ChannelwiseStep)):
            for before in step.inputs:
                self.silence(before, first, last)

    def silence_conv(self, step: g.ConvStep, first: int, last: int) -> None:
        """The same for a convolution and its BatchNorm, without its residual."""
        if first >= last or (step.norm is not None and self.silence_norm(step.norm, first, last)):
            return
        conv = self.backbone.get_submodule(step.conv)
        conv.weight[first:last] = 0
        if conv.bias is not None:
            conv.bias[first:last] = 0

    def silence_norm(self, name: str, first: int, last: int) -> bool:
        """The same for a BatchNorm. False: without scale and shift it passes on 0 for an input of 0, no more."""
        norm = self.backbone.get_submodule(name)
        if norm.weight is None:
            norm.running_mean[..., first:last] = 0
            return False
        norm.weight[..., first:last] = 0
        norm.bias[..., first:last] = 0
        return True
