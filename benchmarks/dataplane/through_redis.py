"""Our own path to Redis: `RedisTier.store` and `load`, over a real server, codec raw.

At the level of the tier, because above it gRPC is the narrower way. Each client is a process with
connections of its own. A put replaces what was put before, so that the server needs no new memory.
"""

import hashlib

from redis.asyncio import Redis

from benchmarks.dataplane.raw_resp import PART_BYTES
from benchmarks.dataplane.ring import Ring
from benchmarks.dataplane.through_client import NotThisWay
from kvstore.api.clock import SystemClock
from kvstore.api.digest import block_digest
from kvstore.api.tier import Block, BlockRef, Load
from kvstore.codec import Raw
from kvstore.metrics import Metrics
from kvstore.runner import ThreadRunner
from kvstore.tiers.redis import RedisTier
from kvstore.tiers.redis_wires import Wires

THREADS = 8
WIRES = 8
TTL_S = 86400
TIMEOUT_S = 60.0
CLOSE_S = 10.0


class ThroughRedis:
    """Stores and loads the blocks of a ring, each under a name of its own."""

    knob = 0

    def __init__(self, ring: Ring, owner: int, url: str) -> None:
        self._ring = ring
        self._runner = ThreadRunner(THREADS)
        self._tier = RedisTier(
            Redis.from_url(url, socket_timeout=TIMEOUT_S, socket_connect_timeout=TIMEOUT_S),
            Raw(),
            self._runner,
            SystemClock(),
            Metrics(),
            capacity_bytes=0,
            part_bytes=PART_BYTES,
            ttl_s=TTL_S,
            wires=Wires.from_url(url, ThreadRunner(WIRES), count=WIRES, timeout_s=TIMEOUT_S),
        )
        namespace = hashlib.sha256(b"dataplane redis %d" % owner).digest()
        blocks = ring.sources(range(ring.blocks))
        self._refs = [
            BlockRef(namespace, hashlib.sha256(place.to_bytes(8, "little")).digest())
            for place in range(ring.blocks)
        ]
        self._digests = [
            block_digest(namespace, ref.key, block)
            for ref, block in zip(self._refs, blocks, strict=True)
        ]
        self._is_filled = False

    async def prepare(self, op: str) -> None:
        """Sets every value once."""
        if not self._is_filled:
            for places in self._ring.calls(1):
                await self.put(places)
            self._is_filled = True

    async def put(self, places: range) -> None:
        """Out of the ring."""
        blocks = [
            Block(self._refs[place], None, self._digests[place], data)
            for place, data in zip(places, self._ring.sources(places), strict=True)
        ]
        if not all(await self._tier.store(blocks)):
            raise NotThisWay("the tier did not take every block")

    async def get(self, places: range) -> None:
        """Into the ring."""
        targets = self._ring.targets(places)
        loads = [Load(self._refs[p], into) for p, into in zip(places, targets, strict=True)]
        if not all(await self._tier.load(loads)):
            raise NotThisWay("the tier did not have every block")

    async def close(self) -> None:
        """Hangs up."""
        await self._tier.close()
        await self._runner.close(CLOSE_S)
