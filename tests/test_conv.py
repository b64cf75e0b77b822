"""`PrefixConv2d` as a drop-in for `nn.Conv2d`, and `replace_conv2d`."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

import rnp_kernels
from rnp_kernels import _C, PrefixConv2d, replace_conv2d, stock

SETTINGS = {
    "plain": {"kernel_size": 3},
    "stride and padding": {"kernel_size": (3, 5), "stride": (2, 1), "padding": (1, 2)},
    "same": {"kernel_size": 4, "padding": "same", "dilation": 2},
    "valid": {"kernel_size": 2, "padding": "valid"},
    "groups": {"kernel_size": 3, "groups": 4, "bias": False},
    "zeros": {"kernel_size": 3, "padding": 1, "padding_mode": "zeros"},
    "reflect": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "replicate": {"kernel_size": 3, "padding": (2, 1), "padding_mode": "replicate"},
    "circular": {"kernel_size": 3, "padding": "same", "padding_mode": "circular"},
}


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_stands_in_for_conv2d(settings: dict, layout: torch.memory_format, isa: str) -> None:
    theirs = nn.Conv2d(8, 12, **settings)
    ours = PrefixConv2d(8, 12, **settings)
    assert ours.load_state_dict(theirs.state_dict()).missing_keys == []
    theirs.load_state_dict(ours.state_dict())
    assert repr(ours) == repr(theirs).replace("Conv2d", "PrefixConv2d")
    for shape in ((2, 8, 11, 9), (8, 11, 9)):
        x = torch.randn(shape)
        x = x.contiguous(memory_format=layout) if x.dim() == 4 else x
        close(ours(x), theirs(x))
        with torch.no_grad():
            for _ in range(3):  # unpacked, then packed
                y = ours(x)
                close(y, theirs(x))
                assert y.stride() == theirs(x).stride()


ROUTES = {  # input, output channels, kernel, groups, channels_last, dtype: one of each route that full width can take
    "ours": ((3, 32, 9, 9), 40, 3, 1, True, torch.float32),
    "oneDNN, NCHW": ((3, 12, 12, 11), 20, 3, 1, False, torch.float32),
    "one product, NCHW": ((3, 12, 12, 11), 20, 1, 1, False, torch.float32),
    "ours, 1x1, NCHW": ((3, 24, 12, 11), 20, 1, 1, False, torch.float32),
    "oneDNN, large NCHW": ((3, 64, 19, 20), 20, 3, 1, False, torch.float32),
    "ours, depthwise": ((3, 40, 9, 9), 40, 3, 40, True, torch.float32),
    "ours, depthwise, NCHW": ((3, 20, 30, 30), 20, 5, 20, False, torch.float32),
    "ours, groups of 4": ((3, 24, 9, 9), 24, 3, 6, True, torch.float32),
    "oneDNN, depthwise": ((3, 40, 9, 9), 40, 3, 40, False, torch.float32),
    "ours, groups of 16": ((3, 32, 15, 14), 32, 3, 2, True, torch.float32),
    "ours, groups of 24 to 20, 1x1": ((3, 72, 9, 9), 60, 1, 3, True, torch.float32),
    "oneDNN, groups of 16 on a small map": ((3, 32, 9, 9), 32, 3, 2, True, torch.float32),
    "oneDNN, groups of 8": ((3, 24, 9, 9), 24, 3, 3, False, torch.float32),
    "ours, groups of 8 to 4": ((3, 24, 9, 9), 12, 3, 3, False, torch.float32),
    "oneDNN, large map": ((3, 8, 58, 57), 16, 3, 1, True, torch.float32),
    "bfloat16": ((3, 24, 9, 9), 12, 3, 1, True, torch.bfloat16),
    "ours, 1x1 map": ((3, 64, 1, 1), 40, 1, 1, True, torch.float32),
}


@pytest.mark.parametrize("name", ROUTES)
def test_full_width_has_the_same_bits_on_every_way(
    name: str, isa: str, threads: None, direct: None, xeon: bool
) -> None:
    shape, out, kernel, groups, last, dtype = ROUTES[name]
    conv = PrefixConv2d(shape[1], out, kernel, padding=kernel // 2, groups=groups, dtype=dtype)
    x = torch.randn(shape, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    full, part = int32(shape[1], shape[1], shape[1]), int32(out, out // 2, out)
    if dtype == torch.float32 and torch.backends.mkldnn.is_available():
        path = _C.stock_path(shape[1:], conv.weight.shape, (1, 1), (kernel // 2,) * 4, (1, 1), groups, "float32", last)
        elsewhere = {"ours, 1x1, NCHW": stock.GEMM, "ours, groups of 16": stock.ONEDNN}
        if xeon and name in elsewhere:
            assert path == elsewhere[name]
        else:
            assert (path == stock.OURS) == name.startswith("ours")
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        trained = conv(x)  # with gradients
        assert trained.requires_grad
        alone = torch.cat([conv(x[n : n + 1]) for n in range(3)])
        assert torch.equal(alone, trained), "with gradients, a sample has other bits alone"
        if stock.route(conv, x, conv.weight, conv.bias, conv.padding).training == stock.OURS:
            results.append(trained)
        else:
            close(trained, rnp_kernels.prefix_conv2d(x, conv.weight, conv.bias, 1, kernel // 2, 1, groups))
        results.append(rnp_kernels.prefix_conv2d(x, conv.weight, conv.bias, 1, kernel // 2, 1, groups))
        with torch.no_grad():
            for _ in range(3):
                results.append(conv(x))
            results.append(torch.cat([conv(x[n : n + 1]) for n in range(3)]))
            results.append(conv(torch.cat([x] * 6))[:3])
            results.append(conv(x, full, None))
            mixed = conv(x, full, part)
            results.append(torch.cat([mixed[:1], conv(x)[1:2], mixed[2:]]))
    for number, result in enumerate(results):
        assert torch.equal(result, results[0]), number
        assert result.dtype == dtype


def test_prefixes_reach_the_operator(isa: str) -> None:
    conv = PrefixConv2d(8, 12, 3, padding=1)
    x = torch.randn(3, 8, 6, 6)
    y = conv(x, int32(8, 2, 0), int32(3, 12, 5))
    x[1, 2:], x[2] = 0, 0
    dense = nn.functional.conv2d(x, conv.weight, conv.bias, padding=1)
    for sample, width in enumerate((3, 12, 5)):
        close(y[sample, :width], dense[sample, :width])
        assert (y[sample, width:] == 0).all()


@pytest.mark.parametrize(
    "copier", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))], ids=["deepcopy", "pickle"]
)
def test_copies_do_not_share_packs(copier: Callable[[nn.Module], nn.Module]) -> None:
    conv = PrefixConv2d(8, 12, 3)
    assert conv.packed_weight() is not None
    twin = copier(conv)
    assert type(twin) is PrefixConv2d and "_packs" not in vars(twin)
    x = torch.randn(1, 8, 5, 5)
    with torch.no_grad():
        close(twin(x), conv(x))
        twin.weight = nn.Parameter(twin.weight + 1)
        assert not torch.allclose(twin(x), conv(x))


def test_copies_of_a_compiled_module_run_their_own_weights() -> None:
    conv = PrefixConv2d(3, 4, 3)
    conv.compile(backend="eager")
    x = torch.randn(1, 3, 8, 8)
    expected, file = conv(x), io.BytesIO()
    torch.save(conv, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for twin in (copy.deepcopy(conv), pickle.loads(pickle.dumps(conv)), loaded):
        close(twin(x), expected)
        twin.weight, twin.bias = nn.Parameter(torch.zeros(4, 3, 3, 3)), None
        assert (twin(x) == 0).all()
    close(conv(x), expected)


@pytest.mark.parametrize("c_in", [64, 8])
def test_a_called_module_can_be_parametrized_and_copied(c_in: int) -> None:
    conv, x = PrefixConv2d(c_in, 64, 3, padding=1).eval(), torch.randn(2, c_in, 14, 14)
    x = x.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        for _ in range(3):
            conv(x)
        nn.utils.parametrizations.weight_norm(conv)
        expected = conv(x)
        twin = copy.deepcopy(conv)
        twin.parametrizations.weight.original0.mul_(2)
        for _ in range(3):
            close(conv(x), expected)
            close(twin(x) - twin.bias.view(1, -1, 1, 1), 2 * (expected - conv.bias.view(1, -1, 1, 1)))


def test_saved_files_hold_no_packs() -> None:
    conv = PrefixConv2d(64, 64, 3)
    sizes = []
    for _ in range(2):
        file = io.BytesIO()
        torch.save(conv, file)
        sizes.append(file.tell())
        assert conv.packed_weight() is not None
    assert sizes[0] == sizes[1]
    assert set(conv.state_dict()) == {"weight", "bias"}


def test_from_conv2d_shares_parameters_and_settings() -> None:
    conv = nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect", dtype=torch.float64).eval()
    conv.bias.requires_grad_(False)
    seen = []
    conv.register_forward_hook(lambda module, args, output: seen.append(type(module)))
    ours = PrefixConv2d.from_conv2d(conv)
    assert ours.weight is conv.weight and ours.bias is conv.bias and not ours.training
    assert ours.padding_mode == "reflect" and repr(ours) == repr(conv).replace("Conv2d", "PrefixConv2d")
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    close(ours(x), conv(x))
    assert seen == [PrefixConv2d, nn.Conv2d]
    ours.register_forward_hook(lambda *a: None)
    assert len(conv._forward_hooks) == 1
    ours.train()
    assert not conv.training


@pytest.mark.parametrize(
    "module", [nn.LazyConv2d(4, 3), nn.Conv1d(3, 4, 3), nn.Linear(2, 2)], ids=lambda m: type(m).__name__
)
def test_from_conv2d_refuses_what_is_not_one(module: nn.Module) -> None:
    with pytest.raises(TypeError, match=type(module).__name__):
        PrefixConv2d.from_conv2d(module)
    with pytest.raises(ValueError, match="complex64"):
        PrefixConv2d.from_conv2d(nn.Conv2d(2, 2, 1, dtype=torch.complex64))


class Odd(nn.Conv2d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) + 1


def test_replace_conv2d() -> None:
    shared = nn.Conv2d(4, 4, 3, padding=1)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), shared, nn.Sequential(nn.Identity(), shared), Odd(4, 4, 1),
        nn.Conv2d(4, 2, 1, dtype=torch.complex64), PrefixConv2d(4, 4, 1), nn.LazyConv2d(4, 1),
    )  # fmt: skip
    before = dict(model.named_parameters(remove_duplicate=False))
    calls = []
    handle = shared.register_forward_pre_hook(lambda module, args: calls.append(type(module)))
    kept = model[7]
    assert replace_conv2d(model) is model
    kinds = [type(m) for m in model]
    assert kinds == [PrefixConv2d, nn.BatchNorm2d, nn.ReLU, PrefixConv2d, nn.Sequential, Odd, nn.Conv2d, PrefixConv2d,
                     nn.LazyConv2d]  # fmt: skip
    assert model[3] is model[4][1] and model[7] is kept
    after = dict(model.named_parameters(remove_duplicate=False))
    assert before.keys() == after.keys() and all(before[name] is after[name] for name in before)
    model[:6](torch.randn(1, 3, 8, 8))
    assert calls == [PrefixConv2d, PrefixConv2d]
    handle.remove()
    model[:6](torch.randn(1, 3, 8, 8))
    assert len(calls) == 2


def wrapped(conv: nn.Conv2d) -> None:
    conv.forward = lambda x, old=conv.forward: old(x) + 1  # as libraries do that put hooks around a module


def circular(conv: nn.Conv2d) -> None:
    conv._conv_forward = lambda x, weight, bias: nn.functional.conv2d(x, -weight, bias)


class Scaled(torch.Tensor):
    """Stands for ten times what it holds, as quantised weights stand for other values."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function in (nn.functional.conv2d, torch.conv2d, rnp_kernels.prefix_conv2d):
            args = [a.as_subclass(torch.Tensor) * 10 if isinstance(a, Scaled) else a for a in args]
            return function(*args, **(kwargs or {}))
        return super().__torch_function__(function, types, args, kwargs or {})


def scaled(name: str) -> Callable[[nn.Conv2d], None]:
    def change(conv: nn.Conv2d) -> None:
        setattr(conv, name, nn.Parameter(getattr(conv, name).detach().as_subclass(Scaled)))

    return change


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (wrapped, "no forward of its own"),
        (circular, "no _conv_forward of its own"),
        (scaled("weight"), "Scaled and Parameter"),
        (scaled("bias"), "Parameter and Scaled"),
    ],
    ids=["forward", "_conv_forward", "class of the weight", "class of the bias"],
)
def test_what_convolves_in_a_way_of_its_own_is_left_alone(change: Callable[[nn.Conv2d], None], rule: str) -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3)), torch.randn(2, 3, 8, 8)
    change(model[0])
    expected = model(x)
    replace_conv2d(model)
    assert type(model[0]) is nn.Conv2d and torch.equal(model(x), expected)
    with pytest.raises(TypeError, match=rf"PrefixConv2d.from_conv2d: .*{rule}"):
        PrefixConv2d.from_conv2d(model[0])


def test_what_compile_made_stays_behind() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3)), torch.randn(1, 3, 8, 8)
    model[0].compile(backend="eager")
    expected = model(x)
    for conv in (PrefixConv2d.from_conv2d(model[0]), replace_conv2d(model)[0]):
        close(conv(x), expected)
        assert (conv(x, out_prefix=int32(2))[:, 2:] == 0).all()
        conv.weight, conv.bias = nn.Parameter(torch.zeros(4, 3, 3, 3)), None
        assert (conv(x) == 0).all()


@pytest.mark.parametrize("kept", [False, True], ids=["first call", "later call"])
@pytest.mark.parametrize(("c_in", "kernel", "size"), [(64, 3, 14), (64, 1, 28), (3, 7, 64)])
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_class_with_a_convolution_of_its_own_is_asked(
    name: str, c_in: int, kernel: int, size: int, kept: bool
) -> None:
    conv, x = PrefixConv2d(c_in, 64, kernel).requires_grad_(False), torch.randn(2, c_in, size, size)
    for _ in range(3 * kept):
        conv(x)
    scaled(name)(conv)
    values = {key: getattr(conv, key).detach().as_subclass(torch.Tensor) for key in ("weight", "bias")}
    values[name] = values[name] * 10
    with torch.no_grad():
        for _ in range(3):
            close(conv(x), nn.functional.conv2d(x, **values))


def test_replace_a_model_that_is_a_conv2d() -> None:
    conv = nn.Conv2d(3, 4, 3)
    new = replace_conv2d(conv)
    assert type(new) is PrefixConv2d and new.weight is conv.weight
    assert replace_conv2d(new) is new
    with pytest.raises(TypeError, match="replace_conv2d"):
        replace_conv2d(conv.weight)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize("first", [True, False], ids=["norm before the swap", "norm after the swap"])
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm, nn.utils.spectral_norm],
                         ids=["weight_norm", "parametrized", "spectral_norm"])  # fmt: skip
def test_normalised_weights(norm: Callable[[nn.Module], nn.Module], first: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(4, 6, 3).eval()
    ours = copy.deepcopy(plain)
    torch.manual_seed(1)
    plain = norm(plain)
    torch.manual_seed(1)
    ours = replace_conv2d(norm(ours)) if first else norm(replace_conv2d(ours))
    plain.eval(), ours.eval()
    x = torch.randn(2, 4, 7, 7)
    for _ in range(3):
        with torch.no_grad():
            close(ours(x), plain(x))
            for module in (plain, ours):
                next(module.parameters()).mul_(1.5)
    ours(x).sum().backward()


def test_fuse_conv_bn_eval() -> None:
    conv, norm = PrefixConv2d(4, 6, 3).eval(), nn.BatchNorm2d(6).eval()
    nn.init.uniform_(norm.running_var, 0.5, 2), nn.init.normal_(norm.running_mean)
    x = torch.randn(2, 4, 7, 7)
    with torch.no_grad():
        conv(x), conv(x)
        fused = torch.nn.utils.fuse_conv_bn_eval(conv, norm)
        assert type(fused) is PrefixConv2d
        close(fused(x), norm(conv(x)))


def test_functional_call_uses_the_given_weights() -> None:
    conv = PrefixConv2d(4, 6, 3)
    x = torch.randn(1, 4, 5, 5)
    with torch.no_grad():
        conv(x), conv(x)
        for _ in range(3):
            other = {"weight": torch.randn_like(conv.weight), "bias": torch.randn(6)}
            close(torch.func.functional_call(conv, other, (x,)), nn.functional.conv2d(x, *other.values()))


@pytest.mark.parametrize("kept", [False, True], ids=["first call", "later call"])
@pytest.mark.parametrize("settings", [{}, {"padding": 1, "padding_mode": "reflect"}], ids=["zeros", "reflect"])
def test_what_is_no_dense_tensor_is_refused(kept: bool, settings: dict) -> None:
    conv, x = PrefixConv2d(4, 6, 3, **settings), torch.randn(2, 4, 8, 8)
    for _ in range(3 * kept):
        conv(x)
    for wrong in (x.numpy(), None, [1.0]):
        with pytest.raises(TypeError, match=rf"PrefixConv2d: input must be a tensor, got {type(wrong).__name__}"):
            conv(wrong)
    if not settings:
        with pytest.raises(NotImplementedError, match="rnp::prefix_conv2d"):
            conv(x.to_sparse())
        with FakeTensorMode():
            fake = torch.empty(2, 4, 8, 8)
        with pytest.raises(AssertionError, match="FakeTensor"):
            conv(fake)


@pytest.mark.filterwarnings("ignore:.*FakeTensor.*")
@pytest.mark.parametrize("needs", [True, False], ids=["gradients", "no gradients"])
@pytest.mark.parametrize("last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize(("c_in", "kernel", "size"), [(8, 3, 9), (64, 3, 14), (64, 1, 28), (3, 7, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fake_tensors_outside_of_their_mode(
    dtype: torch.dtype, c_in: int, kernel: int, size: int, last: bool, needs: bool
) -> None:
    with FakeTensorMode():
        conv = PrefixConv2d(c_in, 64, kernel, dtype=dtype).requires_grad_(needs)
        x = torch.empty(2, c_in, size, size, dtype=dtype)
        x = x.contiguous(memory_format=torch.channels_last) if last else x
    for y in (conv(x), rnp_kernels.training.conv2d(x, conv.weight, conv.bias)):
        assert y.shape == (2, 64, size - kernel + 1, size - kernel + 1) and type(y) is type(x)
        assert y.requires_grad == needs


@pytest.mark.parametrize("bias", [torch.zeros(64).double(), torch.zeros(64).bfloat16(), torch.zeros(63)], ids=str)
@pytest.mark.parametrize("assign", [True, False], ids=["assigned", "data"])
@pytest.mark.parametrize(
    ("c_in", "kernel", "size", "dtype"),
    [(64, 1, 28, torch.float32), (64, 3, 20, torch.float32), (64, 3, 56, torch.float32), (64, 3, 9, torch.float32)],
)
def test_a_bias_that_does_not_fit_is_refused_after_calls_too(
    c_in: int, kernel: int, size: int, dtype: torch.dtype, assign: bool, bias: torch.Tensor
) -> None:
    x = torch.randn(2, c_in, size, size, dtype=dtype)
    for layout in (torch.contiguous_format, torch.channels_last):
        for needs in (False, True):
            conv = PrefixConv2d(c_in, 64, kernel, padding=kernel // 2, dtype=dtype).requires_grad_(needs)
            given = x.contiguous(memory_format=layout)
            for _ in range(3):
                conv(given)
            if assign:
                conv.bias = nn.Parameter(bias, requires_grad=needs)
            else:
                conv.bias.data = bias
            for _ in range(2):
                with pytest.raises((TypeError, ValueError), match="prefix_conv2d: bias must"):
                    conv(given)


def test_meta_device() -> None:
    conv = PrefixConv2d(4, 6, 3, device="meta")
    y = conv(torch.empty(2, 4, 8, 8, device="meta"))
    assert y.shape == (2, 6, 6, 6) and y.device.type == "meta" and conv.packed_weight() is None


@pytest.mark.parametrize("last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize(
    ("c_in", "size", "c_out", "kernel", "stride", "groups"),
    [(96, 16, 16, 1, 1, 2), (128, 1, 128, 1, 1, 2), (64, 8, 256, 1, 1, 2), (256, 4, 64, 7, 2, 1), (32, 8, 32, 3, 1, 1)],
)
def test_with_gradients_neither_batch_nor_threads_show_in_the_bits(
    c_in: int, size: int, c_out: int, kernel: int, stride: int, groups: int, last: bool, threads: None
) -> None:
    """Around 16 samples, one thread and several, torch.conv2d changes its mind."""
    layout = torch.channels_last if last else torch.contiguous_format
    torch.manual_seed(0)
    conv = PrefixConv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups).to(memory_format=layout)
    x = torch.randn(20, c_in, size, size).contiguous(memory_format=layout)
    outputs = []
    for count in (1, 2):
        torch.set_num_threads(count)
        outputs += [conv(x)[:1], conv(x[:4])[:1], conv(x[:1])]
    assert all(torch.equal(y, outputs[0]) for y in outputs)
