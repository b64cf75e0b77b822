"""Fake kernel of `torch.ops.rnp.agent_step`, one decision of the agent of `rnp`; the schema is in csrc/ops.cpp.

The operator has no gradient: an agent learns through `rnp.Agent.q_values`, in plain torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _libraries, backends


@torch.library.register_fake("rnp::agent_step")
def _agent_step_fake(
    pooled: Tensor, hidden: Tensor | None, previous_action: Tensor | None, mean: Tensor, inv_std: Tensor,
    encoder_weight: Tensor, encoder_bias: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias_ih: Tensor,
    bias_hh: Tensor, decoder_weight: Tensor, decoder_bias: Tensor, shift: float, channels: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    samples = pooled.shape[0]
    return (
        pooled.new_empty(samples, weight_hh.shape[1]),
        pooled.new_empty(samples, decoder_weight.shape[0]),
        pooled.new_empty(samples, dtype=torch.int32),
        pooled.new_empty(samples, dtype=torch.int32),
    )


def operator_on(device: torch.device) -> Any:
    """The operator of the agent's step on a device; None where plain torch has to take its place."""
    if device.type == "cpu":
        return torch.ops.rnp.agent_step.default
    if device.type != "cuda":
        return None
    name = backends.resolve_on(device)
    if name == "triton":
        return torch.ops.rnp.agent_step_triton.default
    return torch.ops.rnp.agent_step.default if name == "cuda" and _libraries.has_cuda("agent_step") else None
