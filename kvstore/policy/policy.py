"""What an eviction policy is: it watches, and names victims. No clock, no lock, no I/O."""

from collections.abc import Iterator, Sequence
from typing import Protocol

from kvstore.api.tier import BlockRef


class Policy(Protocol):
    """Orders the blocks of one tier by when they should go.

    Invariant: it knows exactly the blocks that were inserted and not removed.
    """

    def insert(self, ref: BlockRef) -> None:
        """A block has arrived."""

    def touch(self, chain: Sequence[BlockRef]) -> None:
        """Blocks were used, given parents first; those that are not here are passed over."""

    def remove(self, ref: BlockRef) -> None:
        """A block is gone."""

    def victims(self) -> Iterator[BlockRef]:
        """All blocks, the one to evict first at the front. Not to be changed while iterating."""

    def __len__(self) -> int:
        """How many blocks it knows."""
