"""LFU with dynamic aging (Arlitt et al., 2000): how often, but the past fades.

A block's key is the age of the cache at its last use plus how often it was used; the age is the
key of the last victim. What was used often long ago is overtaken by what is used now.
"""

from array import array
from typing import Any

import numpy as np

from kvstore.policy.blocks import Blocks
from kvstore.policy.experts.expert import Request
from kvstore.policy.runs import append, pieces, split, unlink, view

_KEYS = 4096
"""Keys lie so close to the age. More uses than that count as that many."""


class LfuDaExpert:
    """Evicts the block with the least age + number of uses since it was admitted.

    Invariant: what it holds with key k is the linked list that begins at node k modulo `_KEYS`, in
    the order of the last use; all keys lie in the `_KEYS` from the age on. Block b is node
    `_KEYS` + b.
    """

    def __init__(self, blocks: Blocks[Any], flag: int, capacity_bytes: int) -> None:
        self.flag = flag
        self.capacity_bytes = capacity_bytes
        self._bytes = 0
        self._age = 0
        self._flags, self._sizes = blocks.flags, blocks.sizes
        self._uses = blocks.column("H")
        self._next, self._previous = blocks.column("i"), blocks.column("i")
        for column in (self._next, self._previous):
            column[0:0] = array("i", range(_KEYS))

    def use(self, request: Request) -> None:
        flags, uses, flag, age = self._flags, self._uses, self.flag, self._age
        following, previous = self._next, self._previous
        blocks, together = split(request.blocks, flags, flag)
        for block in reversed(blocks):
            node = _KEYS + block
            if flags[block] & flag:
                count = uses[block] + 1
                if count == _KEYS:
                    count -= 1
                before, after = previous[node], following[node]
                following[before], previous[after] = after, before
            else:
                count = 1
                flags[block] |= flag
                self._bytes += self._sizes[block]
            uses[block] = count
            end = (age + count) % _KEYS
            last = previous[end]
            following[last] = previous[end] = node
            following[node], previous[node] = end, last
        if len(together):
            column = view(uses)
            counts = np.minimum(column[together] + 1, _KEYS - 1)
            column[together] = counts
            cut = pieces(following, together + _KEYS, counts)
            unlink(following, previous, cut)
            for first, last, at in cut:
                append(following, previous, first, last, (age + int(counts[at])) % _KEYS)

    def advise(self, request: Request) -> None:
        """Nothing: only uses count."""

    def trim(self, now_s: float) -> list[int]:
        evicted: list[int] = []
        flags, sizes, following, previous = self._flags, self._sizes, self._next, self._previous
        surplus_bytes = self._bytes - self.capacity_bytes
        while surplus_bytes > 0:
            end = self._age % _KEYS
            node = following[end]
            if node == end:
                self._age += 1
                continue
            after = following[node]
            following[end], previous[after] = after, end
            block = node - _KEYS
            flags[block] ^= self.flag
            surplus_bytes -= sizes[block]
            self._bytes -= sizes[block]
            evicted.append(block)
        return evicted
