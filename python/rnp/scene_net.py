"""The demo's network: a VGG-like CNN that reads a scene of two digits; thinner ones of the same form are its rivals."""

from __future__ import annotations

import torch
from torch import Tensor, nn

STEM = 16
WIDTHS: tuple[int | str, ...] = (64, "pool", 128, 128, 128)


class NumberHead(nn.Module):
    """Features (N, C, H, W) → logits (N, 100) of a two-digit number: one linear reading of each half of the scene.

    The logit of the number ab is the left half's for a plus the right half's for b, so the cross-entropy of the number
    is the sum of those of its two digits.
    """

    def __init__(self, channels: int, extent: int) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d((extent, extent // 2))
        self.digits = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        digits = self.digits(self.pool(x).flatten(2).transpose(1, 2))  # (N, 2, 10)
        return (digits[:, 0].unsqueeze(2) + digits[:, 1].unsqueeze(1)).flatten(1)


def scene_net(width: float = 1.0, size: int = 32, widths: tuple[int | str, ...] = WIDTHS) -> nn.Sequential:
    """The network for scenes of size × size pixels, with `width` times the channels behind the first convolution.

    Squares of 2×2 pixels become channels, then come 3×3 convolutions with BatchNorm and ReLU; the heavy ones come late,
    behind the first decisions of an agent.
    """
    layers: list[nn.Module] = [nn.PixelUnshuffle(2)]
    channels, extent = 4, size // 2
    for item in (STEM, *widths):
        if item == "pool":
            layers.append(nn.MaxPool2d(2))
            extent //= 2
            continue
        out = STEM if len(layers) == 1 else max(1, round(int(item) * width))
        layers.append(nn.Conv2d(channels, out, 3, padding=1, bias=False))
        layers += [nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
        channels = out
    return nn.Sequential(*layers, NumberHead(channels, extent)).to(memory_format=torch.channels_last)
