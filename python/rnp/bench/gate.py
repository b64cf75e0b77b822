"""The correctness gate: nothing is timed whose result is wrong."""

from __future__ import annotations

import torch
from torch import Tensor

# Relative L2 error, sample by sample. float32: what Winograd is held to against float64. The reduced types: a few
# roundings of the inputs and one of the output, against a result computed in the same type.
LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}


class WrongResult(AssertionError):
    """A side computes something else than it should."""


def require_close(name: str, got: Tensor, expected: Tensor, limit: float | None = None) -> float:
    """The largest relative L2 error of a sample.

    Args:
        name: what is compared, for the message.
        got, expected: tensors of one shape, samples first.
        limit: allowed error; None for the limit of ``got``'s dtype.

    Raises:
        WrongResult: shapes differ, a sample's error is above the limit, or one is not finite.
    """
    if got.shape != expected.shape:
        raise WrongResult(f"{name}: shape must be {tuple(expected.shape)}, got {tuple(got.shape)}")
    if got.numel() == 0:
        return 0.0
    limit = LIMITS[got.dtype] if limit is None else limit
    got, expected = got.detach(), expected.detach()
    difference = (got.double() - expected.double()).flatten(1).norm(dim=1)
    size = expected.double().flatten(1).norm(dim=1)
    # A sample of which nothing is live is 0 and must be exactly that.
    error = float(torch.where(difference == 0, 0.0, difference / size).max())
    if not error <= limit:
        raise WrongResult(f"{name}: relative L2 error must be at most {limit:.0e}, got {error:.3g}")
    return error
