"""Stands in for torchvision, whose CUDA build cannot be imported beside torch for the CPU.

SGLang imports it for images, which no test here has.
"""

from typing import Any

__version__ = "0.0.0"


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {})
