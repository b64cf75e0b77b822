"""The demo's report: a table and plain words on the terminal, report.json, PNG plots and one self-contained HTML page.

All of them are made from the same findings (:func:`rnp.demo.measure`), so they cannot disagree.
"""

from __future__ import annotations

import base64
import html
import json
import string
from importlib import resources
from pathlib import Path
from typing import Any

from rnp import plots
from rnp.data import Scenes

COLUMNS = ("policy", "accuracy, %", "95 % interval", "MACs, M", "theory", "measured", "p20–p80", "realised")


def targets(findings: dict[str, Any]) -> list[dict[str, Any]]:
    """What the demo set out to show at its main budget, each with the figure measured and whether it was met."""
    main, budgets = findings["main"], findings["budgets"]
    agent = next(row for row in budgets if row["kind"] == "agent" and row["target"] == main["target"])
    full, uniform, thin = (main[f"agent_minus_{rival}"] for rival in ("full", "uniform", "thin"))
    rho = findings["difficulty"]
    minutes = findings["seconds"] / 60
    return [
        _target(
            f"accuracy within 1 point of full width at about {main['target']:g}×",
            f"{points(full)} at {agent['theoretical_speedup']:.2f}×",
            full["difference"] >= -0.01,
        ),
        _target(
            "above uniform width at the same mean MACs, by an interval that excludes zero",
            points(uniform),
            uniform["interval"][0] > 0,
        ),
        _target(
            "not below a thin network trained from scratch for the same time", points(thin), thin["difference"] >= 0
        ),
        _target(
            "rank correlation of MACs with difficulty at least 0.6",
            f"{rho['rank_correlation']:.3f} [{rho['interval'][0]:.3f}, {rho['interval'][1]:.3f}]",
            rho["rank_correlation"] >= 0.6,
        ),
        _target(
            f"realised fraction at least 0.75 at batch {findings['batch_size']}, the agent included",
            f"{agent['realised_fraction']:.3f}",
            agent["realised_fraction"] >= 0.75,
        ),
        _target("ten minutes at most, training included", f"{minutes:.1f} minutes", minutes <= 10),
    ]


def _target(text: str, measured: str, met: bool) -> dict[str, Any]:
    return {"target": text, "measured": measured, "met": bool(met)}


def points(difference: dict[str, Any]) -> str:
    """A difference of accuracies with its interval."""
    low, high = difference["interval"]
    return f"{100 * difference['difference']:+.2f} points [{100 * low:+.2f}, {100 * high:+.2f}]"


def change(interval: list[float]) -> str:
    """What an interval of the agent's accuracy minus another's says of the other."""
    low, high = interval
    return "falls" if low > 0 else "rises" if high < 0 else "cannot be told from the agent's"


def cells(row: dict[str, Any]) -> list[str]:
    """A budget as the texts of COLUMNS."""
    low, high = row["accuracy_interval"]
    return [
        row["policy"],
        f"{100 * row['accuracy']:.2f}",
        f"{100 * low:.2f}–{100 * high:.2f}",
        f"{row['mean_macs'] / 1e6:.2f}",
        f"{row['theoretical_speedup']:.2f}×",
        f"{row['measured_speedup']:.2f}×",
        f"{row['measured_p20']:.2f}–{row['measured_p80']:.2f}",
        f"{row['realised_fraction']:.2f}",
    ]


def sentences(findings: dict[str, Any]) -> list[str]:
    """What the figures say, in plain words."""
    main = findings["main"]
    agent = next(row for row in findings["budgets"] if row["kind"] == "agent" and row["target"] == main["target"])
    rho = findings["difficulty"]
    return [
        f"At {agent['theoretical_speedup']:.2f}× fewer MACs the network with its agent is "
        f"{agent['measured_speedup']:.2f}× as fast as the dense network in its fastest stock form "
        f"({agent['dense_path']}), batch {agent['batch_size']}, "
        f"{agent['threads']} thread(s): {100 * agent['realised_fraction']:.0f} % of the theory arrives.",
        f"Accuracy there, agent minus full width: {points(main['agent_minus_full'])}; minus uniform width at the same "
        f"mean MACs: {points(main['agent_minus_uniform'])}; minus the thin network trained from scratch for the same "
        f"time: {points(main['agent_minus_thin'])}.",
        f"Control: with the agent's own actions dealt to the images at random, accuracy "
        f"{change(main['agent_minus_shuffled']['interval'])}; agent minus shuffled: "
        f"{points(main['agent_minus_shuffled'])}.",
        f"Rank correlation of an image's MACs with its difficulty: {rho['rank_correlation']:.3f} "
        f"[{rho['interval'][0]:.3f}, {rho['interval'][1]:.3f}]. The agent is never told the difficulty.",
    ]


def note(findings: dict[str, Any]) -> str:
    """How the thin network of the table was timed."""
    thin = next(row for row in findings["budgets"] if row["kind"] == "thin")
    times = ", ".join(f"{name} {milliseconds:.2f} ms" for name, milliseconds in thin["thin_ms"].items())
    return (
        f"The thin network was timed on its best stock path and on our kernels ({times} a batch); the faster counts: "
        f"{thin['thin_path']}."
    )


def text(findings: dict[str, Any], out: Path) -> str:
    """What is printed at the end."""
    rows = [list(COLUMNS)] + [cells(row) for row in findings["budgets"]]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    lines = []
    for first, *others in rows:
        aligned = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *aligned]))
    lines.insert(1, "-" * len(lines[0]))
    lines += ["", note(findings)]
    environment = findings["environment"]
    if findings["quick"]:
        lines += ["", "This was --quick: the figures show that everything runs, and nothing else."]
    lines += ["", *sentences(findings), "", "Targets:"]
    lines += [f"  {'met   ' if t['met'] else 'MISSED'}  {t['target']}: {t['measured']}" for t in findings["targets"]]
    lines += [
        "",
        f"{environment['processor']}, {environment['instruction_set']}, {environment['threads']} thread(s), torch "
        f"{environment['torch']}, rnp-kernels {environment['rnp_kernels']} (commit "
        f"{environment['commit'] or 'unknown'}); {findings['seconds'] / 60:.1f} minutes",
        f"again: {findings['command']}",
        f"report: {out / 'index.html'}, {out / 'report.json'}",
    ]
    return "\n".join(lines)


def write(findings: dict[str, Any], test: Scenes, out: Path) -> None:
    """Write report.json, the plots and index.html to the folder `out`; nothing in it refers to another file."""
    figures = plots.draw(findings, test, out)
    values = {name: value for name, value in findings.items() if name != "plots"}
    (out / "report.json").write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (out / "index.html").write_text(page(findings, figures), encoding="utf-8")


def page(findings: dict[str, Any], figures: list[tuple[Path, str]]) -> str:
    """The HTML page, images embedded."""
    template = resources.files("rnp").joinpath("templates/demo.html").read_text(encoding="utf-8")
    body = "".join(
        f'<tr class="{row["kind"]}">' + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells(row)) + "</tr>\n"
        for row in findings["budgets"]
    )
    marks = "".join(
        f'<li class="{"met" if t["met"] else "missed"}"><b>{"met" if t["met"] else "missed"}</b> '
        f"{html.escape(t['target'])}: {html.escape(t['measured'])}</li>\n"
        for t in findings["targets"]
    )
    images = "".join(
        f'<figure><img alt="{html.escape(caption)}" src="data:image/png;base64,{encoded(path)}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>\n"
        for path, caption in figures
    )
    phases = "".join(
        f"<tr><td>{html.escape(row['phase'])}</td><td>{row['steps']:,}</td><td>{row['seconds']:.1f}</td>"
        f"<td>{row['loss']:.3f}</td></tr>\n"
        for row in findings["training"]
    )
    facts = "".join(
        f"<tr><td>{html.escape(name.replace('_', ' '))}</td><td>{html.escape(str(value))}</td></tr>\n"
        for name, value in findings["environment"].items()
    )
    scenes = findings["scenes"]
    return string.Template(template).substitute(
        quick='<p class="quick">This was --quick: the figures show that everything runs, and nothing else.</p>'
        if findings["quick"]
        else "",
        sentences="".join(f"<p>{html.escape(sentence)}</p>\n" for sentence in sentences(findings)),
        head="".join(f"<th>{name}</th>" for name in COLUMNS),
        body=body,
        note=html.escape(note(findings)),
        marks=marks,
        images=images,
        phases=phases,
        facts=facts,
        command=html.escape(findings["command"]),
        minutes=f"{findings['seconds'] / 60:.1f}",
        seed=findings["seed"],
        train=f"{scenes['train']:,}",
        test=f"{scenes['test']:,}",
        dense=f"{findings['dense_macs'] / 1e6:.2f}",
        agent=f"{findings['agent_macs'] / 1e6:.3f}",
        thin=f"{findings['thin_macs'] / 1e6:.2f}",
        batch=findings["batch_size"],
    )


def encoded(path: Path) -> str:
    """A file's bytes in base64."""
    return base64.b64encode(path.read_bytes()).decode("ascii")
