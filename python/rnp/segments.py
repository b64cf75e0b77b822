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

import rnp_kernels.segment  # noqa: F401 (registers the operator's fake kernel)

RUN_SEGMENT = torch.ops.rnp.run_segment.default
KINDS = ("map", "index", "vector")


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


@dataclass
class Native:
    """An instruction of the operator: its word, and its operands in the order of segment_program.cpp."""

    word: str
    operands: list[Slot | Written | Constants | Table | int]


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

    def number(self, slot: Slot) -> int:
        numbers = self.numbers[slot.kind]
        return numbers.setdefault(slot.number, len(numbers))

    def operand(self, value: Slot | Written | Constants | Table | int) -> int:
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
    program = "\n".join([*head, *writer.lines, *tail])
    table = torch.cat(writer.tables).contiguous() if writer.tables else torch.empty(0)
    constants = [table, *(t.detach() for t in writer.constants)]
    reads = [(slot.kind == "index", slot.number) for slot in inputs]
    writes = [(slot.kind == "index", slot.number) for slot in outputs]

    def segment(state: Any) -> None:
        values, prefixes = state.values, state.prefixes
        given = [prefixes[number] if index else values[number] for index, number in reads]
        results = RUN_SEGMENT(program, given, constants, state.shift)
        for (index, number), result in zip(writes, results, strict=True):
            if index:
                prefixes[number] = result
            else:
                values[number] = result

    return segment
