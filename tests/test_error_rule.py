"""The rule that float32 sums are judged by: an ordinary sum passes, and every mistake worth the name is caught."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rnp_kernels import conformance, testing
from rnp_kernels.testing import Case, Sums, Tensors, assert_as_accurate_as_native

CASES = ("3x3", "3x3 stride 2", "dilated", "groups", "mixed prefixes", "prefix, unaligned channels", "everything",
         "residual beyond the prefix", "several blocks", "few channels, contiguous")  # fmt: skip


def judge(case: Case, arguments: Tensors, wrong: Tensors) -> list[str]:
    """What the rule finds in output and gradients that were computed exactly, but from other operands."""
    shape = testing.run_reference(case, arguments)[0].shape
    upstream = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = []

    def all_of(arguments: Tensors) -> dict[str, Tensor]:
        wide = testing.convert(arguments, torch.float64)
        tensors = conformance.gradients(conformance.reference_call, case, wide, torch.float64, upstream)
        return {"output": testing.run_reference(case, wide)[0], "input": tensors["input"], "weight": tensors["weight"]}

    truth, ours = all_of(arguments), all_of(wrong)
    sums = testing.gradient_sums(case, arguments, upstream) | {"output": testing.output_sums(case, arguments)}
    for name, right in truth.items():
        native = right.float()  # no error but its own rounding: the sums alone say what is allowed
        try:
            assert_as_accurate_as_native(name, ours[name].float(), native, right, sums[name])
        except AssertionError as error:
            assert "allowed" in str(error)
            found.append(name)
    return found


def tf32(tensor: Tensor) -> Tensor:
    """Rounded to TF32's ten bits behind the point."""
    bits = tensor.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32).where(tensor.isfinite(), tensor)


def in_tf32(arguments: Tensors) -> Tensors:
    return arguments | {"input": tf32(arguments["input"]), "weight": tf32(arguments["weight"])}


def without_a_tap(arguments: Tensors) -> Tensors:
    weight = arguments["weight"].clone()
    weight[:, :, 0, 0] = 0
    return arguments | {"weight": weight}


def without_a_channel(arguments: Tensors) -> Tensors:
    weight = arguments["weight"].clone()
    weight[:, -1] = 0
    return arguments | {"weight": weight}


def without_a_product(arguments: Tensors) -> Tensors:
    """One weight of one filter, of middling size."""
    weight = arguments["weight"].clone()
    filters = weight[0]
    filters.view(-1)[filters.abs().flatten().argsort()[filters.numel() // 2]] = 0
    return arguments | {"weight": weight}


def off_by_an_ulp_of_half_precision(arguments: Tensors) -> Tensors:
    weight = arguments["weight"].clone()
    weight[0, 0] *= 1 + 2**-11
    return arguments | {"weight": weight}


@pytest.mark.parametrize("name", CASES)
def test_exact_results_pass(name: str) -> None:
    case = testing.case(name)
    arguments = testing.make(case)
    assert judge(case, arguments, arguments) == []


@pytest.mark.parametrize(
    "mistake", [in_tf32, without_a_tap, without_a_channel, without_a_product, off_by_an_ulp_of_half_precision]
)
@pytest.mark.parametrize("name", CASES)
def test_mistakes_are_found(name: str, mistake: Callable[[Tensors], Tensors]) -> None:
    """What is wrong with the weight shows in output and gradient of the input; what with the input, in the weight's."""
    case = testing.case(name)
    arguments = testing.make(case)
    found = judge(case, arguments, mistake(arguments))
    assert found[:2] == ["output", "input"]
    assert mistake is not in_tf32 or found[2:] == ["weight"]


def one_after_the_other(a: Tensor, b: Tensor) -> Tensor:
    """Sums over the last dimension in float32, a multiply-add (one rounding) for each product."""
    total = torch.zeros(a.shape[:-1])
    for x, y in zip(a.unbind(-1), b.unbind(-1), strict=True):
        total = (total.double() + x.double() * y.double()).float()
    return total


@pytest.mark.parametrize("products", [1, 9, 360, 3000])
def test_the_plainest_sum_passes_and_a_biased_one_does_not(products: int) -> None:
    generator = torch.Generator().manual_seed(products)
    a, b = (torch.randn(20000, products, generator=generator) for _ in range(2))
    wide = a.double() * b.double()
    truth, sums = wide.sum(-1), Sums(torch.tensor(float(products)), wide.square().sum(-1))
    ours, native = one_after_the_other(a, b), truth.float()
    assert_as_accurate_as_native("sum", ours, native, truth, sums)
    share = ((ours.double() - truth).abs() / sums.rounding(torch.float32)).max()
    assert products == 1 or 0.2 < share < 0.7  # the allowance is neither tight nor wide
    with pytest.raises(AssertionError, match="allowed"):
        assert_as_accurate_as_native("sum", tf32(a).mul(tf32(b)).double().sum(-1).float(), native, truth, sums)


def test_what_is_summed_is_counted() -> None:
    """By hand: 1x1, two live inputs of four, scale 3, bias and residual."""
    case = Case("by hand", (1, 4, 1, 1), 2, kernel=(1, 1), padding=0, in_prefix=(2,), out_prefix=(1,), scale="vector",
                residual=True, activation="relu")  # fmt: skip
    arguments = testing.make(case) | {"scale": torch.tensor([3.0, 3.0])}
    x, w, bias, residual = (arguments[name].double() for name in ("input", "weight", "bias", "residual"))
    sums = testing.output_sums(case, arguments)
    assert sums.products.flatten().tolist() == [4, 1]  # two products, bias, residual; the residual alone
    products = 3 * x[0, :2, 0, 0] * w[0, :2, 0, 0]
    expected = products.square().sum() + bias[0] ** 2 + residual[0, 0] ** 2
    torch.testing.assert_close(sums.squares[0, 0], expected, rtol=1e-12, atol=0)
    of_input = testing.gradient_sums(case, arguments, torch.ones(1, 2, 1, 1))["input"]
    alive = float(testing.run_reference(case, arguments)[0][0, 0] > 0)  # relu lets the upstream pass, or nothing
    assert of_input.products.flatten().tolist() == [alive, alive, 0, 0]
    expected = alive * (3 * w[0, :2, 0, 0]).square()
    torch.testing.assert_close(of_input.squares[0, :2, 0, 0], expected, rtol=1e-12, atol=0)
