"""The operator by itself: rivals on two typical layers, cold caches, sweeps."""

from collections.abc import Callable

PART = "operator"
SIDES = (
    "prepacked",
    "eager",
    "onnxruntime",
    "openvino",
    "full",
    "1/2",
    "masked 1/2",
    "slices 1/2",
    "per width 1/2",
    "mixed",
    "masked mixed",
    "slices mixed",
    "per width mixed",
    *(f"{eighths}/8" for eighths in (7, 5, 3, 1)),
)


def test_operator(timed: Callable[[], None]) -> None:
    timed()
