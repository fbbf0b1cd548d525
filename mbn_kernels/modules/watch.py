"""Whether a tree of modules is still what it was, asked at each call: faster than to read it anew."""

from __future__ import annotations

from array import array

from torch import nn
from torch.nn.modules import module as global_hooks

#: Where PyTorch keeps the hooks of every module. Who counts or times modules sets them: such a hook sees fused modules
#: one by one, but not into them.
GLOBAL_HOOKS: tuple[dict, ...] = (
    global_hooks._global_forward_hooks,
    global_hooks._global_forward_pre_hooks,
    global_hooks._global_backward_hooks,
    global_hooks._global_backward_pre_hooks,
)
#: Attributes of ours that say what was read of a tree, and not what it is.
_NOTES = ("_reading", "_kept")


def hooks_of(module: nn.Module) -> tuple[dict, ...]:
    """Where a module keeps its forward and backward hooks."""
    return module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks


def has_hook(module: nn.Module) -> bool:
    return any(hooks_of(module)) or any(GLOBAL_HOOKS)


class Watch:
    """What a forward depends on below some modules: children, parameters and buffers, hooks (none), classes and all
    attributes, by identity.

    A tree is other than it was where any of it is; a tensor's own contents are not looked at. The compiled library
    does the looking, so this is for who runs its kernels.
    """

    def __init__(self, roots: list[nn.Module]) -> None:
        from .._C import unchanged

        modules = tuple(dict.fromkeys(m for root in roots for m in root.modules()))
        hooks = [*GLOBAL_HOOKS, *(hooks for m in modules for hooks in hooks_of(m))]
        held = [d for m in modules for d in (m.__dict__, m._modules, m._parameters, m._buffers)]
        types, items = list(map(type, modules)), [list(d.items()) for d in held]  # read once: threads may change them
        notes = [*map(id, types), *(0 for _ in hooks)]
        for own in items:
            notes += len(own), *(note for name, value in own for note in (id(name), _note(name, value)))
        self._alive = types, items  # no address comes to be another object's while this lives
        self._unchanged, self._asked = unchanged, (modules, (*hooks, *held), array("Q", notes).tobytes())

    def holds(self) -> bool:
        return self._unchanged(*self._asked)


def _note(name: str, value: object) -> int:
    return 0 if name in _NOTES else id(value)
