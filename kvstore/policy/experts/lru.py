"""Least recently used as an expert: a linked list in two columns."""

from collections.abc import Iterator
from typing import Any

from kvstore.policy.blocks import Blocks
from kvstore.policy.experts.expert import Request
from kvstore.policy.runs import append, pieces, split, unlink

_END = 0


class LruExpert:
    """Evicts what was used the longest ago, of one request the tail first.

    Invariant: from `_END` along `_next` come the blocks it holds, the next to go first.
    """

    def __init__(self, blocks: Blocks[Any], flag: int, capacity_bytes: int) -> None:
        self.flag = flag
        self.capacity_bytes = capacity_bytes
        self._bytes = 0
        self._flags, self._sizes = blocks.flags, blocks.sizes
        self._next, self._previous = blocks.column("i"), blocks.column("i")

    def use(self, request: Request) -> None:
        flags, following, previous, flag = self._flags, self._next, self._previous, self.flag
        last = previous[_END]
        blocks, together = split(request.blocks, flags, flag)
        for block in reversed(blocks):
            if flags[block] & flag:
                if block == last:
                    continue
                before, after = previous[block], following[block]
                following[before] = after
                previous[after] = before
            else:
                flags[block] |= flag
                self._bytes += self._sizes[block]
            following[last] = block
            previous[block] = last
            last = block
        following[last] = _END
        previous[_END] = last
        if len(together):
            cut = pieces(following, together)
            unlink(following, previous, cut)
            for first, last, _ in cut:
                append(following, previous, first, last, _END)

    def advise(self, request: Request) -> None:
        """Nothing: only uses count."""

    def trim(self, now_s: float) -> list[int]:
        following, evicted = self._next, []
        block = following[_END]
        while self._bytes > self.capacity_bytes:
            self._flags[block] ^= self.flag
            self._bytes -= self._sizes[block]
            evicted.append(block)
            block = following[block]
        following[_END] = block
        self._previous[block] = _END
        return evicted

    def __iter__(self) -> Iterator[int]:
        """What it holds, the next to go first."""
        block = self._next[_END]
        while block != _END:
            yield block
            block = self._next[block]
