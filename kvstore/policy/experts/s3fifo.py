"""S3-FIFO (Yang et al., SOSP 2023): a small queue filters what is used once.

Three first-in-first-out queues: `small` for what is new, `main` for what proved itself there, and
`ghosts`, the names of what left `small` unproven: who comes back from there enters `main` at once.
"""

from typing import Any

import numpy as np

from kvstore.policy.blocks import Blocks
from kvstore.policy.experts.expert import Request
from kvstore.policy.runs import split, view

_SMALL_SHARE = 0.1
"""As published."""
_MOST_USES = 3
_SMALL, _MAIN, _GHOSTS = 1, 2, 3
"""The ends of the three linked lists."""


class S3FifoExpert:
    """Evicts the oldest of the small queue unless it was used there; main works as a clock.

    `ghost_flag` is set for the names among `ghosts`, so that they keep their numbers.
    """

    def __init__(
        self, blocks: Blocks[Any], flag: int, ghost_flag: int, capacity_bytes: int
    ) -> None:
        self.flag = flag
        self.capacity_bytes = capacity_bytes
        self._ghost_flag = ghost_flag
        self._bytes = [0, 0, 0, 0]
        self._flags, self._sizes = blocks.flags, blocks.sizes
        self._uses = blocks.column("B")
        self._next, self._previous = blocks.column("i"), blocks.column("i")
        for queue in (_SMALL, _MAIN, _GHOSTS):
            self._next[queue] = self._previous[queue] = queue

    def use(self, request: Request) -> None:
        flags, uses, flag = self._flags, self._uses, self.flag
        blocks, together = split(request.blocks, flags, flag)
        for block in reversed(blocks):
            if flags[block] & flag:
                if uses[block] < _MOST_USES:
                    uses[block] += 1
                continue
            queue = _SMALL
            if flags[block] & self._ghost_flag:
                self._take(_GHOSTS, block)
                flags[block] ^= self._ghost_flag
                queue = _MAIN
            uses[block] = 0
            flags[block] |= flag
            self._append(queue, block)
        if len(together):
            column = view(uses)
            column[together] = np.minimum(column[together] + 1, _MOST_USES)

    def advise(self, request: Request) -> None:
        """Nothing: only uses count."""

    def trim(self, now_s: float) -> list[int]:
        """What went, ghosts that were given up included: they are no longer held either."""
        evicted: list[int] = []
        small_bytes = max(1, int(_SMALL_SHARE * self.capacity_bytes))
        while self._bytes[_SMALL] + self._bytes[_MAIN] > self.capacity_bytes:
            if self._bytes[_SMALL] > small_bytes or not self._bytes[_MAIN]:
                self._filter(evicted)
            else:
                self._turn(evicted)
        ghost_bytes = max(0, self.capacity_bytes - small_bytes)
        while self._bytes[_GHOSTS] > ghost_bytes:
            block = self._next[_GHOSTS]
            self._take(_GHOSTS, block)
            self._flags[block] ^= self._ghost_flag
            evicted.append(block)
        return evicted

    def _filter(self, evicted: list[int]) -> None:
        """Moves the oldest of the small queue on, or out."""
        following, previous = self._next, self._previous
        block = following[_SMALL]
        after = following[block]
        following[_SMALL], previous[after] = after, _SMALL
        size_bytes = self._sizes[block]
        self._bytes[_SMALL] -= size_bytes
        queue = _GHOSTS
        if self._uses[block]:
            self._uses[block] = 0
            queue = _MAIN
        else:
            self._flags[block] ^= self.flag | self._ghost_flag
            evicted.append(block)
        last = previous[queue]
        following[last] = previous[queue] = block
        following[block], previous[block] = queue, last
        self._bytes[queue] += size_bytes

    def _turn(self, evicted: list[int]) -> None:
        """Gives the oldest of the main queue another round for a use, or evicts it."""
        block = self._next[_MAIN]
        self._take(_MAIN, block)
        if self._uses[block]:
            self._uses[block] -= 1
            self._append(_MAIN, block)
        else:
            self._flags[block] ^= self.flag
            evicted.append(block)

    def _append(self, queue: int, block: int) -> None:
        last = self._previous[queue]
        self._next[last] = self._previous[queue] = block
        self._next[block], self._previous[block] = queue, last
        self._bytes[queue] += self._sizes[block]

    def _take(self, queue: int, block: int) -> None:
        before, after = self._previous[block], self._next[block]
        self._next[before], self._previous[after] = after, before
        self._bytes[queue] -= self._sizes[block]
