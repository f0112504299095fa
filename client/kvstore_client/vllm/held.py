"""Which blocks need not be saved: the node held them a moment ago, or they are on their way."""

import threading
from collections.abc import Iterable

from kvstore.api.clock import Clock

MAX_NAMES = 1 << 16
FRESH_S = 300.0
"""A node may forget, or start anew; after this long a block is offered again."""

Name = tuple[bytes, bytes]
"""A space and a key."""


class Held:
    """Invariant: at most `MAX_NAMES` names are remembered, the oldest are forgotten first."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._until_s: dict[Name, float] = {}
        self._under_way: set[Name] = set()

    def lacking(self, space_id: bytes, keys: Iterable[bytes]) -> list[bool]:
        """For each key whether it should be saved."""
        now_s = self._clock.monotonic_s()
        with self._lock:
            return [
                (space_id, key) not in self._under_way
                and self._until_s.get((space_id, key), 0.0) <= now_s
                for key in keys
            ]

    def begun(self, space_id: bytes, keys: Iterable[bytes]) -> None:
        """These are on their way to the node; `ended` follows."""
        with self._lock:
            self._under_way.update((space_id, key) for key in keys)

    def ended(self, space_id: bytes, keys: Iterable[bytes], held: Iterable[bool]) -> None:
        """The node was given these, and holds some of them."""
        until_s = self._clock.monotonic_s() + FRESH_S
        with self._lock:
            for key, is_held in zip(keys, held, strict=True):
                name = (space_id, key)
                self._under_way.discard(name)
                self._until_s.pop(name, None)
                if is_held:
                    self._until_s[name] = until_s
            while len(self._until_s) > MAX_NAMES:
                del self._until_s[next(iter(self._until_s))]

    def clear(self) -> None:
        """Forgets what the node held; what is on its way stays known."""
        with self._lock:
            self._until_s.clear()
