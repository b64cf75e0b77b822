"""The CPU operator's algorithm for 3x3 convolutions and 7x7 stems: `set_algorithm`, `algorithm`, `get_algorithm`.

"auto", the default, takes Winograd's F(4x4, 3x3) or F(2x2, 3x3) where a measured rule (csrc/core/algorithm.cpp) says
that it is the faster one: float32, 3x3, stride 1, dilated or not, no groups; and F(4x4, 4x4) for a 7x7 kernel with
stride 2 over 2 to 4 channels, whose 2x2 pixels it folds into channels. The rule looks at the layer's shape and at a
sample's own prefixes, never at the batch or the threads. It takes effect where transformed weights are at hand (in a
`PrefixConv2d` whose call needs no gradient, in a converted network, and where `prefix_conv2d(winograd=...)` is given
them), and where the operator transforms them in the call, because that pays for one sample alone: 3x3 layers whose
output has 400 positions or more (`transforms_in_call` in csrc/core/algorithm.cpp), in training above all, forward and
for the input's gradient. Everything else is computed directly.

What "auto" costs and changes:

* Accuracy: a relative L2 error of at most 1e-5 against float64 (measured on normal data with 512 input channels: 1.9e-6
  for F(4x4), 7e-7 for F(2x2); 1.3e-6 for a stem), where direct convolution has about 2e-7. Where the sums cancel (an
  input of mean 100 behind filters whose sum is 0) either one's error is larger, and direct's as large.
* Memory: the transformed weights are kept beside the parameters, 4 times the size of the 3x3 (and 7x7) weights for
  F(4x4) and 16/9 of it for F(2x2). They are made when a call first needs them and never saved.
  `forget_transformed_weights(model)` drops them; under "direct" none are made. A thread that transforms in calls keeps
  room for one layer's, the largest so far.
* NaN and infinity: one such value among the live inputs makes all outputs of every tile that reads it NaN (up to 4x4
  pixels) instead of the outputs that depend on it; in grad_output likewise. Values beyond a prefix are never read.
  Such a weight makes all of its output channel NaN.
* Range: inputs from about 1e37 on overflow in the transforms (5e37 for F(2x2)), though their sums would not; subnormal
  ones lose more of their bits (about 1e-40: a relative error of 4e-4, where direct convolution has 1e-4).
* Bits: "auto" and "direct" round differently. Under either one a sample has the same bits alone and in any batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from . import _C
from .errors import message

ALGORITHMS = ("auto", "direct", "winograd2", "winograd4")


def get_algorithm() -> str:
    """The name last set, one of `ALGORITHMS`."""
    return _C.algorithm()


def set_algorithm(name: str) -> None:
    """Choose the algorithm of the process: "auto" or "direct".

    "winograd2" and "winograd4" are there to test and to measure: that tile wherever it can be used, fast or not. Raises
    ValueError for another name. Not to be called while an operator runs.
    """
    if name not in ALGORITHMS:
        raise ValueError(message("set_algorithm", f"the algorithm must be one of {ALGORITHMS}", repr(name)))
    _C.set_algorithm(name)


@contextlib.contextmanager
def algorithm(name: str) -> Iterator[None]:
    """`with algorithm("direct"): ...` sets the algorithm and restores the one before it."""
    before = get_algorithm()
    set_algorithm(name)
    try:
        yield
    finally:
        set_algorithm(before)


def forget_transformed_weights(model: nn.Module) -> nn.Module:
    """Drop the transformed weights of every module of `model` that keeps some, and return the model.

    The next call that needs them makes them again; set "direct" first to keep the memory free.
    """
    for module in model.modules():
        forget = getattr(module, "forget_transformed_weight", None)
        if forget is not None:
            forget()
    return model
