"""`rnp bench`: the jobs of every part, the report made of rows, exit statuses, and one small real run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import rnp
import rnp_kernels
from rnp import cli
from rnp.bench import command, gate, machine, models, network_rivals, report, rivals, timing
from rnp.bench import run as bench_run
from rnp.bench.layers import BY_NAME, LAYERS, Layer
from rnp.bench.parts import layer, network, operator, training

OPTIONS = bench_run.Options(seconds=0.0, rounds=2, threads=(1,), batches=(2,))


def row(name: str = "l b2", full: float = 1.0, half: float = 3.6, noise: float = 0.01, **more: Any) -> dict[str, Any]:
    def figures(median: float) -> dict[str, float]:
        return {"median": median, "p20": median * (1 - noise), "p80": median * (1 + noise)}

    speedup = {"eager": figures(0.9), "full": figures(full), "1/2": figures(half), "masked 1/2": figures(0.9)}
    return {
        "part": "layer", "name": name, "threads": 1, "cold": False, "layer": "l", "shape": "s", "batch": 2,
        "path": "direct", "flops": 1e9, "bytes": 1e7, "baseline": "prepacked", "rounds": 7,
        "theory": {"prepacked": 1.0, "eager": 1.0, "full": 1.0, "1/2": 4.0, "masked 1/2": 4.0},
        "ms": {side: figures(2.0) for side in ("prepacked", "again", *speedup)}, "speedup": speedup,
        "noise": figures(1.0), "realised": {"1/2": half / 4, "masked 1/2": 0.225},
        "missing": {"openvino": "openvino: not installed: openvino"},
    } | more  # fmt: skip


def results(*rows: dict[str, Any]) -> dict[str, Any]:
    return {
        "command": "rnp bench <layer>", "quick": False, "clock": "wall", "seconds": 60.0, "rows": list(rows),
        "limits": [{"threads": 1, "gflops": 100.0, "gbytes": 20.0}],
        "environment": {
            "processor": "A <processor>", "cores": 2, "instruction_set": "avx2", "torch": "2.13", "onnxruntime": "1",
            "openvino": None, "rnp_kernels": "0", "commit": None, "load": 0.1,
        },
    }  # fmt: skip


def test_losses_are_what_exceeds_the_noise():
    assert report.losses([row(full=0.98, half=3.5)]) == []
    lost = report.losses([row("slow", full=0.9, half=2.0)])
    assert [name for name, _ in lost] == ["slow, 1 thread(s)"] * 2
    assert (
        "full width at 0.90 of the best stock path" in lost[0][1] and "width 1/2 realises 0.50 of 4.00x" in lost[1][1]
    )
    assert report.losses([row(full=0.9, half=3.2, noise=0.1)]) == []
    faster_stock = row(full=1.0)
    faster_stock["speedup"]["eager"]["median"] = 1.2
    assert "0.83" in report.losses([faster_stock])[0][1]


def test_the_report_holds_every_row_and_names_what_is_missing(tmp_path: Path):
    pytest.importorskip("matplotlib")
    sweep = row("batch: l b1", part="operator", sweep="batch", x=1)
    warm = row("warm: l b8", part="operator", sweep="warm", cold=False)
    net = row("net b1", part="network")
    step = row("l b16", part="training", baseline="eager")
    step["ms"]["eager"] = step["ms"]["prepacked"]
    report.write(results(row(full=0.5), sweep, warm, net, step), tmp_path)
    assert json.loads((tmp_path / "results.json").read_text())["rows"][0]["name"] == "l b2"
    text, page = (tmp_path / "results.txt").read_text(), (tmp_path / "index.html").read_text()
    for line in (
        "missing: openvino: not installed",
        "3.60 (0.90)",
        "openvino not installed",
        "full, of the roof",
        "training, speed-up over eager",
    ):
        assert line in text
    assert page.count("<svg") == 6
    assert "A &lt;processor&gt;" in page and "rnp bench &lt;layer&gt;" in page
    assert "src=" not in page and "@import" not in page  # nothing refers to another file
    assert "full width at 0.50" in page


def test_the_share_of_the_roof_is_of_the_rows_threads_and_dtype():
    limits = [{"threads": 1, "gflops": 100.0, "gbytes": 20.0}, {"threads": 2, "gflops": 200.0, "gbytes": 20.0}]
    assert report.share_of_roof(row(), limits) == pytest.approx(5.0)  # 1 GFLOP: 10 ms, measured 2
    assert report.share_of_roof(row(threads=2), limits) == pytest.approx(2.5)
    assert report.share_of_roof(row(bytes=4e8), limits) == pytest.approx(10.0)  # 0.4 GB: 20 ms
    assert report.table([row()], limits)[1][6] == "5.00"
    for other in (row(threads=3), row(part="training"), row(part="operator", dtype="bfloat16")):
        assert report.share_of_roof(other, limits) is None


def test_without_matplotlib_the_page_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None)
    page = report.page(results(row()))
    assert "matplotlib is not installed" in page and "<svg" not in page and "3.60 (0.90)" in page


def test_every_layer_is_a_job_at_every_batch_and_number_of_threads():
    jobs = layer.jobs(bench_run.Options(threads=(1, 2), batches=(1, 8)))
    assert len(jobs) == 4 * len(LAYERS) and len({(j.name, j.threads) for j in jobs}) == len(jobs)
    assert layer.path(BY_NAME["r2_3x3"]).startswith("Winograd")
    assert layer.path(BY_NAME["grouped"]) in ("direct", "oneDNN")


def test_the_other_parts_name_their_jobs_once():
    options = bench_run.Options(threads=(1, 2), batches=(1, 8))
    for part in (operator, network, training):
        jobs = part.jobs(options)
        assert len({(j.name, j.threads) for j in jobs}) == len(jobs) > 0
        assert len(part.jobs(bench_run.Options(threads=(1, 2), batches=(1, 8), quick=True))) < len(jobs)


def test_a_run_restores_the_threads_and_only_runs_what_was_asked_for():
    before, said = torch.get_num_threads(), []
    small = Layer("small", 16, 6, 16, 3)
    jobs = [
        bench_run.Job("layer", f"small {n}", lambda: rivals.convolution(small, 2, dense=False), n, n == 2)
        for n in (1, 2)
    ]
    rows = bench_run.measure_jobs(
        jobs, bench_run.Options(seconds=0, rounds=2, threads=(1, 2), only="small 2"), said.append
    )
    assert [r["name"] for r in rows] == ["small 2"] and len(said) == 1
    assert torch.get_num_threads() == before
    assert rows[0]["cold"] and rows[0]["rounds"] == 2
    assert rows[0]["realised"]["1/2"] == pytest.approx(rows[0]["speedup"]["1/2"]["median"] / 4)
    assert timing.AGAIN in rows[0]["ms"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_training_step_is_checked_and_timed(dtype: torch.dtype):
    case = training.step_case(Layer("small", 16, 8, 32, 3), 4, dtype)
    others = {f"{rival} {width}" for rival in ("masked", "slices") for width in ("1/2", "mixed")}
    assert {"eager", "full", "3/4", "1/2", "1/4", "mixed"} | others == set(case.sides)
    gradients = case.sides["1/2"].run()
    assert gradients[1].shape == (4, 16, 8, 8) and gradients[1][:, 8:].abs().sum() == 0


def test_mixed_actions_meet_their_speedup():
    class Network:
        layers, groups, dense_macs = ["a"] * 6, 4, 16 * 6

        def macs(self, actions: torch.Tensor) -> torch.Tensor:
            return (actions.long() ** 2).sum(1)

    actions = network.mixed_actions(Network(), 8, 4.0)
    assert actions.shape == (8, 6) and actions.dtype == torch.int32 and len(actions.unique()) > 1
    assert 16 * 6 / (actions.double() ** 2).sum(1).mean() == pytest.approx(4.0, rel=0.1)
    assert network.mixed_actions(Network(), 8, 17.0) is None  # sixteen times is all that k = 4 can save


def test_limits_are_positive_and_the_roofline_is_the_slower_of_two():
    assert machine.fma_peak(1, seconds=0.01) > 0.1 and machine.fma_peak(1, seconds=0.01, dtype=torch.bfloat16) > 0.1
    assert machine.copy_bandwidth(megabytes=1, rounds=2) > 0.01
    limits = machine.Limits(1, gflops=10.0, gbytes=5.0)
    assert limits.seconds(20e9, 5e9) == 2.0 and limits.seconds(1e9, 50e9) == 10.0


def test_the_command_runs_a_part_and_writes_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ["bench", "layer", "--quick", "--only", "tiny_4x4", "--threads", "1", "--out", str(tmp_path)]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "tiny_4x4 b2" in printed and "FMA peak" in printed and "--quick" in printed
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["environment"]["torch"] == torch.__version__ and len(found["rows"]) == 1
    assert {file.name for file in tmp_path.iterdir()} == {"results.json", "results.txt", "index.html"}


def test_layers_in_bfloat16_stand_beside_our_own_float32(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ["bench", "layer", "--dtype", "bfloat16", "--quick", "--only", "tiny_4x4", "--threads", "1"]
    assert cli.main([*arguments, "--out", str(tmp_path)]) == 0
    (found,) = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert found["dtype"] == "bfloat16" and {"eager", "full", "own", "float32 own", "1/2"} <= found["speedup"].keys()


def test_layers_in_bfloat16_pass_the_gate_first(monkeypatch: pytest.MonkeyPatch):
    chosen = BY_NAME["tiny_4x4"]
    right = rivals.ours

    def wrong(*arguments: Any, activation: str = "none", **more: Any) -> Any:
        run = right(*arguments, activation=activation, **more)
        return run if activation == "none" else lambda: 1.05 * run()

    monkeypatch.setattr(rivals, "ours", wrong)
    with pytest.raises(gate.WrongResult, match="tiny_4x4 b1, own: relative L2 error"):
        rivals.convolution(chosen, 1, dtype=torch.bfloat16, widths=())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threads", "1", "0"], "--threads must be at least 1, got 0"),
        (["--batch", "0"], "--batch must be at least 1, got 0"),
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--seconds", "nan"], "--seconds must be a number, not negative, got nan"),
        (["--seconds", "inf"], "--seconds must be a number, not negative, got inf"),
        (["--seconds", "-1"], "--seconds must be a number, not negative, got -1.0"),
        (["network", "--dtype", "bfloat16"], "--dtype bfloat16 needs part layer or training, got network"),
        (["--threads", "1", "2", "--clock", "cpu"], "--clock cpu needs --threads 1, got 1 2"),
        (
            ["layer", "--quick", "--threads", "1", "--only", "no such row"],
            "no row's name contains 'no such row'",
        ),
    ],
)
def test_wrong_usage(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["bench", *arguments, "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"rnp bench: error: {message}\n"
    assert not list(tmp_path.iterdir())


def test_a_wrong_result_ends_the_run_without_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def wrong(*arguments: Any) -> None:
        raise gate.WrongResult("tiny, full: relative L2 error must be at most 1e-05, got 0.1")

    monkeypatch.setattr(command, "measure_jobs", wrong)
    assert cli.main(["bench", "layer", "--quick", "--threads", "1", "--out", str(tmp_path)]) == 1
    assert "wrong result, nothing more is measured: tiny, full" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", list(network_rivals.OPERATORS))
def test_rivals_compute_a_pruned_network(name: str):
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    images = images.to(memory_format=torch.channels_last)
    pruned = rnp.convert(models.initialised(models.ResNet(models.BasicBlock, (1, 1, 1, 1), classes=10)), images[:1])
    for actions in (torch.tensor([[1, 4, 2, 1], [4, 3, 1, 2], [2, 2, 2, 3]]), torch.full((3, 4), 2)):
        pruned.policy = rnp.policies.Fixed(actions)
        with torch.inference_mode(), rnp_kernels.backend("reference"):
            expected = pruned(images)
        gate.require_close(name, network_rivals.rival(pruned, images, name)(), expected, network.LIMIT)
    with pytest.raises(ValueError, match=f"{name}: a convolution without groups"):
        network_rivals.rival(pruned.double(), images.double(), name)()
