"""Layers of VGG-16 and ResNet-18/50, and shapes that are hard."""

from collections.abc import Callable

PART = "layer"
WIDTHS = ("3/4", "1/2", "1/4", "mixed")
RIVALS = tuple(f"{rival} {width}" for width in ("1/2", "mixed") for rival in ("masked", "slices", "per width"))
SIDES = ("prepacked", "eager", "onnxruntime", "openvino", "full", "direct full", *WIDTHS, *RIVALS)


def test_layer(timed: Callable[[], None]) -> None:
    timed()
