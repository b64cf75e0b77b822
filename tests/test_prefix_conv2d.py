"""The operator's output: every named case, dtype and instruction set against the specification in float64."""

from __future__ import annotations

import itertools

import pytest
import torch

import rnp_kernels
from rnp_kernels import _C, checks, reference, testing
from rnp_kernels.conformance import DTYPES, call, check_output, defined
from rnp_kernels.testing import CASES, Case


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_case(case: Case, dtype: torch.dtype, isa: str, poisoned_memory: None) -> None:
    arguments = testing.make(case, dtype)
    output, means = call(case, arguments)
    check_output(case, arguments, output, means)
    dense = torch.nn.functional.conv2d(
        arguments["input"], arguments["weight"], None, case.stride,
        *((case.padding,) if isinstance(case.padding, (int, str)) else (0,)), case.dilation, case.groups,
    )  # fmt: skip
    if output.shape == dense.shape and output.numel():
        assert output.stride() == dense.stride(), "conv2d gives another layout"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_packed_weights_change_no_bit(case: Case, isa: str) -> None:
    arguments = testing.make(case)
    packed = rnp_kernels.pack_weight(arguments["weight"], case.groups)
    output, means = call(case, arguments)
    again, means_again = call(case, arguments, packed=packed)
    assert torch.equal(defined(case, output), defined(case, again))
    assert means is None or torch.equal(means, means_again)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_reference_backend_runs_every_case(case: Case) -> None:
    arguments = testing.make(case)
    with rnp_kernels.backend("reference"):
        output, means = call(case, arguments)
    check_output(case, arguments, output, means)


def test_the_reference_is_conv2d_where_no_option_is_used() -> None:
    x, w, b = torch.randn(2, 6, 9, 9).double(), torch.randn(8, 3, 3, 3).double(), torch.randn(8).double()
    ours, _ = reference.prefix_conv2d(x, w, b, (2, 1), (1, 1, 1, 1), (1, 1), 2)
    torch.testing.assert_close(ours, torch.nn.functional.conv2d(x, w, b, (2, 1), 1, 1, 2), rtol=0, atol=1e-12)


def test_the_reference_by_hand() -> None:
    x = torch.tensor([[[[1.0]], [[2.0]]], [[[3.0]], [[torch.nan]]]])  # (2, 2, 1, 1)
    w = torch.tensor([[1.0, 10.0], [2.0, 20.0]])[:, :, None, None]
    prefixes = {"in_prefix": torch.tensor([2, 1]), "out_prefix": torch.tensor([1, 2])}
    y, means = reference.prefix_conv2d(
        x, w, torch.tensor([0.5, 0.25]), scale=torch.tensor([1.0, -1.0]), residual=torch.full((2, 2, 1, 1), 1.0),
        activation="relu", pooled=True, **prefixes,
    )  # fmt: skip
    # sample 0: 1·1 + 2·10 + 0.5 + 1; pruned: 1.  sample 1: 3·1 + 0.5 + 1; −3·2 + 0.25 + 1 < 0.
    assert y.flatten().tolist() == [22.5, 1.0, 4.5, 0.0]
    assert torch.equal(means, y.flatten(1))


def test_unbatched_input(isa: str) -> None:
    arguments = testing.make(testing.case("everything"))
    one = {k: v for k, v in arguments.items() if k not in ("in_prefix", "out_prefix", "row", "scale", "bias")}
    one["input"], one["residual"] = torch.randn(24, 10, 9), one["residual"][0]
    output, means = rnp_kernels.prefix_conv2d(**one, in_prefix=torch.tensor([13], dtype=torch.int32))
    one["input"], one["residual"] = one["input"][None], one["residual"][None]
    batch_output, batch_means = rnp_kernels.prefix_conv2d(**one, in_prefix=torch.tensor([13], dtype=torch.int32))
    assert output.shape == (48, 5, 5) and means.shape == (48,)
    assert torch.equal(output, batch_output[0]) and torch.equal(means, batch_means[0])


def test_float32_tables_beside_half_precision(isa: str) -> None:
    case = testing.case("everything")
    wide, half = testing.make(case), testing.make(case, torch.bfloat16)
    half |= {"scale": wide["scale"], "bias": wide["bias"]}
    output, means = call(case, half)
    assert output.dtype == torch.bfloat16 and means.dtype == torch.float32
    check_output(case, half, output, means)


def test_infinity_and_nan_pass_through(isa: str) -> None:
    x = torch.ones(1, 20, 5, 5)
    x[0, 3, 0, 0], x[0, 4, 4, 4] = torch.nan, torch.inf
    w = torch.ones(33, 20, 1, 1)
    for activation in ("none", "relu"):
        y = rnp_kernels.prefix_conv2d(x, w, activation=activation)
        assert y[0, :, 0, 0].isnan().all() and y[0, :, 4, 4].isposinf().all()
        assert torch.equal(y[0, :, 1:4, 1:4], torch.full((33, 3, 3), 20.0))


def test_subnormals_are_kept(isa: str) -> None:
    y = rnp_kernels.prefix_conv2d(torch.full((1, 1, 4, 4), 1e-40), torch.ones(1, 1, 1, 1))
    assert (y == torch.full((1, 1, 4, 4), 1e-40)).all()


@pytest.mark.parametrize("seed", range(1, 4))
def test_other_random_values(seed: int, isa: str) -> None:
    case = testing.case("everything")
    arguments = testing.make(case, seed=seed)
    check_output(case, arguments, *call(case, arguments))


@pytest.mark.large
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_offsets_beyond_32_bits(layout: str) -> None:
    """The second sample's last rows lie beyond 2^31 elements, in the input and in the output."""
    side, channels = 8200, 16  # 2 * channels * side^2 > 2^31
    elements = 2 * channels * side * side
    assert elements - 4 * channels * side > 2**31
    need = 2 * elements * 2 + (1 << 30)
    with open("/proc/meminfo") as file:
        available = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    if available < need:
        pytest.skip(f"needs {need / 2**30:.1f} GiB of memory")
    memory_format = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}[layout]
    x = torch.empty((2, channels, side, side), dtype=torch.bfloat16, memory_format=memory_format).zero_()
    x[1, -1, -3:, -3:] = 1
    w = torch.arange(1, 1 + channels, dtype=torch.bfloat16)[:, None, None, None].expand(-1, channels, 1, 1)
    y = rnp_kernels.prefix_conv2d(x, w)
    corner = y[1, :, -4:, -4:].float()
    assert torch.equal(corner.sum((1, 2)), 9 * torch.arange(1.0, 1 + channels))
    assert not corner[:, 0].any() and not corner[:, :, 0].any()
    assert not y[0, :, -4:, -4:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("groups", [1, 4])
def test_a_bias_need_not_be_contiguous(groups: int, dtype: torch.dtype) -> None:
    """Layers of the stock path too, which takes it for an array; samples of full width in a mixed batch likewise."""
    torch.manual_seed(0)
    x = torch.randn(3, 64, 57, 57, dtype=dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(64, 64 // groups, 3, 3, dtype=dtype)
    mixed = torch.tensor([64, 32, 64], dtype=torch.int32)
    for bias in (torch.randn(128, dtype=dtype)[::2], torch.randn(1, dtype=dtype).expand(64)):
        for out_prefix in (None, mixed):
            arguments = {"padding": 1, "groups": groups, "out_prefix": out_prefix}
            expected = rnp_kernels.prefix_conv2d(x, weight, bias.contiguous(), **arguments)
            assert torch.equal(rnp_kernels.prefix_conv2d(x, weight, bias, **arguments), expected)


FAR = {  # height, width, kernel, stride, padding, dilation, groups: of outputs that span far more than the image
    "stride and padding": (8, 8, (3, 3), 10**8, 10**8, 1, 1),
    "of eleven digits": (8, 8, (3, 3), 10**10, 10**10, 1, 1),
    "pointwise": (8, 9, (1, 1), 10**8, 10**8, 1, 1),
    "four paddings": (8, 8, (3, 2), (1000, 10**5), (1000, 3000, 0, 10**6), 1, 1),
    "dilation": (9, 8, (3, 3), 1, 10**8, 10**8, 1),
    "dilation of one axis": (9, 20, (3, 3), 1, (10**8, 1), (10**8, 1), 1),
    "depthwise": (9, 8, (3, 3), 1, 10**8, 10**8, 12),
    "groups": (8, 8, (3, 3), 10**8, 10**8, 1, 4),
    "2^60": (8, 8, (3, 3), 1, 2**60, 2**60, 1),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FAR)
def test_only_positions_that_taps_meet_cost_anything(name: str, dtype: torch.dtype, isa: str) -> None:
    height, width, kernel, stride, padding, dilation, groups = FAR[name]
    torch.manual_seed(0)
    stride = stride if isinstance(stride, tuple) else (stride, stride)
    dilation = dilation if isinstance(dilation, tuple) else (dilation, dilation)
    sides = checks.four_paddings(padding, kernel, stride, dilation)
    x, w = torch.randn(2, 12, height, width).to(dtype), torch.randn(24, 12 // groups, *kernel).to(dtype)
    bias, prefix = torch.randn(24).to(dtype), torch.tensor([12, 5], dtype=torch.int32)
    live = torch.where(reference.live(12, prefix, x), x, 0).double()

    def truth(x: torch.Tensor) -> torch.Tensor:
        """By the taps, each of which meets an image position or none."""
        size = checks.output_size(x, w, stride, sides, dilation)
        y = bias.double().view(1, -1, 1, 1).repeat(2, 1, *size)
        for i, j in itertools.product(range(kernel[0]), range(kernel[1])):
            rows = {r: r * stride[0] - sides[0] + i * dilation[0] for r in range(size[0])}
            cols = {c: c * stride[1] - sides[2] + j * dilation[1] for c in range(size[1])}
            for r, c in itertools.product(*({k for k, v in line.items() if 0 <= v < end} for line, end in
                                            ((rows, height), (cols, width)))):  # fmt: skip
                pixel = x[:, :, rows[r], cols[c]].view(2, groups, -1)
                tap = w[:, :, i, j].double().view(groups, 24 // groups, -1)
                y[:, :, r, c] += torch.einsum("ngi,goi->ngo", pixel, tap).flatten(1)
        return y

    last = x.contiguous(memory_format=torch.channels_last)
    for image, narrow, given in ((x, None, x.double()), (last, None, x.double()), (last, prefix, live)):
        y = rnp_kernels.prefix_conv2d(image, w, bias, stride, sides, dilation, groups, in_prefix=narrow)
        tolerance = 1e-4 if dtype in (torch.float32, torch.float64) else 0.05
        torch.testing.assert_close(y.double(), truth(given), rtol=tolerance, atol=tolerance)
        assert y.is_contiguous(memory_format=torch.channels_last) == (image is last)


def test_modules_and_gradients_of_positions_far_apart() -> None:
    """Against the same layer of nearer positions: 8 rows and columns of which a tap meets the first, others none."""
    torch.manual_seed(0)
    x = torch.randn(2, 8, 8, 8)
    near, far = rnp_kernels.PrefixConv2d(8, 12, 3, 40, 40), rnp_kernels.PrefixConv2d(8, 12, 3, 10**8, 10**8)
    far.load_state_dict(near.state_dict())
    assert _C.far_apart((8, 8, 8), (12, 8, 3, 3), (10**8,) * 2, (10**8,) * 4, (1, 1), 1)
    assert not _C.far_apart((8, 8, 8), (12, 8, 3, 3), (40, 40), (40,) * 4, (1, 1), 1)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        tolerance = 1e-4 if dtype in (torch.float32, torch.float64) else 0.1
        results = []
        for conv in (near, far):
            image, conv = x.to(dtype).requires_grad_(), conv.to(dtype)
            for prefix in (None, torch.tensor([8, 3], dtype=torch.int32)):
                for _ in range(3):
                    y = conv(image, prefix)
                results.append((y, *torch.autograd.grad(y.sin().sum(), (image, conv.weight, conv.bias))))
        assert results[0][0].shape == (2, 12, 3, 3)
        for ours, theirs in zip(results[2] + results[3], results[0] + results[1], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
