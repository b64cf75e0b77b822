"""nn.Conv2d in eager mode against PrefixConv2d in its place: full width, no prefixes, warm.

    python bench/dropin.py [--training] [--threads 1] [--clock wall|cpu] [--filter NAME] [--batch 1 8] [--dtype float32]

With --training, a step: forward, and the gradients of weight, bias and input (of an image of up to 4 channels: none).

One line per layer, layout and batch: the median of nn.Conv2d in microseconds, the median ratio ours / theirs of runs
taken in turn (rnp.bench.timing), its p20 and p80, the same of nn.Conv2d against itself (differences below that say
nothing), and the path (Winograd, ours, or a stock one by the rule in csrc/core/stock.cpp). Before them the command, the
machine and the commit. The swap must never cost more than 3 %: a row above that is measured again in five times as many
rounds, on a line of its own, which counts (torch's convolution beside itself reads up to 1.15 in 15 rounds).

Freed memory is kept by malloc, as in `rnp bench`: by default a call's output may be given back and faulted in again at
the next, on one side or on both, by what else lies on the heap (one and the same row read 0.94 and, after others,
2.33). Where it lies still matters to what the caches hold (5x5 depthwise at 28x28, batch 8: 1.50 in the whole list,
0.85 with --filter 5x5). --clock cpu counts the time of this thread alone, for a machine that others use too (one thread
only).
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from rnp.bench.environment import environment
from rnp.bench.timing import AGAIN, CLOCKS, keep_freed_memory, measure, ratio, spread
from rnp_kernels import PrefixConv2d, stock, training

# name: in, out, kernel, input side, stride, groups, and dilation where it is not 1
LAYERS = {
    "VGG-16 conv1_1": (3, 64, 3, 224, 1, 1),
    "VGG-16 conv1_2": (64, 64, 3, 224, 1, 1),
    "VGG-16 conv2_2": (128, 128, 3, 112, 1, 1),
    "VGG-16 conv3_2": (256, 256, 3, 56, 1, 1),
    "VGG-16 conv4_2": (512, 512, 3, 28, 1, 1),
    "VGG-16 conv5_2": (512, 512, 3, 14, 1, 1),
    "ResNet stem": (3, 64, 7, 224, 2, 1),
    "ResNet-18 layer1": (64, 64, 3, 56, 1, 1),
    "ResNet-18 layer2 down": (64, 128, 3, 56, 2, 1),
    "ResNet-18 layer2 shortcut": (64, 128, 1, 56, 2, 1),
    "ResNet-18 layer3 down": (128, 256, 3, 28, 2, 1),
    "ResNet-18 layer3": (256, 256, 3, 14, 1, 1),
    "ResNet-18 layer4": (512, 512, 3, 7, 1, 1),
    "ResNet-50 layer1 expand": (64, 256, 1, 56, 1, 1),
    "ResNet-50 layer1 reduce": (256, 64, 1, 56, 1, 1),
    "ResNet-50 layer3 reduce": (1024, 256, 1, 14, 1, 1),
    "ResNet-50 layer4 expand": (512, 2048, 1, 7, 1, 1),
    "ResNet-50 layer4 shortcut": (1024, 2048, 1, 14, 2, 1),
    "MobileNet stem": (3, 32, 3, 224, 2, 1),
    "MobileNet depthwise 112": (32, 32, 3, 112, 1, 32),
    "MobileNet depthwise 56 down": (128, 128, 3, 56, 2, 128),
    "MobileNet depthwise 14": (512, 512, 3, 14, 1, 512),
    "MobileNet depthwise 7": (1024, 1024, 3, 7, 1, 1024),
    "MobileNet pointwise 14": (512, 512, 1, 14, 1, 1),
    "MobileNetV3 5x5 28 down": (72, 72, 5, 56, 2, 72),
    "MobileNetV3 5x5 28": (120, 120, 5, 28, 1, 120),
    "EfficientNet 5x5 14": (480, 480, 5, 14, 1, 480),
    "EfficientNet 5x5 7": (1152, 1152, 5, 7, 1, 1152),
    "ConvNeXt 7x7 28": (192, 192, 7, 28, 1, 192),
    "ConvNeXt patches": (3, 96, 4, 224, 4, 1),
    "ConvNeXt 56 down": (96, 192, 2, 56, 2, 1),
    "ViT patches": (3, 768, 16, 224, 16, 1),
    "AlexNet 5x5": (64, 192, 5, 27, 1, 1),
    "depthwise, multiplier 2": (64, 128, 3, 28, 1, 64),
    "ResNeXt grouped 56": (128, 128, 3, 56, 1, 32),
    "ResNeXt grouped 56 down": (256, 256, 3, 56, 2, 32),
    "ResNeXt grouped 28": (256, 256, 3, 28, 1, 32),
    "ResNeXt grouped 14": (512, 512, 3, 14, 1, 32),
    "ResNeXt grouped 7": (1024, 1024, 3, 7, 1, 32),
    "ResNeXt grouped 28 down": (512, 512, 3, 28, 2, 32),
    "ResNeXt 32x8d 56 down": (512, 512, 3, 56, 2, 32),
    "RegNet groups of 24": (384, 384, 3, 14, 1, 16),
    "RegNet groups of 16": (672, 672, 3, 7, 1, 42),
    "ShuffleNet grouped 1x1": (240, 240, 1, 28, 1, 3),
    "squeeze 1x1 map": (512, 32, 1, 1, 1, 1),
    "excite 1x1 map": (32, 512, 1, 1, 1, 1),
    "tiny 4x4 map": (64, 64, 3, 4, 1, 1),
    "tiny 8x8 map": (16, 16, 3, 8, 1, 1),
    "CIFAR stem": (3, 16, 3, 32, 1, 1),
    "CIFAR VGG stem": (3, 64, 3, 32, 1, 1),
    "CIFAR 16 to 32": (16, 32, 3, 32, 2, 1),
    "CIFAR 32": (32, 32, 3, 16, 1, 1),
    "small 64": (64, 64, 3, 14, 1, 1),
    "LeNet 5x5": (1, 6, 5, 28, 1, 1),
    "few channels 56": (8, 8, 3, 56, 1, 1),
    "1x1 from 3": (3, 64, 1, 56, 1, 1),
    "1x1 small": (64, 64, 1, 14, 1, 1),
    "ResNet-50 layer2 shortcut": (256, 512, 1, 56, 2, 1),
    "DeepLab dilated": (256, 256, 3, 28, 1, 1, 2),
    "MobileNet depthwise 112 down": (64, 64, 3, 112, 2, 64),
}
LIMIT = 1.03
PATHS = {stock.OURS: "ours", stock.ONEDNN: "oneDNN", stock.CONV2D: "oneDNN", stock.GEMM: "gemm"}


def gate(name: str, ours: Tensor, conv: nn.Conv2d, x: Tensor) -> None:
    """A sum of K products, in any order, is off by at most K eps times the sum of their sizes."""
    geometry = conv.stride, conv.padding, conv.dilation, conv.groups
    x, weight, bias = x.double(), conv.weight.double(), conv.bias.double()
    truth = nn.functional.conv2d(x, weight, bias, *geometry)
    size = nn.functional.conv2d(x.abs(), weight.abs(), bias.abs(), *geometry)
    products = weight[0].numel() + 1
    if not ((ours.double() - truth).abs() <= products * torch.finfo(ours.dtype).eps * size).all():
        raise SystemExit(f"{name}: wrong by up to {(ours.double() - truth).abs().max().item():.3g}")


LARGEST_ERROR = 1e-5  # of a gradient: relative, in L2, against float64; or twice torch's own


def step(conv: nn.Conv2d, x: Tensor, upstream: Tensor) -> Callable[[], list[Tensor]]:
    """Forward and backward; gives the gradients."""
    wanted = [conv.weight, conv.bias, *([x] if x.requires_grad else [])]

    def run() -> list[Tensor]:
        with torch.enable_grad():
            return list(torch.autograd.grad(conv(x), wanted, upstream))

    return run


def gate_gradients(
    name: str, ours: list[Tensor], theirs: list[Tensor], conv: nn.Conv2d, x: Tensor, upstream: Tensor
) -> None:
    exact = copy.deepcopy(conv).double()
    truth = step(exact, x.detach().double().requires_grad_(x.requires_grad), upstream.double())()
    for what, got, other, wanted in zip(("weight", "bias", "input"), ours, theirs, truth, strict=False):
        error, own = (((gradient.double() - wanted).norm() / wanted.norm()).item() for gradient in (got, other))
        if not error <= max(LARGEST_ERROR, 2 * own):
            raise SystemExit(
                f"{name}: the gradient of {what} is wrong by {error:.3g} of its norm, torch's by {own:.3g}"
            )


def row(label: str, path: str, sides: dict[str, Callable[[], object]], rounds: int, clock: str) -> float:
    """Measures and prints one; its ratio."""
    times = measure(sides, "theirs", seconds=0.0, rounds=rounds, clock=clock)
    ours_by_theirs, noise = ratio(times, "ours", "theirs"), ratio(times, AGAIN, "theirs")
    print(
        f"{label} {1e6 * spread(times['theirs'])['median']:10.1f} us  ratio {ours_by_theirs['median']:5.3f}"
        f"  [{ours_by_theirs['p20']:5.3f} {ours_by_theirs['p80']:5.3f}]"
        f"  noise [{noise['p20']:5.3f} {noise['p80']:5.3f}]  {path}"
        f"{f'  OVER {LIMIT}' if ours_by_theirs['median'] > LIMIT else ''}",
        flush=True,
    )
    return ours_by_theirs["median"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--training", action="store_true", help="steps of training, not inference")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall")
    parser.add_argument("--filter", default="", help="only layers whose name contains this")
    parser.add_argument("--batch", type=int, nargs="+", default=(1, 8))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    if options.clock == "cpu" and options.threads != 1:
        parser.error("--clock cpu needs --threads 1")
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    dtype = getattr(torch, options.dtype)
    print("python bench/dropin.py", *sys.argv[1:])
    print(*(f"{key}={value}" for key, value in environment().items()), f"clock={options.clock}")
    worst, rows, over = (0.0, ""), 0, 0
    for layout in (torch.channels_last, torch.contiguous_format):
        for batch in options.batch:
            for name, (c_in, c_out, kernel, side, stride, groups, *more) in LAYERS.items():
                if options.filter not in name:
                    continue
                torch.manual_seed(0)
                dilation = more[0] if more else 1
                theirs = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2 * dilation, dilation, groups, dtype=dtype)
                theirs.eval()
                ours = PrefixConv2d.from_conv2d(theirs)
                x = torch.randn(batch, c_in, side, side).to(dtype).contiguous(memory_format=layout)
                with torch.no_grad() if options.training else torch.inference_mode():
                    for _ in range(3):
                        result, _ = ours(x), theirs(x)
                    gate(name, result, theirs, x)
                    route = stock.route(ours, x, ours.weight, ours.bias, ours.padding)
                    path = PATHS[route.training if options.training else route.path]
                    if options.training and dtype is torch.bfloat16:
                        which = training.our_gradients(x, ours.weight, *route[2:5], groups)
                        path = " and ".join(n for n, own in zip(("input", "weight"), which, strict=True) if own)
                        path = f"our gradient of {path}" if path else "oneDNN"
                    if route.tile and (not options.training or (route.transforms and route.training == stock.OURS)):
                        path = f"Winograd, tiles of {route.tile}"
                    del result
                    sides = {"theirs": lambda: theirs(x), "ours": lambda: ours(x)}  # noqa: B023 (called in this iteration only)
                    if options.training:
                        upstream = torch.randn_like(theirs(x))
                        x = x.clone().requires_grad_(c_in > 4)
                        sides = {"theirs": step(theirs, x, upstream), "ours": step(ours, x, upstream)}
                        gate_gradients(name, sides["ours"](), sides["theirs"](), theirs, x, upstream)
                    label = f"{str(layout).removeprefix('torch.'):17} batch {batch}  {name:28}"
                    median = row(label, path, sides, options.rounds, options.clock)
                    if median > LIMIT:
                        median = row(
                            f"{'again, more rounds':>27}  {name:28}", path, sides, 5 * options.rounds, options.clock
                        )
                rows += 1
                over += median > LIMIT
                worst = max(worst, (median, label))
    print(f"{over} of {rows} rows over {LIMIT}; worst ratio {worst[0]:.3f}: {' '.join(worst[1].split())}")


if __name__ == "__main__":
    main()
