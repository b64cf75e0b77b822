"""The report of a run: results.json, the tables as text, and one HTML page that refers to no other file."""

from __future__ import annotations

import html
import importlib.util
import json
import re
import string
from importlib import resources
from pathlib import Path
from typing import Any

from rnp.bench.machine import Limits
from rnp.bench.run import spread

Row = dict[str, Any]
NOT_SLOWER = 0.97  # of the fastest stock path at full width: below it, a shape counts as lost
REALISED = 0.85  # of the theoretical speed-up, counted from the dense rival


def write(results: dict[str, Any], out: Path) -> None:
    """Write results.json, results.txt and index.html to the folder ``out``."""
    (out / "results.json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (out / "results.txt").write_text(text(results), encoding="utf-8")
    (out / "index.html").write_text(page(results), encoding="utf-8")


def head(environment: dict[str, Any]) -> str:
    """The environment in a line or two."""
    rivals = [f"{name} {environment[name] or 'not installed'}" for name in ("onnxruntime", "openvino")]
    return (
        f"{environment['processor']}, {environment['cores']} core(s), {environment['instruction_set']}; torch "
        f"{environment['torch']}, {', '.join(rivals)}; rnp-kernels {environment['rnp_kernels']}, commit "
        f"{environment['commit'] or 'unknown'}; load {environment['load']}"
    )


def roof(limits: dict[str, float]) -> str:
    """The measured limits in a line."""
    return (
        f"{limits['threads']} thread(s): FMA peak {limits['gflops']:.0f} GFLOP/s, copy {limits['gbytes']:.1f} GB/s "
        "(read + written)"
    )


def missing(rows: list[Row]) -> dict[str, str]:
    """Every rival that could not run anywhere, with the first reason."""
    found: dict[str, str] = {}
    for row in rows:
        for name, reason in row["missing"].items():
            found.setdefault(name, reason)
    return found


def stock_best(row: Row) -> float:
    """The largest speed-up over the baseline that a stock torch path has at full width; the baseline's own is 1."""
    return max([1.0, *(row["speedup"][n]["median"] for n in ("eager", "prepacked") if n in row["speedup"])])


def losses(rows: list[Row]) -> list[tuple[str, str]]:
    """(row, what is lost): where full width is slower than the best stock path, or a width realises too little.

    Differences within the row's own noise are left out.
    """
    lost = []
    for row in rows:
        name, noise = f"{row['name']}, {row['threads']} thread(s)", spread(row["noise"]) / 100
        if row["cold"]:
            name += ", cold"
        full = row["speedup"].get("full", {"median": 1.0})["median"] / stock_best(row)
        if full < NOT_SLOWER - noise:
            lost.append((name, f"full width at {full:.2f} of the best stock path (noise {noise:.2f})"))
        for width, share in row["realised"].items():
            ours = re.fullmatch(r"\d/\d", width) or width.startswith(("mixed", "skewed", "outlier"))
            if ours and share < REALISED - noise:
                lost.append((name, f"width {width} realises {share:.2f} of {row['theory'][width]:.2f}x"))
    return lost


def share_of_roof(row: Row, limits: list[dict[str, Any]]) -> float | None:
    """The roofline's time for the direct algorithm at full width ÷ ours; None where unknown.

    Above 1: Winograd, or tensors that a cache holds. The roof is of the run's dtype: a row of another one has none.
    """
    roofs = [Limits(**limit) for limit in limits if limit["threads"] == row["threads"]]
    if not roofs or "flops" not in row or "full" not in row["ms"] or row["part"] == "training":
        return None
    if row["part"] == "operator" and row.get("dtype", "float32") != "float32":
        return None
    return roofs[0].seconds(row["flops"], row["bytes"]) * 1e3 / row["ms"]["full"]["median"]


def table(rows: list[Row], limits: list[dict[str, Any]]) -> list[list[str]]:
    """A part's rows as texts, the head first. Columns are the sides that any of the rows has."""
    sides = list(dict.fromkeys(side for row in rows for side in row["speedup"]))
    lines = [["row", "threads", "path", "GFLOP/s", "ms", "noise", "full, of the roof", *sides]]
    for row in rows:
        roofed = share_of_roof(row, limits)
        base = row["ms"][row["baseline"]]["median"]
        name = row["name"] + (", cold" if row["cold"] else "")
        rate = f"{row['flops'] / base / 1e6:.0f}" if "flops" in row and row["part"] != "training" else ""
        cells = []
        for side in sides:
            value = row["speedup"].get(side)
            share = row["realised"].get(side)
            cells.append("" if value is None else f"{value['median']:.2f}" + (f" ({share:.2f})" if share else ""))
        lines.append(
            [
                name,
                str(row["threads"]),
                row.get("path", ""),
                rate,
                f"{base:.3f}",
                f"{spread(row['noise']):.0f} %",
                "" if roofed is None else f"{roofed:.2f}",
                *cells,
            ]
        )
    return lines


def parts(results: dict[str, Any]) -> dict[str, list[Row]]:
    """Rows by part, in the order of the run; those of a part that compare with another baseline are apart."""
    found: dict[str, list[Row]] = {}
    for row in results["rows"]:
        found.setdefault(f"{row['part']}, speed-up over {row['baseline']} (share of theory)", []).append(row)
    return found


def text(results: dict[str, Any]) -> str:
    """results.txt."""
    out = [head(results["environment"]), *(roof(limits) for limits in results["limits"])]
    out += [f"missing: {reason}" for reason in missing(results["rows"]).values()]
    for title, rows in parts(results).items():
        lines = table(rows, results["limits"])
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        out += ["", title]
        for line in lines:
            cells = [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]
            out.append("  ".join(cells).rstrip())
    out += ["", "Where it loses:", *(f"  {name}: {what}" for name, what in losses(results["rows"]))]
    return "\n".join([*out, "", f"again: {results['command']}", ""])


def closing(results: dict[str, Any], out: Path) -> str:
    """What is printed at the end."""
    lost = losses(results["rows"])
    minutes = results["seconds"] / 60
    lines = [f"{len(results['rows'])} rows in {minutes:.1f} minutes; {len(lost)} losses, listed in the report"]
    lines += [f"missing: {reason}" for reason in missing(results["rows"]).values()]
    if results["quick"]:
        lines.append("This was --quick: the figures show that everything runs, and nothing else.")
    return "\n".join([*lines, f"report: {out / 'index.html'}, {out / 'results.txt'}, {out / 'results.json'}"])


def page(results: dict[str, Any]) -> str:
    """index.html: tables, what was lost, the environment, and plots where matplotlib is installed."""
    if importlib.util.find_spec("matplotlib") is None:
        figures = "<p>No plots: matplotlib is not installed (pip install 'rnp-kernels[bench]').</p>"
    else:
        from rnp.bench import plots

        figures = "".join(
            f"<figure>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>\n"
            for svg, caption in plots.draw(results)
        )
    tables = ""
    for title, rows in parts(results).items():
        first, *others = table(rows, results["limits"])
        cells = "".join(f"<th>{html.escape(c)}</th>" for c in first)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in line) + "</tr>\n" for line in others)
        tables += f"<h2>{html.escape(title)}</h2>\n<div><table><tr>{cells}</tr>\n{body}</table></div>\n"
    facts = "".join(
        f"<tr><td>{html.escape(name.replace('_', ' '))}</td><td>{html.escape(str(value))}</td></tr>\n"
        for name, value in results["environment"].items()
    )
    lost = "".join(f"<li>{html.escape(f'{name}: {what}')}</li>\n" for name, what in losses(results["rows"]))
    template = resources.files("rnp").joinpath("templates/bench.html").read_text(encoding="utf-8")
    return string.Template(template).substitute(
        quick="<p class=quick>This was --quick: the figures show that everything runs, and nothing else.</p>"
        if results["quick"]
        else "",
        limits="".join(f"<li>{html.escape(roof(limits))}</li>" for limits in results["limits"]),
        missing="".join(f"<li>missing: {html.escape(r)}</li>" for r in missing(results["rows"]).values()),
        figures=figures,
        tables=tables,
        lost=lost or "<li>nothing</li>",
        facts=facts,
        command=html.escape(results["command"]),
        minutes=f"{results['seconds'] / 60:.1f}",
        clock=results["clock"],
        slower=NOT_SLOWER,
        realised=REALISED,
    )
