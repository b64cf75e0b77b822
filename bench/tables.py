"""RESULTS.md's tables of whole networks, of layers, of rivals, of what is lost and of mixed actions, in Markdown, from
what `rnp bench` or networks.py wrote.

python bench/tables.py bench/results/bench-zen4-2core.json
python bench/tables.py bench/results/pruned-zen4-2core.json
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from rnp.bench import report
from rnp.bench.run import spread

RUNTIMES = ("onnxruntime", "openvino")
CLASSES = (
    "3×3, at least 128 channels in", "3×3, 64 channels in", "1×1, at least 128 channels on both sides",
    "1×1, 64 channels on one side",
)  # fmt: skip
WIDTHS = {"3/4": "¾", "1/2": "½", "1/4": "¼", "mixed": "mixed"}


def line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def speedups(row: dict[str, Any]) -> dict[str, float]:
    return {name: value["median"] for name, value in row["speedup"].items()}


def networks(rows: list[dict[str, Any]]) -> list[str]:
    """Full width over the faster runtime; full width and mixed actions over the stock network."""
    rows = [row for row in rows if row["part"] == "network"]
    if not rows:
        return []
    out = [
        line("network", "batch, threads", "over the faster runtime", "full", "mixed 3×", "5×", "10×"),
        "|---" * 7 + "|",
    ]
    for row in rows:
        speed = speedups(row)
        name, batch = row["name"].split()
        cells = [f"{speed[k]:.2f}×" if k in speed else "–" for k in ("full", "mixed 3x", "mixed 5x", "mixed 10x")]
        over = speed["full"] / max(speed[k] for k in RUNTIMES if k in speed)
        out.append(line(name, f"{batch[1:]}, {row['threads']}", f"{over:.2f}×", *cells))
    return out


def class_of(row: dict[str, Any]) -> str | None:
    """Which line of the table a layer of VGG-16 or ResNet-18/50 belongs to; None for stems, groups and others."""
    c_in, c_out, kernel, groups = map(int, re.match(r"(\d+)x\d+->(\d+) k(\d+)s\d+g(\d+)", row["shape"]).groups())
    if groups > 1 or c_in == 3 or not re.match(r"vgg|r\d", row["name"]):
        return None
    if kernel == 3:
        return CLASSES[0] if c_in >= 128 else CLASSES[1]
    return CLASSES[2] if min(c_in, c_out) >= 128 else CLASSES[3]


def layers(rows: list[dict[str, Any]], batch: int) -> list[str]:
    """Median (lowest) over layers and threads; narrower widths as realised fractions, direct convolution alone."""
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in rows:
        if row["part"] != "layer" or row["batch"] != batch or (kind := class_of(row)) is None:
            continue
        speed = speedups(row)
        prefix = "direct " if "direct full" in speed else ""  # timed where the rule would take Winograd
        found[kind, "full"].append(speed["full"])
        found[kind, "full, direct"].append(speed[prefix + "full"])
        for width in WIDTHS:
            if prefix + width in speed:
                found[kind, width].append(speed[prefix + width] / row["theory"][width])
    if not found:
        return []
    columns = ["full", "full, direct", *(w for w in WIDTHS if found[CLASSES[0], w])]
    out = [line("layers", *(WIDTHS.get(c, c) for c in columns)), "|---" * (len(columns) + 1) + "|"]
    for kind in CLASSES:
        if found[kind, "full"]:
            cells = [f"{statistics.median(found[kind, c]):.2f} ({min(found[kind, c]):.2f})" for c in columns]
            out.append(line(kind, *cells))
    return out


def losses(rows: list[dict[str, Any]]) -> list[str]:
    """Every row in which full width is slower than the best stock path by more than its noise, and how many narrow ones
    realise too little (rnp.bench.report.losses)."""
    if not (found := report.losses(rows)):
        return []
    full = [f"{name}: {text.removeprefix('full width at ')}" for name, text in found if text.startswith("full width")]
    rest = f"- {len(found) - len(full)} of the narrower widths realise less than {report.REALISED}"
    return ["Slower than the best stock path at full width:", "", *(f"- {text}" for text in full), rest]


def rivals(rows: list[dict[str, Any]]) -> list[str]:
    """Pruned work by ours and by the others, of the dense baseline's speed: operator, layers (middle) and networks."""
    sides = ("masked", "slices", "per width")
    out = [line("pruned", "width", "ours", *sides, "theory"), "|---" * 7 + "|"]
    layers: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        speed = speedups(row)
        widths = [side.removeprefix("masked ") for side in speed if side.startswith("masked ")]
        for width in widths:
            if row["part"] == "layer":
                layers[width, row["batch"]].append(row)
                continue
            head = f"{row['name'].removeprefix('rivals: ')}, {row['threads']} thread(s)"
            cells = [f"{speed[f'{side} {width}']:.2f}" if f"{side} {width}" in speed else "–" for side in sides]
            out.append(line(head, width, f"{speed[width]:.2f}", *cells, f"{row['theory'][width]:.2f}"))
    for (width, batch), some in layers.items():
        some = [row for row in some if f"slices {width}" in row["speedup"]]  # without groups
        middle = [statistics.median(speedups(row)[name] for row in some) for name in names(width, sides)]
        theory = statistics.median(row["theory"][width] for row in some)
        head = f"{len(some)} layers b{batch}, middle of each, {some[0]['threads']} thread(s)"
        out.append(line(head, width, *(f"{value:.2f}" for value in middle), f"{theory:.2f}"))
    return out if len(out) > 2 else []


def names(width: str, sides: tuple[str, ...]) -> list[str]:
    return [width, *(f"{side} {width}" for side in sides)]


def eighths(rows: list[dict[str, Any]]) -> list[str]:
    """Realised fraction at every eighth of the width (k = 8), of the dense baseline and of our own full width."""
    out = []
    for row in rows:
        if row.get("sweep") != "eighths":
            continue
        speed, widths = (
            speedups(row),
            [f"{i}/8" if i % 2 else f"{i // 2}/4" if i % 4 else "1/2" for i in range(7, 0, -1)],
        )
        if not out:
            out = [line("k = 8", "full", *widths), "|---" * 9 + "|"]
        full = speed.get("direct full", speed["full"])
        cells = [speed.get(f"direct {w}", speed[w]) / row["theory"][w] for w in widths]
        head = f"{row['name'].removeprefix('eighths: ')}, {row['threads']} thread(s)"
        out.append(line(f"{head}, of oneDNN's full width", f"{full:.2f}", *(f"{c:.2f}" for c in cells)))
        out.append(line(f"{head}, of our own", "1", *(f"{c / full:.2f}" for c in cells)))
    return out


def noise(rows: list[dict[str, Any]]) -> list[str]:
    """By how much two equal sides of a row differ (rnp.bench.run.spread): of all rows, in per cent."""
    found = sorted(spread(row["noise"]) for row in rows)
    if not found:
        return []
    return [f"Noise of a row: {found[0]:.0f} to {found[-1]:.0f} %, in the middle {statistics.median(found):.0f} %."]


def pruned(results: dict[str, Any], threads: int | None) -> list[str]:
    """The paper's table from networks.py --parts pruned: share of theory that arrives, and the factor over OpenVINO."""
    algorithm = "direct only" if "direct" in results["command"] else "all (Winograd)"
    found: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for run in results["runs"]:
        if threads in (None, run["environment"]["threads"]):
            for row in run["rows"].get("pruned", []):
                found[row["model"], row["batch"]].append(row)
    columns = ["realised at 3×", "4×", "5×", "10×", "over OpenVINO at 3×", "4×", "5×", "10×"]
    out = [line("network", "batch", "algorithm", *columns), "|---" * (len(columns) + 3) + "|"]
    for (name, batch), rows in found.items():
        cells = [f"{row['realised']['median']:.2f}" for row in rows]
        cells += [f"{row['over']['openvino']['median']:.1f}×" for row in rows]
        out.append(line(name, str(batch), algorithm, *cells))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="results.json of rnp bench, or of networks.py")
    parser.add_argument("--batch", type=int, default=8, help="of the layers (8)")
    parser.add_argument("--threads", type=int, help="rows of so many threads only")
    options = parser.parse_args()
    results = json.loads(options.results.read_text(encoding="utf-8"))
    if "runs" in results:
        print("\n".join(pruned(results, options.threads)))
        return
    if "rows" not in results:
        parser.error(f"{options.results} has neither rows nor runs: it is no file of rnp bench or networks.py")
    rows = results["rows"]
    rows = [row for row in rows if options.threads in (None, row["threads"])]
    tables = [networks(rows), layers(rows, options.batch), rivals(rows), eighths(rows), noise(rows), losses(rows)]
    print("\n\n".join("\n".join(table) for table in tables if table))


if __name__ == "__main__":
    main()
