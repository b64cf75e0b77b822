"""``rnp.evaluate``: accuracy with an interval, MACs, and the time measured beside the best stock path."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rnp import stock
from rnp.agent import Agent
from rnp.batches import images_and_labels
from rnp.measure import in_turn, median, quantile
from rnp.network import PrunedNetwork

RESAMPLES = 10_000


def accuracy_interval(correct: Tensor, confidence: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of ``correct`` (N,) bool over the images.

    Resampling N answers that are right or wrong is drawing from a binomial distribution, so that is what is drawn.
    """
    count = len(correct)
    draws = np.random.default_rng(seed).binomial(count, float(correct.double().mean()), RESAMPLES) / count
    return _percentiles(draws, confidence)


@dataclass
class PairedDifference:
    """Accuracy of one policy minus that of another on the same images."""

    difference: float
    interval: tuple[float, float]

    def __str__(self) -> str:
        return f"{100 * self.difference:+.2f} points [{100 * self.interval[0]:+.2f}, {100 * self.interval[1]:+.2f}]"


def compare(
    first: EvaluationReport | Tensor, second: EvaluationReport | Tensor, confidence: float = 0.95, seed: int = 0
) -> PairedDifference:
    """Accuracy of ``first`` minus that of ``second``, with its bootstrap interval over the images, paired by image.

    Args:
        first, second: reports over the same images in the same order, or their ``correct`` (N,) bool.
    """
    a, b = (each.correct if isinstance(each, EvaluationReport) else each for each in (first, second))
    if a.shape != b.shape:
        raise ValueError(f"compare: both must cover the same images, got {tuple(a.shape)} and {tuple(b.shape)}")
    count = len(a)
    won, lost = int((a & ~b).sum()), int((b & ~a).sum())
    shares = [won / count, lost / count, (count - won - lost) / count]
    draws = np.random.default_rng(seed).multinomial(count, shares, RESAMPLES)
    return PairedDifference((won - lost) / count, _percentiles((draws[:, 0] - draws[:, 1]) / count, confidence))


def _percentiles(draws: np.ndarray, confidence: float) -> tuple[float, float]:
    tail = 50 * (1 - confidence)
    low, high = np.percentile(draws, [tail, 100 - tail])
    return float(low), float(high)


@dataclass
class Timing:
    """Wall-clock time of the network and of the best stock path, on the same batches in one run."""

    measured_speedup: float  # time of the stock path ÷ time of the network; each the sum over batches of its median
    measured_p20: float  # of that ratio over the rounds
    measured_p80: float
    noise: float  # the stock path against itself in the same rounds: p80 of |ratio − 1|
    theoretical_speedup: float  # dense MACs ÷ MACs of the images timed
    realised_fraction: float  # measured ÷ theoretical
    dense_ms: float  # of one batch, mean over the batches of the median
    pruned_ms: float
    dense_path: str  # see rnp.stock.StockPath
    batch_size: int
    batches: int
    rounds: int
    threads: int


@dataclass
class EvaluationReport:
    """What :func:`evaluate` found. ``correct``, ``macs`` and ``actions`` are per image and left out of ``to_dict``."""

    policy: str
    images: int
    accuracy: float
    accuracy_interval: tuple[float, float]  # 95 %, bootstrap over the images
    mean_macs: float  # per image, the agent's own counted in
    p50_macs: float
    p99_macs: float
    dense_macs: int
    theoretical_speedup: float  # dense MACs ÷ mean MACs, over all images
    layers: list[str]
    histogram: list[list[float]]  # share of the images with action 1…k, layer by layer
    timing: Timing | None
    correct: Tensor = field(repr=False)  # (N,) bool
    macs: Tensor = field(repr=False)  # (N,) int64
    actions: Tensor = field(repr=False)  # (N, L) int32

    def to_dict(self) -> dict[str, Any]:
        """JSON values; the entries of ``timing`` stand beside the others (null where nothing was timed)."""
        left_out = ("timing", "correct", "macs", "actions")
        values = {name: value for name, value in self.__dict__.items() if name not in left_out}
        values["accuracy_interval"] = list(self.accuracy_interval)
        for name in Timing.__dataclass_fields__:
            key = "timed_theoretical_speedup" if name == "theoretical_speedup" else name
            values[key] = None if self.timing is None else getattr(self.timing, name)
        return values

    def __str__(self) -> str:
        low, high = self.accuracy_interval
        lines = [
            f"policy                 {self.policy}",
            f"accuracy               {100 * self.accuracy:.2f} % [{100 * low:.2f}, {100 * high:.2f}], "
            f"{self.images} images",
            f"MACs per image         mean {self.mean_macs:,.0f}, p50 {self.p50_macs:,.0f}, p99 {self.p99_macs:,.0f}, "
            f"dense {self.dense_macs:,}",
            f"theoretical speed-up   {self.theoretical_speedup:.3f}x (agent counted in)",
        ]
        if self.timing is not None:
            t = self.timing
            lines += [
                f"measured speed-up      {t.measured_speedup:.3f}x "
                f"[p20 {t.measured_p20:.3f}, p80 {t.measured_p80:.3f}], noise ±{100 * t.noise:.1f} %",
                f"realised fraction      {t.realised_fraction:.3f} of {t.theoretical_speedup:.3f}x on the images timed",
                f"time of a batch        {t.pruned_ms:.2f} ms, dense ({t.dense_path}) {t.dense_ms:.2f} ms; batch "
                f"{t.batch_size}, {t.threads} thread(s), {t.batches} batches, {t.rounds} rounds",
            ]
        width = max(len(name) for name in self.layers)
        lines.append("actions 1…k per layer")
        for name, shares in zip(self.layers, self.histogram, strict=True):
            lines.append(f"  {name:<{width}}  " + " ".join(f"{100 * share:5.1f} %" for share in shares))
        return "\n".join(lines)


def evaluate(
    pruned: PrunedNetwork,
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    batch_size: int | None = None,
    timing_batches: int = 8,
    rounds: int = 7,
    dense: nn.Module | None = None,
    stock_path: stock.StockPath | None = None,
    max_images: int | None = None,
) -> EvaluationReport:
    """Accuracy, MACs and time of the network under its policy and budget.

    The time is that of real batches of the loader, under ``torch.inference_mode()``, against the original dense network
    in the fastest way stock torch offers (:func:`rnp.stock.best_stock_path`). In every round each side runs all
    batches in a row, as a network in use does (its weights stay in the caches), the stock path twice; the order of the
    sides turns from round to round.

    Args:
        pruned: left as it is.
        loader: yields (images (N, C, H, W), labels (N,)).
        batch_size: of the timed batches; None: that of the loader's first batch.
        timing_batches: batches timed; 0: nothing is timed.
        rounds: timed rounds over those batches, after one that is not counted.
        dense: the dense rival; None: the network's own weights at full width (:func:`rnp.stock.dense_model`).
        stock_path: what ``best_stock_path`` gave for this network at this batch size before, to save its search.
        max_images: stop after so many images; None: all.

    Raises:
        ValueError: a number out of its range, the loader gave no images, labels are not (N,), or the network's answer
            is not (N, classes).
        TypeError: the loader yields something else than images with labels, or labels that are not integers.
    """
    numbers = {"batch_size": (batch_size, 1), "timing_batches": (timing_batches, 0), "rounds": (rounds, 1),
               "max_images": (max_images, 1)}  # fmt: skip
    for name, (value, least) in numbers.items():
        if value is not None and value < least:
            raise ValueError(f"evaluate: {name} must be at least {least}, got {value}")
    device = next(pruned.parameters()).device
    training = pruned.training
    epsilon = getattr(pruned.policy, "epsilon", 0.0)
    correct, macs, actions = [], [], []
    timed: list[Tensor] = []
    wanted = 0
    seen = 0
    try:
        pruned.eval()
        if isinstance(pruned.policy, Agent):
            pruned.policy.epsilon = 0.0
        for batch in loader:
            images, labels = images_and_labels(batch, "evaluate")
            if max_images is not None and seen + len(images) > max_images:
                images, labels = images[: max_images - seen], labels[: max_images - seen]
            if len(images) == 0:
                break
            images = images.to(device, memory_format=torch.channels_last)
            if wanted == 0:
                batch_size = len(images) if batch_size is None else batch_size
                wanted = batch_size * timing_batches
            if seen < wanted:
                timed.append(images)
            seen += len(images)
            with torch.inference_mode():
                logits, trace = pruned(images, return_trace=True)
            if not isinstance(logits, Tensor) or logits.dim() != 2:
                got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
                raise ValueError(f"evaluate: the network must answer (N, classes), got {got}")
            correct.append(logits.argmax(1).cpu() == labels.cpu())
            macs.append(trace.macs.cpu())
            actions.append(trace.actions.cpu())
        if not seen:
            raise ValueError("evaluate: the loader gave no images")
        timing = None
        if timed and timing_batches:
            batches = list(torch.cat(timed)[:wanted].split(batch_size))
            if len(batches) > 1 and len(batches[-1]) < batch_size:
                batches.pop()
            if stock_path is None:
                model = stock.dense_model(pruned) if dense is None else dense
                stock_path = stock.best_stock_path(model, batches[0])
            timing = _time(pruned, stock_path, batches, torch.cat(macs), rounds)
    finally:
        if isinstance(pruned.policy, Agent):
            pruned.policy.epsilon = epsilon
        pruned.train(training)
    right, spent, taken = torch.cat(correct), torch.cat(macs), torch.cat(actions)
    counts = torch.stack([(taken == action).double().mean(0) for action in range(1, pruned.groups + 1)], 1)
    return EvaluationReport(
        policy=policy_name(pruned),
        images=seen,
        accuracy=float(right.double().mean()),
        accuracy_interval=accuracy_interval(right),
        mean_macs=float(spent.double().mean()),
        p50_macs=float(spent.double().quantile(0.5)),
        p99_macs=float(spent.double().quantile(0.99)),
        dense_macs=int(pruned.dense_macs),
        theoretical_speedup=pruned.dense_macs / float(spent.double().mean()),
        layers=list(pruned.layers),
        histogram=counts.tolist(),
        timing=timing,
        correct=right,
        macs=spent,
        actions=taken,
    )


def policy_name(pruned: PrunedNetwork) -> str:
    """The network's policy and budget in one line."""
    cap = "" if pruned.max_macs is None else f", cap {pruned.max_macs:g}"
    if isinstance(pruned.policy, Agent):
        return f"Agent(Δp={pruned.penalty_shift:.4g}{cap})"
    return f"{pruned.policy!r}{cap}"


def _time(pruned: PrunedNetwork, path: stock.StockPath, batches: list[Tensor], macs: Tensor, rounds: int) -> Timing:
    """Time ``batches``, whose images cost the first entries of ``macs``."""
    sides = {"dense": path.module, "pruned": pruned, "again": path.module}
    with torch.inference_mode():
        times = in_turn(sides, batches, rounds)
    totals = {name: sum(median(values) for values in times[name]) for name in sides}
    rows = {name: [sum(column) for column in zip(*times[name], strict=True)] for name in sides}  # seconds of each round
    ratios = [dense / ours for dense, ours in zip(rows["dense"], rows["pruned"], strict=True)]
    against_itself = [abs(a / b - 1) for a, b in zip(rows["dense"], rows["again"], strict=True)]
    count = sum(len(images) for images in batches)
    theoretical = pruned.dense_macs * count / float(macs[:count].sum())
    measured = totals["dense"] / totals["pruned"]
    return Timing(
        measured_speedup=measured,
        measured_p20=quantile(ratios, 0.2),
        measured_p80=quantile(ratios, 0.8),
        noise=quantile(against_itself, 0.8),
        theoretical_speedup=theoretical,
        realised_fraction=measured / theoretical,
        dense_ms=1e3 * totals["dense"] / len(batches),
        pruned_ms=1e3 * totals["pruned"] / len(batches),
        dense_path=path.name,
        batch_size=len(batches[0]),
        batches=len(batches),
        rounds=rounds,
        threads=torch.get_num_threads(),
    )
