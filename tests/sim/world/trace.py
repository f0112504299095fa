"""What happened in a run, line by line: its digest for comparing runs, its end for reading."""

import hashlib
from collections import deque

KEPT_LINES = 5000


class Broken(Exception):
    """When a promise of the store was not kept."""


class Trace:
    """The log of one run. Two runs of one seed have the same `digest`."""

    def __init__(self) -> None:
        self.lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._hash = hashlib.blake2b(digest_size=16)

    def say(self, line: str) -> None:
        """Adds a line."""
        self.lines.append(line)
        self._hash.update(line.encode())

    @property
    def digest(self) -> str:
        """Of all lines so far."""
        return self._hash.hexdigest()
