"""Whether a tree of modules is still what it was, asked at each call: faster than to read it anew."""

from __future__ import annotations

from itertools import chain
from operator import is_, itemgetter

from torch import nn

from .fused import GLOBAL_HOOKS, hooks_of


class Watch:
    """What a forward depends on below some modules: children, parameters and buffers by identity, hooks, classes and
    plain attributes.

    A tree is other than it was where any of it is; a tensor's own contents are not looked at.
    """

    def __init__(self, roots: list[nn.Module]) -> None:
        self._modules = list(dict.fromkeys(m for root in roots for m in root.modules()))
        self._classes = list(map(type, self._modules))
        self._hooks = [*GLOBAL_HOOKS, *(hooks for m in self._modules for hooks in hooks_of(m))]
        self._dicts = [d for m in self._modules for d in (m._modules, m._parameters, m._buffers)]
        self._held = [value for d in self._dicts for value in d.values()]
        self._own = [m.__dict__ for m in self._modules]
        self._sizes = list(map(len, self._own))  # a new attribute may be a forward
        public = [(m.__dict__, [name for name in m.__dict__ if not name.startswith("_")]) for m in self._modules]
        self._attributes = [(itemgetter(*names), attributes) for attributes, names in public]
        self._values = self._read()

    def _read(self) -> list:
        return [get(attributes) for get, attributes in self._attributes]

    def holds(self) -> bool:
        # Loops in C: a network has some thousand of these.
        if any(self._hooks) or sum(map(len, self._dicts)) != len(self._held):
            return False
        if list(map(len, self._own)) != self._sizes:
            return False
        if not all(map(is_, chain.from_iterable(map(dict.values, self._dicts)), self._held)):
            return False
        try:
            return list(map(type, self._modules)) == self._classes and self._read() == self._values
        except (KeyError, RuntimeError, ValueError):  # an attribute is gone, or is a tensor
            return False
