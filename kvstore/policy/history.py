"""What is remembered of blocks that no list holds any more: a packed table of bounded size.

Python's own dictionaries would need several hundred bytes for each entry; here it is 41, and
memory that was never written to is not taken from the machine.
"""

import mmap
import struct

_WAYS = 8
_EMPTY = 0
_MASK = 2**64 - 1
_LEAST_ROWS = 1 << 16
_MOST_ROWS = 1 << 24

PAST = struct.Struct("<qfIIHHBBxxxxxx")
"""A `Past` as it lies in the table."""

Past = tuple[int, float, int, int, int, int, int, int]
"""Number of the last access, its time, session, session that ended here, class, uses, sessions,
turn."""


class History:
    """A set-associative table: the hash of a key → what is known of its past.

    Each key may lie in one of eight rows; the one that was written the longest ago gives way.
    Keys are told apart by their 64-bit hash: with 10⁷ entries two of them are confused once in
    about 10⁵ fillings of the table, and then a policy errs about one block.
    """

    def __init__(self, rows: int) -> None:
        rows = min(max(rows, _LEAST_ROWS), _MOST_ROWS)
        self._sets = -(-rows // _WAYS)
        rows = self._sets * _WAYS
        self._fingerprints = memoryview(_empty_map(rows * 8)).cast("Q")
        # For each set the row to be written next; what a `take` left empty waits for its turn.
        self._next_way = memoryview(_empty_map(self._sets))
        self.rows = _empty_map(rows * PAST.size)
        """Row after row of `PAST`; a row of zeros is empty."""

    def put(self, hashed: int, past: Past) -> bytes | None:
        """Remembers a key that is not here; the row that had to give way, if one had to."""
        fingerprint = (hashed & _MASK) or 1
        part = fingerprint % self._sets
        way = self._next_way[part]
        self._next_way[part] = (way + 1) % _WAYS
        row = part * _WAYS + way
        at = row * PAST.size
        forgotten = self.rows[at : at + PAST.size] if self._fingerprints[row] else None
        self._fingerprints[row] = fingerprint
        PAST.pack_into(self.rows, at, *past)
        return forgotten

    def take(self, hashed: int) -> Past | None:
        """What was remembered, which is forgotten by this; None if nothing was."""
        fingerprint = (hashed & _MASK) or 1
        start = fingerprint % self._sets * _WAYS
        ways = self._fingerprints[start : start + _WAYS].tolist()
        if fingerprint not in ways:
            return None
        row = start + ways.index(fingerprint)
        at = row * PAST.size
        found = PAST.unpack_from(self.rows, at)
        self._fingerprints[row] = _EMPTY
        self.rows[at : at + PAST.size] = bytes(PAST.size)
        return found


def _empty_map(size_bytes: int) -> mmap.mmap:
    """Zeros, whose pages appear when they are first written to."""
    return mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
