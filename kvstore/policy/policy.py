"""What an eviction policy is: it watches, and names victims. No clock, no lock, no I/O.

A policy ranks keys, whether their blocks are here or not: a request uses a whole chain at once,
of which some blocks are here, and others will be written once they are computed.
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from kvstore.api.hint import ReuseHint

K = TypeVar("K", bound=Hashable)
"""What names a block: a `BlockRef` in a node, a number in a trace."""


@dataclass(frozen=True, slots=True)
class Use(Generic[K]):
    """That somebody asked for a chain: one request."""

    chain: Sequence[K]
    """All full blocks of the request, parents first, whether they are here or not."""
    now_s: float
    """On a clock that never goes back."""
    block_bytes: int = 1
    block_tokens: int = 1
    hint: ReuseHint | None = None
    """What the caller says of the chain's future: evidence, never an order."""
    session: Hashable = None
    """Whose request it is, where that is known; None: nobody said."""


class Policy(Protocol[K]):
    """Orders the blocks of one tier by when they should go.

    It holds exactly the blocks that were inserted and not removed. What it remembers beyond them
    is bounded by `capacity_bytes`, which its maker gives it.
    """

    def use(self, use: Use[K]) -> None:
        """A chain was asked for. Called once for each request, before what it lacks is inserted."""

    def advise(self, use: Use[K]) -> None:
        """A hint came without a request: its chain is not used by it."""

    def __contains__(self, key: K) -> bool:
        """Whether the key is known, from a use or an insertion, and not forgotten since."""

    def insert(self, key: K, parent: K | None, size_bytes: int) -> None:
        """A block has arrived. Blocks of one chain arrive parents first."""

    def remove(self, key: K) -> None:
        """A block is gone; KeyError if it was not here."""

    def victims(self, now_s: float) -> Iterator[K]:
        """All blocks that are here, the one to evict first at the front.

        The caller may pass over some of them, and must not change the policy while iterating.
        """

    def __len__(self) -> int:
        """How many blocks are here."""
