"""Greedy-dual size frequency (Cherkasova, 1998), leaf first: what is dear to recompute stays.

A token deep in a prompt attends to all before it, so a deep block costs more than a shallow one.
That ranks children above their parents; without leaf first, the parents would leave before them
and strand them.
"""

from collections.abc import Sequence
from typing import Any

from kvstore.policy.blocks import Blocks
from kvstore.policy.experts.expert import Request
from kvstore.policy.experts.ranked import Ranks

_DOUBLING_TOKENS = 30_000
"""The depth at which attention costs as much as all else (16 GFLOP against 0.52 MFLOP per token
and token before it: Llama-3-8B)."""
_FRACTION_BITS = 10
_ORDER_BITS = 16
_ORDER_MASK = (1 << _ORDER_BITS) - 1
_MOST_RANK = (1 << 62) - 1
_MOST_USES = 1 << 20
_NO_BLOCK = 0
_MOST_STEPS = 256
"""Up a chain, to see that it does not come back; past it a block is left without a parent."""


class LeafGdsfExpert:
    """Evicts, of the blocks without children here, the one with the least age + uses × cost.

    Invariant: `_children` counts the held blocks below each; only blocks without are ranked. No
    block is below itself, whatever order a caller named its keys in: some have no children.
    """

    def __init__(self, blocks: Blocks[Any], flag: int, capacity_bytes: int) -> None:
        self.flag = flag
        self.capacity_bytes = capacity_bytes
        self._bytes = 0
        self._age = 0
        self._accesses = 0
        self._flags, self._sizes = blocks.flags, blocks.sizes
        self._uses, self._children = blocks.column("i"), blocks.column("i")
        self._parents = blocks.column("i")
        self._queued = blocks.column("b")
        self._ranks = blocks.column("q")
        self._order = Ranks()
        self._density = 0.0

    def use(self, request: Request) -> None:
        flags, flag, parents, children = self._flags, self.flag, self._parents, self._children
        chain = request.blocks
        # Worth per byte, against the blocks of the first request: 1 where all are alike.
        density = request.block_tokens / request.block_bytes
        self._density = self._density or density
        scale = density / self._density * (1 << _FRACTION_BITS)
        for depth in range(len(chain) - 1, -1, -1):
            block = chain[depth]
            if flags[block] & flag:
                self._uses[block] = min(self._uses[block] + 1, _MOST_USES)
            else:
                flags[block] |= flag
                self._bytes += self._sizes[block]
                self._uses[block] = 1
                children[block] = 0
                parents[block] = _NO_BLOCK
            cost = 1 + (depth + 0.5) * request.block_tokens / _DOUBLING_TOKENS
            self._accesses += 1
            key = self._age + int(self._uses[block] * cost * scale)
            rank = key << _ORDER_BITS | self._accesses & _ORDER_MASK
            self._ranks[block] = min(rank, _MOST_RANK)
        self._link(chain)

    def _link(self, chain: Sequence[int]) -> None:
        """Counts children, now that all of the chain is held, and ranks blocks without.

        That is the last one; and others, where a child was seen before without its parent.
        """
        above = _NO_BLOCK
        for block in chain:
            orphan = above != _NO_BLOCK and self._parents[block] == _NO_BLOCK
            if orphan and not self._may_be_above(block, above):
                self._parents[block] = above
                self._children[above] += 1
            above = block
        for block in chain:
            self._rank(block)

    def _may_be_above(self, block: int, other: int) -> bool:
        """Whether a block is the other one, or could be found above it."""
        if block == other:
            return True
        if not self._children[block]:
            return False
        for _ in range(_MOST_STEPS):
            other = self._parents[other]
            if other == _NO_BLOCK:
                return False
            if other == block:
                return True
        return True

    def _rank(self, block: int) -> None:
        if not self._children[block] and not self._queued[block]:
            self._queued[block] = 1
            self._order.push(block, self._ranks[block])

    def advise(self, request: Request) -> None:
        """Nothing: only uses count."""

    def trim(self, now_s: float) -> list[int]:
        evicted = []
        while self._bytes > self.capacity_bytes:
            block = self._order.pop(self._ranks)
            self._queued[block] = 0
            if self._children[block]:
                continue
            self._age = max(self._age, self._ranks[block] >> _ORDER_BITS)
            self._flags[block] ^= self.flag
            self._bytes -= self._sizes[block]
            evicted.append(block)
            parent = self._parents[block]
            if parent != _NO_BLOCK:
                self._children[parent] -= 1
                self._rank(parent)
        return evicted
