"""Multiply–accumulates of a converted network: exact per sample, and the cheapest way to finish from any point.

A convolution's MACs depend on two groups (of its input and of its output), each the largest of some earlier actions,
and are a table of both here, so that counting is indexing. A cap can be kept exactly: MACs never fall when an action
grows, so the cheapest completion takes action 1 everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .graph import prefix_size


@dataclass
class ConvCost:
    """Where one convolution's MACs come from. Groups None: full width."""

    name: str
    in_group: frozenset[int] | None
    out_group: frozenset[int] | None
    in_channels: int
    out_channels: int
    conv_groups: int
    per_pair: int  # kernel area × output positions: MACs of one (input channel, output channel) pair

    def table(self, k: int) -> Tensor:
        """(k, k) int64: MACs with the input in group i + 1 and the output in group j + 1."""
        rows = [[self.macs(prefix_size(i, self.in_channels, k), prefix_size(j, self.out_channels, k))
                 for j in range(1, k + 1)] for i in range(1, k + 1)]  # fmt: skip
        return torch.tensor(rows, dtype=torch.int64)

    def macs(self, live_in: int, live_out: int) -> int:
        """MACs with the first live_in inputs and live_out outputs; a convolution's groups are filled in order."""
        g_in, g_out = self.in_channels // self.conv_groups, self.out_channels // self.conv_groups
        pairs = sum(
            min(max(live_in - g * g_in, 0), g_in) * min(max(live_out - g * g_out, 0), g_out)
            for g in range(self.conv_groups)
        )
        return pairs * self.per_pair


class MacCounter:
    """MACs per image for actions (N, L) in 1…k."""

    def __init__(self, costs: list[ConvCost], fixed: int, k: int, decisions: int) -> None:
        """`fixed`: MACs of layers that are always dense (linear layers and the like)."""
        self.k, self.decisions, self.fixed, self.costs = k, decisions, fixed, costs
        self.tables = [cost.table(k) for cost in costs]
        self.dense = fixed + sum(int(table[-1, -1]) for table in self.tables)
        ones = torch.ones(1, decisions, dtype=torch.int64)
        self.cheapest = int(self.count(ones)[0])

    def count(self, actions: Tensor) -> Tensor:
        """actions (N, L) in 1…k → MACs (N,) int64, on the actions' device."""
        actions = actions.long()
        total = torch.full((actions.shape[0],), self.fixed, dtype=torch.int64, device=actions.device)
        for cost, table in zip(self.costs, self.tables, strict=True):
            total += self._term(cost, table, actions)
        return total

    def _term(self, cost: ConvCost, table: Tensor, actions: Tensor) -> Tensor:
        table = table.to(actions.device)
        i = self._group(cost.in_group, actions)
        j = self._group(cost.out_group, actions)
        return table.view(-1)[i * self.k + j]

    def _group(self, group: frozenset[int] | None, actions: Tensor) -> Tensor:
        """Index 0…k−1 of the group that the actions give."""
        if group is None:
            return torch.full((actions.shape[0],), self.k - 1, dtype=torch.int64, device=actions.device)
        columns = sorted(group)
        return (actions[:, columns[0]] if len(columns) == 1 else actions[:, columns].amax(1)) - 1

    def candidates(self, layer: int, taken: Tensor) -> Tensor:
        """MACs (N, k) of each action 1…k at decision `layer`, the earlier ones `taken` (N, layer), all later ones 1."""
        n = taken.shape[0]
        actions = torch.ones(n, self.k, self.decisions, dtype=torch.int64, device=taken.device)
        actions[:, :, :layer] = taken[:, None, :].long()
        actions[:, :, layer] = torch.arange(1, self.k + 1, device=taken.device)
        return self.count(actions.view(n * self.k, -1)).view(n, self.k)
