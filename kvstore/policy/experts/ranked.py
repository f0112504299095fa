"""What the experts with a rank per block share: a heap that is put right when it is read.

A rank only rises while a block is held. So a touch need not find the block in the heap: its old
entry comes up too early, and is then replaced by one with the new rank. Each block has exactly
one entry, however often it is used.
"""

from array import array
from heapq import heappop, heappush, heapreplace

_BLOCK_BITS = 32
_BLOCK_MASK = (1 << _BLOCK_BITS) - 1


class Ranks:
    """Blocks by rank. Ranks are whole numbers, each given once."""

    def __init__(self) -> None:
        # rank << 32 | block: one object for each block, compared without a call into Python.
        self._heap: list[int] = []

    def push(self, block: int, rank: int) -> None:
        """Adds a block that is not in it."""
        heappush(self._heap, rank << _BLOCK_BITS | block)

    def pop(self, ranks: "array[int]") -> int:
        """Takes out the block of the least rank, by the column of their present ranks."""
        heap = self._heap
        while True:
            rank, block = heap[0] >> _BLOCK_BITS, heap[0] & _BLOCK_MASK
            present = ranks[block]
            if rank == present:
                heappop(heap)
                return block
            heapreplace(heap, present << _BLOCK_BITS | block)

    def __len__(self) -> int:
        return len(self._heap)
