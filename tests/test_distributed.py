"""`PrefixConv2d` under DistributedDataParallel, with gloo, in two processes."""

from __future__ import annotations

import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from rnp_kernels import replace_conv2d


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = replace_conv2d(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)))
    model[0].packed_weight()  # a cache is neither a parameter nor a buffer: nothing of it is sent
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
    x = torch.randn(2, 2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    for step in range(3):
        optimizer.zero_grad()
        parallel(x[rank] + step).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        output = [model(x[0]) for _ in range(3)][-1]
    torch.save([output, *model.parameters()], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_stay_equal_and_equal_one_that_sees_both_batches() -> None:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(worker, (folder,), nprocs=2)
        first, second = (torch.load(f"{folder}/{rank}.pt") for rank in range(2))
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
