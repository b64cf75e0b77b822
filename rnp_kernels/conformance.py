"""What every backend must pass: the checks behind tests/conformance, `bench/gpu_suite.sh` and the GPU part of CI.

The cases are those of testing.py. Here is what is asked of each: the output, its gradients, the same bits in any
company, and the agent's step, on the device that the backend runs on. Where Triton's kernels are interpreted on a CPU,
which takes a second for what takes a GPU microseconds, a target is `quick`: it gets the cases that `QUICK` names.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _libraries, backends, ops, reference, testing, triton
from .testing import Case, Tensors, assert_as_accurate_as_native

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
PARAMETERS = ("input", "weight", "bias", "scale", "residual")
PER_SAMPLE = ("input", "residual", "in_prefix", "out_prefix", "row")

# Each path of the Triton kernels once: whole eights and remainders of channels, narrow tiles, groups, no matrix unit,
# every epilogue, every layout of the strides.
QUICK = frozenset({
    "3x3", "1x1", "1x1 stride 2", "7x7 stem", "dilated", "asymmetric padding", "groups", "depthwise multiplier",
    "one channel", "strided input", "slice of a larger map", "expanded batch", "weight transposed", "mixed prefixes",
    "all prefixes zero", "mixed, contiguous", "mixed, stem", "prefix, depthwise", "prefix, unaligned channels",
    "residual beyond the prefix", "tables", "everything", "everything, contiguous", "skipped tail, pooled",
    "empty batch", "empty batch, everything",
})  # fmt: skip
QUICK_GRADIENTS = frozenset({
    "1x1 stride 2", "5x3 strides 2 and 1", "asymmetric padding", "depthwise multiplier", "mixed, contiguous",
    "prefix, unaligned channels", "everything", "skipped tail, pooled", "empty batch",
})  # fmt: skip
QUICK_INVARIANCE = frozenset({"mixed, dilated", "prefix, unaligned channels", "everything", "prefix, depthwise"})


@dataclass(frozen=True)
class Target:
    """A backend on a device; `why_not` says why it cannot run here."""

    backend: str
    device: str
    why_not: str | None = None
    quick: bool = False

    def __str__(self) -> str:
        return f"{self.backend} on {self.device}"


def targets() -> list[Target]:
    """Every backend on its device, those that cannot run here included; the reference also on a GPU that is there."""
    found = []
    for name, why_not in backends.available_backends().items():
        device = backends.device_of(name) or "cpu"
        found.append(Target(name, device, why_not, quick=name == "triton" and triton.interpreted()))
        if name == "reference" and torch.cuda.is_available():
            found.append(Target(name, "cuda"))
    return found


@contextlib.contextmanager
def deterministic_cudnn() -> Iterator[None]:
    """Inside, cuDNN takes no algorithm whose bits differ from call to call."""
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = before


@contextlib.contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """Inside, float32 convolutions on CUDA multiply their operands as they are ("ieee") or may round them ("tf32")."""
    setting = torch.backends.cudnn.conv
    before = setting.fp32_precision
    setting.fp32_precision = precision
    try:
        yield
    finally:
        setting.fp32_precision = before


def call(case: Case, arguments: Tensors, **more: Any) -> tuple[Tensor, Tensor | None]:
    """The backend in force: output and means, or None where the case has no means."""
    result = ops.prefix_conv2d(**arguments, **more)
    return result if case.pooled else (result, None)


def defined(case: Case, output: Tensor) -> Tensor:
    """The output with what `tail="skip"` leaves undefined at zero."""
    if case.tail == "zero":
        return output
    prefix = torch.tensor(case.out_prefix, dtype=torch.int32, device=output.device)
    return torch.where(reference.live(case.out, prefix, output), output, 0)


def _check_float64(case: Case, arguments: Tensors, output: Tensor, means: Tensor | None) -> None:
    """No wider truth is at hand, so the bound is the theorem's: a sum of K products, in any order, is off by at most
    K eps times the sum of their absolute values; ours and the reference each by that."""
    truth, _ = testing.run_reference(case, arguments)
    absolute = {k: v.abs() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in arguments.items()}
    size, _ = testing.run_reference(case, absolute)
    products = case.input[1] // case.groups * case.kernel[0] * case.kernel[1] + 3  # scale, bias, residual
    assert output.dtype == torch.float64 and output.shape == truth.shape
    assert ((defined(case, output) - truth).abs() <= 2 * products * torch.finfo(torch.float64).eps * size).all()
    if case.pooled:
        torch.testing.assert_close(means, defined(case, output).mean((2, 3)).float(), rtol=1e-6, atol=1e-7)


def check_output(case: Case, arguments: Tensors, output: Tensor, means: Tensor | None) -> None:
    """AssertionError unless output and means are as accurate as native torch's, and laid out as conv2d would."""
    if output.dtype == torch.float64:
        return _check_float64(case, arguments, output, means)
    native, native_means = testing.run_reference(case, arguments)
    truth, true_means = testing.run_reference(case, testing.convert(arguments, torch.float64))
    # In half precision the output's own rounding exceeds what the sums lose.
    sums = testing.output_sums(case, arguments) if output.dtype is torch.float32 else None
    assert_as_accurate_as_native("output", defined(case, output), native, truth, sums)
    if case.pooled:
        assert means is not None and native_means is not None and true_means is not None
        assert means.dtype == torch.float32
        assert_as_accurate_as_native("means", means, native_means.float(), true_means)


def check_tf32(case: Case, device: str) -> None:
    """float32 where TF32 is allowed. cuDNN takes TF32 for some shapes and not for others, so its error says nothing of
    ours; the bound is arithmetic's: each operand loses less than 2^-10 of itself (cut off, as wgmma does; rounded, as
    the kernels of sm_80 do, 2^-11), so each sum at most 2^-9 of the sum of its products' absolute values, and the
    addition in float32 far less."""
    arguments = testing.make(case, torch.float32, device)
    with float32_products("tf32"):
        output, _ = call(case, arguments)
    wide = testing.convert(arguments, torch.float64)
    truth, _ = testing.run_reference(case, wide)
    absolute = {k: v.abs() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in wide.items()}
    size, _ = testing.run_reference(case, absolute)
    assert output.dtype is torch.float32 and output.shape == truth.shape
    error, allowed = (defined(case, output) - truth).abs(), (2**-9 + 2**-16) * size + 1e-6
    assert (error <= allowed).all(), f"error {error.max():.3g}, allowed {allowed[error == error.max()].max():.3g} there"


def leaves(arguments: Tensors, dtype: torch.dtype) -> Tensors:
    """The arguments with every floating tensor a leaf that needs a gradient, its strides kept."""
    out = {}
    for name, value in arguments.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            value = value.detach().clone(memory_format=torch.preserve_format).to(dtype).requires_grad_()
        out[name] = value
    return out


def gradients(run: Any, case: Case, arguments: Tensors, dtype: torch.dtype, upstream: Tensor) -> dict[str, Tensor]:
    arguments = leaves(arguments, dtype)
    output, means = run(case, arguments)
    loss = (torch.where(output.isnan(), 0, output) * upstream.to(dtype)).sum()
    if means is not None:
        loss = loss + (means.to(dtype) * upstream.mean((2, 3)).to(dtype)).sum()
    loss.backward()
    return {name: arguments[name].grad for name in PARAMETERS if arguments[name] is not None}


def reference_call(case: Case, arguments: Tensors) -> tuple[Tensor, Tensor | None]:
    output, means = testing.run_reference(case, arguments)
    return output, None if means is None else means.float() if output.dtype != torch.float64 else means


def check_gradients(case: Case, dtype: torch.dtype, device: str) -> None:
    """Every gradient by name, against autograd through the specification in float64; twice, to the bit."""
    arguments = testing.make(case, dtype, device)
    shape = testing.run_reference(case, arguments)[0].shape
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)
    if case.tail == "skip":  # what no reader may use has no gradient
        prefix = torch.tensor(case.out_prefix, dtype=torch.int32, device=device)
        upstream = torch.where(reference.live(case.out, prefix, upstream), upstream, 0)
    # Our kernels give the same bits without being asked; the reference is torch's own convolution, which has to be.
    asked = deterministic_cudnn() if backends.get_backend() == "reference" else contextlib.nullcontext()
    with asked:
        ours, again = (gradients(call, case, arguments, dtype, upstream) for _ in range(2))
    with deterministic_cudnn():  # one yardstick, not another at every run
        native = gradients(reference_call, case, arguments, dtype, upstream)
    truth = gradients(reference_call, case, arguments, torch.float64, upstream)
    sums = testing.gradient_sums(case, arguments, upstream) if dtype is torch.float32 else {}
    assert ours.keys() == truth.keys()
    for name, gradient in ours.items():
        assert gradient is not None, f"no gradient of {name}"
        assert_as_accurate_as_native(f"gradient of {name}", gradient, native[name], truth[name], sums.get(name))
        assert torch.equal(gradient, again[name]), f"gradient of {name} differs from call to call"


def pick(arguments: Tensors, index: Any) -> Tensors:
    return {k: v[index] if k in PER_SAMPLE and v is not None else v for k, v in arguments.items()}


def _results(case: Case, arguments: Tensors) -> list[Tensor]:
    output, means = call(case, arguments)
    if case.tail == "skip":
        live = reference.live(case.out, arguments["out_prefix"], output)
        output = torch.where(live, output, 0)
    return [output] if means is None else [output, means]


def check_invariance(case: Case, dtype: torch.dtype, device: str) -> None:
    """The same sample gives the same bits: alone, in other orders, beside other widths, with full prefixes or None."""
    arguments = testing.make(case, dtype, device)
    batch, channels = case.input[:2]
    whole = _results(case, arguments)
    order = torch.arange(batch, device=device).flip(0)
    for index in (order, torch.cat([order, order.flip(0), order])):
        for tensor, again in zip(whole, _results(case, pick(arguments, index)), strict=True):
            assert torch.equal(tensor[index], again), f"samples {index.tolist()}"
    for n in range(batch):
        for tensor, again in zip(whole, _results(case, pick(arguments, slice(n, n + 1))), strict=True):
            assert torch.equal(tensor[n : n + 1], again), f"sample {n} alone"
    if case.tail == "skip" or case.layout == "expanded":
        return
    arguments["input"] = torch.where(arguments["input"].isnan(), 0.5, arguments["input"])
    dense = _results(case, arguments | {"in_prefix": None, "out_prefix": None})
    full_in = torch.full((batch,), channels, dtype=torch.int32, device=device)
    full_out = torch.full((batch,), case.out, dtype=torch.int32, device=device)
    explicit = _results(case, arguments | {"in_prefix": full_in, "out_prefix": full_out})
    for tensor, again in zip(dense, explicit, strict=True):
        assert torch.equal(tensor, again), "None is not an explicit full prefix"
    full_in[0], full_out[0] = channels // 2, case.out // 2
    mixed = _results(case, arguments | {"in_prefix": full_in, "out_prefix": full_out})
    for tensor, again in zip(dense, mixed, strict=True):
        assert torch.equal(tensor[1:], again[1:]), "beside a sample of another width"


AGENTS = {  # features, code, hidden, actions, samples
    "default": (64, 32, 32, 4, 5),
    "odd sizes": (13, 21, 11, 3, 3),
    "one of each": (1, 1, 1, 1, 2),
    "long rows": (513, 32, 32, 8, 3),
}


def agent_operator(backend: str) -> Any:
    """The operator of the agent's step of a backend; None where plain torch takes its place."""
    if backend == "triton":
        return torch.ops.rnp.agent_step_triton
    if backend == "cuda" and not _libraries.has_cuda("agent_step"):
        return None
    return None if backend == "reference" else torch.ops.rnp.agent_step


def _agent_in_torch(
    pooled: Tensor, hidden: Tensor | None, previous: Tensor | None, mean: Tensor, inv_std: Tensor, encoder: Tensor,
    encoder_bias: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor, decoder: Tensor, decoder_bias: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    actions = decoder.shape[0]
    code = F.relu(F.linear((pooled - mean) * inv_std, encoder, encoder_bias))
    if hidden is None:
        hidden = pooled.new_zeros(pooled.shape[0], w_hh.shape[1])
    one_hot = code.new_zeros(code.shape[0], actions)
    if previous is not None:
        one_hot = F.one_hot(previous.long() - 1, actions).to(code.dtype)
    new = torch.gru_cell(torch.cat([code, one_hot], 1), hidden, w_ih, w_hh, b_ih, b_hh)
    return new, F.linear(new, decoder, decoder_bias)


def agent_arguments(name: str, device: str, first: bool) -> list[Any]:
    """Arguments of the agent's step for one of `AGENTS`, without shift and channels; `first`: no state yet."""
    features, code, hidden, actions, samples = AGENTS[name]
    generator = torch.Generator().manual_seed(0)

    def values(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) / 2).to(device)

    previous = torch.randint(1, actions + 1, (samples,), generator=generator, dtype=torch.int32).to(device)
    state = [None, None] if first else [values(samples, hidden), previous]
    return [
        values(samples, features), *state, values(features), values(features).abs() + 0.5, values(code, features),
        values(code), values(3 * hidden, code + actions), values(3 * hidden, hidden), values(3 * hidden),
        values(3 * hidden), values(actions, hidden), values(actions),
    ]  # fmt: skip


def check_agent_step(operator: Any, name: str, device: str, first: bool) -> None:
    """Hidden state and Q against plain torch, the action by its rule, the prefix, and the same bits alone."""
    arguments = agent_arguments(name, device, first)
    shift, channels, actions = -0.2, 37, AGENTS[name][3]
    hidden, q, action, prefix = operator(*arguments, shift, channels)
    native = _agent_in_torch(*arguments)
    wide = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments]
    for what, ours, theirs, truth in zip(("hidden", "q"), (hidden, q), native, _agent_in_torch(*wide), strict=True):
        error, allowed = (ours - truth).abs().max(), 2 * (theirs - truth).abs().max() + 2e-6
        assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"
    biased = q + shift * torch.arange(actions, device=device)
    assert action.dtype is torch.int32 and prefix.dtype is torch.int32
    assert torch.equal(action.long(), biased.argmax(1) + 1)
    assert prefix.tolist() == [-(-a * channels // actions) for a in action.tolist()]
    for n in range(AGENTS[name][4]):
        one = [a[n : n + 1] if i < 3 and a is not None else a for i, a in enumerate(arguments)]
        for whole, alone in zip((hidden, q, action, prefix), operator(*one, shift, channels), strict=True):
            assert torch.equal(whole[n : n + 1], alone), f"sample {n} alone"


def cases_for(target: Target, quick: frozenset[str] = QUICK) -> Iterator[Case]:
    """The cases that a target gets: all, or the quick ones."""
    return (case for case in testing.CASES if not target.quick or case.name in quick)
