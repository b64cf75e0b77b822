"""The convolutions that are measured: layers of VGG-16 and ResNet-18/50, and shapes that are hard for other reasons."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from rnp_kernels import _C

GROUPS = 4  # of mixed batches: actions 1…4 of 4 groups


@dataclass(frozen=True)
class Layer:
    """A square convolution: ``c_in`` channels of ``size`` × ``size`` pixels, padding kernel // 2, no bias."""

    name: str
    c_in: int
    size: int
    c_out: int
    kernel: int
    stride: int = 1
    groups: int = 1

    @property
    def padding(self) -> int:
        return self.kernel // 2

    @property
    def out_size(self) -> int:
        return (self.size + 2 * self.padding - self.kernel) // self.stride + 1

    @property
    def shape(self) -> str:
        """The layer in a few letters, as tables show it."""
        return f"{self.c_in}x{self.size}->{self.c_out} k{self.kernel}s{self.stride}g{self.groups}"

    def valid_macs(self) -> int:
        """MACs of one image at full width, taps in the padding left out."""
        taps = sum(
            0 <= o * self.stride - self.padding + k < self.size
            for o in range(self.out_size)
            for k in range(self.kernel)
        )
        return self.c_in // self.groups * self.c_out * taps * taps

    def bytes(self, batch: int, itemsize: int = 4) -> int:
        """Bytes that a call must move at full width: input, weight and output once."""
        pixels = batch * (self.c_in * self.size**2 + self.c_out * self.out_size**2)
        return itemsize * (pixels + self.c_in // self.groups * self.c_out * self.kernel**2)

    def tensors(self, batch: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Random input (N, C, H, W), channels_last, and weight; never zeros."""
        generator = torch.Generator().manual_seed(seed)
        fan_in = self.c_in // self.groups * self.kernel**2
        x = torch.randn(batch, self.c_in, self.size, self.size, generator=generator)
        w = torch.randn(self.c_out, self.c_in // self.groups, self.kernel, self.kernel, generator=generator)
        return x.to(dtype).contiguous(memory_format=torch.channels_last), (w / fan_in**0.5).to(dtype)

    def widths(self, batch: int, seed: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
        """(in_prefix, out_prefix) of every eighth below 1 (a layer of few channels: rounded up); from batch 2 also of
        mixed batches, in quarters:

        ``mixed``: widths drawn at random; ``skewed``: three samples in four at 1/4, the others full; ``outlier``: one
        sample full, the others at 1/4. An input of fewer than 4 channels stays whole.
        """

        def channels(eighths: Tensor, count: int) -> Tensor:
            return -(-eighths * count // 8) if count >= GROUPS else torch.full_like(eighths, count)

        chosen = {str(Fraction(a, 8)): (torch.full((batch,), a), torch.full((batch,), a)) for a in range(7, 0, -1)}
        if batch > 1:
            draw = torch.randint(1, GROUPS + 1, (2, batch), generator=torch.Generator().manual_seed(seed))
            skewed, outlier = torch.ones(2, batch, dtype=torch.int64)
            skewed[::4], outlier[batch // 2] = GROUPS, GROUPS
            quarters = {"mixed": (draw[0], draw[1]), "skewed": (skewed, skewed), "outlier": (outlier, outlier)}
            chosen |= {k: (2 * i, 2 * o) for k, (i, o) in quarters.items()}
        return {k: (channels(i, self.c_in).int(), channels(o, self.c_out).int()) for k, (i, o) in chosen.items()}

    def theory(self, in_prefix: Tensor, out_prefix: Tensor) -> float:
        """Dense MACs ÷ MACs of these prefixes."""
        macs = _C.macs(
            in_prefix.tolist(), out_prefix.tolist(), in_channels=self.c_in, out_channels=self.c_out,
            kernel_size=(1, 1), output_size=(1, 1), groups=self.groups,
        )  # fmt: skip
        return len(macs) * self.c_in * self.c_out / self.groups / max(1, sum(macs))


LAYERS = [
    Layer("vgg1_1", 3, 224, 64, 3),
    Layer("vgg1_2", 64, 224, 64, 3),
    Layer("vgg2_1", 64, 112, 128, 3),
    Layer("vgg2_2", 128, 112, 128, 3),
    Layer("vgg3_1", 128, 56, 256, 3),
    Layer("vgg3_2", 256, 56, 256, 3),
    Layer("vgg4_1", 256, 28, 512, 3),
    Layer("vgg4_2", 512, 28, 512, 3),
    Layer("vgg5", 512, 14, 512, 3),
    Layer("stem", 3, 224, 64, 7, 2),
    Layer("r1_3x3", 64, 56, 64, 3),
    Layer("r2_3x3s2", 64, 56, 128, 3, 2),
    Layer("r2_3x3", 128, 28, 128, 3),
    Layer("r3_3x3s2", 128, 28, 256, 3, 2),
    Layer("r3_3x3", 256, 14, 256, 3),
    Layer("r4_3x3s2", 256, 14, 512, 3, 2),
    Layer("r4_3x3", 512, 7, 512, 3),
    Layer("r1_1x1", 64, 56, 64, 1),
    Layer("r1_1x1_up", 64, 56, 256, 1),
    Layer("r1_1x1_down", 256, 56, 64, 1),
    Layer("r2_1x1_up", 128, 28, 512, 1),
    Layer("r2_1x1_down", 512, 28, 128, 1),
    Layer("r3_1x1_up", 256, 14, 1024, 1),
    Layer("r3_1x1_down", 1024, 14, 256, 1),
    Layer("r4_1x1_up", 512, 7, 2048, 1),
    Layer("r4_1x1_down", 2048, 7, 512, 1),
    Layer("r2_1x1s2", 64, 56, 128, 1, 2),
    Layer("r50_1x1s2", 512, 28, 1024, 1, 2),
    Layer("tiny_8x8", 64, 8, 64, 3),
    Layer("tiny_4x4", 128, 4, 128, 3),
    Layer("tiny_2x2", 256, 2, 256, 3),
    Layer("digits_1", 1, 32, 16, 3),
    Layer("digits_2", 16, 32, 32, 3),
    Layer("grouped", 128, 28, 128, 3, 1, 4),
    Layer("depthwise", 128, 56, 128, 3, 1, 128),
    Layer("depthwise_s2", 256, 28, 256, 3, 2, 256),
]
BY_NAME = {layer.name: layer for layer in LAYERS}
