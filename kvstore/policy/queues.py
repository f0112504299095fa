"""What the tier holds and a simulated cache does not: the next to go, if that one leads."""

from array import array
from collections.abc import Iterable, Iterator, Set
from typing import Any

from kvstore.policy.blocks import HERE, Blocks

_END = 0


class Queue:
    """Blocks in the order in which one expert dropped them.

    A block with children here cannot go before them. If one comes to the front it is set aside,
    and comes back to the front when its last child has gone.

    Invariant: a block that is here is held by the expert, or has this queue's bit in `queued`;
    then it is in the list, or aside.
    """

    def __init__(self, blocks: Blocks[Any], queued: "array[int]", bit: int) -> None:
        self._flags, self._children = blocks.flags, blocks.children
        self._queued = queued
        self._bit = bit
        self._next, self._previous = blocks.column("i"), blocks.column("i")
        self._aside: set[int] = set()

    def extend(self, dropped: Iterable[int]) -> list[int]:
        """Queues those of the blocks that are here; those that nobody wants any more."""
        flags, queued, bit = self._flags, self._queued, self._bit
        following, previous = self._next, self._previous
        last, unwanted = previous[_END], []
        for block in dropped:
            flag = flags[block]
            if flag & HERE:
                # An expert may name a block twice: when it goes, and when its name goes too.
                if not (flag | queued[block]) & bit:
                    queued[block] |= bit
                    following[last] = block
                    previous[block] = last
                    last = block
            elif not flag:
                unwanted.append(block)
        following[last] = _END
        previous[_END] = last
        return unwanted

    def discard(self, block: int) -> None:
        """Takes out a block that is queued."""
        self._queued[block] ^= self._bit
        if self._aside and block in self._aside:
            self._aside.remove(block)
            return
        before, after = self._previous[block], self._next[block]
        self._next[before], self._previous[after] = after, before

    def freed(self, block: int) -> None:
        """The last child of a block has gone."""
        if block in self._aside:
            self._aside.remove(block)
            first = self._next[_END]
            self._previous[first] = self._next[_END] = block
            self._next[block], self._previous[block] = first, _END

    def settle(self) -> bool:
        """Sets aside what cannot go, so that the front can; False if nothing is left."""
        while (block := self._next[_END]) != _END:
            if not self._children[block]:
                return True
            after = self._next[block]
            self._next[_END], self._previous[after] = after, _END
            self._aside.add(block)
        return False

    @property
    def aside(self) -> Set[int]:
        """The blocks that wait for their children to go."""
        return self._aside

    def __iter__(self) -> Iterator[int]:
        block = self._next[_END]
        while block != _END:
            yield block
            block = self._next[block]
