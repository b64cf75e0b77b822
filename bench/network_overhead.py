"""Where the time of a converted network goes, against the same network dense as stock torch runs it.

    python bench/network_overhead.py [--threads 1] [--rounds 9] [--only resnet18] [--clock cpu]

For each network, interleaved in one process: the original (eager, BatchNorm folded, channels_last), the original with
prepacked oneDNN convolutions, the converted network at full width, under uniform widths, and with an agent that chooses
mixed actions. Then one run of the agent's plan with each instruction timed, by kind, and a run in which convolutions
return at once: what is left is Python, small operators and pooling. `--clock cpu` counts the process's CPU seconds
instead of the wall's, for a machine that others use too (one thread only).
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import rnp
import rnp_kernels
from rnp import stock
from rnp.measure import quantile

K = 4
clock = time.perf_counter


def vgg(widths: list[list[int]], pixels: int, classes: int = 10) -> nn.Module:
    """3×3 convolutions with BatchNorm and ReLU; a max-pool after each list of widths."""
    layers: list[nn.Module] = []
    channels = 3
    for stage in widths:
        for width in stage:
            layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(True)]
            channels = width
        layers.append(nn.MaxPool2d(2))
    pixels //= 2 ** len(widths)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * pixels * pixels, classes))


class Block(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out)
        self.conv2, self.bn2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False), nn.BatchNorm2d(c_out)
        self.relu, self.downsample = nn.ReLU(inplace=True), None
        if stride != 1 or c_in != c_out:
            self.downsample = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(out + identity)


def resnet18(classes: int = 1000) -> nn.Module:
    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(True), nn.MaxPool2d(3, 2, 1)]
    shapes = [(64, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1)]
    blocks = [Block(*shape) for shape in [*shapes, (256, 512, 2), (512, 512, 1)]]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes))


VGG16 = [[64, 64], [128, 128], [256, 256, 256], [512, 512, 512], [512, 512, 512]]
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {  # constructor, pixels, batch
    "small-32px-b32": (lambda: vgg([[32, 32], [64, 64], [128, 128]], 32), 32, 32),
    "small-32px-b1": (lambda: vgg([[32, 32], [64, 64], [128, 128]], 32), 32, 1),
    "resnet18-64px-b8": (resnet18, 64, 8),
    "resnet18-128px-b1": (resnet18, 128, 1),
    "resnet18-128px-b8": (resnet18, 128, 8),
    "vgg16-64px-b8": (lambda: vgg(VGG16, 64), 64, 8),
}


def interleaved(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every call in every round; two rounds of warm-up, every other round in reverse order."""
    times: dict[str, list[float]] = {label: [] for label in calls}
    for number in range(-2, rounds):
        for label in list(calls) if number % 2 else list(reversed(calls)):
            start = clock()
            calls[label]()
            if number >= 0:
                times[label].append(clock() - start)
    return times


def mixed_agent(network: rnp.PrunedNetwork, x: Tensor) -> rnp.Agent:
    """An untrained agent whose features are standardised and whose choices differ from image to image."""
    network.policy = rnp.policies.Random(torch.Generator().manual_seed(0))
    features = network(torch.cat([x, x.flip(3)]), return_trace="features")[1].features
    agent = rnp.Agent(network.feature_sizes, network.groups).eval()
    agent.set_feature_statistics([f.mean(0) for f in features], [f.std(0) for f in features])
    nn.init.normal_(agent.decoders[0].weight, std=3.0)
    network.policy = agent
    return agent


def by_kind(network: rnp.PrunedNetwork, x: Tensor, rounds: int) -> dict[str, float]:
    """Median milliseconds of the plan's instructions, one operator a layer, summed by kind."""
    plan = network._plan(full=False, features=True)
    plain, rows, operator = [i.call for i in plan.instructions], [], rnp.network.OPERATOR
    totals: dict[str, float] = {}

    def timed(instruction: Callable[[Any], None]) -> Callable[[Any], None]:
        label = instruction.__name__
        if label in ("call_module", "execute"):
            label = type(instruction.__closure__[0].cell_contents).__name__.lower()

        def run(state: Any) -> None:
            start = clock()
            instruction(state)
            totals[label] = totals.get(label, 0.0) + clock() - start

        return run

    try:
        rnp.network.OPERATOR = lambda *arguments: operator(*arguments)  # any other than its own: no segments
        for instruction in plan.instructions:
            instruction.call = timed(instruction.call)
        for _ in range(rounds):
            totals.clear()
            network(x)
            rows.append(dict(totals))
    finally:
        rnp.network.OPERATOR = operator
        for instruction, call in zip(plan.instructions, plain, strict=True):
            instruction.call = call
    return {label: 1e3 * quantile([row[label] for row in rows], 0.5) for label in rows[0]}


def without_convolutions(network: rnp.PrunedNetwork, x: Tensor) -> Callable[[], Any]:
    """One operator a layer, that returns ready-made outputs: what segments save of it is Python and small operators."""
    recorded: list[tuple[Tensor, Tensor]] = []
    operator = rnp.network.OPERATOR

    def record(*args: Any) -> tuple[Tensor, Tensor]:
        recorded.append(operator(*args))
        return recorded[-1]

    rnp.network.OPERATOR = record
    network(x)
    rnp.network.OPERATOR = operator

    def call() -> Any:
        outputs = iter(recorded)
        rnp.network.OPERATOR = lambda *args: next(outputs)
        try:
            return network(x)
        finally:
            rnp.network.OPERATOR = operator

    return call


def report(name: str, rounds: int) -> None:
    make, pixels, batch = NETWORKS[name]
    torch.manual_seed(0)
    model = make().eval()
    x = torch.randn(batch, 3, pixels, pixels).to(memory_format=torch.channels_last)
    networks = {label: rnp.convert(model, x[:1], K) for label in ("full", "three quarters", "half", "quarter", "agent")}
    for label, width in (("three quarters", 0.75), ("half", 0.5), ("quarter", 0.25)):
        networks[label].policy = rnp.policies.Uniform(width)
    folded, prepacked = stock.folded(model), stock.prepacked(model, x)
    error = (networks["full"](x) - folded(x)).abs().max() / folded(x).abs().max()
    assert error < 1e-4, f"full width differs from the original: {error}"
    agent = networks["agent"]
    mixed_agent(agent, x)
    calls: dict[str, Callable[[], Any]] = {"folded": lambda: folded(x), "prepacked": lambda: prepacked(x)}
    calls |= {label: (lambda network=network: network(x)) for label, network in networks.items()}
    calls["agent, no convolutions"] = without_convolutions(agent, x)
    times = interleaved(calls, rounds)
    base = quantile(times["prepacked"], 0.5)
    print(f"\n{name}: dense {agent.dense_macs / 1e6:.0f} M MACs an image, {len(agent.layers)} decisions")
    for label, seconds in times.items():
        middle = quantile(seconds, 0.5)
        low, high = (1e3 * quantile(seconds, q) for q in (0.2, 0.8))
        line = f"  {label:<24}{1e3 * middle:9.3f} ms  [{low:.3f} … {high:.3f}]"
        if label in networks:
            macs = networks[label](x, return_trace=True)[1].macs.double().mean().item()
            theory = agent.dense_macs / macs
            line += f"  {base / middle:5.2f}× prepacked, theory {theory:5.2f}×, realised {base / middle / theory:.2f}"
        elif label == "folded":
            line += f"  {base / middle:5.2f}× prepacked"
        print(line)
    kinds = by_kind(agent, x, rounds)
    print("  agent, by kind: " + ", ".join(f"{k} {v:.3f} ms" for k, v in sorted(kinds.items(), key=lambda i: -i[1])))
    depth: dict[str, int] = defaultdict(int)
    for instruction in agent._plan(full=False, features=True).instructions:
        depth[instruction.call.__name__] += 1
    print("  instructions: " + ", ".join(f"{k} {v}" for k, v in depth.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", default="", help="substring of the names to run")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    arguments = parser.parse_args()
    global clock
    clock = time.process_time if arguments.clock == "cpu" else time.perf_counter
    torch.set_num_threads(arguments.threads)
    print(
        f"torch {torch.__version__}, {arguments.threads} thread(s), {rnp_kernels.__version__}, {arguments.clock} clock"
    )
    with torch.inference_mode():
        for name in NETWORKS:
            if arguments.only in name:
                report(name, arguments.rounds)


if __name__ == "__main__":
    main()
