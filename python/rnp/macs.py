"""Multiply–accumulates of a converted network: exact per sample, and the cheapest way to finish from any point.

A convolution's MACs depend on two groups (of its input and of its output), each the largest of some earlier actions,
and are a table of both here, so that counting is indexing. A cap can be kept exactly: MACs never fall when an action
grows, so the cheapest completion takes action 1 everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .constant import Constant
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
        self.k, self.decisions, self.fixed = k, decisions, fixed
        # Convolutions whose groups depend on the same decisions share one table.
        self.pairs: dict[tuple[frozenset[int] | None, frozenset[int] | None], Tensor] = {}
        for cost in costs:
            pair, table = (cost.in_group, cost.out_group), cost.table(k)
            self.pairs[pair] = self.pairs[pair] + table if pair in self.pairs else table
        self.dense = fixed + sum(int(table[-1, -1]) for table in self.pairs.values())
        groups = {group for pair in self.pairs for group in pair if group is not None}
        self._columns = {group: Constant(torch.tensor(sorted(group))) for group in groups}
        self._tables = {pair: Constant(table.view(-1)) for pair, table in self.pairs.items()}
        self.cheapest = int(self.count(torch.ones(1, decisions, dtype=torch.int64))[0])

    def count(self, actions: Tensor) -> Tensor:
        """actions (N, L) in 1…k → MACs (N,) int64, on the actions' device."""
        if actions.dim() != 2 or actions.shape[1] != self.decisions:
            raise ValueError(f"macs: actions must be (N, {self.decisions}), got {tuple(actions.shape)}")
        actions = actions.long()
        total = torch.full((actions.shape[0],), self.fixed, dtype=torch.int64, device=actions.device)
        for (in_group, out_group), table in self._tables.items():
            i, j = self._group(in_group, actions), self._group(out_group, actions)
            place, values = i * self.k + j, table.on(actions.device)
            total += values[place] if isinstance(place, int) else values.index_select(0, place)
        return total

    def _group(self, group: frozenset[int] | None, actions: Tensor) -> Tensor | int:
        """Index 0…k−1 of the group that the actions give."""
        if group is None:
            return self.k - 1
        if len(group) == 1:
            return actions[:, next(iter(group))] - 1
        return actions.index_select(1, self._columns[group].on(actions.device)).amax(1) - 1


@dataclass
class CapTerm:
    """MACs that the action of one decision adds, given the largest earlier actions of two groups."""

    in_columns: list[int]  # earlier decisions whose maximum is the input's group
    out_columns: list[int]
    extra: Constant  # (k · k, k): [largest earlier in − 1, out − 1][action − 1] → MACs beyond action 1


class Cap:
    """Keeps every image within an allowance of MACs, decision by decision, assuming action 1 for what is to come.

    `spent` is the cost of the actions so far with the cheapest completion; the MACs of every candidate differ from it
    only in the convolutions whose groups contain this decision.
    """

    def __init__(self, counter: MacCounter) -> None:
        self.k, self.cheapest = counter.k, counter.cheapest
        k = self.k
        self.terms: list[list[CapTerm]] = []
        self.fixed: list[Constant] = []
        span = torch.arange(k)
        for decision in range(counter.decisions):
            fixed, terms = torch.zeros(k, dtype=torch.int64), dict[tuple[tuple[int, ...], tuple[int, ...]], Tensor]()
            for (in_group, out_group), table in counter.pairs.items():
                of_in, of_out = decision in (in_group or ()), decision in (out_group or ())
                if not (of_in or of_out):
                    continue
                columns = [sorted(d for d in group or () if d < decision) for group in (in_group, out_group)]
                # [earlier in][earlier out][action] → index of the table
                i = span[:, None, None] if in_group is not None else torch.full((1, 1, 1), k - 1)
                j = span[None, :, None] if out_group is not None else torch.full((1, 1, 1), k - 1)
                i = torch.maximum(i, span) if of_in else i
                j = torch.maximum(j, span) if of_out else j
                total = table[i, j].expand(k, k, k)
                extra = total - total[:, :, :1]
                if not columns[0] and not columns[1]:
                    fixed += extra[0, 0]
                    continue
                key = (tuple(columns[0]), tuple(columns[1]))
                extra = extra.reshape(k * k, k)
                terms[key] = extra + terms[key] if key in terms else extra
            self.fixed.append(Constant(fixed))
            self.terms.append([CapTerm(list(i), list(j), Constant(extra)) for (i, j), extra in terms.items()])

    def lower(self, decision: int, action: Tensor, taken: list[Tensor], spent: Tensor, allowance: int) -> Tensor:
        """The largest actions ≤ `action` (N,) int32 within `allowance`. Updates `spent` (N,) int64 in place."""
        fixed = self.fixed[decision].on(spent.device)
        candidates = spent[:, None] + fixed  # (N, k)
        for term in self.terms[decision]:
            index = self._largest(term.in_columns, taken) * self.k + self._largest(term.out_columns, taken)
            extra = term.extra.on(spent.device)
            candidates = candidates + (extra[index] if isinstance(index, int) else extra.index_select(0, index))
        action = torch.minimum(action, (candidates <= allowance).sum(1, dtype=action.dtype))
        spent.copy_(candidates.gather(1, action.long()[:, None] - 1)[:, 0])
        return action

    @staticmethod
    def _largest(columns: list[int], taken: list[Tensor]) -> Tensor | int:
        """Largest earlier action of the columns − 1, or 0 where there is none."""
        if not columns:
            return 0
        largest = taken[columns[0]]
        for column in columns[1:]:
            largest = torch.maximum(largest, taken[column])
        return largest - 1
