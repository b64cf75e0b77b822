"""From tensors to launches: check, allocate, choose the tile, schedule, launch. Nothing is read back from the device.

Every function here takes the arguments of the operator it implements (csrc/ops.cpp), on CUDA tensors, or on CPU
tensors under TRITON_INTERPRET=1.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import backends, checks, cuda_library
from ..errors import message
from ..registrations import output_memory_format
from . import schedule, tiles
from .agent_step import agent_step_kernel
from .direct import direct_kernel
from .gemm import gemm_kernel
from .kernels import mean_kernel
from .weight_grad import weight_grad_direct_kernel, weight_grad_kernel

_PROGRAMS_PER_MULTIPROCESSOR = 2  # what shared memory and registers of the largest tiles admit (tiles.py)
_RUN_PROGRAMS = 256  # programs a weight gradient is split into, a constant so that the split depends on shapes alone


def launch(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], warps: int, stages: int) -> None:
    """The one place where a kernel is launched, on the current stream of the current device."""
    kernel[grid](**arguments, num_warps=warps, num_stages=stages)


def _device(tensor: Tensor) -> Any:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def precision_of(dtype: torch.dtype) -> str:
    """How float32 products are taken, "tf32" or "ieee": torch's setting for convolutions. ROCm may have no TF32."""
    if dtype is not torch.float32:
        return "tf32"  # of no meaning: other dtypes are multiplied as they are
    return "tf32" if torch.version.hip is None and cuda_library.tf32_allowed() else "ieee"


def _stages(tile: tiles.Tile) -> int:
    # AMD's pipeliner counts the copy in registers; more than two would not fit 64 KB of local memory.
    return min(tile.stages, 2) if torch.version.hip is not None else tile.stages


def _extent(tensor: Tensor) -> int:
    """Elements from the first to the last."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _index_type(*tensors: Tensor | None) -> Any:
    """64-bit offsets wherever 32 bits could overflow."""
    return tl.int64 if any(t is not None and _extent(t) >= 2**31 for t in tensors) else tl.int32


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _programs(tensor: Tensor, items: int) -> int:
    if not tensor.is_cuda:
        return min(items, 2)  # interpreted one after the other; two, so that each takes several items
    return min(items, _PROGRAMS_PER_MULTIPROCESSOR * _multiprocessors(tensor.device))


def _suited_weight(weight: Tensor) -> Tensor:
    """The weight with its input channels next to one another, as a channels_last weight has them; else it is copied."""
    if weight.shape[1] == 1 or weight.stride(1) == 1:
        return weight
    return weight.contiguous(memory_format=torch.channels_last)


def _schedule(
    source: Tensor, batch: int, positions: int, tile: tiles.Tile, channels: tuple[int, int, int],
    in_prefix: Tensor | None, out_prefix: Tensor | None, row: Tensor | None, lines: int, skip: bool, per_sample: bool,
) -> dict[str, Tensor]:  # fmt: skip
    """Launches the schedule; `channels` is (read, written, written a group)."""
    lists = torch.empty(4 * batch + 1, dtype=torch.int32, device=source.device)
    order, size, member, start = lists.split((batch, batch, batch, batch + 1))
    arguments = {
        "in_prefix": in_prefix, "out_prefix": out_prefix, "row": row, "order": order, "size": size, "member": member,
        "start": start, "batch": batch, "channels_in": channels[0], "channels_out": channels[1],
        "group_out": channels[2], "positions": positions, "lines": lines, "TABLE": row is not None, "ROWS": tile.rows,
        "COLUMNS": tile.columns, "SKIP": skip,
        "PER_SAMPLE": per_sample, "HAS_IN": in_prefix is not None, "HAS_OUT": out_prefix is not None,
        "BLOCK": schedule.BLOCK,
    }  # fmt: skip
    if batch <= schedule.ONE_LAUNCH:
        launch(schedule.schedule_kernel, (1,), arguments | {"RANK": True, "SCAN": True}, 8, 1)
    else:
        blocks = triton.cdiv(batch, schedule.BLOCK)
        launch(schedule.schedule_kernel, (blocks,), arguments | {"RANK": True, "SCAN": False}, 8, 1)
        launch(schedule.schedule_kernel, (1,), arguments | {"RANK": False, "SCAN": True}, 8, 1)
    return {"order": order, "size": size, "start": start}


def _strides(tensor: Tensor | None, prefix: str) -> dict[str, int]:
    steps = (0, 0, 0, 0) if tensor is None else tensor.stride()
    return {f"{prefix}_{axis}": step for axis, step in zip("nchw", steps, strict=True)}


def _geometry(
    weight_size: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> dict[str, int]:
    return {
        "KERNEL_H": weight_size[2], "KERNEL_W": weight_size[3], "STRIDE_H": stride[0], "STRIDE_W": stride[1],
        "PAD_H": padding[0], "PAD_W": padding[2], "DILATION_H": dilation[0], "DILATION_W": dilation[1],
    }  # fmt: skip


def _step(table: Tensor | None) -> int:
    """Elements from a line of a table to the next; 0 for a vector."""
    return table.shape[1] if table is not None and table.dim() == 2 else 0


def _log(
    output: Tensor, weight: Tensor, geometry: dict[str, int], groups: int, transposed: bool, kernel: str, chosen: str
) -> None:
    if backends.LOG:
        name = "prefix_conv2d_input_grad" if transposed else "prefix_conv2d"
        stride, padding = (geometry["STRIDE_H"], geometry["STRIDE_W"]), (geometry["PAD_H"], geometry["PAD_W"])
        backends.log(output, weight, stride, padding, groups, f"backend triton, {name}: {kernel}, tile {chosen}")


def _convolve(source: Tensor, weight: Tensor, output: Tensor, geometry: dict[str, int], groups: int, transposed: bool,
              in_prefix: Tensor | None, out_prefix: Tensor | None, scale: Tensor | None = None,
              bias: Tensor | None = None, row: Tensor | None = None, residual: Tensor | None = None, relu: bool = False,
              skip: bool = False, pooled: Tensor | None = None) -> None:  # fmt: skip
    """`output` from `source` by `weight`; transposed: the gradient `output` of the input from that of the output.

    `in_prefix` and `out_prefix` are those of source and output.
    """
    batch, channels_out, out_height, out_width = output.shape
    channels_in, positions = source.shape[1], out_height * out_width
    group_in, group_out = channels_in // groups, channels_out // groups
    precision = precision_of(source.dtype)
    direct = tiles.is_direct(source.dtype, groups, group_in, group_out)
    key = tiles.key_of(source.dtype, precision, direct, positions, group_out)
    tile = tiles.choose(key)
    whole = channels_out if direct else group_out  # direct tiles span groups
    skip = skip and out_prefix is not None
    if not direct:
        weight = _suited_weight(weight)
    inner, outer = (0, 1) if transposed else (1, 0)
    each = triton.cdiv(positions, tile.rows)
    column_tiles = channels_out // whole * triton.cdiv(whole, tile.columns)
    per_sample = pooled is not None
    tables = [table for table in (scale, bias) if table is not None and table.dim() == 2]
    lines, row = (tables[0].shape[0], row) if tables else (1, None)
    uniform = in_prefix is None and out_prefix is None and row is None
    items = (batch * each if per_sample or not uniform else triton.cdiv(batch * positions, tile.rows)) * column_tiles
    lists: dict[str, Any] = {"order": None, "size": None, "start": None}
    sums = (batch * each, channels_out)
    partial = torch.empty(sums, dtype=torch.float32, device=source.device) if per_sample else None
    with _device(source):
        if not uniform:
            channels = (channels_in, channels_out, whole)
            lists = _schedule(
                source, batch, positions, tile, channels, in_prefix, out_prefix, row, lines, skip, per_sample
            )
        arguments = {
            "input": source, "weight": weight, "output": output, "residual": residual,
            "scale": None if scale is None else scale.contiguous(),
            "bias": None if bias is None else bias.contiguous(), "row": row, "partial": partial,
            "in_prefix": in_prefix, "out_prefix": out_prefix, **lists, **_strides(source, "in"),
            "weight_outer": weight.stride(outer), "weight_inner": weight.stride(inner), "weight_h": weight.stride(2),
            "weight_w": weight.stride(3), **_strides(output, "out"), **_strides(residual, "res"), "batch": batch,
            "items": items, "channels_in": channels_in, "channels_out": channels_out, "group_in": group_in,
            "group_out": group_out, "height": source.shape[2], "width": source.shape[3], "out_width": out_width,
            "positions": positions, "lines": lines, "scale_step": _step(scale), "bias_step": _step(bias), **geometry,
            "GROUPED": groups > 1, "TRANSPOSED": transposed,
            "SORTED": not uniform, "HAS_IN": in_prefix is not None, "HAS_OUT": out_prefix is not None,
            "TABLE": row is not None, "SCALE": scale is not None, "BIAS": bias is not None,
            "RESIDUAL": residual is not None, "RELU": relu, "SKIP": skip,
            "POOLED": per_sample, "ALIGNED": whole % 8 == 0, "ROWS": tile.rows, "COLUMNS": tile.columns,
            "INDEX": _index_type(source, output, residual, weight, partial),
        }  # fmt: skip
        if direct:
            kernel: Any = direct_kernel
            arguments["WIDE"] = source.dtype is torch.float64
        else:
            kernel = gemm_kernel
            some_narrow = out_prefix is not None or 0 < whole % tile.columns <= tile.columns // 2
            arguments |= {
                "REMAINDER": in_prefix is not None or group_in % 8 != 0, "PRECISION": precision,
                "NARROW": tile.columns >= 32 and some_narrow, "DEPTH": tile.depth, "STAGES": _stages(tile),
            }  # fmt: skip
        _log(output, weight, geometry, groups, transposed, "direct" if direct else "gemm", f"{key!r} {tile}")
        launch(kernel, (_programs(source, items),), arguments, tile.warps, _stages(tile))
        if pooled is not None:
            arguments = {
                "partial": partial, "out_prefix": out_prefix, "mean": pooled, "channels": channels_out, "parts": each,
                "positions": positions, "SKIP": skip, "HAS_OUT": out_prefix is not None, "BLOCK": 128,
            }  # fmt: skip
            launch(mean_kernel, (batch, triton.cdiv(channels_out, 128)), arguments, 4, 1)


def prefix_conv2d(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int, in_prefix: Tensor | None, out_prefix: Tensor | None, scale: Tensor | None,
    row: Tensor | None, residual: Tensor | None, activation: str, tail: str, pooled: bool, *_packs: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The forward. Packs of the weight are for other kernels; these read the weight itself."""
    checks.check_call(
        input, weight, bias, stride, padding, dilation, groups, in_prefix, out_prefix, scale, row, residual, activation,
        tail,
    )  # fmt: skip
    checks.check_values(in_prefix, "in_prefix", input.shape[1])
    checks.check_values(out_prefix, "out_prefix", weight.shape[0])
    tables = [table for table in (scale, bias) if table is not None and table.dim() == 2]
    if tables:
        checks.check_values(row, "row", tables[0].shape[0] - 1)
    batch, channels = input.shape[0], weight.shape[0]
    size = (batch, channels, *checks.output_size(input, weight, stride, padding, dilation))
    output = torch.empty(
        size, dtype=input.dtype, device=input.device, memory_format=output_memory_format(input, weight)
    )
    mean = input.new_empty((batch, channels) if pooled else (0,), dtype=torch.float32)
    if batch and channels:
        geometry = _geometry(weight.shape, stride, padding, dilation)
        _convolve(
            input, weight, output, geometry, groups, False, _contiguous(in_prefix), _contiguous(out_prefix), scale,
            bias, _contiguous(row), residual, activation == "relu", tail == "skip", mean if pooled else None,
        )  # fmt: skip
    return output, mean


def _contiguous(index: Tensor | None) -> Tensor | None:
    return None if index is None else index.contiguous()


def input_grad(
    grad_output: Tensor, weight: Tensor, input_size: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int, in_prefix: Tensor | None, out_prefix: Tensor | None,
) -> Tensor:  # fmt: skip
    """The gradient of the input, zero beyond each in-prefix; only live output channels are read."""
    grad = torch.empty(
        tuple(input_size), dtype=grad_output.dtype, device=grad_output.device,
        memory_format=torch._prims_common.suggest_memory_format(grad_output),
    )  # fmt: skip
    if grad.numel():
        geometry = _geometry(weight.shape, stride, padding, dilation)
        _convolve(grad_output, weight, grad, geometry, groups, True, _contiguous(out_prefix), _contiguous(in_prefix))
    return grad


def weight_grad(
    grad_output: Tensor, input: Tensor, weight_size: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int, in_prefix: Tensor | None, out_prefix: Tensor | None,
) -> Tensor:  # fmt: skip
    """The gradient of the weight; of each sample only its live channels on both sides are multiplied."""
    batch, channels_out, out_height, out_width = grad_output.shape
    group_in, group_out = weight_size[1], channels_out // groups
    taps = weight_size[2] * weight_size[3]
    if batch == 0 or 0 in weight_size:
        return grad_output.new_zeros(tuple(weight_size))
    dtype = input.dtype
    direct = tiles.is_direct(dtype, groups, group_in, group_out)
    precision = precision_of(dtype)
    key = tiles.key_of(dtype, precision, True, 0, 0) if direct else f"weight {tiles.operand(dtype, precision)}"
    tile = tiles.choose(key)
    row_tiles, column_tiles = triton.cdiv(group_out, tile.rows), triton.cdiv(group_in, tile.columns)
    if direct:
        grid: tuple[int, ...] = (triton.cdiv(channels_out, tile.columns), group_in * taps)
    else:
        grid = (groups * row_tiles * column_tiles * taps,)
    count = grid[0] * (grid[1] if direct else 1)
    each = triton.cdiv(batch, max(1, min(batch, _RUN_PROGRAMS // count)))
    runs = triton.cdiv(batch, each)
    wide = torch.promote_types(dtype, torch.float32)
    partial = torch.empty((runs, taps, channels_out, group_in), dtype=wide, device=input.device)
    arguments = {
        "grad": grad_output, "input": input, "partial": partial, "in_prefix": _contiguous(in_prefix),
        "out_prefix": _contiguous(out_prefix), **_strides(grad_output, "grad"), **_strides(input, "in"),
        "batch": batch, "each": each, "channels_in": input.shape[1], "channels_out": channels_out,
        "group_in": group_in, "group_out": group_out, "height": input.shape[2], "width": input.shape[3],
        "out_width": out_width, "positions": out_height * out_width,
        **_geometry(weight_size, stride, padding, dilation), "HAS_IN": in_prefix is not None,
        "HAS_OUT": out_prefix is not None, "ROWS": tile.rows, "COLUMNS": tile.columns,
        "INDEX": _index_type(grad_output, input, partial),
    }  # fmt: skip
    if direct:
        arguments["WIDE"] = dtype is torch.float64
    else:
        arguments |= {"PRECISION": precision, "DEPTH": tile.depth, "STAGES": _stages(tile)}
    kernel: Any = weight_grad_direct_kernel if direct else weight_grad_kernel
    with _device(input):
        launch(kernel, (*grid, runs), arguments, tile.warps, _stages(tile))
        total = partial.sum(0) if runs > 1 else partial[0]
        total = total.to(dtype).view(weight_size[2], weight_size[3], channels_out, group_in)
        return total.permute(2, 3, 0, 1).contiguous()


def agent_step(
    pooled: Tensor, hidden: Tensor | None, previous_action: Tensor | None, mean: Tensor, inv_std: Tensor,
    encoder_weight: Tensor, encoder_bias: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias_ih: Tensor,
    bias_hh: Tensor, decoder_weight: Tensor, decoder_bias: Tensor, shift: float, channels: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """One decision for every sample: (hidden, q, action, out_prefix)."""
    samples, features = pooled.shape
    size, actions = weight_hh.shape[1], decoder_weight.shape[0]
    outputs = (
        pooled.new_empty(samples, size), pooled.new_empty(samples, actions),
        pooled.new_empty(samples, dtype=torch.int32), pooled.new_empty(samples, dtype=torch.int32),
    )  # fmt: skip
    if samples == 0:
        return outputs
    weights = {
        "mean": mean, "inv_std": inv_std, "encoder_weight": encoder_weight, "encoder_bias": encoder_bias,
        "weight_ih": weight_ih, "weight_hh": weight_hh, "bias_ih": bias_ih, "bias_hh": bias_hh,
        "decoder_weight": decoder_weight, "decoder_bias": decoder_bias,
    }  # fmt: skip
    for name, tensor in weights.items():
        if tensor.dtype is not torch.float32 or tensor.device != pooled.device:
            rule = f"{name} must be float32 on {pooled.device}"
            raise RuntimeError(message("agent_step", rule, f"{tensor.dtype} on {tensor.device}"))
    pooled = pooled.contiguous()
    hidden = None if hidden is None else hidden.contiguous()
    arguments = {
        "pooled": pooled, "hidden_in": hidden, "previous": _contiguous(previous_action),
        **{name: tensor.contiguous() for name, tensor in weights.items()}, "hidden_out": outputs[0],
        "q_out": outputs[1], "action_out": outputs[2], "prefix_out": outputs[3], "pooled_step": features,
        "hidden_step": size, "shift": float(shift), "channels": channels, "features": features,
        "code": encoder_weight.shape[0], "hidden": size, "actions": actions, "inputs": weight_ih.shape[1],
        "HAS_HIDDEN": hidden is not None, "HAS_PREVIOUS": previous_action is not None,
        "HIDDEN": triton.next_power_of_2(size), "ACTIONS": triton.next_power_of_2(actions), "BLOCK": 32,
    }  # fmt: skip
    with _device(pooled):
        launch(agent_step_kernel, (samples,), arguments, 4, 1)
    return outputs
