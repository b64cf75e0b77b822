"""The demo's measurements: one agent over many budgets, beside static rivals at the same mean MACs.

The rivals are not told anything about an image. *Uniform width*: the same network, every layer at one share of its
channels; where no width has the agent's mean MACs, each image gets one of the two nearest widths by lot, in the share
that makes the mean MACs equal (:class:`Lottery`), and its accuracy is the expectation over that lot. *Thin*: a plain
network with fewer channels, trained from scratch for the same time. Uniform width runs on our kernels; the thin network
on them or on its best stock path, whichever is faster.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

import rnp
from rnp import stock
from rnp.data import SceneLoader, Scenes
from rnp.evaluation import EvaluationReport
from rnp.measure import in_turn, median, quantile
from rnp.network import PrunedNetwork
from rnp.policies import Fixed, FullWidth, Uniform

OURS = "rnp"  # the name of our kernels as a path, beside "eager", "folded" and "prepacked"
BATCH = 32  # of everything that is timed
RESAMPLES = 10_000
CONFIDENCE = 0.95


class Lottery:
    """Uniform width by lot: each image takes action `high` everywhere with probability `share`, else action `low`."""

    needs_features = False

    def __init__(self, low: int, high: int, share: float, seed: int = 0) -> None:
        self.low, self.high, self.share = low, high, share
        self.generator = torch.Generator().manual_seed(seed)

    def start(self, network: PrunedNetwork, batch_size: int, device: torch.device) -> Tensor:
        wins = torch.rand(batch_size, generator=self.generator) < self.share
        return torch.where(wins, self.high, self.low).to(device, torch.int32)

    def act(self, layer: int, features: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
        return state, state

    def __repr__(self) -> str:
        return f"Lottery({self.low}, {self.high}, {self.share:.3f})"


@dataclass
class Row:
    """One line of the table. `kind`: "full", "agent", "uniform" or "thin"; `right` (N,) float64: chance to be right."""

    kind: str
    policy: str
    target: float | None  # the theoretical speed-up asked for
    right: Tensor = field(repr=False)
    mean_macs: float
    theoretical_speedup: float
    timing: dict[str, Any]  # measured_speedup, realised_fraction, and how they were measured

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "policy": self.policy,
            "kind": self.kind,
            "target": self.target,
            "accuracy": float(self.right.mean()),
            "accuracy_interval": list(bootstrap_mean(self.right)),
            "mean_macs": self.mean_macs,
            "theoretical_speedup": self.theoretical_speedup,
            **self.timing,
        }


def bootstrap_mean(values: Tensor, seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean of `values` (N,), resampling images.

    The values are few (an image is right, wrong, or right with the chance of a lot), so resampling N of them is drawing
    from a multinomial distribution over the distinct ones.
    """
    distinct, counts = np.unique(values.double().numpy().round(12), return_counts=True)
    draws = np.random.default_rng(seed).multinomial(len(values), counts / len(values), RESAMPLES)
    return _percentiles(draws @ distinct / len(values))


def difference(first: Tensor, second: Tensor) -> dict[str, Any]:
    """Mean of first − second (N,) over the same images, with the interval of the paired bootstrap."""
    delta = first.double() - second.double()
    return {"difference": float(delta.mean()), "interval": list(bootstrap_mean(delta))}


def ranks(values: Tensor) -> np.ndarray:
    """Ranks (N,) of values (N,), ties at their mean."""
    _, inverse, counts = np.unique(values.double().numpy(), return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def rank_correlation(first: Tensor, second: Tensor, resamples: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Spearman's rank correlation of two (N,) tensors, with its 95 % percentile bootstrap interval.

    Where one of them does not vary there is no correlation; it is given as 0.
    """
    a, b = ranks(first), ranks(second)
    generator = np.random.default_rng(seed)
    draws = []
    for _ in range(resamples):
        index = generator.integers(len(a), size=len(a))
        # Ranks of a resample are close to a monotone function of the whole set's: ranking those keeps ties right.
        draws.append(_pearson(ranks(torch.from_numpy(a[index])), ranks(torch.from_numpy(b[index]))))
    return {"rank_correlation": _pearson(a, b), "interval": list(_percentiles(np.array(draws)))}


def _pearson(a: np.ndarray, b: np.ndarray) -> float:
    if a.std() == 0 or b.std() == 0:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


def _percentiles(draws: np.ndarray) -> tuple[float, float]:
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(draws, [tail, 100 - tail])
    return float(low), float(high)


class Comparison:
    """Measures everything on the test scenes; the network's policy must be the trained agent."""

    def __init__(
        self,
        pruned: PrunedNetwork,
        thin: PrunedNetwork,
        validation: Scenes,
        test: Scenes,
        timing_batches: int,
        rounds: int,
    ) -> None:
        self.pruned, self.thin, self.agent = pruned.eval(), thin.eval(), pruned.policy
        self.loader = SceneLoader(test, 250)
        self.validation = SceneLoader(validation, 250)
        self.timing_batches, self.rounds = timing_batches, rounds
        example = test.batch(slice(0, BATCH))[0]
        self.dense = stock.best_stock_path(stock.dense_model(pruned), example)
        self.widths: dict[int, EvaluationReport] = {}  # uniform action → report, not timed

    # -- one policy ----------------------------------------------------------------------------------------------

    def evaluate(self, policy: Any, shift: float = 0.0, timed_only: bool = False) -> EvaluationReport:
        """rnp.evaluate under a policy; `timed_only` looks at the timed images alone."""
        self.pruned.policy = policy
        self.pruned.set_budget(shift)
        try:
            return rnp.evaluate(
                self.pruned,
                self.loader,
                batch_size=BATCH,
                timing_batches=self.timing_batches,
                rounds=self.rounds,
                stock_path=self.dense,
                max_images=self.timing_batches * BATCH if timed_only else None,
            )
        finally:
            self.pruned.policy = self.agent
            self.pruned.set_budget()

    def uniform(self, action: int) -> EvaluationReport:
        """The report at one uniform action, evaluated once."""
        if action not in self.widths:
            self.widths[action] = self.evaluate(Uniform(action / self.pruned.groups))
        return self.widths[action]

    def full_row(self) -> Row:
        """The converted network at full width, no agent."""
        report = self.evaluate(FullWidth())
        self.widths[self.pruned.groups] = report
        return _row("full", "full width", None, report)

    def agent_row(self, target: float) -> tuple[Row, EvaluationReport]:
        """The agent, steered to a speed-up on the validation scenes, then measured on the test scenes."""
        found = rnp.calibrate(self.pruned, self.validation, speedup=target, max_images=None)
        report = self.evaluate(self.agent, found.penalty_shift)
        return _row("agent", f"agent, Δp = {found.penalty_shift:+.4f}", target, report), report

    def uniform_row(self, mean_macs: float, target: float | None) -> Row:
        """Uniform width at the given mean MACs: a lot between the two neighbouring widths."""
        k = self.pruned.groups
        at = [self.uniform(action).mean_macs for action in range(1, k + 1)]
        mean_macs = min(max(mean_macs, at[0]), at[-1])
        low = max(action for action in range(1, k) if at[action - 1] <= mean_macs)
        share = (mean_macs - at[low - 1]) / (at[low] - at[low - 1])
        narrow, wide = self.uniform(low).correct.double(), self.uniform(low + 1).correct.double()
        timed = self.evaluate(Lottery(low, low + 1, share), timed_only=True)
        name = f"uniform width {low}/{k}" if share < 0.01 else f"uniform width {low}/{k} or {low + 1}/{k}"
        speedup = self.pruned.dense_macs / mean_macs
        return Row("uniform", name, target, share * wide + (1 - share) * narrow, mean_macs, speedup, _timing(timed))

    def thin_row(self, target: float) -> Row:
        """The thin network, timed beside the dense one on its best stock path and on our kernels: the faster counts.

        Raises RuntimeError where the two paths differ by more than rounding.
        """
        scenes = self.loader.scenes
        batches = [scenes.batch(slice(i * BATCH, (i + 1) * BATCH))[0] for i in range(self.timing_batches)]
        batches = [images.contiguous(memory_format=torch.channels_last) for images in batches]
        self.thin.policy = FullWidth()
        report = rnp.evaluate(self.thin, self.loader, timing_batches=0)
        stock_path = stock.best_stock_path(stock.dense_model(self.thin), batches[0])
        paths = {stock_path.name: stock_path.module, OURS: self.thin}
        with torch.inference_mode():
            require_agreement(*paths.values(), batches)
            times = in_turn({"dense": self.dense.module, **paths}, batches, self.rounds)
        totals = {name: sum(median(values) for values in rows) for name, rows in times.items()}
        path = min(paths, key=totals.__getitem__)
        theoretical = self.pruned.dense_macs / self.thin.dense_macs
        measured = totals["dense"] / totals[path]
        rounds = {name: [sum(column) for column in zip(*rows, strict=True)] for name, rows in times.items()}
        ratios = [dense / thin for dense, thin in zip(rounds["dense"], rounds[path], strict=True)]
        milliseconds = {name: 1e3 * seconds / self.timing_batches for name, seconds in totals.items()}
        timing = {
            "measured_speedup": measured,
            "measured_p20": quantile(ratios, 0.2),
            "measured_p80": quantile(ratios, 0.8),
            "realised_fraction": measured / theoretical,
            "timed_theoretical_speedup": theoretical,
            "dense_ms": milliseconds["dense"],
            "pruned_ms": milliseconds[path],
            "dense_path": self.dense.name,
            "thin_path": path,
            "thin_ms": {name: milliseconds[name] for name in paths},
            "batch_size": BATCH,
            "threads": torch.get_num_threads(),
        }
        name, right = "thin network from scratch", report.correct.double()
        return Row("thin", name, target, right, self.thin.dense_macs, theoretical, timing)

    def shuffled(self, actions: Tensor, seed: int = 0) -> Tensor:
        """A control: the agent's actions (N, L) dealt to the images at random → (N,) float64, right or wrong.

        The mean MACs stay the same; what is lost is that they went to the images that need them.
        """
        order = torch.randperm(len(actions), generator=torch.Generator().manual_seed(seed))
        right = []
        with torch.inference_mode():
            done = 0
            for images, labels in self.loader:
                self.pruned.policy = Fixed(actions[order[done : done + len(labels)]])
                done += len(labels)
                right.append(self.pruned(images).argmax(1) == labels)
        self.pruned.policy = self.agent
        return torch.cat(right).double()


def require_agreement(first: torch.nn.Module, second: torch.nn.Module, batches: list[Tensor]) -> None:
    """Raise RuntimeError where two ways to run one network differ by more than rounding on any of the batches."""
    for images in batches:
        truth = first(images)
        error, allowed = float((second(images) - truth).abs().max()), stock.rounding(truth)
        if not error <= allowed:
            raise RuntimeError(f"two paths of one network differ by {error:.3g}, allowed are {allowed:.3g}")


def _timing(report: EvaluationReport) -> dict[str, Any]:
    values = report.to_dict()
    names = ("measured_speedup", "measured_p20", "measured_p80", "noise", "timed_theoretical_speedup",
             "realised_fraction", "dense_ms", "pruned_ms", "dense_path", "batch_size", "threads")  # fmt: skip
    return {name: values[name] for name in names}


def _row(kind: str, policy: str, target: float | None, report: EvaluationReport) -> Row:
    right = report.correct.double()
    return Row(kind, policy, target, right, report.mean_macs, report.theoretical_speedup, _timing(report))
