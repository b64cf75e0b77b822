"""`torch.ops.rnp.max_pool2d` against torch's own pooling, on the live channels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rnp_kernels import _C
from rnp_kernels.max_pool2d import runs_on, takes  # registers the fake kernel

OP = torch.ops.rnp.max_pool2d.default
CASES = {  # input, kernel, stride, padding
    "vgg": ((3, 32, 8, 8), [2, 2], [2, 2], [0, 0]),
    "resnet": ((2, 20, 9, 11), [3, 3], [2, 2], [1, 1]),
    "overlapping": ((4, 40, 7, 5), [3, 3], [1, 1], [1, 1]),
    "asymmetric": ((2, 17, 6, 6), [3, 2], [1, 2], [1, 0]),
    "one-channel": ((5, 1, 4, 4), [2, 2], [2, 2], [0, 0]),
    "one-pixel": ((3, 9, 1, 1), [1, 1], [1, 1], [0, 0]),
}


@pytest.fixture(params=["portable", "avx2", "avx512"])
def isa(request: pytest.FixtureRequest):
    before = _C.isa()
    try:
        _C.set_isa(request.param)
    except RuntimeError as error:
        pytest.skip(str(error))
    yield request.param
    _C.set_isa(before)


def inputs(case: str) -> tuple[Tensor, Tensor, list[int], list[int], list[int]]:
    size, kernel, stride, padding = CASES[case]
    g = torch.Generator().manual_seed(0)
    x = torch.randn(size, generator=g)
    x[0, 0, 0, 0] = float("nan")
    x[-1, -1] = float("-inf")
    x[1, 0] = float("inf")
    prefix = torch.randint(0, size[1] + 1, (size[0],), generator=g, dtype=torch.int32)
    prefix[0], prefix[-1] = size[1], 0
    return x.to(memory_format=torch.channels_last), prefix, kernel, stride, padding


@pytest.mark.parametrize("case", CASES)
def test_is_torchs_max_pool(isa, case):
    x, prefix, kernel, stride, padding = inputs(case)
    expected = F.max_pool2d(x, kernel, stride, padding)
    got = OP(x, None, kernel, stride, padding, "zero")
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(OP(x.contiguous(), None, kernel, stride, padding, "skip").nan_to_num(7), got.nan_to_num(7))
    live = (torch.arange(x.shape[1]) < prefix[:, None])[:, :, None, None]
    poisoned = torch.where(live, x, float("nan")).to(memory_format=torch.channels_last)
    zeroed = OP(poisoned, prefix, kernel, stride, padding, "zero")
    torch.testing.assert_close(zeroed, torch.where(live, expected, 0.0), rtol=0, atol=0, equal_nan=True)
    skipped = OP(poisoned, prefix, kernel, stride, padding, "skip")
    assert torch.equal(torch.where(live, skipped, 0.0).nan_to_num(7), zeroed.nan_to_num(7))


def test_an_empty_batch_and_threads():
    x, prefix, kernel, stride, padding = inputs("vgg")
    assert OP(x[:0], prefix[:0], kernel, stride, padding, "zero").shape == (0, 32, 4, 4)
    x = torch.randn(16, 64, 32, 32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(OP(x, None, kernel, stride, padding, "zero"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


def test_errors():
    x, prefix, kernel, stride, padding = inputs("vgg")
    for arguments, text in (
        ((x.double(), None, kernel, stride, padding, "zero"), "input must be Float"),
        ((x[0], None, kernel, stride, padding, "zero"), "4|dimensions"),
        ((x, prefix.long(), kernel, stride, padding, "zero"), "prefix must be int32"),
        ((x, prefix + 1, kernel, stride, padding, "zero"), r"prefix must lie in 0\.\.\.32; got 33 at sample 0"),
        ((x, None, kernel, stride, [2, 2], "zero"), "at most half the kernel"),
        ((x, None, [9, 9], stride, padding, "zero"), "window must fit"),
        ((x, None, kernel, [0, 1], padding, "zero"), "must be positive"),
        ((x, None, kernel, stride, padding, "none"), "tail must be"),
    ):
        with pytest.raises(RuntimeError, match=text):
            OP(*arguments)


def test_what_it_takes_in_place_of_torch():
    """On a CPU float32 in any layout; elsewhere halves too, in the layout that it would not have to change."""
    x = torch.empty(2, 8, 4, 4)
    last = x.to(memory_format=torch.channels_last)
    assert takes(x) and takes(last) and not takes(last.bfloat16()) and not takes(x.double())
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert takes(last.to("meta", dtype)) and not takes(x.to("meta", dtype))
    assert not takes(last.to("meta", torch.float64))
    assert runs_on(x.device) and not runs_on(torch.device("meta"))


def test_halves_on_a_cpu_are_left_to_torch():
    x, _, kernel, stride, padding = inputs("vgg")
    with pytest.raises(RuntimeError, match="input must be Float"):
        OP(x.bfloat16(), None, kernel, stride, padding, "zero")


def test_opcheck():
    x, prefix, kernel, stride, padding = inputs("resnet")
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_static", "test_aot_dispatch_dynamic")
    torch.library.opcheck(OP, (x.nan_to_num(0), prefix, kernel, stride, padding, "zero"), test_utils=tests)
