"""Tells of the blocks of a load while later ones are still on their way."""

from collections.abc import Callable

from kvstore.api.tier import Loaded

OnLoaded = Callable[[Loaded], None]
"""Hears of the next leading block: its bytes are complete, good, and the caller's from now on."""


class Leading:
    """Puts arrivals into the order of the chain.

    Invariant: each block is told once, and none before those ahead of it.
    """

    def __init__(self, on_loaded: OnLoaded) -> None:
        self._on_loaded = on_loaded
        self._told = 0
        self._waiting: dict[int, Loaded] = {}

    def here(self, block: int, loaded: Loaded) -> None:
        """A block has arrived, in whatever order."""
        self._waiting[block] = loaded
        while (following := self._waiting.pop(self._told, None)) is not None:
            self._told += 1
            self._on_loaded(following)
