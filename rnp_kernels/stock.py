"""When torch's own convolution is the faster one at full width, and how a module gets there without a detour.

The rules themselves are `stock_path` and, for a module's training, `training_path` in csrc/core/stock.cpp. The operator
follows the first for every sample of full width; what is here saves the way through it where no sample can be pruned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import _C, backends
from .checks import check_convolution, four_paddings, pair
from .registrations import output_memory_format

OURS, ONEDNN, GEMM, CONV2D = range(4)  # the first three as in csrc/core/stock.h; CONV2D is ONEDNN through F.conv2d
NAMES = ("", "oneDNN", "one matrix product a sample", "oneDNN")


class Route(NamedTuple):
    """How a module's convolution of full width runs for inputs of one shape and layout, in any batch."""

    path: int  # of a call that needs no gradient
    training: int  # of one that needs some
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    kernel_size: tuple[int, int]
    tile: int  # of the Winograd algorithm at full width, or 0
    transforms: bool  # whether the operator itself transforms weights for it, where it is given none
    copied_to: torch.memory_format | None  # the layout to bring both operands into below conv2d; None: both have it


native_bfloat16 = False  # whether oneDNN multiplies bfloat16 with the processor's own instructions


def tell_the_operator() -> None:
    """Say in which dtypes this torch has oneDNN on this processor."""
    global native_bfloat16
    if not torch.backends.mkldnn.is_available():
        _C.set_stock_dtypes(False, 0, False)
        return
    ops = torch.ops.mkldnn
    bfloat16, features = 0, _C.cpu_features()
    if ops._is_mkldnn_bf16_supported():
        bfloat16 = 3 if features.get("amx_bf16") else 2 if features.get("avx512bf16") else 1
    native_bfloat16 = bfloat16 >= 2
    _C.set_stock_dtypes(True, bfloat16, ops._is_mkldnn_fp16_supported())


def route(
    conv: nn.Conv2d, input: Tensor, weight: Tensor, bias: Tensor | None, padding: int | Sequence[int] | str
) -> Route | None:
    """The route of a batched input; None where only the operator can say what is wrong or run it."""
    if input.dim() != 4 or weight.dim() != 4 or 0 in input.shape or 0 in weight.shape:
        return None
    if bias is not None and bias.shape != weight.shape[:1]:
        return None
    stride, dilation = pair(conv.stride, "stride"), pair(conv.dilation, "dilation")
    kernel = tuple(weight.shape[2:])
    paddings = four_paddings(padding, kernel, stride, dilation)
    try:
        check_convolution(input, weight, stride, paddings, dilation, conv.groups)
    except ValueError:
        return None
    if _C.far_apart(tuple(input.shape[1:]), tuple(weight.shape), stride, paddings, dilation, conv.groups):
        return None
    path = _path(conv, input, weight, bias, stride, paddings, dilation)
    tile, transforms = 0, False
    if input.dtype is torch.float32 is weight.dtype and _C.winograd_can(
        tuple(weight.shape), stride, dilation, conv.groups
    ):
        layer = (tuple(input.shape[1:]), tuple(weight.shape), stride, paddings, dilation, conv.groups, "float32")
        tile, transforms = _C.winograd_tile(*layer), _C.transforms_in_call(*layer)
    training = _training_path(conv, input, weight, bias, stride, paddings, dilation, path)
    if backends.LOG:
        chosen = NAMES[path] or describe_kernel(input, weight, stride, paddings, dilation, conv.groups)
        if tile:
            winograd = describe_winograd(tile, kernel)
            chosen = winograd if transforms or training else f"{winograd}, with gradients {chosen}"
        if NAMES[training] != NAMES[path] and training:
            chosen += ", with gradients torch's own"
        backends.log(input, weight, stride, paddings, conv.groups, f"backend cpu, full width: {chosen}")
    layout: torch.memory_format | None = output_memory_format(input, weight)
    if input.is_contiguous(memory_format=layout) and weight.is_contiguous(memory_format=layout):
        layout = None
    return Route(path, training, stride, paddings, dilation, kernel, tile, transforms, layout)


def stock_function(route: Route, path: int, groups: int) -> tuple[Callable[..., Tensor], tuple[Any, ...]]:
    """What `path`, which is not OURS, calls with an input, a weight and a bias like the route's; its further arguments.

    torch.conv2d brings its operands into one layout before it calls what computes, and so has to do whoever calls that:
    the gradients of the matrix product take it for granted, and views or two layouts would give wrong ones. A bias,
    whose strides may change with its data, is read as though it were contiguous.
    """
    padding, layout = route.padding[::2], route.copied_to
    if path == CONV2D:
        return torch.conv2d, (route.stride, padding, route.dilation, groups)

    def product(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch._C._nn.thnn_conv2d(input, weight, route.kernel_size, bias, route.stride, padding)

    def one_dnn(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if bias is not None:
            bias = bias.contiguous()
        return torch.mkldnn_convolution(input, weight, bias, padding, route.stride, route.dilation, groups)

    function = product if path == GEMM else one_dnn
    if layout is None:
        return function, ()

    def copied(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return function(input.contiguous(memory_format=layout), weight.contiguous(memory_format=layout), bias)

    return copied, ()


def describe_winograd(tile: int, kernel: tuple[int, ...]) -> str:
    """The algorithm in words."""
    filters = "4x4) of 2x2 pixels folded into channels" if kernel == (7, 7) else "3x3)"
    return f"Winograd F({tile}x{tile}, {filters}"


def describe_kernel(input: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: int) -> str:
    """The CPU operator's own kernel for these arguments, in words."""
    if 0 in input.shape:
        return "nothing to compute"
    name = str(input.dtype).removeprefix("torch.")
    return _C.describe_kernel(tuple(input.shape[1:]), tuple(weight.shape), stride, padding, dilation, groups, name)


def describe_operator(arguments: tuple[Any, ...]) -> str:
    """What the CPU operator runs for its arguments, in words: by width, where samples of full width go elsewhere."""
    (input, weight, bias, stride, padding, dilation, groups, in_prefix, out_prefix, scale, row, residual, activation,
     _tail, pooled, _packed, _winograd) = arguments  # fmt: skip
    own = describe_kernel(input, weight, stride, padding, dilation, groups)
    name = str(input.dtype).removeprefix("torch.")
    layer = (tuple(input.shape[1:]), tuple(weight.shape), stride, padding, dilation, groups, name)
    if 0 not in input.shape and _C.transforms_in_call(*layer):
        return f"{describe_winograd(_C.winograd_tile(*layer), weight.shape[2:])}, few live channels: {own}"
    plain = scale is None and row is None and residual is None and activation == "none" and not pooled
    plain = plain and (bias is None or (bias.dim() == 1 and bias.dtype is input.dtype))
    if not plain or 0 in input.shape:
        return own
    last = output_memory_format(input, weight) is torch.channels_last
    path = _C.stock_path(*layer, last)
    if path == OURS:
        return own
    pruned = in_prefix is not None or out_prefix is not None
    return f"full width: {NAMES[path]}" + (f"; narrower: {own}" if pruned else "")


def _path(
    conv: nn.Conv2d, input: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any
) -> int:
    dtype = input.dtype
    if dtype not in (torch.float32, torch.bfloat16, torch.float16) or weight.dtype is not dtype:
        return OURS
    if bias is not None and bias.dtype is not dtype:
        return OURS
    last = output_memory_format(input, weight) is torch.channels_last
    name = str(dtype).removeprefix("torch.")
    path = _C.stock_path(
        tuple(input.shape[1:]), tuple(weight.shape), stride, padding, dilation, conv.groups, name, last
    )
    if path != ONEDNN or tuple(weight.shape[2:]) == (1, 1):
        return path
    # F.conv2d chooses by the batch too. Where it takes oneDNN for a single sample and a kernel larger than 1x1, it
    # always does, with any number of threads; it has the shortest way and its own gradients.
    backend = _torchs_backend(conv, 1, input, weight, bias, stride, padding, dilation)
    return CONV2D if backend == torch._C._ConvBackend.Mkldnn else ONEDNN


def _training_path(
    conv: nn.Conv2d, input: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any,
    path: int,
) -> int:  # fmt: skip
    """The path of a call at full width that needs gradients: torch's own, with its own gradients, or ours.

    Through conv2d wherever it chooses the same way for a sample alone and in a batch; else as it chooses in a batch.
    """
    dtypes = {t.dtype for t in (input, weight, bias) if t is not None}
    if dtypes != {torch.float32}:
        return CONV2D if path == CONV2D else OURS
    wanted = float32_training_path(input, weight, stride, padding, dilation, conv.groups)
    if wanted != ONEDNN or tuple(weight.shape[2:]) == (1, 1):  # conv2d chooses for 1x1 by the batch and the threads
        return wanted
    alone, among = (_torchs_backend(conv, n, input, weight, bias, stride, padding, dilation) for n in (1, 2))
    if alone == among:
        return CONV2D
    return ONEDNN if among == torch._C._ConvBackend.Mkldnn else OURS


def float32_training_path(input: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: int) -> int:
    """`training_path` of csrc/core/stock.cpp."""
    last = output_memory_format(input, weight) is torch.channels_last
    return _C.training_path(tuple(input.shape[1:]), tuple(weight.shape), stride, padding, dilation, groups, last)


def _torchs_backend(
    conv: nn.Conv2d, batch: int, input: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any,
    dilation: Any,
) -> Any:  # fmt: skip
    """What F.conv2d would choose for so many samples like these."""
    some = input[:1].expand(batch, *input.shape[1:])
    return torch._C._select_conv_backend(some, weight, bias, stride, padding[::2], dilation, False, (0, 0), conv.groups)


tell_the_operator()
