"""What the backend has done, for SGLang's metrics and for whoever looks into a running engine."""

import threading
from collections import Counter, deque
from typing import Any

KEPT = 1024
"""Measurements that wait for SGLang to fetch them; past it the oldest are lost."""

MEANINGS = {
    "pages_asked": "pages that a lookup asked for",
    "pages_found": "of those, the leading ones that were found",
    "pages_not_worth": "found, and left to be computed, because loading would take longer",
    "pages_loaded": "restored into the host pool, whole and intact",
    "pages_lost": "asked to be restored, and not delivered in time",
    "pages_stored": "the node holds them after they were backed up",
    "pages_not_stored": "the node does not hold them after they were backed up",
    "parents_unknown": "backups that did not say which page comes before them",
    "parents_lost": "backups whose parent the node had forgotten, stored without it",
    "stood_down": "calls answered with nothing because the weights were replaced",
}
"""Every name that `Figures.counters` can hold."""


class Figures:
    """Counts by the names of `MEANINGS`, and measurements of transfers. Any thread may call."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # All below is guarded by the lock.
        self._counters: Counter[str] = Counter()
        self._loads: deque[tuple[int, float]] = deque(maxlen=KEPT)
        self._stores: deque[tuple[int, float]] = deque(maxlen=KEPT)

    @property
    def counters(self) -> Counter[str]:
        """A copy of what was counted."""
        with self._lock:
            return Counter(self._counters)

    def count(self, **times: int) -> None:
        """Adds to counters."""
        with self._lock:
            for name, value in times.items():
                self._counters[name] += value

    def loaded(self, pages: int, size_bytes: int, seconds: float) -> None:
        """One load brought so many pages."""
        with self._lock:
            self._loads.append((pages, size_bytes / 1e9 / max(seconds, 1e-9)))

    def stored(self, pages: int, size_bytes: int, seconds: float) -> None:
        """One backup left so many pages with the node."""
        with self._lock:
            self._stores.append((pages, size_bytes / 1e9 / max(seconds, 1e-9)))

    def fill(self, metrics: Any) -> None:
        """Hands the measurements since the last time to SGLang's `StorageMetrics`, in GB/s."""
        with self._lock:
            loads, stores = list(self._loads), list(self._stores)
            self._loads.clear()
            self._stores.clear()
        metrics.prefetch_pgs.extend(pages for pages, _ in loads)
        metrics.prefetch_bandwidth.extend(speed for _, speed in loads)
        metrics.backup_pgs.extend(pages for pages, _ in stores)
        metrics.backup_bandwidth.extend(speed for _, speed in stores)
