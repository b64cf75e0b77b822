"""In-place operations: the converted network equals the original, or `rnp.convert` says which one it cannot replace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rnp
from rnp.stock import dense_model

K = 4


class Net(nn.Module):
    """Two convolutions; `write` gets the map between them, and forward() goes on with that map by its old name.

    One reader is a mean, which a fused convolution gives along with its output: from before the map was written.
    """

    def __init__(self, write: Callable[[Net, Tensor], Any]) -> None:
        super().__init__()
        self.stem, self.first, self.second = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 8, 3, 1, 1), nn.Conv2d(8, 6, 3)
        self.hardswish, self.identity, self.dropout = nn.Hardswish(inplace=True), nn.Identity(), nn.Dropout()
        self.fc = nn.Linear(14, 5)
        self.register_buffer("seen", torch.zeros(8, 16, 16))
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.stem(x).relu())
        found = self.write(self, x)
        y = self.second(x)
        y = y if found is None else y + found.flatten(1).mean(1).view(-1, 1, 1, 1)
        return self.fc(torch.cat([y.mean((2, 3)), x.mean((2, 3))], 1))


def subtract(x: Tensor) -> None:
    x -= 0.25


def double(x: Tensor) -> None:
    x *= 2


def halve(x: Tensor) -> None:
    x /= 2


def shift(x: Tensor) -> None:
    x += 0.5


def blank(x: Tensor) -> None:
    x[:, :2] = 0


REPLACED: dict[str, Callable[[Net, Tensor], Any]] = {
    "clamp_": lambda net, x: x.clamp_(min=0),
    "sigmoid_": lambda net, x: x.sigmoid_(),
    "add_, mul_, div_": lambda net, x: x.add_(1).mul_(0.3).div_(2.0),
    "a value into itself": lambda net, x: x.add_(x),
    "+=": lambda net, x: shift(x),
    "-=": lambda net, x: subtract(x),
    "*=": lambda net, x: double(x),
    "/=": lambda net, x: halve(x),
    "leaky_relu_": lambda net, x: F.leaky_relu_(x, 0.2),
    "elu_": lambda net, x: F.elu_(x),
    "torch.clamp_": lambda net, x: torch.clamp_(x, 0),
    "torch.clamp_ by name": lambda net, x: torch.clamp_(input=x, min=0),
    "mish": lambda net, x: F.mish(x, inplace=True),
    "a flag given by place": lambda net, x: F.leaky_relu(x, 0.2, True),
    "a map given by name": lambda net, x: F.relu(input=x, inplace=True),
    "a module": lambda net, x: net.hardswish(x),
    "under the name of an identity": lambda net, x: net.identity(x).tanh_(),
    "and what was there before": lambda net, x: (x * 3, x.tanh_())[0],
    "one after the other": lambda net, x: (net.identity(x).sub_(0.1), x.clamp_(-0.5, 0.5))[0],
    "a chain of names": lambda net, x: net.identity(net.identity(x).mul_(2)).sub_(0.3),
    "a view nobody reads again": lambda net, x: (x * 2).view(x.size(0), -1).relu_(),
    "a view, then its size only": lambda net, x: (x.flatten(1), x.relu_())[0].size(1) * x,
}
REFUSED: dict[str, tuple[Callable[[Net, Tensor], Any], str]] = {
    "a slice": (
        lambda net, x: x[:, :2].clamp_(min=0),
        r"clamp_ \(node 'clamp_'\) writes .* and 'second' reads 'first'",
    ),
    "a view taken before": (lambda net, x: (x[:, :2], x.clamp_(min=0))[0], "in the same memory, afterwards"),
    "a part taken before": (lambda net, x: (x.chunk(2, 1)[0], x.clamp_(min=0))[0], "in the same memory, afterwards"),
    "data": (lambda net, x: x.data.clamp_(min=0), "'second' reads 'first', in the same memory"),
    "behind dropout": (lambda net, x: net.dropout(x).relu_(), "'second' reads 'first', in the same memory"),
    "an item": (lambda net, x: blank(x), "setitem .* knows no operation"),
    "out": (lambda net, x: torch.add(x, 1, out=x), r"add \(node 'add'\) writes .* knows no operation"),
    "zero_": (lambda net, x: x.zero_(), r"zero_ \(node 'zero_'\) .* Write it as an operation that returns a new"),
    "bernoulli_": (lambda net, x: x.bernoulli_(0.5), "bernoulli_"),
    "an overload": (lambda net, x: torch.ops.aten.relu_.default(x), "relu_.* knows no operation"),
    "another type": (lambda net, x: x.gt_(0), "gt .* another shape or type"),
    "a buffer": (lambda net, x: (net.seen.add_(x.mean(0)), x)[1], "a parameter or buffer of the model"),
    "a buffer, unseen": (lambda net, x: (net.seen.add_(1), x)[1], "Net writes into 'seen'"),
}


@pytest.mark.parametrize("case", REPLACED)
def test_full_width_is_the_original(case):
    torch.manual_seed(0)
    model, x = Net(REPLACED[case]).eval(), torch.randn(5, 3, 16, 16)
    expected = model(x.clone()).detach()
    network = rnp.convert(model, x[:1], K)
    before = x.clone()
    with torch.no_grad():
        torch.testing.assert_close(network(x), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(dense_model(network)(x.clone()), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(network(x), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(network.forward_path(x, [K, K]), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(x, before) and model.hardswish.inplace


@pytest.mark.parametrize("case", REPLACED)
def test_gradients_are_the_originals(case):
    torch.manual_seed(0)
    model, x = Net(REPLACED[case]).eval().double(), torch.randn(3, 3, 16, 16, dtype=torch.float64)
    network = rnp.convert(model, x[:2], K)
    gradients = []
    for f in (model, network):
        f(x.clone()).square().sum().backward()
        gradients.append({name.removeprefix("backbone."): p.grad for name, p in f.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-9, atol=1e-12, msg=f"{case}: {name}")


@pytest.mark.parametrize("case", REPLACED)
def test_mixed_actions_are_the_masked_network(case):
    torch.manual_seed(0)
    model, x = Net(REPLACED[case]).eval(), torch.randn(4, 3, 16, 16)
    network, actions = rnp.convert(model, x[:1], K), torch.tensor([[1, 2], [4, 1], [2, 4], [3, 3]])
    live = torch.arange(8) < 2 * actions[:, :1], torch.arange(6) < (6 * actions[:, 1:] + K - 1) // K
    for conv, mask in zip((model.first, model.second), live, strict=True):
        conv.register_forward_hook(lambda module, inputs, output, mask=mask: output * mask[:, :, None, None])
    expected = model(x.clone())
    network.policy = rnp.policies.Fixed(actions)
    with torch.no_grad():
        torch.testing.assert_close(network(x), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(network(x), expected, rtol=1e-5, atol=1e-6)
    for i, path in enumerate(actions.tolist()):
        torch.testing.assert_close(network.forward_path(x, path)[i], expected[i], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_replaced_is_refused(case):
    write, message = REFUSED[case]
    model = Net(write).eval()
    before = model.seen.clone()
    with pytest.raises(ValueError, match=rf"(?s)rnp\.convert: .*{message}"):
        rnp.convert(model, torch.randn(1, 3, 16, 16), K)
    assert torch.equal(model.seen, before) and model.hardswish.inplace


class OnTheImages(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x.sub_(0.5).div_(0.25)
        n = x.size(0)
        m = n
        m += 1  # a number has no other names
        return self.fc(self.conv(self.stem(x)).mean((2, 3))) * (m - n)


def test_the_images_stay_as_they_are():
    torch.manual_seed(0)
    model, x = OnTheImages().eval(), torch.rand(3, 3, 12, 12)
    before = x.clone()
    with torch.inference_mode():
        network = rnp.convert(model, x, K)
        expected = model(x.clone())
        torch.testing.assert_close(network(x), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(x, before)
