"""The figures of the report, as SVG text. Each is drawn only if the run has rows for it."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

OURS, RIVAL, GREY, GREEN = "#1f6fc4", "#c2571a", "#3a3f45", "#5b8c2a"
COLOURS = {"full": OURS, "1/2": GREEN, "mixed": "#8a4fbf", "prepacked": GREY, "eager": RIVAL}
Row = dict[str, Any]


def draw(results: dict[str, Any]) -> list[tuple[str, str]]:
    """(svg, caption) of every figure, in the order of the page."""
    made = []
    for function in (theory, roofline, cold, scaling, networks, training):
        drawn = function(results)
        if drawn is not None:
            made.append(drawn)
    return made


def _axes(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _svg(figure: Any) -> str:
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue().partition("?>")[2].partition(">")[2]  # without the XML and document-type lines


def _rows(results: dict[str, Any], test: Callable[[Row], bool]) -> list[Row]:
    return [row for row in results["rows"] if test(row)]


def theory(results: dict[str, Any]) -> tuple[str, str] | None:
    """Measured against theoretical speed-up of every layer and width."""
    rows = _rows(results, lambda row: row["part"] == "layer" and row["realised"])
    if not rows:
        return None
    figure, (axis,) = _axes(6.4, 5)
    for width, colour in (("3/4", RIVAL), ("1/2", GREEN), ("1/4", OURS), ("mixed", "#8a4fbf")):
        points = [(r["theory"][width], r["speedup"][width]["median"]) for r in rows if width in r["speedup"]]
        if points:
            axis.scatter(*zip(*points, strict=True), s=12, alpha=0.6, color=colour, linewidths=0, label=width)
    axis.plot([1, 16], [1, 16], color=GREY, linewidth=1, label="all of it arrives")
    axis.plot([1, 16], [1, 1], color=GREY, linewidth=1, linestyle=":", label="masks: nothing arrives")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.set_xlabel("theoretical speed-up (dense MACs ÷ MACs)")
    axis.set_ylabel(f"measured speed-up over {rows[0]['baseline']} oneDNN, dense")
    axis.legend(frameon=False, fontsize=8)
    return _svg(
        figure
    ), "Speed-up against theory: every layer, batch and number of threads. Winograd lifts points above."


def roofline(results: dict[str, Any]) -> tuple[str, str] | None:
    """GFLOP/s of direct work against flops per byte, with the measured roofs."""
    rows = _rows(results, lambda row: row["part"] == "layer")
    used = {row["threads"] for row in rows}
    limits = [limit for limit in results["limits"] if limit["threads"] in used]
    if not rows or not limits:
        return None
    figure, axes = _axes(6 * len(limits), 4.6, len(limits))
    for axis, limit in zip(axes, limits, strict=True):
        here = [row for row in rows if row["threads"] == limit["threads"]]
        x = [row["flops"] / row["bytes"] for row in here]
        for side, colour, marker in (("prepacked", GREY, "^"), ("full", OURS, "o")):
            rates = [row["flops"] / row["ms"][side]["median"] / 1e6 for row in here]
            axis.scatter(x, rates, s=14, color=colour, marker=marker, alpha=0.7, linewidths=0, label=side)
        span = [min(x) / 1.3, limit["gflops"] / limit["gbytes"], max(max(x), 2 * limit["gflops"] / limit["gbytes"])]
        axis.plot(span, [min(limit["gflops"], s * limit["gbytes"]) for s in span], color=RIVAL, linewidth=1.2)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlabel("flops per byte (dense layer; input, weight, output once)")
        axis.set_ylabel("GFLOP/s")
        axis.set_title(
            f"{limit['threads']} thread(s): {limit['gflops']:.0f} GFLOP/s, {limit['gbytes']:.0f} GB/s", fontsize=9
        )
        axis.legend(frameon=False, fontsize=8)
    return _svg(figure), (
        "Roofline, one point a layer and batch: flops of direct convolution, padding left out, over the time taken. "
        "Points above the roof: Winograd needs fewer operations, or the data came from a cache."
    )


def cold(results: dict[str, Any]) -> tuple[str, str] | None:
    """Speed-up over prepacked oneDNN with warm and with cold caches."""
    rows = _rows(results, lambda row: row.get("sweep") in ("warm", "cold"))
    if not rows:
        return None
    sides = [side for side in ("full", "1/2", "mixed") if all(side in row["speedup"] for row in rows)]
    figure, (axis,) = _axes(7, 3.6)
    for index, side in enumerate(sides):
        at = [i + (index - 1) * 0.25 for i in range(len(rows))]
        axis.bar(at, [row["speedup"][side]["median"] for row in rows], 0.23, color=COLOURS[side], label=side)
    axis.axhline(1, color=GREY, linewidth=1)
    axis.set_xticks(range(len(rows)), [f"{row['layer']}\n{row['sweep']}" for row in rows], fontsize=8)
    axis.set_ylabel("speed-up over prepacked oneDNN")
    axis.legend(frameon=False, fontsize=8)
    return _svg(figure), "Warm and cold: the same call again and again, or with other data in the caches before each."


def scaling(results: dict[str, Any]) -> tuple[str, str] | None:
    """Share of the theoretical speed-up, and full width, over batch, channels and threads."""
    sweeps = [s for s in ("batch", "channels", "threads") if _rows(results, lambda row, s=s: row.get("sweep") == s)]
    if not sweeps:
        return None
    figure, axes = _axes(4.3 * len(sweeps), 3.6, len(sweeps))
    for axis, sweep in zip(axes, sweeps, strict=True):
        rows = _rows(results, lambda row, s=sweep: row.get("sweep") == s)
        for side in ("full", "1/2", "mixed"):
            points = [
                (row["x"], row["speedup"][side]["median"] / row["theory"][side])
                for row in rows
                if side in row["speedup"]
            ]
            if points:
                axis.plot(*zip(*points, strict=True), "o-", color=COLOURS[side], markersize=4, label=side)
        axis.axhline(1, color=GREY, linewidth=1)
        axis.set_xscale("log", base=2)
        axis.set_xticks([row["x"] for row in rows], [str(row["x"]) for row in rows])
        axis.set_xlabel(sweep)
        axis.set_ylim(bottom=0)
    axes[0].set_ylabel("speed-up over prepacked oneDNN ÷ theory")
    axes[0].legend(frameon=False, fontsize=8)
    return _svg(figure), "Scaling: speed-up over prepacked oneDNN, dense, as a share of the theoretical one."


def _bars(rows: list[Row], title: str) -> Any:
    figure, (axis,) = _axes(max(6.0, 1.9 * len(rows)), 4)
    sides = list(dict.fromkeys(side for row in rows for side in row["speedup"]))
    for index, side in enumerate(sides):
        at = [i + (index - len(sides) / 2) * 0.8 / len(sides) for i, row in enumerate(rows) if side in row["speedup"]]
        height = [row["speedup"][side]["median"] for row in rows if side in row["speedup"]]
        rival = side in ("eager", "onnxruntime", "openvino") or side.startswith("masked")
        shade = 0.45 + 0.55 * index / len(sides)
        axis.bar(at, height, 0.75 / len(sides), color=RIVAL if rival else OURS, alpha=shade, label=side)
    axis.axhline(1, color=GREY, linewidth=1)
    names = [f"{row['name']}\n{row['threads']} thread(s)" for row in rows]
    axis.set_xticks(range(len(rows)), names, fontsize=7, rotation=0 if len(rows) < 8 else 90)
    axis.set_ylabel(title)
    axis.legend(frameon=False, fontsize=8, ncols=2)
    return figure


def networks(results: dict[str, Any]) -> tuple[str, str] | None:
    """Whole networks beside their rivals."""
    rows = _rows(results, lambda row: row["part"] == "network")
    if not rows:
        return None
    return _svg(_bars(rows, "speed-up over prepacked oneDNN")), "Whole networks: rivals in orange, ours in blue."


def training(results: dict[str, Any]) -> tuple[str, str] | None:
    """Training steps beside torch's dense one."""
    rows = _rows(results, lambda row: row["part"] == "training")
    if not rows:
        return None
    return _svg(
        _bars(rows, "speed-up over torch's dense step")
    ), "A training step of a layer: forward and both gradients."
