"""Fake kernel of `torch.ops.rnp.run_segment`: a run of a converted network's layers in one call.

`run_segment(program, inputs, constants, shift)`: `program` is text, one instruction a line
(csrc/cpu/segment_program.h has the grammar; `rnp.segments` writes it). `inputs` are its maps (N, C, H, W), indices (N,)
int32 and vectors (N, F), in this order; the result holds its outputs in the same order, maps in channels_last. float32,
on a CPU, no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Operands of an instruction that this file reads, by position after the word (segment_program.cpp lists them all).
_CONV_IN, _CONV_OUT, _CONV_MEAN, _CONV_CHANNELS, _CONV_KERNEL = 0, 2, 6, 12, 14
_POOL_IN, _POOL_OUT, _POOL_KERNEL = 0, 1, 3


def _length(size: int, kernel: int, stride: int, padding: int, dilation: int = 1) -> int:
    return (size + padding - dilation * (kernel - 1) - 1) // stride + 1


@torch.library.register_fake("rnp::run_segment")
def _run_segment_fake(
    program: str, inputs: Sequence[Tensor], constants: Sequence[Tensor], shift: float
) -> list[Tensor]:
    maps: dict[int, tuple[int, int, int]] = {}
    vectors: dict[int, int] = {}
    queue, outputs = list(inputs), []
    batch = inputs[0].shape[0]
    for line in program.splitlines():
        word, *rest = line.split()
        if word in ("in", "out"):
            kind, slot = rest[0], int(rest[1])
            if word == "in":
                given = queue.pop(0)
                if kind == "map":
                    maps[slot] = (given.shape[1], given.shape[2], given.shape[3])
                elif kind == "vector":
                    vectors[slot] = int(rest[2])
            elif kind == "map":
                size = (batch, *maps[slot])
                outputs.append(inputs[0].new_empty(size, dtype=torch.float32).to(memory_format=torch.channels_last))
            elif kind == "index":
                outputs.append(inputs[0].new_empty((batch,), dtype=torch.int32))
            else:
                outputs.append(inputs[0].new_empty((batch, vectors[slot]), dtype=torch.float32))
            continue
        n = [int(value) for value in rest]
        if word == "conv":
            kh, kw, sh, sw, top, bottom, left, right, dh, dw = n[_CONV_KERNEL : _CONV_KERNEL + 10]
            _, height, width = maps[n[_CONV_IN]]
            channels = n[_CONV_CHANNELS]
            maps[n[_CONV_OUT]] = (
                channels, _length(height, kh, sh, top + bottom, dh), _length(width, kw, sw, left + right, dw)
            )  # fmt: skip
            vectors[n[_CONV_MEAN]] = channels
        elif word == "max_pool":
            kh, kw, sh, sw, ph, pw = n[_POOL_KERNEL : _POOL_KERNEL + 6]
            channels, height, width = maps[n[_POOL_IN]]
            maps[n[_POOL_OUT]] = (channels, _length(height, kh, sh, 2 * ph), _length(width, kw, sw, 2 * pw))
        elif word == "add":
            maps[n[2]] = maps[n[0]]
        elif word == "decide":
            vectors[n[3]] = n[9]
    return outputs


def release_memory() -> None:
    """Free the buffers that `run_segment` keeps from call to call for its activations."""
    torch.ops.rnp.release_segment_memory()
