"""The demo's report from given findings: what it says is what they say, met or missed."""

from __future__ import annotations

import copy
import html
from pathlib import Path
from typing import Any

import pytest
import torch

from rnp import data, report


def row(
    kind: str, policy: str, target: float | None, accuracy: float, theory: float, measured: float
) -> dict[str, Any]:
    return {
        "kind": kind,
        "policy": policy,
        "target": target,
        "accuracy": accuracy,
        "accuracy_interval": [accuracy - 0.01, accuracy + 0.01],
        "mean_macs": 2e7 / theory,
        "theoretical_speedup": theory,
        "measured_speedup": measured,
        "measured_p20": 0.9 * measured,
        "measured_p80": 1.1 * measured,
        "realised_fraction": measured / theory,
        "dense_path": "prepacked",
        "batch_size": 32,
        "threads": 2,
    }


def findings() -> dict[str, Any]:
    """Everything met."""
    count = 60
    difficulty = torch.linspace(0, 1, count)
    values = {
        "budgets": [
            row("full", "full width", None, 0.93, 1.0, 0.99),
            row("agent", "agent, Δp = <0.1>", 3.0, 0.925, 3.0, 2.4),
            row("uniform", "uniform width 2/4", 3.0, 0.91, 3.0, 2.5),
            row("thin", "thin network", 3.0, 0.92, 3.0, 2.2)
            | {"thin_path": "rnp", "thin_ms": {"prepacked": 4.0, "rnp": 3.5}},
        ],
        "main": {
            "target": 3.0,
            "agent_minus_full": {"difference": -0.005, "interval": [-0.008, -0.002]},
            "agent_minus_uniform": {"difference": 0.015, "interval": [0.01, 0.02]},
            "agent_minus_thin": {"difference": 0.005, "interval": [-0.001, 0.011]},
            "agent_minus_shuffled": {"difference": 0.03, "interval": [0.02, 0.04]},
            "layers": ["4", "8"],
            "histogram": [[0.5, 0.1, 0.1, 0.3], [0.4, 0.2, 0.2, 0.2]],
        },
        "difficulty": {"rank_correlation": 0.7, "interval": [0.68, 0.72]},
        "environment": {
            "rnp_kernels": "0", "torch": "2", "processor": "a <processor>", "instruction_set": "avx2", "threads": 2,
            "commit": None,
        },
        "training": [{"phase": "pretrain", "steps": 1234, "seconds": 5.0, "loss": 0.5}],
        "scenes": {"train": 100, "validation": 10, "test": count},
        "agent_macs": 30_000,
        "dense_macs": 20_000_000,
        "thin_macs": 6_600_000,
        "batch_size": 32,
        "seed": 0,
        "quick": False,
        "seconds": 360.0,
        "command": "rnp demo --seed 0",
        "plots": {
            "difficulty": difficulty,
            "share": 0.1 + 0.8 * difficulty,
            "right": {name: torch.ones(count).double() for name in ("agent", "full width", "uniform width")},
        },
    }  # fmt: skip
    values["targets"] = report.targets(values)
    return values


def scenes() -> data.Scenes:
    train, _ = data.digit_sources()
    return data.compose(train, 60, seed=0)


def test_all_targets_met() -> None:
    assert [target["met"] for target in report.targets(findings())] == [True] * 6


@pytest.mark.parametrize(
    ("which", "change"),
    [
        (0, lambda f: f["main"]["agent_minus_full"].update(difference=-0.0101)),
        (1, lambda f: f["main"]["agent_minus_uniform"].update(interval=[-0.001, 0.03])),
        (2, lambda f: f["main"]["agent_minus_thin"].update(difference=-0.0001)),
        (3, lambda f: f["difficulty"].update(rank_correlation=0.59)),
        (4, lambda f: f["budgets"][1].update(realised_fraction=0.74)),
        (5, lambda f: f.update(seconds=601.0)),
    ],
)
def test_each_target_can_be_missed_alone_and_the_report_says_so(which: int, change: Any, tmp_path: Path) -> None:
    values = findings()
    change(values)
    values["targets"] = report.targets(values)
    assert [target["met"] for target in values["targets"]] == [number != which for number in range(6)]
    missed = [line for line in report.text(values, tmp_path).splitlines() if line.strip().startswith("MISSED")]
    assert len(missed) == 1 and values["targets"][which]["target"] in missed[0]


def test_the_table_lines_up_and_shows_every_budget(tmp_path: Path) -> None:
    lines = report.text(findings(), tmp_path).splitlines()
    table = lines[: lines.index("")]
    assert len({len(line) for line in table}) == 1
    assert "92.50" in table[3] and "91.50–93.50" in table[3] and "2.40×" in table[3] and "0.80" in table[3]


@pytest.mark.parametrize(
    ("difference", "interval", "said"),
    [
        (0.03, [0.02, 0.04], "accuracy falls; agent minus shuffled: +3.00 points"),
        (-0.02, [-0.03, -0.01], "accuracy rises; agent minus shuffled: -2.00 points"),
        (0.01, [-0.01, 0.03], "accuracy cannot be told from the agent's; agent minus shuffled: +1.00 points"),
    ],
)
def test_the_control_says_what_its_interval_says(difference: float, interval: list[float], said: str) -> None:
    values = findings()
    values["main"]["agent_minus_shuffled"] = {"difference": difference, "interval": interval}
    assert said in report.sentences(values)[2]


def test_beneath_the_table_stands_how_the_thin_network_was_timed(tmp_path: Path) -> None:
    values = findings()
    report.write(values, scenes(), tmp_path)
    for shown in (report.text(values, tmp_path), (tmp_path / "index.html").read_text(encoding="utf-8")):
        assert "(prepacked 4.00 ms, rnp 3.50 ms a batch); the faster counts: rnp." in shown


def test_the_page_escapes_what_it_is_given(tmp_path: Path) -> None:
    values = findings()
    before = copy.deepcopy(values["budgets"])
    report.write(values, scenes(), tmp_path)
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "agent, Δp = &lt;0.1&gt;" in page and "<0.1>" not in page
    assert "a &lt;processor&gt;" in page
    assert "1,234" in page
    for sentence in report.sentences(values):
        assert html.escape(sentence) in page
    assert values["budgets"] == before
    assert "plots" not in (tmp_path / "report.json").read_text(encoding="utf-8")
