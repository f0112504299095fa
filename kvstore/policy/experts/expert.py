"""What an expert is: a complete cache without bytes, that sees every request and evicts at once."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from kvstore.api.hint import ReuseHint


@dataclass(slots=True)
class Request:
    """One use, by numbers of blocks."""

    blocks: Sequence[int]
    """Parents first."""
    now_s: float
    block_bytes: int
    block_tokens: int
    hint: ReuseHint | None = None
    session: int = 0
    """A number for whoever sent it; 0: unknown."""


class Expert(Protocol):
    """A cache of `capacity_bytes` that holds what its rule would keep.

    It sets its `flag` in `Blocks.flags` for what it holds. A request is admitted as a whole, its
    tail first, and only then is evicted what is too much; blocks of the same request may be.
    """

    flag: int
    capacity_bytes: int

    def use(self, request: Request) -> None:
        """Touches what it holds of the chain and admits the rest."""

    def advise(self, request: Request) -> None:
        """A hint for a chain that is not used by it."""

    def trim(self, now_s: float) -> list[int]:
        """Evicts until it fits its capacity. What went, in that order."""
