"""A node whose slower tier has every block there is, and delivers so many bytes a second.

`python -m benchmarks.service.throttled_node SETTINGS` takes its settings as JSON, and beside them
`bytes_per_s`; it says its endpoints in a line of JSON and ends with its standard input.
"""

import asyncio
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from kvstore.api.clock import Clock, SystemClock
from kvstore.api.digest import block_digest
from kvstore.api.tier import Block, BlockRef, Load, Loaded, Tier, Usage
from kvstore.config import Settings
from kvstore.heap import keep_freed_memory
from kvstore.server import NodeServer
from kvstore_client import Space
from tests.sim.nodes import descriptor_of

BLOCK_BYTES = 256 << 10
SPACE = Space.of(descriptor_of(BLOCK_BYTES))


def content(key: bytes, size: int) -> bytes:
    """What the block of a key contains; all of it follows from the key."""
    return (key * (size // len(key) + 1))[:size]


class Spring:
    """Stands for `real`: has every block of one space, whoever asks, and keeps nothing."""

    name = "disk"

    def __init__(self, real: Tier, space: Space) -> None:
        self._real = real
        self._space_id = space.space_id

    async def locate(self, refs: Sequence[BlockRef]) -> list[str | None]:
        return [self.name for _ in refs]

    async def wants(self, refs: Sequence[BlockRef]) -> list[bool]:
        return [False for _ in refs]

    async def load(self, loads: Sequence[Load]) -> list[Loaded | None]:
        for load in loads:
            load.into[:] = content(load.ref.key, len(load.into))
        return [
            Loaded(self.name, block_digest(self._space_id, load.ref.key, load.into))
            for load in loads
        ]

    async def store(self, blocks: Sequence[Block]) -> list[bool]:
        return [False for _ in blocks]

    async def discard(self, refs: Sequence[BlockRef]) -> int:
        return 0

    async def clear(self, namespace: bytes) -> int:
        return 0

    def usage(self) -> list[Usage]:
        return [Usage(self.name, 0, 0, 0)]

    async def close(self) -> None:
        await self._real.close()


class Throttled:
    """`inner`, which delivers `bytes_per_s`, one batch after the other.

    Who goes away while he waits gets no time back: the work is done all the same.
    """

    def __init__(self, inner: Tier, bytes_per_s: float, clock: Clock) -> None:
        self._inner = inner
        self._bytes_per_s = bytes_per_s
        self._clock = clock
        self._free_at_s = 0.0
        self.name = inner.name

    async def load(self, loads: Sequence[Load]) -> list[Loaded | None]:
        size = sum(len(load.into) for load in loads)
        now_s = self._clock.monotonic_s()
        self._free_at_s = max(self._free_at_s, now_s) + size / self._bytes_per_s
        await self._clock.sleep(self._free_at_s - now_s)
        return await self._inner.load(loads)

    async def locate(self, refs: Sequence[BlockRef]) -> list[str | None]:
        return await self._inner.locate(refs)

    async def wants(self, refs: Sequence[BlockRef]) -> list[bool]:
        return await self._inner.wants(refs)

    async def store(self, blocks: Sequence[Block]) -> list[bool]:
        return await self._inner.store(blocks)

    async def discard(self, refs: Sequence[BlockRef]) -> int:
        return await self._inner.discard(refs)

    async def clear(self, namespace: bytes) -> int:
        return await self._inner.clear(namespace)

    def usage(self) -> list[Usage]:
        return self._inner.usage()

    async def close(self) -> None:
        await self._inner.close()


async def serve(given: dict[str, Any]) -> None:
    """The node, until standard input ends."""
    clock = SystemClock()
    bytes_per_s = float(given.pop("bytes_per_s"))
    stop = asyncio.Event()
    asyncio.get_running_loop().add_reader(sys.stdin.fileno(), stop.set)

    def wrap(tier: Tier) -> Tier:
        return Throttled(Spring(tier, SPACE), bytes_per_s, clock)

    server = await NodeServer.start(Settings.model_validate(given), clock, wrap)
    ready = {
        "endpoint": server.endpoint,
        "metrics": server.metrics_endpoint,
        "pid": os.getpid(),
    }
    sys.stdout.write(json.dumps(ready) + "\n")
    sys.stdout.flush()
    await stop.wait()
    await server.stop()


def main() -> None:
    """The command."""
    keep_freed_memory()  # As `kvstore serve` does: memory is one of the things that are judged.
    asyncio.run(serve(json.loads(sys.argv[1])))


if __name__ == "__main__":
    main()
