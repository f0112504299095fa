"""What happens in a node, for whoever watches."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

QUEUE_LENGTH = 256


@dataclass(frozen=True, slots=True)
class SegmentSealed:
    """A disk segment is on the device."""

    segment_id: int
    blocks: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Draining:
    """The node takes no new calls and is about to stop."""


Event = SegmentSealed | Draining


class Events:
    """Passes events to any number of watchers; one that does not keep up loses the oldest."""

    def __init__(self) -> None:
        self._queues: set[asyncio.Queue[Event]] = set()
        self._loop = asyncio.get_running_loop()

    def publish(self, event: Event) -> None:
        """Tells everybody who watches now. May be called from any thread."""
        self._loop.call_soon_threadsafe(self._deliver, event)

    @contextmanager
    def watch(self) -> Iterator[asyncio.Queue[Event]]:
        """A queue that gets every event from now on, until the block is left."""
        queue: asyncio.Queue[Event] = asyncio.Queue(QUEUE_LENGTH)
        self._queues.add(queue)
        try:
            yield queue
        finally:
            self._queues.discard(queue)

    def _deliver(self, event: Event) -> None:
        for queue in self._queues:
            if queue.full():
                queue.get_nowait()
            queue.put_nowait(event)
