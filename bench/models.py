"""The networks that are measured, under the name that scripts beside this file use; they live in the package."""

from rnp.bench.models import MODELS, initialised, make

__all__ = ["MODELS", "initialised", "make"]
