"""The cases that every backend of `prefix_conv2d` passes, their inputs, and the rule by which an error is judged.

One list serves the tests of the forward and the backward, opcheck, every backend and the benchmarks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import reference
from .checks import four_paddings, output_size, pair

Tensors = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One call of `prefix_conv2d`, by name. Prefixes and lines are given sample by sample."""

    name: str
    input: tuple[int, int, int, int]  # N, C_in, H, W
    out: int  # C_out
    kernel: tuple[int, int] = (3, 3)
    stride: Any = 1
    padding: Any = 1
    dilation: Any = 1
    groups: int = 1
    in_prefix: tuple[int, ...] | None = None
    out_prefix: tuple[int, ...] | None = None
    bias: str | None = "vector"  # None, "vector" or "table" of three lines
    scale: str | None = None
    row: tuple[int, ...] | None = None
    residual: bool = False
    activation: str = "none"
    tail: str = "zero"
    pooled: bool = False
    layout: str = "channels_last"  # of input and residual: a key of LAYOUTS
    weight_layout: str = "contiguous"

    def __str__(self) -> str:
        return self.name


CASES = (
    # conv2d's own arguments, full width
    Case("3x3", (2, 16, 9, 10), 24),
    Case("3x3 contiguous", (2, 16, 9, 10), 24, layout="contiguous"),
    Case("1x1", (2, 70, 7, 5), 33, kernel=(1, 1), padding=0),
    Case("1x1 stride 2", (2, 40, 8, 9), 48, kernel=(1, 1), padding=0, stride=2),
    Case("3x3 stride 2", (2, 20, 11, 12), 40, stride=2),
    Case("7x7 stem", (1, 3, 30, 29), 18, kernel=(7, 7), stride=2, padding=3),
    Case("5x3 strides 2 and 1", (2, 12, 12, 9), 20, kernel=(5, 3), stride=(2, 1), padding=(2, 0)),
    Case("2x2 without padding", (2, 8, 6, 7), 16, kernel=(2, 2), stride=2, padding=0),
    Case("dilated", (2, 10, 13, 14), 12, dilation=(2, 3), padding=(2, 3)),
    Case("same, even kernel", (2, 9, 8, 8), 10, kernel=(4, 2), padding="same"),
    Case("same, dilated", (1, 9, 10, 8), 10, kernel=(2, 3), padding="same", dilation=(3, 2)),
    Case("valid", (2, 6, 7, 8), 34, padding="valid"),
    Case("asymmetric padding", (2, 10, 8, 9), 20, padding=(0, 2, 3, 1)),
    Case("padding beyond the kernel", (1, 5, 4, 4), 17, padding=4),
    Case("groups", (2, 24, 8, 8), 36, groups=3),
    Case("depthwise", (2, 40, 9, 9), 40, groups=40),
    Case("depthwise stride 2", (2, 20, 9, 10), 20, groups=20, stride=2, kernel=(5, 5), padding=2),
    Case("depthwise multiplier", (2, 12, 7, 7), 24, groups=12),
    Case("one pixel", (3, 32, 1, 1), 40, kernel=(1, 1), padding=0),
    Case("one channel", (2, 1, 8, 9), 1),
    Case("no bias", (2, 16, 6, 6), 16, bias=None),
    Case("wide rows", (1, 16, 3, 45), 32),
    Case("many input channels", (1, 300, 4, 5), 20, kernel=(1, 1), padding=0),
    Case("several blocks", (1, 130, 6, 15), 100),
    # layouts
    Case("strided input", (2, 12, 8, 9), 20, layout="strided"),
    Case("transposed input", (2, 12, 8, 9), 20, layout="transposed"),
    Case("slice of more channels", (2, 12, 8, 9), 20, layout="channel slice", residual=True),
    Case("slice of a larger map", (2, 12, 8, 9), 20, layout="map slice", residual=True),
    Case("expanded batch", (3, 12, 8, 9), 20, layout="expanded", in_prefix=(5, 12, 1)),
    Case("weight channels_last", (2, 12, 8, 9), 20, layout="contiguous", weight_layout="channels_last"),
    Case("weight strided", (2, 12, 8, 9), 20, weight_layout="strided"),
    Case("weight transposed", (2, 12, 8, 9), 20, weight_layout="transposed"),
    # prefixes: 0, 1, inside a tile, at its edge, full; mixed in one batch
    Case("mixed prefixes", (6, 64, 9, 9), 96, in_prefix=(64, 32, 1, 0, 17, 48), out_prefix=(96, 24, 95, 33, 1, 0)),
    Case("prefix of the input alone", (4, 70, 8, 8), 40, in_prefix=(70, 65, 64, 3)),
    Case("prefix of the output alone", (4, 20, 8, 8), 70, out_prefix=(70, 64, 33, 15)),
    Case("full prefixes", (2, 20, 7, 7), 40, in_prefix=(20, 20), out_prefix=(40, 40)),
    Case("all prefixes zero", (3, 20, 7, 7), 40, in_prefix=(0, 0, 0), out_prefix=(0, 0, 0)),
    Case("no live input", (2, 20, 7, 7), 40, in_prefix=(0, 0), activation="relu"),
    Case("mixed, 1x1 stride 2", (4, 68, 9, 7), 36, kernel=(1, 1), padding=0, stride=2,
         in_prefix=(68, 34, 17, 51), out_prefix=(9, 18, 27, 36)),
    Case("mixed, contiguous", (4, 40, 9, 9), 36, layout="contiguous", in_prefix=(40, 7, 0, 16),
         out_prefix=(3, 36, 18, 32)),
    Case("mixed, stem", (3, 3, 20, 21), 40, kernel=(7, 7), stride=2, padding=3, in_prefix=(3, 2, 1),
         out_prefix=(40, 9, 33)),
    Case("mixed, dilated", (3, 10, 13, 14), 34, dilation=2, padding=2, in_prefix=(10, 3, 9), out_prefix=(34, 33, 2)),
    Case("prefix across groups", (4, 24, 8, 8), 36, groups=3, in_prefix=(24, 9, 8, 1), out_prefix=(13, 36, 12, 25)),
    Case("prefix, depthwise", (4, 40, 9, 9), 40, groups=40, in_prefix=(40, 13, 32, 0), out_prefix=(40, 17, 5, 40)),
    Case("prefix, unaligned channels", (3, 33, 6, 5), 47, in_prefix=(31, 33, 2), out_prefix=(47, 31, 46)),
    # the epilogue
    Case("scale and bias", (2, 16, 7, 8), 24, scale="vector"),
    Case("relu", (2, 16, 7, 8), 24, activation="relu"),
    Case("residual", (2, 16, 7, 8), 24, residual=True),
    Case("residual beyond the prefix", (3, 16, 7, 8), 40, residual=True, activation="relu", in_prefix=(16, 4, 0),
         out_prefix=(40, 10, 0), pooled=True),
    Case("tables", (4, 16, 7, 8), 40, scale="table", bias="table", row=(2, 0, 1, 2), in_prefix=(16, 5, 9, 0),
         out_prefix=(40, 20, 31, 40), activation="relu"),
    Case("scale table, bias vector", (3, 8, 6, 6), 12, scale="table", row=(0, 2, 2)),
    Case("bias table, no scale", (3, 8, 6, 6), 12, bias="table", row=(1, 1, 0), out_prefix=(12, 0, 7)),
    Case("everything", (4, 24, 10, 9), 48, scale="table", bias="table", row=(1, 0, 2, 1), in_prefix=(24, 12, 6, 18),
         out_prefix=(12, 48, 24, 36), residual=True, activation="relu", pooled=True, stride=2),
    Case("everything, contiguous", (3, 24, 10, 9), 48, scale="table", bias="table", row=(1, 0, 2),
         in_prefix=(24, 12, 6), out_prefix=(12, 48, 24), residual=True, activation="relu", pooled=True,
         layout="contiguous"),
    Case("1x1, contiguous", (2, 70, 13, 9), 45, kernel=(1, 1), padding=0, layout="contiguous"),
    Case("1x1, contiguous, strides 2 and 3", (3, 20, 20, 30), 33, kernel=(1, 1), padding=0, stride=(2, 3),
         layout="contiguous", in_prefix=(20, 3, 0), out_prefix=(33, 17, 9)),
    Case("everything, 1x1, contiguous", (3, 512, 9, 10), 30, kernel=(1, 1), padding=0, scale="table", bias="table",
         row=(1, 0, 2), in_prefix=(512, 300, 17), out_prefix=(30, 14, 29), residual=True, activation="relu",
         pooled=True, layout="contiguous"),
    Case("groups, 1x1 stride 2, contiguous", (2, 48, 19, 18), 36, kernel=(1, 1), padding=0, stride=2, groups=3,
         layout="contiguous", in_prefix=(48, 20), out_prefix=(36, 31), tail="skip"),
    Case("few channels, contiguous", (4, 5, 19, 23), 50, layout="contiguous", stride=(1, 2), dilation=(2, 1),
         padding=(3, 0, 2, 1), in_prefix=(5, 2, 0, 5), out_prefix=(50, 33, 7, 0)),
    Case("everything, few channels, contiguous", (3, 8, 21, 18), 35, scale="table", bias="table", row=(1, 0, 2),
         in_prefix=(8, 3, 8), out_prefix=(35, 35, 20), residual=True, activation="relu", pooled=True,
         layout="contiguous"),
    Case("everything, depthwise", (3, 24, 10, 9), 24, scale="table", bias="table", row=(1, 0, 2),
         in_prefix=(24, 12, 6), out_prefix=(12, 24, 20), residual=True, activation="relu", pooled=True, groups=24),
    Case("skipped tail", (3, 16, 7, 8), 40, tail="skip", in_prefix=(16, 8, 3), out_prefix=(40, 20, 1)),
    Case("skipped tail, pooled", (3, 16, 7, 8), 40, tail="skip", in_prefix=(16, 8, 3), out_prefix=(40, 20, 0),
         activation="relu", pooled=True, scale="table", bias="table", row=(0, 1, 2)),
    Case("pooled", (2, 16, 7, 8), 24, pooled=True),
    Case("pooled, contiguous", (3, 16, 7, 8), 24, pooled=True, layout="contiguous", out_prefix=(24, 7, 0)),
    # nothing to do
    Case("empty batch", (0, 16, 7, 8), 24, in_prefix=(), out_prefix=()),
    Case("empty batch, everything", (0, 16, 7, 8), 24, scale="table", bias="table", row=(), residual=True,
         activation="relu", pooled=True),
)  # fmt: skip


def case(name: str) -> Case:
    return next(c for c in CASES if c.name == name)


def _channels_last(shape: tuple[int, ...], **options: Any) -> Tensor:
    return torch.full(shape, torch.nan, **options).contiguous(memory_format=torch.channels_last)


# Each gives a tensor of the shape (n, c, h, w) whose surroundings, where it has any, are NaN.
LAYOUTS: dict[str, Callable[..., Tensor]] = {
    "contiguous": lambda n, c, h, w, **o: torch.full((n, c, h, w), torch.nan, **o),
    "channels_last": lambda n, c, h, w, **o: _channels_last((n, c, h, w), **o),
    "strided": lambda n, c, h, w, **o: torch.full((n, 2 * c, 2 * h, 3 * w), torch.nan, **o)[:, ::2, 1::2, ::3],
    "transposed": lambda n, c, h, w, **o: torch.full((w, h, c, n), torch.nan, **o).permute(3, 2, 1, 0),
    "channel slice": lambda n, c, h, w, **o: _channels_last((n, c + 7, h, w), **o)[:, 3 : c + 3],
    "map slice": lambda n, c, h, w, **o: _channels_last((n, c, h + 3, w + 2), **o)[:, :, 1 : h + 1, 2:],
    "expanded": lambda n, c, h, w, **o: _channels_last((1, c, h, w), **o).expand(n, c, h, w),
}


def _values(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _laid_out(layout: str, values: Tensor, dtype: torch.dtype, device: Any) -> Tensor:
    tensor = LAYOUTS[layout](*values.shape, dtype=dtype, device=device)
    if layout == "expanded":
        tensor[:1].copy_(values[:1])
    else:
        tensor.copy_(values)
    return tensor


def make(case: Case, dtype: torch.dtype = torch.float32, device: Any = "cpu", seed: int = 0) -> Tensors:
    """The arguments of `prefix_conv2d` for a case, by name. Input channels that are not live are NaN."""
    generator = torch.Generator().manual_seed(seed)
    batch, c_in = case.input[:2]
    weight_shape = (case.out, c_in // case.groups, *case.kernel)
    fan_in = max(1, weight_shape[1] * case.kernel[0] * case.kernel[1])
    input = _values(generator, *case.input)
    weight = _laid_out(case.weight_layout, _values(generator, *weight_shape) / fan_in**0.5, dtype, device)
    input = _laid_out(case.layout, input, dtype, device)
    arguments: Tensors = {
        "input": input, "weight": weight, "bias": None, "stride": case.stride, "padding": case.padding,
        "dilation": case.dilation, "groups": case.groups, "scale": None, "residual": None,
        "activation": case.activation, "tail": case.tail, "pooled": case.pooled,
    }  # fmt: skip
    for name in ("in_prefix", "out_prefix", "row"):
        values = getattr(case, name)
        arguments[name] = None if values is None else torch.tensor(values, dtype=torch.int32, device=device)
    if case.in_prefix is not None and case.layout != "expanded":
        input.masked_fill_(~reference.live(c_in, arguments["in_prefix"], input), torch.nan)
    for name, offset in (("bias", 0.0), ("scale", 1.0)):
        kind = getattr(case, name)
        if kind is not None:
            table = _values(generator, *((3, case.out) if kind == "table" else (case.out,))) / 4 + offset
            arguments[name] = table.to(device, dtype)
    if case.residual:
        size = output_size(input, weight, *geometry(case))
        residual = _values(generator, batch, case.out, *size)
        arguments["residual"] = _laid_out(case.layout, residual, dtype, device)
    return arguments


def geometry(case: Case) -> tuple[tuple[int, int], tuple[int, int, int, int], tuple[int, int]]:
    """Stride, the four paddings and dilation of a case."""
    stride, dilation = pair(case.stride, "stride"), pair(case.dilation, "dilation")
    return stride, four_paddings(case.padding, case.kernel, stride, dilation), dilation


def convert(arguments: Tensors, dtype: torch.dtype) -> Tensors:
    """The same arguments with every floating tensor in another dtype."""
    return {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in arguments.items()}


def run_reference(case: Case, arguments: Tensors) -> tuple[Tensor, Tensor | None]:
    """The specification's output and means, in the arguments' dtype (the means of float64 in float64: the truth)."""
    stride, padding, dilation = geometry(case)
    output, _ = reference.prefix_conv2d(**{**arguments, "stride": stride, "padding": padding, "dilation": dilation})
    wide = torch.promote_types(output.dtype, torch.float32)
    return output, output.mean((2, 3), dtype=wide) if case.pooled else None


# How many times u sqrt(K) R a sum may be off. Rounding to nearest loses at most u = eps / 2 of each partial sum, either
# way. Products of random signs make the partial sums a random walk that ends near R, the root of the sum of the
# products' squares; so the losses add up to some u sqrt(K / 6) R at most, 0.30 u sqrt(K) R measured, for the plainest
# algorithm: one product after the other. Its worst of a million sums is 3.5 u sqrt(K) R, whatever K, and a tenfold more
# sums add 0.6 to that. At K = 500 the worst element of a tensor loses some 100 times the allowance to TF32, and a
# product left out is 5000 times the allowance (tests/test_error_rule.py).
ROUNDINGS = 6.0


@dataclass(frozen=True)
class Sums:
    """What the elements of a tensor add up: the number K of products in each, and the sum of their squares, R^2."""

    products: Tensor
    squares: Tensor

    def rounding(self, dtype: torch.dtype) -> Tensor:
        """What adding in `dtype`, one product after the other, may lose of each element.

        Holds for operands drawn around 0 without regard to each other, as those of `make` are.
        """
        return ROUNDINGS * torch.finfo(dtype).eps / 2 * (self.products * self.squares).sqrt()


def _each(arguments: Tensors, change: Callable[[Tensor], Tensor]) -> Tensors:
    return {k: change(v) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in arguments.items()}


def output_sums(case: Case, arguments: Tensors) -> Sums:
    """Of the output, before the activation (which loses nothing): the specification itself adds up the squares of its
    operands, and ones in their place."""
    wide = convert(arguments, torch.float64) | {"activation": "none"}
    return Sums(run_reference(case, _each(wide, torch.ones_like))[0], run_reference(case, _each(wide, torch.square))[0])


def gradient_sums(case: Case, arguments: Tensors, upstream: Tensor) -> dict[str, Sums]:
    """Of the gradients of input and weight; `upstream` (N, C_out, OH, OW) and, for means, its mean flow back.

    The specification is linear in each of them, so its derivative at the squares of everything, by the squares of what
    flows back, adds up the squares of the products of the gradient.
    """
    wide, upstream = convert(arguments, torch.float64), upstream.double()
    output, _ = run_reference(case, wide)
    if case.pooled:
        upstream = upstream + upstream.mean((2, 3), keepdim=True) / (output.shape[2] * output.shape[3])
    if case.activation == "relu":
        upstream = torch.where(output > 0, upstream, 0)
    found = []
    for change, flowing in ((torch.ones_like, (upstream != 0).double()), (torch.square, upstream.square())):
        changed = _each(wide | {"activation": "none"}, change)
        operands = [changed[name].requires_grad_() for name in ("input", "weight")]
        found.append(torch.autograd.grad(run_reference(case, changed)[0], operands, flowing))
    return {name: Sums(*both) for name, *both in zip(("input", "weight"), *found, strict=True)}


@dataclass(frozen=True)
class Errors:
    """The largest error against the truth in one tensor: ours, native torch's, and what was allowed."""

    name: str
    ours: float = 0.0
    native: float = 0.0
    allowed: float = 0.0


def assert_as_accurate_as_native(
    name: str, ours: Tensor, native: Tensor, truth: Tensor, sums: Sums | None = None
) -> Errors:
    """Largest error of ours <= 2 x the largest of native torch's + one rounding step of the largest value.

    `native` is plain torch in the dtype of `ours`, `truth` plain torch in float64. Given `sums`, an element may instead
    have the error of an ordinary sum (`Sums.rounding`): native torch's is no yardstick alone, since cuDNN adds some
    gradients up in several runs, atomically, and so loses a fifth of what one sum after the other does.
    AssertionError, with the tensor's name, where the rule is broken, shapes or dtypes differ, or a NaN appears.
    """
    assert ours.shape == truth.shape, f"{name}: shape {tuple(ours.shape)}, expected {tuple(truth.shape)}"
    assert ours.dtype == native.dtype, f"{name}: dtype {ours.dtype}, expected {native.dtype}"
    if truth.numel() == 0:
        return Errors(name)
    assert torch.isfinite(truth).all(), f"{name}: the truth itself is not finite"
    error = (ours.double() - truth).abs()
    assert not error.isnan().any(), f"{name}: NaN at {error.isnan().nonzero()[0].tolist()}"
    native_error = (native.double() - truth).abs().max().item()
    allowed = 2 * native_error + torch.finfo(ours.dtype).eps * truth.abs().max().item()
    limit = torch.full_like(error, allowed)
    if sums is not None:
        limit = torch.maximum(limit, sums.rounding(ours.dtype))
    excess = error / limit.clamp(min=torch.finfo(torch.float64).tiny)
    worst = tuple((excess == excess.max()).nonzero()[0].tolist())
    assert (error <= limit).all(), (
        f"{name}: error {error[worst]:.3g} at {list(worst)} of {tuple(ours.shape)}; native torch's is "
        f"{native_error:.3g}, allowed {limit[worst]:.3g}"
    )
    return Errors(name, error.max().item(), native_error, allowed)
