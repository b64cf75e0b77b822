"""Fake kernel of `torch.ops.rnp.linear`, a classifier that reads each weight once a batch (schema: csrc/ops.cpp).

`linear(input, weight, bias)` is `torch.nn.functional.linear` of a float32 input (N, C) with weight (K, C) and bias (K,)
or None, on a CPU → (N, K). A row has the same bits alone and in any batch. No gradient: networks train through torch's.

With `in_prefix` int32 (N,) the inputs are C / `channel_inputs` channels, flattened: of row n only the first
`in_prefix[n]` channels are read, the others count as zero. RuntimeError where it does not lie in 0…C / channel_inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.register_fake("rnp::linear")
def _linear_fake(
    input: Tensor, weight: Tensor, bias: Tensor | None, in_prefix: Tensor | None = None, channel_inputs: int = 1
) -> Tensor:
    return input.new_empty((input.shape[0], weight.shape[0]))
