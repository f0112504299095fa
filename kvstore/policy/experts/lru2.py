"""LRU-2 (O'Neil, O'Neil and Weikum, 1993): the last use but one decides.

What was used once goes before what was used twice, so that a scan cannot wash out a working set.
When a block was last used is remembered long after it was evicted: `Blocks.last`.
"""

from typing import Any

import numpy as np

from kvstore.policy.blocks import Blocks
from kvstore.policy.experts.expert import Request
from kvstore.policy.experts.ranked import Ranks
from kvstore.policy.runs import split, view

_END = 0
_ONCE = 0


class Lru2Expert:
    """Evicts the block whose last use but one is the longest ago; first those without one.

    Invariant: what it holds and was used once is in the linked list that begins at `_END`, in
    the order of use; the rest is ranked by the last use but one.
    """

    def __init__(self, blocks: Blocks[Any], flag: int, capacity_bytes: int) -> None:
        self.flag = flag
        self.capacity_bytes = capacity_bytes
        self._bytes = 0
        self._accesses = 0
        self._flags, self._sizes, self._last = blocks.flags, blocks.sizes, blocks.last
        self._next, self._previous = blocks.column("i"), blocks.column("i")
        # The number of the last access but one, or _ONCE.
        self._before = blocks.column("q")
        self._order = Ranks()

    def use(self, request: Request) -> None:
        flags, before, last, flag = self._flags, self._before, self._last, self.flag
        following, previous, order = self._next, self._previous, self._order
        now = self._accesses
        blocks, together = split(request.blocks, flags, flag)
        for block in reversed(blocks):
            now += 1
            former = last[block]
            last[block] = now
            if flags[block] & flag:
                if before[block] == _ONCE:
                    ahead, behind = previous[block], following[block]
                    following[ahead], previous[behind] = behind, ahead
                    order.push(block, former)
                before[block] = former
                continue
            flags[block] |= flag
            self._bytes += self._sizes[block]
            before[block] = former
            if former:
                order.push(block, former)
            else:
                youngest = previous[_END]
                following[youngest] = previous[_END] = block
                following[block], previous[block] = _END, youngest
        if len(together):
            column, former_of = view(before), view(last)[together]
            for at in np.flatnonzero(column[together] == _ONCE).tolist():
                block = int(together[at])
                ahead, behind = previous[block], following[block]
                following[ahead], previous[behind] = behind, ahead
                order.push(block, int(former_of[at]))
            column[together] = former_of
            view(last)[together] = np.arange(now + 1, now + 1 + len(together))
            now += len(together)
        self._accesses = now

    def advise(self, request: Request) -> None:
        """Nothing: only uses count."""

    def trim(self, now_s: float) -> list[int]:
        evicted: list[int] = []
        flags, sizes, following = self._flags, self._sizes, self._next
        block = following[_END]
        surplus_bytes = self._bytes - self.capacity_bytes
        while surplus_bytes > 0:
            if block == _END:
                chosen = self._order.pop(self._before)
            else:
                chosen, block = block, following[block]
            flags[chosen] ^= self.flag
            surplus_bytes -= sizes[chosen]
            self._bytes -= sizes[chosen]
            evicted.append(chosen)
        following[_END] = block
        self._previous[block] = _END
        return evicted
