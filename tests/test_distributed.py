"""`PrefixConv2d` under DistributedDataParallel, with gloo, in two processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

WORKER = Path(__file__).with_name("distributed_worker.py")


def test_two_processes_stay_equal_and_equal_one_that_sees_both_batches(tmp_path: Path) -> None:
    commands = [[sys.executable, str(WORKER), str(rank), str(tmp_path)] for rank in range(2)]
    processes = [subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) for command in commands]
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], errors
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(2, 2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    for step in range(3):
        optimizer.zero_grad()
        sum((model(x[rank] + step).square().mean() for rank in range(2)), torch.zeros(())).div(2).backward()
        optimizer.step()
    for ours, plain in zip(first[1:], model.parameters(), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
