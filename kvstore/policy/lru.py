"""Least recently used, tail first.

A touch moves a chain from its tail to its head, so that among the blocks of one use the head is
the youngest: what is evicted leaves a usable prefix behind.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence

from kvstore.api.tier import BlockRef


class Lru:
    """Evicts the block whose last use is the longest ago; within one use, the deepest."""

    def __init__(self) -> None:
        self._order: OrderedDict[BlockRef, None] = OrderedDict()

    def insert(self, ref: BlockRef) -> None:
        self._order[ref] = None

    def touch(self, chain: Sequence[BlockRef]) -> None:
        for ref in reversed(chain):
            if ref in self._order:
                self._order.move_to_end(ref)

    def remove(self, ref: BlockRef) -> None:
        del self._order[ref]

    def victims(self) -> Iterator[BlockRef]:
        return iter(self._order)

    def __len__(self) -> int:
        return len(self._order)
