"""The agent of Runtime Neural Pruning (Lin et al., NIPS 2017): encoder per layer → code → RNN across layers → Q-values.

Read in the paper: global average pooling, one encoder per layer, a code of fixed length, one RNN that runs across the
layers, a decoder of k Q-values without ReLU, and the run-time balance a* = argmax_i [Q(s, a_i) + (i − 1)·Δp]. Ours: the
standardised features, GRU 32 by default, the previous action as an input, the decoder initialised at zero (RNP.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rnp_kernels.agent_step import operator_on

AGENT_STEP = torch.ops.rnp.agent_step.default
CELLS = ("gru", "lstm", "none")


@dataclass
class AgentState:
    """What the agent carries from one decision of a batch to the next."""

    shift: float
    hidden: Tensor | None = None  # (N, H)
    cell: Tensor | None = None  # (N, H), LSTM only
    previous: Tensor | None = None  # (N,) int32, 1…k
    channels: list[int] | None = None  # output channels that each decision is about
    out_prefix: Tensor | None = None  # (N,) int32, live channels under the last actions, where they came with them
    fused: list[tuple[Tensor, ...]] | None = None  # per layer, what the operator takes between previous and shift


class Agent(nn.Module):
    """Q-learning agent over L decisions with k actions.

    `feature_sizes`: channels of the pooled features at each decision (`PrunedNetwork.feature_sizes`).
    `groups`: k. `hidden`, `code`: sizes of the RNN's state and of the code. `cell`: "gru", "lstm" or "none" (the code
    goes straight to the decoder). `shared_decoder` False gives each decision a decoder of its own. `previous_action`:
    the RNN also reads the last action, one-hot (zeros at the first decision); not possible with cell "none".

    `epsilon` (default 0) is the probability of a uniformly random action, drawn from `generator` (a CPU generator, or
    torch's global one). In eval mode a sample's actions are the same alone and in any batch; with cell "gru" and a
    shared decoder a decision is then one operator, `torch.ops.rnp.agent_step`, on a CPU. Else plain torch runs.
    """

    needs_features = True

    def __init__(
        self,
        feature_sizes: Sequence[int],
        groups: int,
        hidden: int = 32,
        code: int = 32,
        cell: str = "gru",
        shared_decoder: bool = True,
        previous_action: bool = True,
    ) -> None:
        super().__init__()
        if cell not in CELLS:
            raise ValueError(f"Agent: cell must be one of {CELLS}, got {cell!r}")
        if groups < 1 or not feature_sizes:
            raise ValueError(f"Agent: needs groups ≥ 1 and at least one decision, got {groups}, {list(feature_sizes)}")
        self.feature_sizes, self.groups = [int(size) for size in feature_sizes], int(groups)
        self.hidden, self.code, self.cell = hidden, code, cell
        self.shared_decoder, self.previous_action = shared_decoder, previous_action and cell != "none"
        self.epsilon = 0.0
        self.generator: torch.Generator | None = None
        self._fused: tuple[list[Any], list[tuple[Tensor, ...]] | None] | None = None
        self.encoders = nn.ModuleList(nn.Linear(size, code) for size in self.feature_sizes)
        inputs = code + (groups if self.previous_action else 0)
        self.rnn = {"gru": nn.GRUCell, "lstm": nn.LSTMCell}[cell](inputs, hidden) if cell != "none" else None
        width = code if cell == "none" else hidden
        self.decoders = nn.ModuleList(
            nn.Linear(width, groups) for _ in range(1 if shared_decoder else len(self.feature_sizes))
        )
        for decoder in self.decoders:
            nn.init.zeros_(decoder.weight)
            nn.init.zeros_(decoder.bias)
        for i, size in enumerate(self.feature_sizes):
            self.register_buffer(f"mean_{i}", torch.zeros(size))
            self.register_buffer(f"inv_std_{i}", torch.ones(size))

    @property
    def macs_per_image(self) -> int:
        """Multiply–accumulates of all decisions of one image."""
        gates = {"gru": 3, "lstm": 4, "none": 0}[self.cell]
        inputs = self.code + (self.groups if self.previous_action else 0)
        width = self.code if self.cell == "none" else self.hidden
        step = gates * self.hidden * (inputs + self.hidden) + width * self.groups
        return sum(size * self.code for size in self.feature_sizes) + len(self.feature_sizes) * step

    @torch.no_grad()
    def set_feature_statistics(self, means: Sequence[Tensor], stds: Sequence[Tensor]) -> None:
        """Standardise the features of decision l by means[l], stds[l] (C_l,). A std of 0 (dead channel) counts as 1."""
        if len(means) != len(self.feature_sizes) or len(stds) != len(self.feature_sizes):
            raise ValueError(f"set_feature_statistics: {len(self.feature_sizes)} means and stds expected")
        for i, (mean, std) in enumerate(zip(means, stds, strict=True)):
            getattr(self, f"mean_{i}").copy_(mean)
            std = std.to(self.get_buffer(f"inv_std_{i}"))
            getattr(self, f"inv_std_{i}").copy_(torch.where(std > 0, 1 / std, 1.0))

    def decoder(self, layer: int) -> nn.Linear:
        """The decoder of a decision."""
        return self.decoders[0 if self.shared_decoder else layer]

    def step(self, layer: int, features: Tensor, state: AgentState) -> Tensor:
        """One decision in plain torch: features (N, C_layer) → Q (N, k). Updates state.hidden and state.cell."""
        linear = F.linear if self.training or torch.is_grad_enabled() else invariant_linear
        encoder = self.encoders[layer]
        x = (features - self.get_buffer(f"mean_{layer}")) * self.get_buffer(f"inv_std_{layer}")
        x = F.relu(linear(x, encoder.weight, encoder.bias))
        decoder = self.decoder(layer)
        if self.rnn is None:
            return linear(x, decoder.weight, decoder.bias)
        if self.previous_action:
            x = torch.cat([x, self._one_hot(state.previous, x)], 1)
        hidden = state.hidden if state.hidden is not None else x.new_zeros(x.shape[0], self.hidden)
        from_input = linear(x, self.rnn.weight_ih, self.rnn.bias_ih)
        from_hidden = linear(hidden, self.rnn.weight_hh, self.rnn.bias_hh)
        if self.cell == "gru":
            r_i, z_i, n_i = from_input.chunk(3, 1)
            r_h, z_h, n_h = from_hidden.chunk(3, 1)
            reset, update = torch.sigmoid(r_i + r_h), torch.sigmoid(z_i + z_h)
            new = torch.tanh(n_i + reset * n_h)
            state.hidden = new + update * (hidden - new)
        else:
            cell = state.cell if state.cell is not None else torch.zeros_like(hidden)
            i, f, g, o = (from_input + from_hidden).chunk(4, 1)
            state.cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
            state.hidden = torch.sigmoid(o) * torch.tanh(state.cell)
        return linear(state.hidden, decoder.weight, decoder.bias)

    def _one_hot(self, actions: Tensor | None, like: Tensor) -> Tensor:
        if actions is None:
            return like.new_zeros(like.shape[0], self.groups)
        return F.one_hot(actions.long() - 1, self.groups).to(like.dtype)

    def q_values(self, features: Sequence[Tensor], actions: Tensor) -> Tensor:
        """Q of whole episodes, teacher-forced: features[l] (B, C_l), actions taken (B, L) in 1…k → (B, L, k)."""
        state = AgentState(shift=0.0)
        q = []
        for layer, x in enumerate(features):
            q.append(self.step(layer, x, state))
            state.previous = actions[:, layer]
        return torch.stack(q, 1)

    def start(self, network: Any, batch_size: int, device: torch.device) -> AgentState:
        """Begin a batch; Δp comes from `network.penalty_shift`."""
        channels = getattr(network, "decision_channels", None)
        return AgentState(shift=network.penalty_shift, channels=channels, fused=self._fused_arguments(device))

    @torch.no_grad()
    def act(self, layer: int, features: Tensor | None, state: AgentState) -> tuple[Tensor, AgentState]:
        """argmax_i [Q_i + (i − 1)·Δp], ties to the smaller action; with probability `epsilon` a random action."""
        assert features is not None
        if state.fused is not None:
            previous = state.previous if self.previous_action else None
            channels = state.channels[layer] if state.channels is not None else 0
            step = AGENT_STEP if features.is_cpu else operator_on(features.device)
            state.hidden, _, actions, state.out_prefix = step(
                features, state.hidden, previous, *state.fused[layer], state.shift, channels
            )
        else:
            actions = greedy_actions(self.step(layer, features, state), state.shift)
        if self.epsilon > 0:
            actions, state.out_prefix = self._explore(actions), None
        state.previous = actions
        return actions, state

    def took(self, layer: int, actions: Tensor, state: AgentState) -> None:
        """The network took other actions than `act` answered, to keep its cap."""
        state.previous = actions

    def _fused_arguments(self, device: torch.device) -> list[tuple[Tensor, ...]] | None:
        """What `torch.ops.rnp.agent_step` takes for each layer, or None where the plain torch path has to run.

        The list is kept, and made again when a parameter or buffer is another tensor or has been given other memory
        (`.data = …`), whose address the segments hold.
        """
        if self.training or self.cell != "gru" or not self.shared_decoder or operator_on(device) is None:
            return None
        if torch.compiler.is_compiling():
            return self._collect_arguments()[1]
        if self._fused is None or not all(
            registry.get(name) is thing and (pointer is None or thing.data_ptr() == pointer)
            for registry, name, thing, pointer in self._fused[0]
        ):
            sources, arguments = self._collect_arguments()
            pointers = (thing.data_ptr() if isinstance(thing, Tensor) else None for _, _, thing in sources)
            self._fused = [(*s, pointer) for s, pointer in zip(sources, pointers, strict=True)], arguments
        return self._fused[1]

    def _collect_arguments(self) -> tuple[list[Any], list[tuple[Tensor, ...]] | None]:
        """Where the arguments come from, (registry, name, module or tensor) each, and the arguments of each layer, or
        None where the operator does not take them."""
        rnn, decoder = self.rnn, self.decoder(0)
        assert isinstance(rnn, nn.GRUCell)
        named = [[(self, f"mean_{i}"), (self, f"inv_std_{i}"), (encoder, "weight"), (encoder, "bias")]
                 for i, encoder in enumerate(self.encoders)]  # fmt: skip
        shared = [(rnn, "weight_ih"), (rnn, "weight_hh"), (rnn, "bias_ih"), (rnn, "bias_hh")]
        shared += [(decoder, "weight"), (decoder, "bias")]
        sources = [(self._modules, name, self._modules[name]) for name in ("rnn", "encoders", "decoders")]
        for modules in (self.encoders._modules, self.decoders._modules):
            sources += [(modules, name, module) for name, module in modules.items()]
        for module, name in [*shared, *(item for layer in named for item in layer)]:
            registry = module._parameters if name in module._parameters else module._buffers
            sources.append((registry, name, registry[name]))
        arguments = [tuple(getattr(m, name) for m, name in [*layer, *shared]) for layer in named]
        tensors = [t for layer in arguments for t in layer]
        usable = all(t.dtype is torch.float32 and t.device == tensors[0].device and t.is_contiguous() for t in tensors)
        return sources, arguments if usable else None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_fused": None}

    def _explore(self, actions: Tensor) -> Tensor:
        size = actions.shape
        explore = torch.rand(size, generator=self.generator) < self.epsilon
        random = torch.randint(1, self.groups + 1, size, generator=self.generator, dtype=torch.int32)
        return torch.where(explore.to(actions.device), random.to(actions.device), actions)


def greedy_actions(q: Tensor, shift: float) -> Tensor:
    """argmax_i [q_i + (i − 1)·shift] of q (N, k) → (N,) int32 in 1…k; of equal ones the smallest action."""
    shifted = q + shift * torch.arange(q.shape[1], device=q.device, dtype=q.dtype)
    best = shifted == shifted.amax(1, keepdim=True)
    return (best.to(torch.int32).argmax(1) + 1).to(torch.int32)


def invariant_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """F.linear whose sums run over one row at a time: a sample gets the same bits alone and in any batch."""
    return (x[:, None, :] * weight).sum(-1) + bias
