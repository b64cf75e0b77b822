"""Layers of VGG-16 and ResNet-18/50, and shapes that are hard."""

from collections.abc import Callable

PART = "layer"
SIDES = ("prepacked", "eager", "onnxruntime", "openvino", "full", "direct full", "3/4", "1/2", "1/4", "mixed")


def test_layer(timed: Callable[[], None]) -> None:
    timed()
