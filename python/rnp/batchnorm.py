"""BatchNorm kept per in-prefix: k sets of statistics and of affine parameters in one layer.

The width of the convolution's *input* changes the distribution of its outputs, so each of the k groups that an input
prefix may end in has statistics of its own, over the channels and samples that are live: one shared set collapses at
small widths. Row k − 1, full width, starts as the original layer; the other rows start as copies of it.

That holds where activations, pooling or another BatchNorm lie in between, and where others read the same value. A sum
of feature maps has no convolution of its own: a BatchNorm behind it (pre-activation networks) takes the set of the
sum's own prefix. One set is kept where the input's width never changes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PrefixBatchNorm2d(nn.Module):
    """k BatchNorms over C channels; `row` = in-prefix group − 1 names the one in use. One row: the input never varies.

    Parameters `weight`, `bias` (k, C), None without affine. Buffers `running_mean`, `running_var` (k, C) and
    `num_batches_tracked` (k, C) int64: a channel counts only the batches in which it was live.
    `momentum` None averages cumulatively, as in `nn.BatchNorm2d`.
    """

    def __init__(
        self, num_features: int, rows: int, eps: float = 1e-5, momentum: float | None = 0.1, affine: bool = True
    ) -> None:
        super().__init__()
        self.num_features, self.rows, self.eps, self.momentum, self.affine = num_features, rows, eps, momentum, affine
        self.weight = nn.Parameter(torch.ones(rows, num_features)) if affine else None
        self.bias = nn.Parameter(torch.zeros(rows, num_features)) if affine else None
        self.register_buffer("running_mean", torch.zeros(rows, num_features))
        self.register_buffer("running_var", torch.ones(rows, num_features))
        self.register_buffer("num_batches_tracked", torch.zeros(rows, num_features, dtype=torch.int64))

    @classmethod
    def from_batchnorm(cls, norm: nn.BatchNorm2d, rows: int) -> PrefixBatchNorm2d:
        """`rows` copies of a BatchNorm2d that tracks running statistics."""
        if norm.running_mean is None or norm.running_var is None:
            raise ValueError("PrefixBatchNorm2d: the BatchNorm2d must track running statistics")
        new = cls(norm.num_features, rows, norm.eps, norm.momentum, norm.affine)
        new.to(device=norm.running_mean.device, dtype=norm.running_mean.dtype)
        with torch.no_grad():
            new.running_mean.copy_(norm.running_mean.expand(rows, -1))
            new.running_var.copy_(norm.running_var.expand(rows, -1))
            if norm.num_batches_tracked is not None:
                new.num_batches_tracked.copy_(norm.num_batches_tracked.expand(rows, norm.num_features))
            if norm.affine:
                new.weight = nn.Parameter(norm.weight.detach().expand(rows, -1).clone(), norm.weight.requires_grad)
                new.bias = nn.Parameter(norm.bias.detach().expand(rows, -1).clone(), norm.bias.requires_grad)
        return new.train(norm.training)

    def extra_repr(self) -> str:
        return f"{self.num_features}, rows={self.rows}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}"

    def table(self) -> tuple[Tensor, Tensor]:
        """(scale, shift), each (k, C) float: y = scale · x + shift with the running statistics. Differentiable."""
        scale = torch.rsqrt(self.running_var + self.eps)
        if self.weight is not None and self.bias is not None:
            scale = scale * self.weight
            return scale, self.bias - self.running_mean * scale
        return scale, -self.running_mean * scale

    def forward_slice(self, x: Tensor, row: int) -> Tensor:
        """Normalise x (N, r, H, W), the first r ≤ C channels of samples that all have in-prefix group row + 1."""
        r = x.shape[1]
        weight = None if self.weight is None else self.weight[row, :r]
        bias = None if self.bias is None else self.bias[row, :r]
        mean, var = self.running_mean[row, :r], self.running_var[row, :r]
        if not self.training:
            return F.batch_norm(x, mean, var, weight, bias, False, 0.0, self.eps)
        count = self.num_batches_tracked[row, :r]
        count += 1
        if self.momentum is not None:
            return F.batch_norm(x, mean, var, weight, bias, True, self.momentum, self.eps)
        batch_mean, batch_var = torch.zeros_like(mean), torch.zeros_like(var)
        y = F.batch_norm(x, batch_mean, batch_var, weight, bias, True, 1.0, self.eps)
        mean += (batch_mean - mean) / count
        var += (batch_var - var) / count
        return y

    def forward(self, x: Tensor, row: Tensor | None = None, live: Tensor | None = None) -> Tensor:
        """Normalise a mixed batch: x (N, C, H, W), row (N,) int 0…k−1, live (N, C) bool. Dead channels become 0.

        Without `row` all samples take the last one, full width; without `live` all channels live.
        """
        if row is None:
            row = torch.full((x.shape[0],), self.rows - 1, device=x.device)
        live = x.new_ones(x.shape[:2]) if live is None else live.to(x.dtype)
        index = row.long()
        if not self.training:
            scale, shift = self.table()
            return (x * scale[index, :, None, None] + shift[index, :, None, None]) * live[:, :, None, None]
        member = F.one_hot(index, self.rows).to(x.dtype).t()  # (k, N)
        positions = x.shape[2] * x.shape[3]
        count = (member @ live) * positions  # (k, C)
        size = count.clamp(min=1)
        mean = member @ (x.sum((2, 3)) * live) / size
        centred = x - mean[index, :, None, None]
        var = member @ (centred.square().sum((2, 3)) * live) / size
        self._update(mean.detach(), var.detach() * size / (size - 1).clamp(min=1), count > 0)
        scale = torch.rsqrt(var + self.eps)
        scale = scale if self.weight is None else scale * self.weight
        y = centred * scale[index, :, None, None]
        y = y if self.bias is None else y + self.bias[index, :, None, None]
        return y * live[:, :, None, None]

    @torch.no_grad()
    def _update(self, mean: Tensor, var: Tensor, seen: Tensor) -> None:
        """Move the running statistics of the (row, channel) pairs that were `seen` in this batch."""
        self.num_batches_tracked += seen
        share = self.momentum if self.momentum is not None else 1.0 / self.num_batches_tracked.clamp(min=1)
        share = seen * share
        self.running_mean += share * (mean - self.running_mean)
        self.running_var += share * (var - self.running_var)
