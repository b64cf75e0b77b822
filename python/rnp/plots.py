"""The demo's figures, as PNG files."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rnp.data import Scenes

AGENT, STATIC, THIN, DENSE = "#1f6fc4", "#c2571a", "#5b8c2a", "#3a3f45"
GALLERY = 12  # images at either end


def draw(findings: dict[str, Any], test: Scenes, out: Path) -> list[tuple[Path, str]]:
    """Draw every figure into `out`; returns (file, caption) in the order of the page."""
    import matplotlib

    matplotlib.use("Agg")
    made = []
    for name, function in (
        ("accuracy", accuracy),
        ("speedup", speedup),
        ("difficulty", difficulty),
        ("gallery", gallery),
        ("actions", actions),
    ):
        figure, caption = function(findings, test)
        path = out / f"{name}.png"
        figure.savefig(path, dpi=110)
        made.append((path, caption))
    return made


def _axes(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _series(findings: dict[str, Any], kinds: tuple[str, ...]) -> list[dict[str, Any]]:
    rows = [row for row in findings["budgets"] if row["kind"] in kinds]
    return sorted(rows, key=lambda row: row["theoretical_speedup"])


def accuracy(findings: dict[str, Any], test: Scenes) -> tuple[Any, str]:
    """Accuracy against theoretical and against measured speed-up."""
    figure, axes = _axes(10, 4, 2)
    for axis, column, title in zip(
        axes,
        ("theoretical_speedup", "measured_speedup"),
        ("theoretical speed-up (dense MACs ÷ MACs)", "measured speed-up (dense time ÷ time)"),
        strict=True,
    ):
        for kinds, colour, marker, label in (
            (("agent",), AGENT, "o-", "agent"),
            (("uniform",), STATIC, "s--", "uniform width"),
            (("thin",), THIN, "D", "thin network from scratch"),
            (("full",), DENSE, "^", "full width"),
        ):
            rows = _series(findings, kinds)
            x = [row[column] for row in rows]
            y = [100 * row["accuracy"] for row in rows]
            error = [[100 * abs(row["accuracy"] - row["accuracy_interval"][end]) for row in rows] for end in (0, 1)]
            axis.errorbar(x, y, error, fmt=marker, color=colour, label=label, capsize=2, markersize=5, linewidth=1.2)
        axis.set_xlabel(title)
        axis.set_ylabel("accuracy, %")
    axes[0].legend(frameon=False, loc="lower left")
    return figure, "Accuracy on the test scenes against the speed-up, in theory and on the clock; bars: 95 % intervals."


def speedup(findings: dict[str, Any], test: Scenes) -> tuple[Any, str]:
    """Measured against theoretical speed-up."""
    figure, (axis,) = _axes(5.2, 4)
    top = max(max(row["theoretical_speedup"], row["measured_speedup"]) for row in findings["budgets"]) * 1.05
    axis.plot([1, top], [1, top], color=DENSE, linewidth=1, label="all of it arrives")
    axis.plot([1, top], [1, 1], color=DENSE, linewidth=1, linestyle=":", label="masks: nothing arrives")
    for kinds, colour, marker, label in (
        (("agent",), AGENT, "o-", "agent"),
        (("uniform",), STATIC, "s--", "uniform width"),
        (("thin",), THIN, "D", "thin network"),
    ):
        rows = _series(findings, kinds)
        axis.plot([r["theoretical_speedup"] for r in rows], [r["measured_speedup"] for r in rows], marker, color=colour,
                  label=label, markersize=5)  # fmt: skip
    axis.set_xlabel("theoretical speed-up")
    axis.set_ylabel("measured speed-up")
    axis.legend(frameon=False)
    return figure, "How much of the theoretical speed-up arrives, against the dense network in its fastest stock form."


def difficulty(findings: dict[str, Any], test: Scenes) -> tuple[Any, str]:
    """Compute and accuracy against difficulty, at the main budget."""
    values = findings["plots"]
    hard, share = values["difficulty"].numpy(), values["share"].numpy()
    figure, axes = _axes(10, 4, 2)
    axes[0].scatter(hard, share, s=3, alpha=0.25, color=AGENT, linewidths=0, rasterized=True)
    edges = np.linspace(0, 1, 21)
    inside = [(hard >= low) & (hard < high) for low, high in itertools.pairwise(edges)]
    centres = (edges[:-1] + edges[1:]) / 2
    enough = [mask.sum() >= 5 for mask in inside]
    mean = [share[mask].mean() if ok else np.nan for mask, ok in zip(inside, enough, strict=True)]
    axes[0].plot(centres, mean, "o-", color=DENSE, markersize=4, label="mean")
    axes[0].set_xlabel("difficulty")
    axes[0].set_ylabel("MACs of an image, share of the dense network's")
    axes[0].legend(frameon=False)
    for (name, right), colour, marker in zip(
        values["right"].items(), (AGENT, DENSE, STATIC), ("o-", "^-", "s--"), strict=True
    ):
        rate = [100 * right.numpy()[mask].mean() if ok else np.nan for mask, ok in zip(inside, enough, strict=True)]
        axes[1].plot(centres, rate, marker, color=colour, markersize=4, linewidth=1.2, label=name)
    axes[1].set_xlabel("difficulty")
    axes[1].set_ylabel("accuracy, %")
    axes[1].legend(frameon=False)
    rho = findings["difficulty"]["rank_correlation"]
    return figure, (
        f"Left: what each test scene got, against its difficulty (rank correlation {rho:.2f}). Right: accuracy. "
        f"Both at the budget of {findings['main']['target']:g}×."
    )


def gallery(findings: dict[str, Any], test: Scenes) -> tuple[Any, str]:
    """The images that got the least and the most compute."""
    from matplotlib.figure import Figure

    share = findings["plots"]["share"]
    order = torch.argsort(share, stable=True)
    ends = (order[:GALLERY], order.flip(0)[:GALLERY])
    figure = Figure(figsize=(10, 2.6), layout="constrained")
    rows = figure.subfigures(2, 1)
    for part, chosen, title in zip(rows, ends, ("least compute", "most compute"), strict=True):
        part.suptitle(title, fontsize=10, x=0.01, ha="left")
        for axis, index in zip(part.subplots(1, GALLERY), chosen.tolist(), strict=False):
            axis.imshow(test.images[index, 0].numpy(), cmap="gray", vmin=0, vmax=255)
            axis.set_title(f"{100 * float(share[index]):.0f} %", fontsize=8)
            axis.axis("off")
    return figure, "The test scenes that got the least and the most compute, with their share of the dense MACs."


def actions(findings: dict[str, Any], test: Scenes) -> tuple[Any, str]:
    """How often each action was taken, decision by decision."""
    main = findings["main"]
    histogram = np.array(main["histogram"])
    figure, (axis,) = _axes(7, 3.2)
    left = np.zeros(len(histogram))
    shades = np.linspace(0.25, 1.0, histogram.shape[1])
    for action, shade in enumerate(shades):
        axis.barh(np.arange(len(histogram)), histogram[:, action], left=left, color=AGENT, alpha=shade,
                  label=f"{action + 1}/{len(shades)} of the channels")  # fmt: skip
        left += histogram[:, action]
    axis.set_yticks(np.arange(len(histogram)), [f"decision {i + 1}" for i in range(len(histogram))])
    axis.invert_yaxis()
    axis.set_xlim(0, 1)
    axis.set_xlabel("share of the test scenes")
    axis.legend(frameon=False, ncols=2, bbox_to_anchor=(0, 1.02), loc="lower left", fontsize=8)
    return figure, f"Channels computed, decision by decision, at the budget of {main['target']:g}×."
