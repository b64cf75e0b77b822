"""Fixtures that all tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import rnp_kernels
from rnp_kernels import _C


@pytest.fixture(params=_C.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each CPU instruction set of this machine in turn, forced for the whole process."""
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fresh tensors hold NaN, so an element that a kernel forgets to write shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(4).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores the number of threads that a test changes."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=[False, True], ids=["as on Zen 4", "as on a Xeon"])
def xeon(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Rules that differ by processor (csrc/core/processor.h), on whatever machine the tests run."""
    before = _C.processor()
    _C.set_processor([request.param] * 4)
    yield request.param
    _C.set_processor(before)


@pytest.fixture
def direct() -> Iterator[None]:
    """No Winograd: for rules that hold for direct convolution alone, as equal bits with and without gradients."""
    with rnp_kernels.algorithm("direct"):
        yield
