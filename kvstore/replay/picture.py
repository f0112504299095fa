"""Pictures by matplotlib, which only those need who ask for one."""

import importlib.util
from typing import Any

from kvstore.cli import MissingExtra


def require_pictures() -> None:
    """Raises `MissingExtra` if pictures cannot be drawn, before any work is done for one."""
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtra("--png needs the extra \"demo\": pip install 'kvstore-llm[demo]'")


def new_picture(title: str) -> tuple[Any, Any]:
    """An empty figure, with its axes, that can be saved without a screen."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, loc="left")
    axes.grid(visible=True, color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
