"""How an error of a caller's is said: one sentence, ``op: argument: expected …, got …``."""

from __future__ import annotations

from typing import Any, NoReturn


def fail(op: str, argument: str, expected: str, got: object, kind: type[Exception] = ValueError) -> NoReturn:
    raise kind(f"{op}: {argument}: expected {expected}, got {got}")


def short(value: Any) -> str:
    """The value for an error, on one line and of a bearable length."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # whatever a class of the caller's does; an int of more digits than Python writes
        text = type(value).__name__
    return text if len(text) <= 80 else f"{text[:77]}..."
