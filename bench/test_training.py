"""A training step of a layer: forward and both gradients."""

from collections.abc import Callable

PART = "training"
SIDES = ("eager", "full", "3/4", "1/2", "masked 1/2", "slices 1/2", "1/4", "mixed", "masked mixed", "slices mixed")


def test_training(timed: Callable[[], None]) -> None:
    timed()
