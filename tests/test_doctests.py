"""Every public function and class has an example in its docstring, and the examples do what they say."""

from __future__ import annotations

import doctest
import inspect
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

import mbn_kernels
from mbn_kernels import functional, models

pytestmark = pytest.mark.usefixtures("needs_cpu")
PACKAGE = Path(mbn_kernels.__file__).parent
#: What the examples take as imported.
IMPORTED = {"torch": torch, "nn": nn, "mbn_kernels": mbn_kernels, "functional": functional, "models": models}


def exported() -> dict[str, object]:
    """By name, the functions and classes of the public interface."""
    found = {name: getattr(mbn_kernels, name) for name in mbn_kernels.__all__}
    found |= {name: getattr(models, name) for name in models.__all__}
    own = {name: v for name, v in vars(functional).items() if getattr(v, "__module__", None) == functional.__name__}
    found |= {name: value for name, value in own.items() if not name.startswith("_")}
    return {name: value for name, value in found.items() if inspect.isroutine(value) or inspect.isclass(value)}


def modules_with_examples() -> list[str]:
    files = (file for file in PACKAGE.rglob("*.py") if "    >>> " in file.read_text())
    names = (file.relative_to(PACKAGE.parent).with_suffix("").parts for file in files)
    return sorted(".".join(name).removesuffix(".__init__") for name in names)


def examples_of(module: ModuleType) -> Iterator[doctest.DocTest]:
    """Those of a module and of all that it defines. doctest's own search passes over decorated functions."""
    finder, globs = doctest.DocTestFinder(recurse=True, exclude_empty=True), vars(module) | IMPORTED
    own = {n: v for n, v in vars(module).items() if getattr(v, "__module__", None) == module.__name__}
    for name, value in own.items():
        if inspect.isroutine(inspect.unwrap(value)) or inspect.isclass(value):
            yield from finder.find(value, name, module=False, globs=dict(globs))


def run(examples: Iterator[doctest.DocTest]) -> tuple[int, str]:
    """(how many lines of examples there were, what went otherwise)."""
    said: list[str] = []
    runner = doctest.DocTestRunner(verbose=False)
    for example in examples:
        runner.run(example, out=said.append)
    return runner.tries, "".join(said)


@pytest.mark.parametrize("name", modules_with_examples())
def test_examples(name: str) -> None:
    module = import_module(name)
    count, failures = run(examples_of(module))
    assert not failures, failures
    assert count == inspect.getsource(module).count("    >>> ")  # none was passed over


def test_every_public_name_has_an_example() -> None:
    found = exported()
    assert {"fuse", "freeze", "FusedInvResBlock", "squeeze_excite", "run_chain", "layer_shapes"} <= found.keys()
    assert [name for name, value in found.items() if ">>> " not in (value.__doc__ or "")] == []


def test_a_wrong_example_is_found() -> None:
    module = ModuleType("made_up")

    def undecorated(x: int) -> int:
        """
        >>> undecorated(1)
        3
        """
        return x + 1

    @torch.no_grad()
    def decorated() -> torch.Size:
        """
        >>> models.mobilenet_v1(num_classes=3)
        4
        >>> decorated()
        torch.Size([2])
        """
        return torch.ones(2).shape

    for function in (undecorated, decorated):
        function.__module__ = module.__name__
        setattr(module, function.__name__, function)
    count, failures = run(examples_of(module))
    assert count == 3
    assert "Expected:\n    3\nGot:\n    2\n" in failures and failures.count("Expected:") == 2
