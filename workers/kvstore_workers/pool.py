"""Which block of the VRAM pool belongs to whom: indices and keys, no tensors, locks or clocks.

free ──allocate──► in use ──release──► cached (has a key) ──match──► in use
  ▲                   └────release──► free (has none)
  └───────────────── evicted by allocate, oldest first ◄── cached
"""

from collections import Counter, OrderedDict, deque
from collections.abc import Hashable, Iterable, Sequence
from typing import Generic, NamedTuple, TypeVar

KeyT = TypeVar("KeyT", bound=Hashable)


class Allocation(NamedTuple, Generic[KeyT]):
    """Blocks for a new owner, and the keys that can no longer be found because of it."""

    blocks: list[int]
    evicted: list[KeyT]


class PoolUsage(NamedTuple):
    """How many blocks are in each state; together all of them."""

    free: int
    cached: int
    in_use: int


class BlockPool(Generic[KeyT]):
    """Hands out blocks, finds published ones again and says which to forget.

    Not thread-safe: one thread owns it. Chains are given parents first.

    Invariant: every block is free (no key, no reference), cached (a key, no reference) or in use
    (references); a key names exactly one block; cached blocks are evicted oldest first, and of a
    chain that was released together the tail comes before the head.
    """

    def __init__(self, blocks: int) -> None:
        if blocks < 1:
            raise ValueError(f"blocks: must be 1 or more, got {blocks}")
        self._references = [0] * blocks
        self._keys: list[KeyT | None] = [None] * blocks
        self._index: dict[KeyT, int] = {}
        self._free = deque(range(blocks))
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def blocks(self) -> int:
        """How many blocks there are in all."""
        return len(self._references)

    def usage(self) -> PoolUsage:
        """How many blocks are in each state."""
        free, cached = len(self._free), len(self._cached)
        return PoolUsage(free, cached, self.blocks - free - cached)

    def allocate(self, count: int) -> Allocation[KeyT] | None:
        """`count` blocks with one reference each, or None where that many cannot be had.

        Free blocks go first; then cached ones are evicted. None changes nothing.
        """
        if count > len(self._free) + len(self._cached):
            return None
        blocks: list[int] = []
        evicted: list[KeyT] = []
        for _ in range(count):
            if not self._free:
                evicted.append(self._evict_oldest())
            block = self._free.popleft()
            self._references[block] = 1
            blocks.append(block)
        return Allocation(blocks, evicted)

    def match(self, keys: Iterable[KeyT]) -> list[int]:
        """The blocks of the longest published prefix of `keys`, each with one more reference."""
        blocks: list[int] = []
        for key in keys:
            block = self._index.get(key)
            if block is None:
                break
            blocks.append(block)
        self.hold(blocks)
        return blocks

    def hold(self, blocks: Iterable[int]) -> None:
        """One more reference to blocks that are cached or in use."""
        for block in blocks:
            assert self._references[block] or block in self._cached, f"block {block} is free"
            self._cached.pop(block, None)
            self._references[block] += 1

    def publish(self, block: int, key: KeyT) -> bool:
        """True if `key` finds this block from now on; False if it already finds another.

        The first copy stays. The block must be in use, complete, and never written again.
        """
        assert self._references[block], f"block {block} is not in use"
        if key in self._index:
            return self._index[key] == block
        assert self._keys[block] is None, f"block {block} is published under another key"
        self._index[key] = block
        self._keys[block] = key
        return True

    def release(self, chain: Sequence[int]) -> None:
        """One reference less to each block; `chain` is given parents first.

        Released from the tail, so that a chain's head is the last of it to be evicted.
        """
        for block in reversed(chain):
            assert self._references[block], f"block {block} is released once too often"
            self._references[block] -= 1
            if self._references[block]:
                continue
            if self._keys[block] is None:
                self._free.append(block)
            else:
                self._cached[block] = None

    def forget_all(self) -> list[KeyT]:
        """The keys of all published blocks, none of which can be found any more.

        Cached blocks become free; blocks in use stay with their owners.
        """
        forgotten = list(self._index)
        self._index.clear()
        self._keys = [None] * self.blocks
        self._free.extend(self._cached)
        self._cached.clear()
        return forgotten

    def check(self) -> None:
        """Recomputes every invariant; raises AssertionError naming the first that is broken."""
        free, cached = set(self._free), set(self._cached)
        in_use = {block for block, count in enumerate(self._references) if count > 0}
        assert min(self._references) >= 0, "a reference count is negative"
        assert len(free) == len(self._free), "a block is free twice"
        states = Counter([*free, *cached, *in_use])
        assert states == Counter(range(self.blocks)), "a block is in no state or in two"
        named = {key: block for block, key in enumerate(self._keys) if key is not None}
        assert named == self._index, "index and keys disagree"
        assert cached <= set(self._index.values()), "a cached block has no key"
        assert not free & set(self._index.values()), "a free block has a key"

    def _evict_oldest(self) -> KeyT:
        block, _ = self._cached.popitem(last=False)
        key = self._keys[block]
        assert key is not None, f"block {block} is cached without a key"
        del self._index[key]
        self._keys[block] = None
        self._free.append(block)
        return key
