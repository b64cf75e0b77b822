"""The choice of the backend, and the errors of wrong arguments."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import rnp_kernels
from rnp_kernels import testing


def test_names_and_reasons() -> None:
    found = rnp_kernels.available_backends()
    assert list(found) == ["cpu", "cuda", "triton", "reference"]
    assert found["cpu"] is None and found["reference"] is None
    assert all(reason is None or len(reason) > 10 for reason in found.values())
    assert rnp_kernels.get_backend() == "auto"


def test_the_setting_is_restored_even_after_an_error() -> None:
    with pytest.raises(KeyError), rnp_kernels.backend("reference"):
        assert rnp_kernels.get_backend() == "reference"
        with rnp_kernels.backend("cpu"):
            assert rnp_kernels.get_backend() == "cpu"
        assert rnp_kernels.get_backend() == "reference"
        raise KeyError
    assert rnp_kernels.get_backend() == "auto"


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_a_backend_that_cannot_run_says_why(name: str) -> None:
    reason = rnp_kernels.available_backends()[name]
    if reason is None:
        pytest.skip(f"{name} runs here")
    with pytest.raises(RuntimeError) as raised:
        rnp_kernels.set_backend(name)
    assert name in str(raised.value) and reason in str(raised.value)
    assert rnp_kernels.get_backend() == "auto"


def test_an_unknown_backend() -> None:
    with pytest.raises(ValueError, match="'cudnn'"):
        rnp_kernels.set_backend("cudnn")
    assert rnp_kernels.get_backend() == "auto"


def test_the_choice_decides_what_runs() -> None:
    arguments = testing.make(testing.case("everything"))
    ran = {}
    for name in ("cpu", "reference"):
        with rnp_kernels.backend(name), torch.profiler.profile() as profile:
            rnp_kernels.prefix_conv2d(**arguments)
        ran[name] = {event.key for event in profile.key_averages()}
    assert "rnp::prefix_conv2d" in ran["cpu"] and "aten::convolution" not in ran["cpu"]
    assert "rnp::prefix_conv2d" not in ran["reference"] and "aten::convolution" in ran["reference"]


def test_the_log_says_once_per_shape_what_was_chosen(tmp_path: Path) -> None:
    code = (
        "import torch, rnp_kernels\n"
        "x, conv = torch.randn(1, 12, 5, 5), rnp_kernels.PrefixConv2d(12, 12, 3)\n"
        "for _ in range(3): rnp_kernels.prefix_conv2d(x, conv.weight); conv(x); conv(torch.randn(1, 12, 30, 30))\n"
        "rnp_kernels.prefix_conv2d(x[:, :8], conv.weight[:, :8])\n"
        "with rnp_kernels.backend('reference'): conv(x)\n"
        "conv(torch.randn(1, 12, 30, 30), out_prefix=torch.tensor([4], dtype=torch.int32))\n"
    )
    environment = os.environ | {"RNP_LOG": "1"}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    lines = run.stderr.splitlines()
    assert len(lines) == len(set(lines)) and all(line.startswith("rnp: prefix_conv2d torch.float32") for line in lines)
    kernel = re.compile(r": backend cpu, \w+ kernels, tile \d+x\d+ pixels x \d+ channels$")
    assert any(line.endswith(", with gradients torch's own") for line in lines), lines
    assert any(kernel.search(line) for line in lines), lines
    for chosen in ("channels; contiguous: planes", "full width: oneDNN", "backend reference"):
        assert any(line.endswith(chosen) for line in lines), lines
    assert any("full width: oneDNN; narrower: " in line for line in lines), lines


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


X, W = torch.randn(2, 6, 5, 5), torch.randn(8, 6, 3, 3)
TABLE = torch.randn(3, 8)
WRONG: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "input is no tensor": (TypeError, "list", {"input": [1.0]}),
    "input is 2-D": (ValueError, r"\(3, 4\)", {"input": torch.randn(3, 4)}),
    "integer input": (TypeError, "int64", {"input": X.long(), "weight": W.long()}),
    "weight is 3-D": (ValueError, r"\(8, 6, 3\)", {"weight": W[..., 0]}),
    "weight is None": (TypeError, "NoneType", {"weight": None}),
    "weight of another dtype": (TypeError, "float64", {"weight": W.double()}),
    "channels": (ValueError, "got 5", {"input": X[:, :5]}),
    "groups": (ValueError, "got 0", {"groups": 0}),
    "output channels and groups": (ValueError, "got 8", {"input": torch.randn(2, 18, 5, 5), "groups": 3}),
    "stride": (ValueError, r"\(0, 1\)", {"stride": (0, 1)}),
    "stride of three": (ValueError, r"\(1, 1, 1\)", {"stride": (1, 1, 1)}),
    "stride is a float": (TypeError, "float", {"stride": 1.5}),
    "dilation": (ValueError, r"\(0, 0\)", {"dilation": 0}),
    "padding": (ValueError, "-1", {"padding": (0, -1)}),
    "padding's name": (ValueError, "'full'", {"padding": "full"}),
    "same with a stride": (ValueError, r"\(2, 2\)", {"padding": "same", "stride": 2}),
    "kernel larger than the input": (ValueError, "-1", {"input": X[..., :1]}),
    "in_prefix of another dtype": (TypeError, "int64", {"in_prefix": int32(1, 2).long()}),
    "in_prefix is a list": (TypeError, "list", {"in_prefix": [1, 2]}),
    "in_prefix too long": (ValueError, r"\(3,\)", {"in_prefix": int32(1, 2, 3)}),
    "out_prefix is 2-D": (ValueError, r"\(1, 2\)", {"out_prefix": int32(1, 2)[None]}),
    "in_prefix too large": (RuntimeError, "7", {"in_prefix": int32(1, 7)}),
    "in_prefix negative": (RuntimeError, "-1", {"in_prefix": int32(1, -1)}),
    "out_prefix too large": (RuntimeError, "9", {"out_prefix": int32(9, 1)}),
    "row too large": (RuntimeError, "3", {"bias": TABLE, "row": int32(3, 0)}),
    "bias's shape": (ValueError, r"\(7,\)", {"bias": torch.randn(7)}),
    "bias's dtype": (TypeError, "float64", {"bias": torch.randn(8).double()}),
    "scale is 3-D": (ValueError, r"\(1, 1, 8\)", {"scale": torch.randn(1, 1, 8)}),
    "table without row": (ValueError, "row=None", {"scale": TABLE}),
    "tables of two lengths": (ValueError, r"\[3, 2\]", {"scale": TABLE, "bias": TABLE[:2], "row": int32(0, 1)}),
    "activation": (ValueError, "'gelu'", {"activation": "gelu"}),
    "tail": (ValueError, "'keep'", {"tail": "keep"}),
    "residual's shape": (ValueError, r"\(2, 8, 1, 1\)", {"residual": torch.randn(2, 8, 1, 1)}),
    "residual's dtype": (TypeError, "float64", {"residual": torch.randn(2, 8, 3, 3).double()}),
    "residual and skip": (ValueError, "skip", {"residual": torch.randn(2, 8, 3, 3), "tail": "skip"}),
    "stride is a bool": (TypeError, "stride .* True", {"stride": True}),
    "stride is a string": (TypeError, "stride .* '1'", {"stride": "1"}),
    "stride of floats": (TypeError, "stride .* 1.0", {"stride": (1.0, 1.0)}),
    "stride beyond 64 bits": (ValueError, "stride .* less than .* 9223372036854775808", {"stride": 2**63}),
    "dilation beyond 64 bits": (ValueError, "dilation .* less than", {"weight": W[..., :1, :1], "dilation": 2**63}),
    "padding is a float": (TypeError, "padding .* 1.0", {"padding": (1, 1.0)}),
    "padding of four has a bool": (TypeError, "padding .* True", {"padding": (1, 1, 1, True)}),
    "padding too large": (ValueError, "padding .*1099511627776", {"padding": 2**40}),
    "padding beyond 64 bits": (ValueError, "padding .*9223372036854775808", {"padding": 2**63}),
    "groups is None": (TypeError, "groups .* None", {"groups": None}),
    "groups is a float": (TypeError, "groups .* 1.0", {"groups": 1.0}),
    "groups is a bool": (TypeError, "groups .* True", {"groups": True}),
    "pooled is a string": (TypeError, "pooled .* 'yes'", {"pooled": "yes"}),
    "residual is a number": (TypeError, "residual .* float", {"residual": 1.0}),
    "residual is a number, no batch": (TypeError, "residual .* float", {"input": X[0], "residual": 1.0}),
    "scale without a line": (ValueError, r"scale .* \(0, 8\)", {"scale": TABLE[:0], "row": int32(0, 7)}),
    "bias without a line": (ValueError, r"bias .* \(0, 8\)", {"bias": TABLE[:0], "row": int32(0, 0)}),
    "row negative, no table": (RuntimeError, "row must lie in .*-5", {"row": int32(0, -5)}),
    "no input channels": (ValueError, r"weight .* \(8, 0, 3, 3\)", {"input": X[:, :0], "weight": W[:, :0]}),
    "no output channels": (ValueError, r"weight .* \(0, 6, 3, 3\)", {"weight": W[:0]}),
    "no taps": (ValueError, r"weight .* \(8, 6, 0, 3\)", {"weight": W[:, :, :0]}),
    "padding and dilation too large": (ValueError, "padding .*2\\^61", {"padding": 2**62, "dilation": 2**62}),
    "padding of 63 bits": (ValueError, "padding .*2\\^61", {"padding": 2**63 - 1, "stride": 2**62}),
    "dilation of 63 bits": (ValueError, "kernel must fit", {"dilation": 2**62, "padding": 2**61 - 1}),
    "dilation that comes round": (ValueError, "kernel must fit", {"dilation": 2**63 - 1}),
    "another weight's pack": (RuntimeError, "packed", {"packed": rnp_kernels.pack_weight(torch.randn(4, 6, 3, 3))}),
}


@pytest.mark.parametrize("name", ["auto", "reference"])
@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_wrong_arguments(wrong: tuple[type[Exception], str, dict[str, Any]], name: str) -> None:
    kind, value, change = wrong
    if "packed" in change and name == "reference":
        return
    with rnp_kernels.backend(name), pytest.raises(kind, match=value) as raised:
        rnp_kernels.prefix_conv2d(**({"input": X, "weight": W} | change))
    assert "prefix_conv2d" in str(raised.value)


SHAPES = [name for name, (kind, _, change) in WRONG.items() if kind is not RuntimeError and "packed" not in change][:24]


@pytest.mark.parametrize("wrong", [WRONG[name] for name in SHAPES], ids=SHAPES)
def test_wrong_shapes_raise_while_compiling_too(wrong: tuple[type[Exception], str, dict[str, Any]]) -> None:
    _, value, change = wrong
    arguments = {"input": X, "weight": W} | change
    if any(not isinstance(arguments[name], torch.Tensor) for name in ("input", "weight")):
        return
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(Exception, match=value):
        rnp_kernels.prefix_conv2d(**arguments)


@pytest.mark.parametrize("name", ["auto", "reference"])
@pytest.mark.parametrize(
    "one", [np.int64(1), np.uint8(1), torch.tensor(1), torch.tensor([1], dtype=torch.int32)], ids=repr
)
def test_integers_as_conv2d_takes_them(one: Any, name: str) -> None:
    expected = torch.nn.functional.conv2d(X, W, None, one, one, one, one)
    pairs = torch.nn.functional.conv2d(X, W, None, [one], (one, 1), (1, one))
    two = (one, one)  # nn.Conv2d's constructor would iterate over a tensor
    conv = rnp_kernels.PrefixConv2d(6, 8, 3, stride=two, padding=two, dilation=two, groups=one, bias=False)
    with rnp_kernels.backend(name), torch.no_grad():
        conv.weight.copy_(W)
        for ours in (rnp_kernels.prefix_conv2d(X, W, None, one, one, one, one), conv(X), conv(X), conv(X)):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
        ours = rnp_kernels.prefix_conv2d(X, W, None, [one], (one, 1), (1, one))
        torch.testing.assert_close(ours, pairs, rtol=1e-4, atol=1e-4)
        ours = rnp_kernels.prefix_conv2d(X, W, None, 1, (one, 1, 1, one))
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_a_table_may_be_empty_where_no_sample_needs_a_line() -> None:
    output = rnp_kernels.prefix_conv2d(X[:0], W, scale=TABLE[:0], row=int32())
    assert output.shape == (0, 8, 3, 3)
