"""What lookups promised: leases, from the moment that pages were found until they are read."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvstore.api.clock import Clock
from kvstore_client.match import Match

MAX_PROMISES = 256
"""Kept at once. Past it the oldest is given up: its pages are likely to be there all the same."""


@dataclass(frozen=True, slots=True, eq=False)
class _Promise:
    match: Match
    keys: Sequence[bytes]
    ends_s: float


class Promises:
    """Finds the lease of pages that are about to be read. Any thread may call.

    Invariant: a lease is released once, unless it expires before that.
    """

    def __init__(self, clock: Clock, release: Callable[[Match], None]) -> None:
        self._clock = clock
        self._release = release
        self._lock = threading.Lock()
        # Both are guarded by the lock.
        self._open: dict[bytes, _Promise] = {}
        """By lease, oldest first."""
        self._of_page: dict[bytes, _Promise] = {}

    def give(self, match: Match, keys: Sequence[bytes]) -> None:
        """Remembers that these pages, in order, were found under the lease of a match."""
        if not match.lease_id or not keys:
            return
        now_s = self._clock.monotonic_s()
        promise = _Promise(match, keys, now_s + match.lease_ms / 1000)
        with self._lock:
            for old in [old for old in self._open.values() if old.ends_s <= now_s]:
                self._forget_locked(old)
            oldest = next(iter(self._open.values())) if len(self._open) >= MAX_PROMISES else None
            if oldest is not None:
                self._forget_locked(oldest)
            self._open[match.lease_id] = promise
            self._of_page.update(dict.fromkeys(keys, promise))
        if oldest is not None:
            self._release(oldest.match)

    def lease(self, key: bytes) -> Match | None:
        """The lease that a page is under, while it holds."""
        with self._lock:
            promise = self._of_page.get(key)
        if promise is None or promise.ends_s <= self._clock.monotonic_s():
            return None
        return promise.match

    def was_read(self, keys: Sequence[bytes], loaded: int) -> None:
        """Ends a promise that was kept to its last page, or that could not be kept."""
        last = keys[loaded - 1] if loaded else b""
        with self._lock:
            promise = self._of_page.get(last)
            if promise is None or promise.keys[-1] != last:
                promise = self._of_page.get(keys[loaded]) if loaded < len(keys) else None
            if promise is None:
                return
            self._forget_locked(promise)
        self._release(promise.match)

    def _forget_locked(self, promise: _Promise) -> None:
        del self._open[promise.match.lease_id]
        for key in promise.keys:
            if self._of_page.get(key) is promise:
                del self._of_page[key]
