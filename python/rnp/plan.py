"""The flat plan a converted network runs in eval mode: a list of small functions around the registered operators.

Everything that does not depend on the images is settled when the plan is built (plan_builder.py): BatchNorms folded
into scale and bias tables, weights packed, which tails may stay undefined, where prefixes come from, when a tensor is
let go. It exists twice. `instructions` call one operator a layer: for `torch.compile`, `torch.export` and the other
backends. `calls` hand whole runs of layers to one operator (segments.py): for eager use on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .segments import Instruction, Slot, segments

if TYPE_CHECKING:
    from .decider import Decider


@dataclass
class Run:
    """What one execution of a plan carries along."""

    operator: Callable[..., tuple[Tensor, Tensor]] | None
    decide: Decider | None
    shift: float
    values: list[Any]
    prefixes: list[Tensor | None]


@dataclass
class Source:
    """One thing a plan was made from: a module or tensor in its registry; for a tensor also address and version."""

    registry: dict[str, Any]
    name: str
    thing: Any
    pointer: int = 0
    version: int = 0


@dataclass
class Plan:
    """Instructions, what they were made from, and for an agent that decides inside the segments its arguments."""

    instructions: list[Instruction]
    value_slots: int
    prefix_slots: int
    input_slot: int
    output_slot: int
    action_slots: list[int]  # of `prefixes`, one for each decision
    agent: list[tuple[Tensor, ...]] | None = None
    traced: bool = False
    sources: list[Source] = field(default_factory=list)

    def __post_init__(self) -> None:
        traced = self.action_slots if self.traced else []
        last = Instruction(lambda run: None, [Slot("map", self.output_slot), *(Slot("index", s) for s in traced)])
        self.calls = segments([*self.instructions, last])
        self.modules = [(s.registry, s.name, s.thing) for s in self.sources if not s.pointer]
        self.tensors = [(s.registry, s.name, s.thing, s.pointer, s.version) for s in self.sources if s.pointer]

    def current(self) -> bool:
        """Whether every module, tensor, storage and version is still the one the plan was made from."""
        for registry, name, thing in self.modules:
            if registry.get(name) is not thing:
                return False
        for registry, name, thing, pointer, version in self.tensors:
            if registry.get(name) is not thing or thing.data_ptr() != pointer or version_of(thing) != version:
                return False
        return True

    def run(self, images: Tensor, operator: Callable[..., Any], decide: Decider | None) -> Any:
        """One operator call a layer."""
        run = self.start(images, operator, decide, 0.0)
        if torch.compiler.is_compiling():
            for instruction in self.instructions:
                instruction.call(run)
        else:
            with torch._C._AutoDispatchBelowAutograd():  # autograd's Python layer costs more than a small convolution
                for instruction in self.instructions:
                    instruction.call(run)
        return run.values[self.output_slot]

    def run_segments(self, images: Tensor, operator: Any, decide: Decider | None, shift: float) -> Run:
        """One operator call for each run of layers. `shift` is the Δp of an agent that decides inside."""
        run = self.start(images, operator, decide, shift)
        with torch._C._AutoDispatchBelowAutograd():
            for call in self.calls:
                call(run)
        return run

    def start(self, images: Tensor, operator: Any, decide: Decider | None, shift: float) -> Run:
        values: list[Any] = [None] * self.value_slots
        values[self.input_slot] = images
        return Run(operator, decide, shift, values, [None] * self.prefix_slots)

    def actions(self, run: Run) -> Tensor:
        """(N, L) int32, where an agent decided inside the segments."""
        return torch.stack([run.prefixes[slot] for slot in self.action_slots], 1)


def version_of(tensor: Tensor) -> int:
    """The tensor's version counter, 0 where it has none."""
    return 0 if tensor.is_inference() else tensor._version


def watch(module: nn.Module) -> list[Source]:
    """Sources that notice a change of a parameter or buffer of the module, or below it: those of a parametrization."""
    found = []
    for each in module.modules():
        found += [Source(each._modules, name, child) for name, child in each._modules.items()]
        for registry in (each._parameters, each._buffers):
            for name, t in registry.items():
                if name == "num_batches_tracked":
                    continue
                found.append(
                    Source(registry, name, t) if t is None else Source(registry, name, t, t.data_ptr(), version_of(t))
                )
    return found
