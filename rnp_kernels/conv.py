"""`PrefixConv2d`, a drop-in for `torch.nn.Conv2d`, and `replace_conv2d`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ops import pack_weight, prefix_conv2d


class PrefixConv2d(nn.Conv2d):
    """`nn.Conv2d` whose forward also takes the live input and output channels of each sample."""

    @classmethod
    def from_conv2d(cls, conv: nn.Conv2d) -> PrefixConv2d:
        """A PrefixConv2d that shares the parameters of `conv`."""
        new = cls.__new__(cls)
        nn.Module.__init__(new)
        state = dict(conv.__dict__)
        for registry in ("_parameters", "_buffers", "_modules"):
            state[registry] = dict(state[registry])
        new.__dict__.update(state)
        return new

    def packed_weight(self) -> Tensor | None:
        return pack_weight(self.weight.detach(), self.groups)

    def forward(self, input: Tensor, in_prefix: Tensor | None = None, out_prefix: Tensor | None = None) -> Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        return prefix_conv2d(
            input, self.weight, self.bias, self.stride, padding, self.dilation, self.groups, in_prefix=in_prefix,
            out_prefix=out_prefix,
        )  # fmt: skip


def replace_conv2d(model: nn.Module) -> nn.Module:
    """Swap every `nn.Conv2d` of `model` in place and return the model."""
    if type(model) is nn.Conv2d:
        return PrefixConv2d.from_conv2d(model)
    swapped: dict[nn.Module, PrefixConv2d] = {}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if type(child) is nn.Conv2d:
                if child not in swapped:
                    swapped[child] = PrefixConv2d.from_conv2d(child)
                parent._modules[name] = swapped[child]
    return model
