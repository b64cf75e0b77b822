"""A training step of a layer: forward, and the gradients of input and weight, against torch's dense step, with masks
where it is pruned, and sample by sample on slices. oneDNN packed ahead, ONNX Runtime and OpenVINO have no gradients.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import rnp_kernels
from rnp.bench.gate import require_close
from rnp.bench.layers import BY_NAME, Layer
from rnp.bench.parts.layer import facts
from rnp.bench.rivals import Case, Side, live
from rnp.bench.run import Job, Options
from rnp_kernels import training

NAMES = ("vgg3_2", "vgg5", "r1_3x3", "r2_3x3", "r3_3x3", "r3_3x3s2", "r4_3x3", "r2_1x1_up", "r3_1x1_down")
BATCH = 16
Step = Callable[[], tuple[Tensor, ...]]


def jobs(options: Options) -> list[Job]:
    """Some layers of VGG-16 and ResNet-18/50 at batch 16."""
    names = NAMES[-2:] if options.quick else NAMES
    return [
        Job("training", f"{name} b{BATCH}", lambda layer=BY_NAME[name]: step_case(layer, BATCH, options.dtype), threads,
            facts=facts(BY_NAME[name], BATCH, options.dtype))
        for threads in options.threads
        for name in names
    ]  # fmt: skip


def step_case(layer: Layer, batch: int, dtype: torch.dtype = torch.float32) -> Case:
    """Torch's dense step, ours at full width, 3/4, 1/2, 1/4 and mixed; masks and slices at 1/2 and mixed.

    The weights are packed inside the step, since training changes them every time. In bfloat16 full width is what a
    module does: torch's convolution, and either gradient of ours where it is the faster one.
    """
    x, w = layer.tensors(batch, dtype)
    x.requires_grad_(), w.requires_grad_()
    size = (batch, layer.c_out, layer.out_size, layer.out_size)
    upstream = torch.randn(size, generator=torch.Generator().manual_seed(1)).to(
        dtype, memory_format=torch.channels_last
    )

    def step(forward: Callable[[], Tensor]) -> Step:
        def run() -> tuple[Tensor, ...]:
            with torch.enable_grad():
                y = forward()
                return y, *torch.autograd.grad(y, (x, w), upstream)

        return run

    def dense(i: Tensor | None = None, o: Tensor | None = None) -> Tensor:
        y = F.conv2d(x if i is None else x * i, w, None, layer.stride, layer.padding, 1, layer.groups)
        return y if o is None else y * o

    def slices(i: Tensor, o: Tensor) -> Tensor:
        parts = [
            F.conv2d(x[n : n + 1, :a], w[:b, :a], None, layer.stride, layer.padding)
            for n, (a, b) in enumerate(zip(i.tolist(), o.tolist(), strict=True))
        ]
        return torch.cat([F.pad(part, (0, 0, 0, 0, 0, layer.c_out - part.shape[1])) for part in parts])

    def ours(i: Tensor | None = None, o: Tensor | None = None) -> Tensor:
        return rnp_kernels.prefix_conv2d(
            x, w, None, layer.stride, layer.padding, 1, layer.groups, in_prefix=i, out_prefix=o
        )

    def module() -> Tensor:
        return training.conv2d(x, w, None, layer.stride, layer.padding, 1, layer.groups)

    full = ours if dtype is torch.float32 else module
    case = Case(f"{layer.name} b{batch}", "eager", {"eager": Side(step(dense)), "full": Side(step(full))})
    check(f"{case.name}, full", case.sides["full"].run(), case.sides["eager"].run())
    for width, (i, o) in layer.widths(batch).items():
        if width not in ("3/4", "1/2", "1/4", "mixed"):
            continue
        masks = live(i, layer.c_in).to(x.dtype), live(o, layer.c_out).to(x.dtype)
        masked = step(lambda masks=masks: dense(*masks))
        side = Side(step(lambda i=i, o=o: ours(i, o)), layer.theory(i, o))
        check(f"{case.name}, {width}", side.run(), masked())
        case.sides[width] = side
        if width in ("1/2", "mixed"):
            case.sides[f"masked {width}"] = Side(masked, side.theory)
            if layer.groups == 1:
                sliced = step(lambda i=i, o=o: slices(i, o))
                check(f"{case.name}, slices {width}", sliced(), masked())
                case.sides[f"slices {width}"] = Side(sliced, side.theory)
    return case


def check(name: str, got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Output and both gradients; of a gradient the whole tensor."""
    for what, a, b in zip(("output", "input gradient", "weight gradient"), got, expected, strict=True):
        require_close(f"{name}, {what}", a[None], b[None])
