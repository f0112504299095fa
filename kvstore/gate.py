"""Lets a thread fill a caller's buffer only as long as the caller waits for it.

A thread cannot be cancelled. Whoever gives up waiting closes the gate first, and afterwards the
buffer is his alone.
"""

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class Abandoned(Exception):
    """When nobody waits for the result any more."""


class Gate:
    """Open until it is closed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open = True

    def through(self, fill: Callable[[], T]) -> T:
        """Runs `fill`, which writes to the caller's buffer. Raises `Abandoned` once closed."""
        with self._lock:
            if not self._open:
                raise Abandoned
            return fill()

    def close(self) -> None:
        """Waits for the one `fill` that may be running; none begins afterwards."""
        with self._lock:
            self._open = False
