"""Modules that stand in for an engine's while our adapter is imported over them."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any


@contextmanager
def imported_over(modules: Mapping[str, Mapping[str, Any]], *roots: str) -> Iterator[None]:
    """`import` finds these meanwhile. What lies below `roots` is imported anew, and afterwards
    is again what it was before."""

    def ours(name: str) -> bool:
        return any(name == root or name.startswith(f"{root}.") for root in roots)

    before = {name: sys.modules.pop(name) for name in list(sys.modules) if ours(name)}
    for name, contents in modules.items():
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            package = ".".join(parts[:end])
            if package not in sys.modules:
                sys.modules[package] = ModuleType(package)
                sys.modules[package].__path__ = []
        vars(sys.modules[name]).update(contents)
    try:
        yield
    finally:
        for name in [name for name in sys.modules if ours(name)]:
            del sys.modules[name]
        sys.modules.update(before)
