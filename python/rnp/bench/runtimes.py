"""Networks in ONNX Runtime and OpenVINO, as users deploy them on a CPU: float32, the dense model, fixed shape."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

Run = Callable[[Tensor], Tensor]


class Missing(RuntimeError):
    """A rival cannot run here; the message says why."""


def onnxruntime_model(model: nn.Module, example: Tensor, threads: int) -> Run:
    """``model`` (eval mode, on the CPU) in ONNX Runtime, all graph optimisations, for inputs shaped like ``example``.

    Raises:
        Missing: a package is not installed, or the export fails; the message says which and why.
    """
    _need("onnxruntime", "onnx")
    import onnxruntime

    file = io.BytesIO()
    with _quiet("onnxruntime"):
        try:
            torch.onnx.export(model, (example.contiguous(),), file, dynamo=False, opset_version=17)
        except Exception as failure:
            raise Missing(f"onnxruntime: torch.onnx.export failed: {type(failure).__name__}: {failure}") from failure
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {name: images.contiguous().numpy()})[0])

    return run


def openvino_model(model: nn.Module, example: Tensor, threads: int) -> Run:
    """``model`` in OpenVINO, compiled for latency in float32, for inputs shaped like ``example``. Raises as above."""
    _need("openvino")
    import openvino

    with _quiet("openvino"):
        try:
            converted = openvino.convert_model(model, example_input=example.contiguous(), input=[list(example.shape)])
        except Exception as failure:
            raise Missing(f"openvino: convert_model failed: {type(failure).__name__}: {failure}") from failure
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    request = openvino.Core().compile_model(converted, "CPU", settings).create_infer_request()

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(request.infer([images.contiguous().numpy()], share_inputs=True)[0])

    return run


RUNTIMES: dict[str, Callable[[nn.Module, Tensor, int], Run]] = {
    "onnxruntime": onnxruntime_model,
    "openvino": openvino_model,
}


def runtimes(model: nn.Module, example: Tensor, threads: int) -> tuple[dict[str, Run], dict[str, str]]:
    """Every runtime that runs ``model`` here, ready to call, and of the others why not."""
    ready: dict[str, Run] = {}
    missing: dict[str, str] = {}
    for name, make in RUNTIMES.items():
        try:
            ready[name] = make(model, example, threads)
        except Missing as reason:
            missing[name] = str(reason)
    return ready, missing


def _need(*packages: str) -> None:
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    if absent:
        raise Missing(f"{packages[0]}: not installed: {', '.join(absent)} (pip install 'rnp-kernels[bench]')")


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Exporters warn at length about tracing; what matters comes as an exception or through the gate."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
