"""The blocks that a policy knows, as small numbers, and what it knows of each in columns.

A Python object for each block would cost kilobytes; a number costs an entry in each column. So
keys are looked up once, and everything else of the policy works on numbers.
"""

from array import array
from collections import deque
from typing import Generic

from kvstore.policy.history import History
from kvstore.policy.policy import K

FIRST = 4
"""The least number of a block. Smaller ones are the ends of linked lists."""

HERE = 1 << 15
"""Flag: the tier has the block."""
AWAITED = 1 << 14
"""Flag: somebody asked for it, and it may arrive."""

_LEAST_GROWTH = 256
_HISTORY_FACTOR = 8
_MOST_FORGOTTEN = 1 << 16


class Blocks(Generic[K]):
    """Numbers of keys, and columns indexed by number.

    Invariant: a key has a number while `flags` or `children` of it are not 0; afterwards what is
    remembered of it moves into the history.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity_bytes = capacity_bytes
        self._history: History | None = None
        self._columns: list[array[int] | array[float]] = []
        self._free: list[int] = []
        self.ids: dict[K, int] = {}
        self.keys: list[K | None] = [None] * FIRST
        self.sizes = self.column("q")
        self.flags = self.column("H")
        """One bit for each expert whose simulated cache has the block, HERE, AWAITED."""
        self.children = self.column("i")
        """How many blocks that are here have this one as parent."""
        # What is remembered for as long as the history reaches.
        self.last = self.column("q")
        """The number of its last access; 0: never before."""
        self.used_s = self.floats()
        """When it was last used."""
        self.session = self.column("I")
        self.ended = self.column("I")
        """The session whose last request ended with this block; 0: none."""
        self.classes = self.column("H")
        self.uses = self.column("H")
        self.sessions = self.column("B")
        self.turn = self.column("B")
        self.forgotten: deque[bytes] = deque(maxlen=_MOST_FORGOTTEN)
        """What the history gave up lately (`PAST`), for those who count the dead."""

    def column(self, code: str) -> "array[int]":
        """A column of whole numbers, 0 at first, that grows with the blocks."""
        made: array[int] = array(code, bytes(array(code).itemsize * len(self.keys)))
        self._columns.append(made)
        return made

    def floats(self) -> "array[float]":
        """A column of floating-point numbers that grows with the blocks."""
        made: array[float] = array("d", bytes(8 * len(self.keys)))
        self._columns.append(made)
        return made

    def add(self, key: K, size_bytes: int) -> int:
        """The number of a key that has none, with what the history knows of it."""
        if not self._free:
            self._grow()
        block = self._free.pop()
        self.ids[key] = block
        self.keys[block] = key
        self.sizes[block] = size_bytes
        found = self._history.take(hash(key)) if self._history is not None else None
        if found is None:
            self.last[block] = self.uses[block] = self.ended[block] = 0
        else:
            (
                self.last[block], self.used_s[block], self.session[block], self.ended[block],
                self.classes[block], self.uses[block], self.sessions[block], self.turn[block],
            ) = found  # fmt: skip
        return block

    def drop(self, block: int) -> None:
        """Takes the number away from a block that nobody holds any more."""
        key = self.keys[block]
        assert key is not None
        del self.ids[key]
        self.keys[block] = None
        self._free.append(block)
        last = self.last[block]
        if not last:
            return
        if self._history is None:
            rows = _HISTORY_FACTOR * self._capacity_bytes // max(1, self.sizes[block])
            self._history = History(rows)
        forgotten = self._history.put(
            hash(key),
            (
                last, self.used_s[block], self.session[block], self.ended[block],
                self.classes[block], self.uses[block], self.sessions[block], self.turn[block],
            ),
        )  # fmt: skip
        if forgotten is not None:
            self.forgotten.append(forgotten)

    @property
    def history(self) -> History | None:
        """The blocks without number; None as long as there never was one."""
        return self._history

    def _grow(self) -> None:
        count = max(_LEAST_GROWTH, len(self.keys) // 16)
        first = len(self.keys)
        self.keys.extend([None] * count)
        for column in self._columns:
            column.frombytes(bytes(column.itemsize * count))
        self._free.extend(range(first + count - 1, first - 1, -1))
