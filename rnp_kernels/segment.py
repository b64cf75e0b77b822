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
_CONV_IN, _CONV_OUT, _CONV_MEAN, CONV_WINOGRAD, _CONV_CHANNELS, _CONV_KERNEL = 0, 2, 6, 8, 13, 15
_POOL_IN, _POOL_OUT, _POOL_KERNEL = 0, 1, 3

Size = tuple[int, int, int]  # channels, height, width


def _length(size: int, kernel: int, stride: int, padding: int, dilation: int = 1) -> int:
    return (size + padding - dilation * (kernel - 1) - 1) // stride + 1


def sizes(program: str, inputs: Sequence[Size]) -> tuple[dict[int, Size], dict[int, int], list[Size]]:
    """What a program computes for map inputs of these sizes: every map's size, every vector's, and the size of the
    input of each convolution in turn."""
    maps: dict[int, Size] = {}
    vectors: dict[int, int] = {}
    read: list[Size] = []
    given = iter(inputs)
    for line in program.splitlines():
        word, *rest = line.split()
        if word == "in":
            if rest[0] == "map":
                maps[int(rest[1])] = next(given)
            elif rest[0] == "vector":
                vectors[int(rest[1])] = int(rest[2])
            continue
        n = [int(value) for value in rest] if word != "out" else []
        if word == "conv":
            kh, kw, sh, sw, top, bottom, left, right, dh, dw = n[_CONV_KERNEL : _CONV_KERNEL + 10]
            read.append(maps[n[_CONV_IN]])
            _, height, width = read[-1]
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
    return maps, vectors, read


@torch.library.register_fake("rnp::run_segment")
def _run_segment_fake(
    program: str, inputs: Sequence[Tensor], constants: Sequence[Tensor], shift: float
) -> list[Tensor]:
    maps, vectors, _ = sizes(program, [(t.shape[1], t.shape[2], t.shape[3]) for t in inputs if t.dim() == 4])
    like, batch, outputs = inputs[0], inputs[0].shape[0], []
    for line in program.splitlines():
        word, *rest = line.split()
        if word != "out":
            continue
        kind, slot = rest[0], int(rest[1])
        if kind == "map":
            size = (batch, *maps[slot])
            outputs.append(like.new_empty(size, dtype=torch.float32).to(memory_format=torch.channels_last))
        elif kind == "index":
            outputs.append(like.new_empty((batch,), dtype=torch.int32))
        else:
            outputs.append(like.new_empty((batch, vectors[slot]), dtype=torch.float32))
    return outputs


def release_memory() -> None:
    """Free what the CPU keeps from call to call: activations of `run_segment`, outputs of modules (at most 64 MB)."""
    torch.ops.rnp.release_segment_memory()
