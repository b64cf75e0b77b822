"""One suite for every backend: the same cases for reference, cpu, triton and cuda, whichever can run here.

Without a GPU the Triton kernels run interpreted (tests/triton_backend/test_interpreted.py starts this file so). What
needs a GPU is in test_on_a_gpu.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import rnp_kernels
from rnp_kernels import conformance, registrations, testing
from rnp_kernels.conformance import QUICK, QUICK_GRADIENTS, QUICK_INVARIANCE, Target
from rnp_kernels.testing import Case

# Where it is slow: what changes with the dtype. float64 takes a step of the interpreter for every product's term.
QUICK_HALF = frozenset({"mixed, stem", "prefix, depthwise", "everything", "skipped tail, pooled"})
QUICK_DOUBLE = frozenset({"1x1 stride 2", "one channel", "prefix, depthwise"})


def parameters(*dtypes: torch.dtype, quick: frozenset[str], half: frozenset[str] = QUICK_HALF) -> list[Any]:
    """(target, dtype, case) for every target; where it is slow, float32 gets the `quick` cases, the others some."""
    found = []
    for target in conformance.targets():
        for dtype in dtypes:
            names = {torch.float32: quick, torch.float64: QUICK_DOUBLE}.get(dtype, half & quick)
            for case in conformance.cases_for(target, names):
                found.append(pytest.param(target, dtype, case, id=f"{target}-{dtype}-{case}".replace("torch.", "")))
    return found


@pytest.fixture
def running(request: pytest.FixtureRequest) -> Iterator[Target]:
    """The target's backend in force, or the test skipped with the reason why it cannot be."""
    target: Target = request.getfixturevalue("target")
    if target.why_not is not None:
        pytest.skip(f"{target}: {target.why_not}")
    # Beside native torch, which is free to use TF32 where we do not: test_on_a_gpu.py tests that.
    with rnp_kernels.backend(target.backend), conformance.float32_products("ieee"):
        yield target


@pytest.mark.parametrize(("target", "dtype", "case"), parameters(*conformance.DTYPES, quick=QUICK))
def test_output(running: Target, target: Target, dtype: torch.dtype, case: Case, poisoned_memory: None) -> None:
    arguments = testing.make(case, dtype, target.device)
    output, means = conformance.call(case, arguments)
    conformance.check_output(case, arguments, output, means)
    if target.backend != "reference":  # as the fake kernel tells torch.compile
        layout = registrations.output_memory_format(arguments["input"], arguments["weight"])
        assert output.is_contiguous(memory_format=layout)


@pytest.mark.parametrize(
    ("target", "dtype", "case"),
    [p for p in parameters(torch.float32, torch.bfloat16, quick=QUICK_GRADIENTS) if p.values[2].layout != "expanded"],
)
def test_gradients(running: Target, target: Target, dtype: torch.dtype, case: Case) -> None:
    conformance.check_gradients(case, dtype, target.device)


@pytest.mark.parametrize(
    ("target", "dtype", "case"),
    [
        p
        for p in parameters(torch.float32, torch.bfloat16, quick=QUICK_INVARIANCE, half=frozenset({"everything"}))
        if p.values[2].input[0] > 0 and p.values[2].layout != "expanded" and p.values[0].backend != "reference"
    ],
)
def test_invariance(running: Target, target: Target, dtype: torch.dtype, case: Case, poisoned_memory: None) -> None:
    conformance.check_invariance(case, dtype, target.device)


@pytest.mark.parametrize("first", [True, False], ids=["first step", "later step"])
@pytest.mark.parametrize("agent", conformance.AGENTS)
@pytest.mark.parametrize("target", conformance.targets(), ids=str)
def test_agent_step(running: Target, target: Target, agent: str, first: bool) -> None:
    operator = conformance.agent_operator(target.backend)
    if operator is None:
        pytest.skip(f"{target}: plain torch takes the agent's step")
    conformance.check_agent_step(operator, agent, target.device, first)


@pytest.mark.parametrize("target", [t for t in conformance.targets() if t.backend != "reference"], ids=str)
def test_prefixes_out_of_range(running: Target, target: Target) -> None:
    """A CPU raises; a GPU clamps, since raising would stall the stream."""
    case = testing.case("prefix of the output alone")
    arguments = testing.make(case, device=target.device)
    right, _ = conformance.call(case, arguments | {"out_prefix": arguments["out_prefix"].clamp(max=33)})
    assert right.isfinite().all()
    wrong = arguments | {"out_prefix": torch.tensor([71, -1, 1 << 30, 70], dtype=torch.int32, device=target.device)}
    if target.device == "cpu":
        with pytest.raises(RuntimeError, match="71"):
            conformance.call(case, wrong)
        return
    clamped = arguments | {"out_prefix": torch.tensor([70, 0, 70, 70], dtype=torch.int32, device=target.device)}
    assert torch.equal(conformance.call(case, wrong)[0], conformance.call(case, clamped)[0])
