"""How errors are worded: operator, rule, value."""

from __future__ import annotations


def message(operator: str, rule: str, value: object) -> str:
    return f"{operator}: {rule}, got {value}"
