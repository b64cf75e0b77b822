"""VGG-16, ResNet-18 and ResNet-50 at 224 x 224."""

from collections.abc import Callable

PART = "network"
SIDES = (
    "prepacked",
    "eager",
    "onnxruntime",
    "openvino",
    "full",
    "1/2",
    "mixed 3x",
    "masked mixed 3x",
    "slices mixed 3x",
    "per width mixed 3x",
    "mixed 4x",
    "mixed 5x",
    "mixed 10x",
)


def test_network(timed: Callable[[], None]) -> None:
    timed()
