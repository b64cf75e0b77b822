"""Outputs of modules on memory that is kept from call to call: ordinary tensors, never shared, bounded in all."""

from __future__ import annotations

import copy
import gc
import io
import threading

import pytest
import torch

import rnp_kernels
from rnp_kernels import _C, PrefixConv2d
from rnp_kernels.segment import release_memory


def layer(layout: torch.memory_format = torch.channels_last, side: int = 48) -> tuple[PrefixConv2d, torch.Tensor]:
    """Ours in both layouts; an output of 288 KB a sample."""
    torch.manual_seed(0)
    conv = PrefixConv2d(32, 32, 3, padding=1).eval()
    x = torch.randn(2, 32, side, side).to(memory_format=layout)
    with torch.inference_mode():
        for _ in range(3):
            conv(x)
    return conv, x


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_output_is_an_ordinary_tensor(layout: torch.memory_format, mode: type) -> None:
    conv, x = layer(layout)
    expected = rnp_kernels.prefix_conv2d(x, conv.weight, conv.bias, padding=1)
    with mode():
        y = conv(x)
        assert torch.allclose(y, expected, atol=1e-5)
        assert y.stride() == expected.stride() and y.dtype == expected.dtype and not y.requires_grad
        assert y.is_inference() == (mode is torch.inference_mode)
        assert y.data_ptr() % 64 == 0
        twin, buffer = copy.deepcopy(y), io.BytesIO()
        torch.save(y, buffer)
        buffer.seek(0)
        assert torch.equal(torch.load(buffer), twin)
        assert torch.equal(y.relu_(), twin.relu())
    assert y.numpy().shape == tuple(y.shape)


def test_memory_comes_back_only_when_nobody_can_see_it() -> None:
    conv, x = layer()
    with torch.inference_mode():
        first = conv(x)
        place, kept = first.data_ptr(), first.clone()
        view = first[1:, :3]
        del first
        others = [conv(2 * x) for _ in range(3)]
        assert place not in [y.data_ptr() for y in others]
        assert torch.equal(view, kept[1:, :3])
        del view
        gc.collect()
        assert conv(x).data_ptr() == place


def test_what_is_kept_is_bounded_and_can_be_released() -> None:
    (conv, x), (small, pixels) = layer(side=256), layer(side=46)  # 16 MB an output, and 529 KB
    release_memory()
    assert _C.output_pool_bytes() == 0
    with torch.inference_mode():
        outputs = [conv(x) for _ in range(7)]
        assert _C.output_pool_bytes() == 0
        del outputs
        assert 16 << 20 <= _C.output_pool_bytes() <= 64 << 20
        outputs = [small(pixels) for _ in range(20)]
        del outputs
        assert 0 < _C.output_pool_bytes() <= 8 * (600 << 10)
    release_memory()
    assert _C.output_pool_bytes() == 0


def test_small_and_huge_outputs_are_torchs() -> None:
    def call(side: int) -> _C.LayerCall:
        size = (1, 32, side, side)
        strides = torch.empty(size).stride()
        return _C.LayerCall(size, (32, 32, 3, 3), (1, 1), (1,) * 4, (1, 1), 1, strides, (288, 9, 3, 1), strides, 0)

    assert [call(side).pools_output for side in (44, 48, 510, 520)] == [False, True, True, False]
    release_memory()
    taken = call(48).new_output()
    assert "dltensor" in repr(taken) and _C.output_pool_bytes() == 0
    del taken  # nobody took it over
    assert _C.output_pool_bytes() == 32 * 48 * 48 * 4


def test_threads_never_share_an_output() -> None:
    conv, x = layer()
    inputs = [x * k for k in (1, 2, 3)]
    with torch.inference_mode():
        expected = [conv(v) for v in inputs]
    wrong: list[int] = []

    def work(k: int) -> None:
        with torch.inference_mode():
            for _ in range(50):
                if not torch.equal(conv(inputs[k]), expected[k]):
                    wrong.append(k)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
