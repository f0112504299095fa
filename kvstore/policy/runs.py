"""Many blocks of a request at a time, where they lie in lists as the request before left them.

A chain that is asked for again stands in each expert's lists in the order in which it shall stand
again, a few times cut. So whole pieces are moved, and what is noted of each block is noted of all
in one step of numpy. The outcome is the same as block by block.
"""

from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

LEAST = 128
"""Of fewer blocks each is handled by itself: that is faster then."""

Ints = NDArray[np.int32]


def view(column: "array[Any]") -> NDArray[Any]:
    """A column as numpy sees it. It must be gone before the column grows."""
    return np.frombuffer(column, dtype=_TYPES[column.typecode])


_TYPES = {code: np.dtype(code) for code in "bBhHiIqQd"}


class Chain(list[int]):
    """The blocks of a request by number, parents first, and the same from the tail as an array.

    `None` as array: there are few, or one stands in it twice, and each is handled by itself.
    """

    __slots__ = ("tail_first",)

    def __init__(self, blocks: Sequence[int]) -> None:
        super().__init__(blocks)
        self.tail_first: Ints | None = None
        if len(self) >= LEAST and len(set(self)) == len(self):
            self.tail_first = np.array(self[::-1], dtype=np.int32)


def split(chain: Sequence[int], flags: "array[int]", flag: int) -> tuple[Sequence[int], Ints]:
    """The blocks of a chain to be handled one by one, and then, tail first, those all at once.

    These are the leading ones that have the flag.
    """
    tail_first = chain.tail_first if isinstance(chain, Chain) else None
    if tail_first is None:
        return chain, _NONE
    lacking = np.flatnonzero(view(flags)[tail_first] & flag == 0)
    one_by_one = int(lacking[-1]) + 1 if len(lacking) else 0
    if len(tail_first) - one_by_one < LEAST:
        return chain, _NONE
    return chain[len(chain) - one_by_one :], tail_first[one_by_one:]


_NONE: Ints = np.zeros(0, dtype=np.int32)


def pieces(
    following: "array[int]", nodes: Ints, ends: "Ints | None" = None
) -> list[tuple[int, int, int]]:
    """Nodes cut where the next one does not follow in its list, or shall go to another one.

    For each piece its first and last node, and where in `nodes` it begins.
    """
    cut = view(following)[nodes[:-1]] != nodes[1:]
    if ends is not None:
        cut |= ends[:-1] != ends[1:]
    after = np.flatnonzero(cut) + 1
    starts = [0, *after.tolist()]
    firsts = [int(nodes[0]), *nodes[after].tolist()]
    lasts = [*nodes[after - 1].tolist(), int(nodes[-1])]
    return list(zip(firsts, lasts, starts, strict=True))


def unlink(
    following: "array[int]", previous: "array[int]", cut: Sequence[tuple[int, int, int]]
) -> None:
    """Takes pieces out of their lists; inside they stay linked."""
    for first, last, _ in cut:
        before, after = previous[first], following[last]
        following[before], previous[after] = after, before


def append(
    following: "array[int]", previous: "array[int]", first: int, last: int, end: int
) -> None:
    """Puts a piece at the end of the list that ends at node `end`."""
    before = previous[end]
    following[before], previous[first] = first, before
    following[last], previous[end] = end, last
