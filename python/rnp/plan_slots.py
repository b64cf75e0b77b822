"""The slots of a plan (plan.py): numbers for its values and prefixes, and the instructions that make a prefix.

A value's *group* (N,) int32 1…k is the largest of some decisions' actions; its prefix is ceil(group · C / k). Tables
have a line 0 that is never used, so that a group is at once the `row` of its line.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import graph as g
from .plan import Run
from .segments import Instruction, Native, Slot, Written

Group = frozenset[int] | None
NOTHING = 0  # slot of `values` and `prefixes` that always holds None


class PlanSlots:
    """Slots and instructions of a plan in the making.

    `k`: groups of a layer. `full`: every group is k, and none has a slot. `native`: instructions keep what the
    segments' operator does instead of them. `at_once`: all actions are known before the first layer, so that a handful
    of operations makes all groups and prefixes (`emit_all_prefixes`), where one or two a layer would cost a GPU as much
    as a small convolution.
    """

    def __init__(self, k: int, full: bool, device: torch.device, native: bool, at_once: bool) -> None:
        self.k, self.full, self.device, self.native, self.at_once = k, full, device, native, at_once
        self.alias: dict[str, str] = {}  # values that are another one unchanged
        self.slots: dict[str, int] = {}
        self.prefix_of: dict[tuple[frozenset[int], int | None], int] = {}
        self.lines: dict[tuple[frozenset[int], int], int] = {}  # with `at_once`: group and channels → slot
        self.instructions: list[Instruction] = []
        self.next_value = self.next_prefix = 1

    def emit(self, call: Callable[[Run], None], reads: list[Slot], native: Native | None = None) -> None:
        self.instructions.append(Instruction(call, reads, native if self.native else None))

    def new_value(self) -> int:
        self.next_value += 1
        return self.next_value - 1

    def slot(self, name: str) -> int:
        name = self.root(name)
        if name not in self.slots:
            self.slots[name] = self.new_value()
        return self.slots[name]

    def root(self, name: str) -> str:
        return self.alias.get(name, name)

    def map(self, name: str) -> Slot:
        return Slot("map", self.slot(name))

    def group_slot(self, group: Group) -> int:
        """Slot of the group's tensor (N,) 1…k; emits the maximum that makes it, once."""
        if group is None or self.full:
            return NOTHING
        if self.at_once:
            return self.line(group, self.k)  # of k channels, a live one to each group
        key = (group, None)
        if key not in self.prefix_of:
            # Reuse the largest maximum there is: the group of a residual stream grows by one decision at a time.
            known = [have for have, channels in self.prefix_of if channels is None and have < group]
            first = max(known, key=len)
            rest = self.group_slot(group - first)
            a, target = self.prefix_of[first, None], self.new_prefix(key)

            def maximum(run: Run) -> None:
                run.prefixes[target] = torch.maximum(run.prefixes[a], run.prefixes[rest])

            both = [Slot("index", a, self.k), Slot("index", rest, self.k)]
            self.emit(maximum, both, Native("largest", [*both, Written(Slot("index", target, self.k))]))
        return self.prefix_of[key]

    def prefix_slot(self, group: Group, channels: int) -> int:
        """Slot of the prefix (N,) int32 for a map of `channels`; emits the look-up that makes it, once."""
        if group is None or self.full:
            return NOTHING
        if self.at_once:
            return self.line(group, channels)
        key = (group, channels)
        if key not in self.prefix_of:
            source, target = self.group_slot(group), self.new_prefix(key)
            table = self.prefix_table(channels)

            def look_up(run: Run) -> None:
                run.prefixes[target] = table.index_select(0, run.prefixes[source])

            read, written = Slot("index", source, self.k), Written(Slot("index", target, channels))
            self.emit(look_up, [read], Native("prefix", [read, written, channels, self.k]))
        return self.prefix_of[key]

    def line(self, group: frozenset[int], channels: int) -> int:
        """Slot of one line of what `emit_all_prefixes` makes."""
        key = (group, channels)
        if key not in self.lines:
            self.lines[key] = self.next_prefix
            self.next_prefix += 1
        return self.lines[key]

    def emit_all_prefixes(self, at: int, actions: list[int]) -> None:
        """Makes all `lines`, each a contiguous (N,) int32, from the actions in these slots, as instruction `at`."""
        if not self.lines:
            return
        slots = list(self.lines.values())
        members = [sorted(group) for group, _ in self.lines]
        widest = max(len(decisions) for decisions in members)
        padded = [decisions + decisions[:1] * (widest - len(decisions)) for decisions in members]
        index = torch.tensor(padded, dtype=torch.int32, device=self.device).view(-1)
        tables = torch.stack([self.prefix_table(channels) for _, channels in self.lines])  # (lines, k + 1)

        def make_all(run: Run) -> None:
            taken = torch.stack([run.prefixes[slot] for slot in actions])  # (L, N)
            groups = taken.index_select(0, index)
            if widest > 1:
                groups = groups.view(len(slots), widest, groups.shape[1]).amax(1)
            for slot, line in zip(slots, tables.gather(1, groups.long()).unbind(0), strict=True):
                run.prefixes[slot] = line

        self.instructions.insert(at, Instruction(make_all, [Slot("index", slot, self.k) for slot in actions]))

    def prefix_table(self, channels: int) -> Tensor:
        """Group 0…k → live channels (k + 1,) int32."""
        sizes = [0] + [g.prefix_size(a, channels, self.k) for a in range(1, self.k + 1)]
        return torch.tensor(sizes, dtype=torch.int32, device=self.device)

    def new_prefix(self, key: tuple[frozenset[int], int | None]) -> int:
        self.prefix_of[key] = self.next_prefix
        self.next_prefix += 1
        return self.prefix_of[key]
