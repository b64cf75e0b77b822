"""One of two processes of tests/test_distributed.py: `python distributed_worker.py RANK FOLDER`.

A program of its own, so that it meets the installed package, whatever folder the tests were started from.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch import nn

from rnp_kernels import replace_conv2d


def work(rank: int, folder: str) -> None:
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


if __name__ == "__main__":
    work(int(sys.argv[1]), sys.argv[2])
