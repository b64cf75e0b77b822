"""Runs of a plan's instructions that one operator, `torch.ops.rnp.run_segment`, does at once.

The builder gives every instruction that the operator knows a `Native` description; `segments` gathers neighbouring ones
into programs. What is left of Python is a call for each run between two points where Python has to act: a policy of the
user's, a layer that no kernel knows, the classifier.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rnp_kernels.algorithms import get_algorithm
from rnp_kernels.packing import LayerTransforms
from rnp_kernels.segment import CONV_WINOGRAD, Size, sizes  # registers the operator's fake kernel

RUN_SEGMENT = torch.ops.rnp.run_segment.default
KINDS = ("map", "index", "vector")
_MOST_VARIANTS = 16  # of a segment's program: one for each size of the images and each algorithm


@dataclass(frozen=True)
class Slot:
    """Where a value of a run lives: `values` (maps and vectors) or `prefixes` (indices); number 0 is nothing.

    `size`: what an index cannot exceed, or the elements of a sample's vector.
    """

    kind: str
    number: int
    size: int = 0


@dataclass(frozen=True)
class Written:
    """The slot that an operand writes."""

    slot: Slot


@dataclass(eq=False)
class Constants:
    """Tensors handed to the operator one after the other; the operand is the position of the first."""

    tensors: Sequence[Tensor]


@dataclass(eq=False)
class Table:
    """A table of scale or bias, laid side by side with all others; the operand is its first element, −1 for None."""

    tensor: Tensor | None


@dataclass(eq=False)
class Transformed:
    """Weights transformed for Winograd, where the rule names a tile for the size of the convolution's input."""

    weights: LayerTransforms | None


@dataclass
class Native:
    """An instruction of the operator: its word, and its operands in the order of segment_program.cpp."""

    word: str
    operands: list[Operand]


Operand = Slot | Written | Constants | Table | Transformed | int


@dataclass
class Instruction:
    """One step of a plan: a function of the run, what it reads, and what the operator would do instead."""

    call: Callable[[Any], None]
    reads: list[Slot] = field(default_factory=list)
    native: Native | None = None
    frees: list[int] = field(default_factory=list)  # value slots whose tensors are let go


def segments(instructions: list[Instruction]) -> list[Callable[[Any], None]]:
    """The plan as calls: runs of native instructions in one each, the others as they are."""
    calls: list[Callable[[Any], None]] = []
    at = 0
    while at < len(instructions):
        end = at
        while end < len(instructions) and (instructions[end].native is not None or instructions[end].frees):
            end += 1
        run = [i for i in instructions[at:end] if i.native is not None]
        if not run:
            calls.append(instructions[at].call)
            at += 1
            continue
        later = {(s.kind, s.number) for i in instructions[end:] for s in i.reads}
        calls.append(_segment(run, later))
        freed = [slot for i in instructions[at:end] for slot in i.frees]
        if freed:
            calls.append(release(freed))
        at = end
    return calls


def release(slots: list[int]) -> Callable[[Any], None]:
    """Let the tensors of value slots go."""

    def free(run: Any) -> None:
        for slot in slots:
            run.values[slot] = None

    return free


class _Writer:
    """Writes a program: numbers the slots, gathers inputs, tables and other constants."""

    def __init__(self) -> None:
        self.numbers: dict[str, dict[int, int]] = {kind: {} for kind in KINDS}
        self.inputs: dict[str, list[Slot]] = {kind: [] for kind in KINDS}
        self.written: list[Slot] = []
        self.constants: list[Tensor] = []
        self.tables: list[Tensor] = []
        self.table_floats = 0
        self.lines: list[str] = []
        self.transforms: list[tuple[int, LayerTransforms | None]] = []  # line of each convolution, and its weights

    def number(self, slot: Slot) -> int:
        numbers = self.numbers[slot.kind]
        return numbers.setdefault(slot.number, len(numbers))

    def operand(self, value: Operand) -> int:
        if isinstance(value, int):
            return value
        if isinstance(value, Constants):
            first = 1 + len(self.constants)  # constant 0 holds the tables
            self.constants += value.tensors
            return first
        if isinstance(value, Table):
            if value.tensor is None:
                return -1
            first = self.table_floats
            self.tables.append(value.tensor.reshape(-1))
            self.table_floats += value.tensor.numel()
            return first
        if isinstance(value, Transformed):
            self.transforms.append((len(self.lines), value.weights))
            return -1
        slot = value.slot if isinstance(value, Written) else value
        if slot.number == 0:
            return -1
        if isinstance(value, Written):
            self.written.append(slot)
        elif slot.number not in self.numbers[slot.kind]:
            self.inputs[slot.kind].append(slot)
        return self.number(slot)

    def add(self, native: Native) -> None:
        self.lines.append(" ".join([native.word, *(str(self.operand(value)) for value in native.operands)]))


def _segment(run: list[Instruction], later: set[tuple[str, int]]) -> Callable[[Any], None]:
    writer = _Writer()
    for instruction in run:
        assert instruction.native is not None
        writer.add(instruction.native)
    inputs = [slot for kind in KINDS for slot in writer.inputs[kind]]
    outputs = [slot for kind in KINDS for slot in writer.written if slot.kind == kind and (kind, slot.number) in later]
    head = ["slots " + " ".join(str(len(writer.numbers[kind])) for kind in KINDS)]
    for slot in inputs:
        size = "" if slot.kind == "map" else f" {slot.size}"
        head.append(f"in {slot.kind} {writer.number(slot)}{size}")
    tail = [f"out {slot.kind} {writer.number(slot)}" for slot in outputs]
    lines = [*head, *writer.lines, *tail]
    table = torch.cat(writer.tables).contiguous() if writer.tables else torch.empty(0)
    constants = [table, *(t.detach() for t in writer.constants)]
    transforms = [(len(head) + line, weights) for line, weights in writer.transforms]
    reads = [(slot.kind == "index", slot.number) for slot in inputs]
    writes = [(slot.kind == "index", slot.number) for slot in outputs]
    maps = [number for (_, number), slot in zip(reads, inputs, strict=True) if slot.kind == "map"]
    variants: dict[Any, tuple[str, list[Tensor]]] = {}

    def segment(state: Any) -> None:
        values, prefixes = state.values, state.prefixes
        given = [prefixes[number] if index else values[number] for index, number in reads]
        key = (get_algorithm(), *(values[number].shape[1:] for number in maps))
        variant = variants.get(key)
        if variant is None:
            if len(variants) >= _MOST_VARIANTS:
                variants.clear()
            variant = variants[key] = _with_transforms(lines, constants, transforms, key[1:])
        results = RUN_SEGMENT(variant[0], given, variant[1], state.shift)
        for (index, number), result in zip(writes, results, strict=True):
            if index:
                prefixes[number] = result
            else:
                values[number] = result

    return segment


def _with_transforms(
    lines: list[str],
    constants: list[Tensor],
    transforms: list[tuple[int, LayerTransforms | None]],
    maps: Sequence[Size],
) -> tuple[str, list[Tensor]]:
    """The program and the constants for map inputs of these sizes, with the transformed weights that they call for."""
    lines, constants = list(lines), list(constants)
    _, _, read = sizes("\n".join(lines), maps)
    for (line, weights), (_, height, width) in zip(transforms, read, strict=True):
        transformed = None if weights is None else weights.get((height, width))
        if transformed is not None:
            words = lines[line].split()
            words[1 + CONV_WINOGRAD] = str(len(constants))
            lines[line] = " ".join(words)
            constants.append(transformed)
    return "\n".join(lines), constants
