"""The one place of the version: read by the package, by pyproject.toml and by CMakeLists.txt."""

__version__ = "0.1.0"
