"""Fused execution in models that are there already: :func:`fuse` and :func:`unfuse`."""

from .fuse import fuse, unfuse
from .report import Report, Row

__all__ = ["Report", "Row", "fuse", "unfuse"]
