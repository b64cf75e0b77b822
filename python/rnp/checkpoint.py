"""``rnp.save`` and ``rnp.load``: a converted network, its agent and its budget in one safetensors file, never pickle.

Nothing is changed by a load that fails: everything is checked before the first tensor is copied.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rnp import fileformat
from rnp.agent import Agent
from rnp.convert import convert
from rnp.fileformat import CheckpointError
from rnp.network import PrunedNetwork
from rnp.policies import FullWidth, Policy, Uniform

AGENT_OPTIONS = ("hidden", "code", "cell", "shared_decoder", "previous_action")


def save(pruned: PrunedNetwork, path: str | Path) -> None:
    """Write the network, its policy and its budget to ``path`` (safetensors with a JSON header), atomically.

    Raises:
        ValueError: the policy is not one that a file can hold (an Agent, FullWidth or Uniform, no sub-class of these),
            or the model has extra state (``get_extra_state``). Nothing is written.
    """
    require_plain_state(pruned)
    header = {
        "network": describe(pruned),
        "policy": _describe_policy(pruned.policy),
        "budget": {"penalty_shift": pruned.penalty_shift, "max_macs": pruned.max_macs},
    }
    fileformat.write(path, "network", pruned.state_dict(), header)


@torch.inference_mode(False)
def load(path: str | Path, model: nn.Module) -> PrunedNetwork:
    """Read what :func:`save` wrote into ``model``.

    Args:
        path: the file.
        model: the network that was converted (its weights do not matter; it is not modified), or a
            :class:`rnp.PrunedNetwork` made from it, which is loaded in place and returned.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: truncated, damaged, foreign, or of another network, another type of its tensors included
            (a float32 file for a bfloat16 model); ``model`` is then as it was.
    """
    tensors, header = fileformat.read(path, "network")
    described = header["network"]
    if isinstance(model, PrunedNetwork):
        network = model
    else:
        parameter = next(model.parameters(), torch.empty(0))
        example = torch.zeros((1, *described["image_shape"]), device=parameter.device, dtype=parameter.dtype)
        try:
            network = convert(model, example, groups=described["groups"])
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"{path}: the model cannot be converted for images of {described['image_shape']}: {error}"
            ) from error
    require_equal(path, "network", described, {**describe(network), "agent": described["agent"]})
    policy = _make_policy(path, header["policy"], network)
    targets = {name: tensor for name, tensor in network.state_dict().items() if name.startswith("backbone.")}
    if isinstance(policy, Agent):
        policy.to(tensors["agent.mean_0"].dtype if "agent.mean_0" in tensors else None)  # made here: as it was saved
        targets |= {f"agent.{name}": tensor for name, tensor in policy.state_dict().items()}
    _copy(path, targets, tensors)
    network.policy = policy
    network.penalty_shift, network.max_macs = header["budget"]["penalty_shift"], header["budget"]["max_macs"]
    return network.eval()


def describe(network: PrunedNetwork) -> dict[str, Any]:
    """What tells one converted network from another, as JSON values."""
    policy = network.policy
    return {
        "groups": network.groups,
        "layers": list(network.layers),
        "feature_sizes": list(network.feature_sizes),
        "image_shape": list(network._values[network._input].shape[1:]),  # (C, H, W) at which MACs are counted
        "dense_macs": int(network.dense_macs),
        "agent": {name: getattr(policy, name) for name in AGENT_OPTIONS} if isinstance(policy, Agent) else None,
    }


def _describe_policy(policy: Policy) -> dict[str, Any]:
    if type(policy) is Agent:  # no sub-class: it would be read back as a plain Agent
        return {"kind": "Agent", **{name: getattr(policy, name) for name in AGENT_OPTIONS}}
    if type(policy) is FullWidth:
        return {"kind": "FullWidth"}
    if type(policy) is Uniform:
        return {"kind": "Uniform", "width": policy.width}
    got = type(policy).__name__ if isinstance(policy, nn.Module) else repr(policy)
    raise ValueError(f"rnp.save: the policy must be an Agent, FullWidth or Uniform to be stored, got {got}")


def _make_policy(path: str | Path, described: dict[str, Any], network: PrunedNetwork) -> Policy:
    options = dict(described)
    kind = options.pop("kind")
    if kind == "FullWidth":
        return FullWidth()
    if kind == "Uniform":
        return Uniform(**options)
    if kind == "Agent":
        with torch.random.fork_rng(devices=[]):  # its fresh weights are overwritten: leave the caller's generator alone
            agent = Agent(network.feature_sizes, network.groups, **options)
        return agent.to(next(network.parameters()).device)
    raise CheckpointError(f"{path}: policy must be Agent, FullWidth or Uniform, got {kind!r}")


def require_equal(path: str | Path, what: str, stored: Mapping[str, Any], present: Mapping[str, Any]) -> None:
    """Raise CheckpointError naming the first entry in which the file and what is present differ (floats: exactly)."""
    for name in [*present, *(name for name in stored if name not in present)]:
        if stored.get(name) != present.get(name):
            raise CheckpointError(
                f"{path}: of another {what}: {name} is {stored.get(name)!r} in the file and {present.get(name)!r} here"
            )


def _copy(path: str | Path, targets: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Copy all of ``tensors`` into the targets of the same names, after every name, shape and type has been checked."""
    missing = sorted(set(targets) - set(tensors))
    foreign = sorted(set(tensors) - set(targets))
    for names, problem in ((missing, "lacks"), (foreign, "holds, unknown to the model,")):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise CheckpointError(f"{path}: the file {problem} {', '.join(names[:3])}{more}")
    for name, target in targets.items():
        if tensors[name].shape != target.shape:
            raise CheckpointError(
                f"{path}: {name} has shape {tuple(tensors[name].shape)} in the file, {tuple(target.shape)} in the model"
            )
        if tensors[name].dtype != target.dtype:
            raise CheckpointError(
                f"{path}: {name} has type {tensors[name].dtype} in the file, {target.dtype} in the model; convert the "
                "model first, or after loading"
            )
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(tensors[name])


def require_plain_state(network: PrunedNetwork) -> None:
    """Raise ValueError where the network's state holds more than parameters and buffers: a file has no place for it."""
    for name, entry in network.state_dict().items():
        if name.rpartition(".")[2] == "_extra_state" or not isinstance(entry, Tensor):
            raise ValueError(
                f"checkpoint: a network's state must be parameters and buffers, and {name} is {type(entry).__name__}"
            )


def load_state(path: str | Path, network: PrunedNetwork, tensors: Mapping[str, Tensor]) -> None:
    """Copy a whole state into the network and its agent, or raise and leave both alone."""
    _copy(path, network.state_dict(), tensors)


def parts(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """{"a.x": …, "b.y": …} → {"a": {"x": …}, "b": {"y": …}}."""
    split: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        first, _, rest = name.partition(".")
        split.setdefault(first, {})[rest] = tensor
    return split


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's moments and step counts as "<parameter index>.<name>"; learning rates come from the schedule."""
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{name}": torch.as_tensor(value) for index, entry in state.items() for name, value in entry.items()
    }


def load_optimizer(path: str | Path, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Restore what :func:`optimizer_tensors` gave. Moments take the layout of their parameter, as fused steps need."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, _, entry = name.partition(".")
        if not index.isdigit() or int(index) >= len(parameters):
            raise CheckpointError(f"{path}: optimizer state {name!r} belongs to none of {len(parameters)} parameters")
        parameter = parameters[int(index)]
        if tensor.dim() and tensor.shape != parameter.shape:
            raise CheckpointError(
                f"{path}: optimizer state {name!r} must have shape {tuple(parameter.shape)}, got {tuple(tensor.shape)}"
            )
        own = torch.empty_like(parameter, dtype=tensor.dtype) if tensor.dim() else torch.empty_like(tensor)
        state.setdefault(int(index), {})[entry] = own.copy_(tensor)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
