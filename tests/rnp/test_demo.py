"""`rnp demo --quick` end to end: every artefact is written, and they agree with each other."""

from __future__ import annotations

import argparse
import html
import json
import multiprocessing
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rnp import cli, demo, fileformat, report, training
from rnp.config import Length
from rnp.demo_plan import MAIN_TARGET, OTHER_SECONDS, full_plan, quick_plan
from rnp.demo_training import beside
from rnp.fileformat import CheckpointError

PNG = b"\x89PNG\r\n\x1a\n"
KEYS = ("policy", "accuracy", "accuracy_interval", "mean_macs", "theoretical_speedup", "measured_speedup",
        "realised_fraction")  # fmt: skip


@dataclass
class Result:
    out: Path
    printed: str
    values: dict[str, Any]
    page: str


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Result:
    out = tmp_path_factory.mktemp("demo") / "out"
    capture = pytest.MonkeyPatch()
    printed: list[str] = []
    capture.setattr("builtins.print", lambda *parts, **rest: printed.append(" ".join(map(str, parts))))
    try:
        assert cli.main(["demo", "--quick", "--seed", "1", "--out", str(out)]) == 0
    finally:
        capture.undo()
    values = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return Result(out, "\n".join(printed), values, (out / "index.html").read_text(encoding="utf-8"))


def test_every_budget_has_the_figures_promised(result: Result) -> None:
    budgets = result.values["budgets"]
    for row in budgets:
        assert set(KEYS) <= set(row)
        low, high = row["accuracy_interval"]
        assert 0 <= low <= row["accuracy"] <= high <= 1
        assert row["mean_macs"] > 0 and row["measured_speedup"] > 0
        dense = result.values["dense_macs"]
        assert row["theoretical_speedup"] == pytest.approx(dense / row["mean_macs"])
        assert row["realised_fraction"] == pytest.approx(row["measured_speedup"] / row["timed_theoretical_speedup"])
        assert row["batch_size"] == 32
    assert sum(row["kind"] in ("full", "agent") for row in budgets) >= 5
    assert {row["kind"] for row in budgets} == {"full", "agent", "uniform", "thin"}


def test_every_static_rival_has_the_mean_macs_of_its_agent(result: Result) -> None:
    budgets = result.values["budgets"]
    agents = {row["target"]: row for row in budgets if row["kind"] == "agent"}
    for row in budgets:
        if row["kind"] == "uniform":
            assert row["mean_macs"] == pytest.approx(agents[row["target"]]["mean_macs"])
    assert result.values["thin_macs"] * MAIN_TARGET <= result.values["dense_macs"]
    assert result.values["thin_macs"] * MAIN_TARGET > 0.9 * result.values["dense_macs"]


def test_the_thin_network_is_timed_as_the_others_and_the_faster_path_counts(result: Result) -> None:
    thin = next(row for row in result.values["budgets"] if row["kind"] == "thin")
    (stock_path,) = thin["thin_ms"].keys() - {"rnp"}
    assert stock_path in ("eager", "folded", "prepacked")
    assert thin["thin_ms"][thin["thin_path"]] == thin["pruned_ms"] == min(thin["thin_ms"].values())
    assert thin["measured_speedup"] == pytest.approx(thin["dense_ms"] / thin["pruned_ms"])
    assert report.note(result.values) in result.printed and report.note(result.values) in html.unescape(result.page)


def test_differences_and_difficulty_have_intervals_around_them(result: Result) -> None:
    main = result.values["main"]
    for rival in ("full", "uniform", "thin", "shuffled"):
        one = main[f"agent_minus_{rival}"]
        assert one["interval"][0] <= one["difference"] <= one["interval"][1]
    budgets = result.values["budgets"]
    agent = next(row for row in budgets if row["kind"] == "agent" and row["target"] == main["target"])
    for rival, kind in (("full", "full"), ("thin", "thin")):
        other = next(row for row in budgets if row["kind"] == kind)
        assert main[f"agent_minus_{rival}"]["difference"] == pytest.approx(agent["accuracy"] - other["accuracy"])
    difficulty = result.values["difficulty"]
    assert -1 <= difficulty["interval"][0] <= difficulty["interval"][1] <= 1
    assert -1 <= difficulty["rank_correlation"] <= 1
    for shares in main["histogram"]:
        assert sum(shares) == pytest.approx(1)


def test_terminal_and_page_show_the_figures_of_the_json(result: Result) -> None:
    page = html.unescape(result.page)
    for row in result.values["budgets"]:
        for cell in report.cells(row):
            assert cell in result.printed
            assert f"<td>{cell}</td>" in page
    for sentence in report.sentences(result.values):
        assert sentence in result.printed and sentence in page
    for target in result.values["targets"]:
        line = f"{target['target']}: {target['measured']}"
        assert line in result.printed and line in page
        assert ("met" if target["met"] else "MISSED") in result.printed


def test_targets_are_judged_by_the_figures(result: Result) -> None:
    assert result.values["targets"] == report.targets(result.values)


def test_the_page_is_one_file(result: Result) -> None:
    sources = re.findall(r'(?:src|href)="([^"]*)"', result.page)
    assert len(sources) == 5 and all(source.startswith("data:image/png;base64,") for source in sources)
    assert "url(" not in result.page and "<script" not in result.page and "http" not in result.page
    assert "$" not in re.sub(r"base64,[^\"]*", "", result.page)
    for name in ("accuracy", "speedup", "difficulty", "gallery", "actions"):
        assert (result.out / f"{name}.png").read_bytes().startswith(PNG)


def test_environment_seed_and_command_are_there(result: Result) -> None:
    environment = result.values["environment"]
    assert {"torch", "rnp_kernels", "commit", "processor", "instruction_set", "threads"} <= set(environment)
    assert result.values["seed"] == 1 and result.values["quick"] is True
    words = result.values["command"].split()
    assert words[:2] == ["rnp", "demo"] and words[words.index("--seed") + 1] == "1"
    steps = words[words.index("--steps") + 1]
    plan = quick_plan().with_steps(steps)
    assert (*plan.lengths, plan.thin) == (*quick_plan().lengths, quick_plan().thin)
    assert result.values["command"] in result.printed


def test_quick_says_that_its_figures_mean_nothing(result: Result) -> None:
    assert "--quick" in result.printed.split("Targets:")[0]
    assert "This was --quick" in result.page


def test_a_finished_run_resumed_trains_nothing_again(result: Result, capsys: pytest.CaptureFixture[str]) -> None:
    """Both networks come back from the checkpoints, so what does not depend on the clock is the same bit by bit."""
    assert cli.main(["demo", "--quick", "--seed", "1", "--resume", "--out", str(result.out)]) == 0
    again = json.loads((result.out / "report.json").read_text(encoding="utf-8"))
    for old, new in zip(result.values["budgets"], again["budgets"], strict=True):
        for key in ("policy", "accuracy", "accuracy_interval", "mean_macs", "theoretical_speedup"):
            assert old[key] == new[key]
    assert again["difficulty"] == result.values["difficulty"]
    assert again["training"] == result.values["training"]
    assert "targets" in capsys.readouterr().out.lower()


# `rnp demo` with a plan still smaller than --quick's; the first argument "kill" ends it in the middle of finetune.
TINY = """
import os, signal, sys
from rnp import backbone_phases, cli, demo
from rnp.config import Length
from rnp.demo_plan import Plan

def step_or_die(phase, number, *arguments):
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(phase, number, *arguments)

if __name__ == "__main__":
    lengths = tuple(Length(steps=steps) for steps in (8, 4, 5, 4))
    demo.quick_plan = lambda: Plan(256, 64, 64, lengths, Length(steps=6), (2.0, 3.0), timing_batches=1, rounds=2)
    step = backbone_phases.Finetune.step
    if sys.argv[1] == "kill":
        backbone_phases.Finetune.step = step_or_die
    sys.exit(cli.main(["demo", "--quick", "--threads", "1", *sys.argv[2:]]))
"""


def test_a_run_killed_in_the_middle_goes_on_from_there(tmp_path: Path) -> None:
    def run(how: str, *options: str) -> int:
        command = [sys.executable, "-c", TINY, how, "--out", str(tmp_path / "out"), *options]
        with (tmp_path / "log").open("w") as log:  # the thin network's process would hold a pipe open
            return subprocess.run(command, cwd=tmp_path, stdout=log, stderr=log, check=False).returncode

    assert run("kill") == -signal.SIGKILL, (tmp_path / "log").read_text()
    _, header = fileformat.read(tmp_path / "out" / "checkpoint" / training.STATE_FILE, "training")
    assert [row["phase"] for row in header["history"]] == ["pretrain", "agent"]
    assert not (tmp_path / "out" / "report.json").exists()
    assert run("finish", "--resume") == 0, (tmp_path / "log").read_text()
    values = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert values["training"][:2] == header["history"]  # to the second: neither was trained again
    steps = [(row["phase"], row["steps"]) for row in values["training"]]
    assert steps == [("pretrain", 8), ("agent", 4), ("finetune", 5), ("agent", 4), ("thin network", 6)]
    assert {row["kind"] for row in values["budgets"]} == {"full", "agent", "uniform", "thin"}
    assert "Targets:" in (tmp_path / "log").read_text() and (tmp_path / "out" / "index.html").exists()


def test_the_phases_share_the_time_asked_for() -> None:
    plan = full_plan(6.0)
    seconds = [length.seconds for length in plan.lengths]
    assert sum(seconds) == pytest.approx(plan.thin.seconds, abs=1)
    assert plan.thin.seconds + OTHER_SECONDS == pytest.approx(360, abs=1)
    assert len(plan.targets) + 1 >= 5 and max(plan.targets) == 5.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "1,2,3"], "--steps takes 5 numbers of steps, each at least 1, got '1,2,3'"),
        (["--steps", "1,2,3,4,x"], "--steps takes 5 numbers of steps, each at least 1, got '1,2,3,4,x'"),
        (["--steps", "1,2,3,4,-5"], "--steps takes 5 numbers of steps, each at least 1, got '1,2,3,4,-5'"),
        (["--steps", "1,2,0,4,5"], "--steps takes 5 numbers of steps, each at least 1, got '1,2,0,4,5'"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--threads", "-1"], "--threads must be at least 1, got -1"),
        (["--seed", "-1"], "--seed must lie in 0…4294967295, got -1"),
        (["--seed", str(2**64)], "--seed must lie in 0…4294967295, got 18446744073709551616"),
        (["--minutes", "nan"], "--minutes must be a positive number, got nan"),
        (["--minutes", "inf"], "--minutes must be a positive number, got inf"),
        (["--minutes", "0"], "--minutes must be a positive number, got 0.0"),
        (["--minutes", "-6"], "--minutes must be a positive number, got -6.0"),
        (["--minutes", "0.5"], "--minutes must leave time to train, at least 1.2, got 0.5"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_runs(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["demo", *arguments, "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == f"rnp demo: error: {message}\n"
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_other_arguments_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*arguments: Any) -> None:
        raise CheckpointError("training.safetensors: of another setting: seed is 1 in the file and 2 here")

    monkeypatch.setattr(demo, "make_scenes", lambda plan, seed: {})
    monkeypatch.setattr(demo, "train_both", refused)
    assert cli.main(["demo", "--quick", "--resume", "--out", str(tmp_path)]) == 2
    expected = "--resume: training.safetensors: of another setting: seed is 1 in the file and 2 here"
    assert capsys.readouterr().err == f"rnp demo: error: {expected}\n"


def test_the_command_of_a_timed_run_gives_its_lengths_in_steps() -> None:
    arguments = argparse.Namespace(seed=4, quick=False, minutes=6.0)
    history = [{"steps": steps} for steps in (10, 20, 30, 40, 50)]
    words = demo.command(arguments, history).split()
    assert words[-2:] == ["--steps", "10,20,30,40,50"]
    plan = full_plan(6.0).with_steps(words[-1])
    assert plan.lengths[3] == Length(steps=40) and plan.thin == Length(steps=50)


def test_what_runs_beside_gives_its_result_or_its_exception() -> None:
    with beside(int, "12") as call:
        assert call.result() == 12
    with pytest.raises(ValueError, match="twelve"), beside(int, "twelve") as call:
        call.result()


def test_an_exception_ends_what_runs_beside() -> None:
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt), beside(time.sleep, 600):
        raise KeyboardInterrupt
    assert time.monotonic() - started < 300 and not multiprocessing.active_children()


def test_what_runs_beside_does_not_survive_its_parent(tmp_path: Path) -> None:
    pid = str(tmp_path / "pid")
    work = f"import os, pathlib, time; pathlib.Path({pid!r}).write_text(f'{{os.getpid()}}.'); time.sleep(600)"
    code = (
        "import os, pathlib, signal, time\n"
        "from rnp.demo_training import beside\n"
        "if __name__ == '__main__':\n"
        f"    with beside(exec, {work!r}):\n"
        f"        file = pathlib.Path({pid!r})\n"
        "        while not (file.exists() and file.read_text().endswith('.')): time.sleep(0.1)\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    # Into a file: the child would hold a pipe open.
    with (tmp_path / "log").open("w") as log:
        run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, stdout=log, stderr=log, check=False)
    assert run.returncode == -signal.SIGKILL, (tmp_path / "log").read_text()
    child = Path("/proc", Path(pid).read_text().strip("."))
    deadline = time.monotonic() + 60
    while child.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not child.exists()
