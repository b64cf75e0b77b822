"""`prefix_conv2d` and `pack_weight`: the public functions in front of the registered operators `torch.ops.rnp.*`."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from . import backends, checks, cuda_library, flops, gradients, reference, registrations, stock, transforms  # noqa: F401 (some register on import)
from .errors import message
from .triton import operators as triton_operators

_OPERATOR = torch.ops.rnp.prefix_conv2d.default
_below_autograd = torch._C._AutoDispatchBelowAutograd
_PLAIN = (Tensor, torch.nn.Parameter, type(None))


def needs_autograd(*tensors: Tensor | None) -> bool:
    """Whether autograd must see the call. What a transform wraps does not say so (`transforms`)."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def all_plain(*tensors: Any) -> bool:
    """Whether each is absent or of torch's own classes: no fake tensor, no Proxy, no subclass that looks at calls."""
    return all(type(t) in _PLAIN for t in tensors)


def _reference(arguments: tuple[Any, ...]) -> tuple[Tensor, Tensor | None]:
    """The specification behind the same checks as the operator's, those of values included."""
    checks.check_call(*arguments[:14])
    (input, weight, bias, stride, padding, dilation, groups, in_prefix, out_prefix, scale, row, residual, activation,
     tail, pooled, _packed, _winograd) = arguments  # fmt: skip
    checks.check_values(in_prefix, "in_prefix", input.shape[1])
    checks.check_values(out_prefix, "out_prefix", weight.shape[0])
    lines = [table.shape[0] for table in (scale, bias) if table is not None and table.dim() == 2]
    checks.check_values(row, "row", (lines[0] if lines else 2**31) - 1)
    device = input.device.type
    autocast = device in ("cpu", "cuda") and torch.is_autocast_enabled(device)
    if autocast:
        input, weight, bias, residual = registrations.autocast_operands(device, input, weight, bias, scale, residual)
        checks.check_types(input, weight, autocast=False)
    dtype = input.dtype
    if not torch.compiler.is_compiling():
        right = gradients.right_dtype(input, weight, stride, padding, dilation, groups)
        input, weight, residual = input.to(right), weight.to(right), None if residual is None else residual.to(right)
    with torch.autocast(device, enabled=False) if autocast else contextlib.nullcontext():
        output, mean = reference.prefix_conv2d(
            input, weight, bias, stride, padding, dilation, groups, in_prefix=in_prefix, out_prefix=out_prefix,
            scale=scale, row=row, residual=residual, activation=activation, tail=tail, pooled=pooled,
        )  # fmt: skip
    return output.to(dtype), mean


def _describe(name: str, arguments: tuple[Any, ...]) -> str:
    """For RNP_LOG=1. Arguments that the operator is about to refuse have no kernel."""
    if name not in ("cpu", "cuda"):
        return f"backend {name}"
    try:
        checks.check_call(*arguments[:14])
    except (ValueError, TypeError):
        return "refused"
    if name == "cuda":
        return f"backend cuda, {cuda_library.describe_kernel(arguments)}"
    return f"backend cpu, {stock.describe_operator(arguments)}"


def _run(arguments: tuple[Any, ...]) -> tuple[Tensor, Tensor | None]:
    """The operator's arguments, in the schema's order, on the backend in force.

    What needs no gradient skips autograd's Python layer, which costs more than a small convolution.
    """
    input, weight, bias, *_, scale, _row, residual, _activation, _tail, _pooled, _packed, _winograd = arguments
    name, compiling = backends.resolve(input), torch.compiler.is_compiling()
    transformed = compiling or transforms.in_force()
    if transformed and (
        transforms.differentiating() or (not compiling and transforms.has_tangent(input, weight, bias, scale, residual))
    ):
        name = "reference"
    if backends.LOG and name != "triton" and not compiling:  # which logs kernel and tile itself
        backends.log(input, weight, arguments[3], arguments[4], arguments[6], _describe(name, arguments))
    if name == "reference":
        return _reference(arguments)
    if name == "cuda" and not compiling:
        cuda_library.follow_tf32()
    operator = triton_operators.PREFIX_CONV2D if name == "triton" else _OPERATOR
    # A slice of what torch.vmap maps over may need a gradient though the whole does not say so.
    if transformed or needs_autograd(input, weight, bias, scale, residual):
        return operator(*arguments)
    with _below_autograd():
        return operator(*arguments)


def run_below_autograd(*arguments: Any) -> tuple[Tensor, Tensor]:
    with _below_autograd():
        return _OPERATOR(*arguments)


def _call(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: int | Sequence[int],
    padding: int | Sequence[int] | str, dilation: int | Sequence[int], groups: int, in_prefix: Tensor | None,
    out_prefix: Tensor | None, scale: Tensor | None, row: Tensor | None, residual: Tensor | None, activation: str,
    tail: str, pooled: bool, packed: Tensor | None, winograd: Tensor | None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    stride, dilation = checks.pair(stride, "stride"), checks.pair(dilation, "dilation")
    padding = checks.four_paddings(padding, weight.shape[2:], stride, dilation)
    groups = checks.integer(groups, "groups")
    if type(pooled) is not bool:  # the operator would take numbers, and None
        raise TypeError(message("prefix_conv2d", "pooled must be a bool", repr(pooled)))
    batched = input.dim() == 4
    if not batched:
        input = input.unsqueeze(0)
        residual = residual if residual is None else residual.unsqueeze(0)
    if row is not None:
        checks.check_lines(scale, bias, input.shape[0])
    output, mean = _run(
        (input, weight, bias, stride, padding, dilation, groups, in_prefix, out_prefix, scale, row, residual,
         activation, tail, pooled, packed, winograd)
    )  # fmt: skip
    if not batched:
        output, mean = output.squeeze(0), mean.squeeze(0) if pooled else mean
    return (output, mean) if pooled else output


def _fault(arguments: tuple[Any, ...]) -> Exception | None:
    """What a caller's arguments break, in Python's exception types, or None."""
    try:
        checks.check_call(*arguments)
    except (ValueError, TypeError) as error:
        return error
    return None


def prefix_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    in_prefix: Tensor | None = None,
    out_prefix: Tensor | None = None,
    scale: Tensor | None = None,
    row: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    tail: str = "zero",
    pooled: bool = False,
    packed: Tensor | None = None,
    winograd: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """2-D convolution over only the live channel prefix of each sample of a batch.

    With every option at its default this is `torch.nn.functional.conv2d`. For each sample n: input channels from
    `in_prefix[n]` on count as zero and are never read; `scale * conv2d(input, weight) + bias` is computed for the
    output channels below `out_prefix[n]`, and the channels beyond contribute nothing; then `residual` is added to all
    channels and the activation applied. `rnp_kernels.reference.prefix_conv2d` is the definition in plain torch.

    The kernels have gradients of any order in reverse mode. Under `torch.func.grad`, `vjp`, `jvp` and what is made of
    them (`jacrev`, `hessian`, gradients of samples), and for dual tensors of forward-mode autograd, that definition
    runs instead, and skips no work. Under `torch.vmap` alone the kernels run, once for each slice, with gradients.

    Args:
        input: (N, C_in, H, W) or (C_in, H, W); float32, float64, float16 or bfloat16. channels_last is the fast layout.
        weight: (C_out, C_in / groups, KH, KW), of the input's dtype.
        bias: (C_out,), or a table (T, C_out) of which `row` names each sample's line; of the input's dtype or float32.
        stride, dilation: an int or (vertical, horizontal). An int may be whatever conv2d takes for one.
        padding: an int, (vertical, horizontal), (top, bottom, left, right), "valid" or "same".
        groups: as in conv2d; a prefix counts channels in their order across groups.
        in_prefix: int32 (N,), live input channels of each sample, 0...C_in. None: all.
        out_prefix: int32 (N,), live output channels of each sample, 0...C_out. None: all.
        scale: like `bias`; None: 1.
        row: int32 (N,), lines of the tables, 0...T-1.
        residual: of the output's shape and dtype.
        activation: "none" or "relu".
        tail: "zero", or "skip" to leave the output channels from `out_prefix[n]` on undefined (not with a residual).
        pooled: also return the mean over positions of the output, tails 0 where skipped, as (N, C_out) float32.
        packed: `pack_weight(weight, groups)`, to spare packing at every call. One element of each filter is compared
            with it, so most stale packs are noticed and not used; whoever edits weights should pack again.
        winograd: `pack_winograd(weight, tile)`, on a CPU: samples for which the algorithm in force
            (`rnp_kernels.set_algorithm`) names that tile are computed by it. None: the call transforms weights for
            3x3 layers of 400 output positions or more, and computes everything else directly.

    Returns:
        The output (N, C_out, OH, OW), in the layout conv2d would give it; with `pooled`, a pair of it and the means. An
        unbatched input gives (C_out, OH, OW) and (C_out,).

    Raises:
        ValueError, TypeError: an argument breaks a rule above.
        RuntimeError: on a CPU, a prefix or row out of range; or a backend that cannot run.

    Source: the channel groups of J. Lin, Y. Rao, J. Lu, J. Zhou, Runtime Neural Pruning, NIPS 2017.
    """
    if has_torch_function((input, weight, bias)):
        return handle_torch_function(
            prefix_conv2d, (input, weight, bias), input, weight, bias, stride, padding, dilation, groups,
            in_prefix=in_prefix, out_prefix=out_prefix, scale=scale, row=row, residual=residual, activation=activation,
            tail=tail, pooled=pooled, packed=packed, winograd=winograd,
        )  # fmt: skip
    arguments = (input, weight, bias, stride, padding, dilation, groups, in_prefix, out_prefix, scale, row, residual,
                 activation, tail, pooled, packed, winograd)  # fmt: skip
    if torch.compiler.is_compiling():  # the fake kernel checks, once per graph
        return _call(*arguments)
    try:
        return _call(*arguments)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
        # The operator checks everything before it starts, in less time than Python would take. Only now the rule is
        # looked up, to be raised as the exception type that Python callers expect.
        fault = _fault(arguments[:14])
        if fault is None:
            raise
    raise fault


def pack_weight(weight: Tensor, groups: int = 1) -> Tensor | None:
    """`weight` (C_out, C_in / groups, KH, KW) in the kernels' own layout, for `prefix_conv2d(..., packed=...)`.

    The result is opaque: 1-D, float32, valid for this weight as it is now and for no other. None where no kernel packs.
    ValueError for a weight on the meta device, which holds nothing to pack.
    """
    if weight.is_meta:
        raise ValueError(message("pack_weight", "weight must hold values, on a CPU or a GPU", "device meta"))
    return torch.ops.rnp.pack_weight(weight.detach(), groups)


def pack_winograd(weight: Tensor, tile: int = 4) -> Tensor:
    """`weight` (C_out, C_in, 3, 3) float32 transformed for F(tile x tile, 3x3), tile 2 or 4.

    Or (C_out, C_in, 7, 7), C_in at most 4, with tile 4: for a stride of 2, where 2x2 pixels are folded into channels.
    For `prefix_conv2d(..., winograd=...)` on a CPU. The result is opaque: 1-D, float32, 4 (tile 4) or 16/9 (tile 2)
    times the weight's size, valid for this weight as it is now and for no other. RuntimeError for another weight or
    tile.
    """
    return torch.ops.rnp.pack_winograd(weight.detach(), tile)
