"""Our own path from node to node: `PeerTier.load`, from a real node's memory.

At the level of the tier, as with Redis: what a client does with the blocks then is another row.
Nothing is put this way, so that there is a get alone.
"""

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from redis.asyncio import Redis

from benchmarks.dataplane.ring import Ring
from benchmarks.dataplane.through_client import NotThisWay, ThroughClient
from kvstore.api.clock import SystemClock
from kvstore.api.tier import BlockRef, Load
from kvstore.directory import Directory, Neighbour
from kvstore.metrics import Metrics
from kvstore.names import namespace
from kvstore.peers.circle import Circle
from kvstore.peers.credentials import Credentials
from kvstore.peers.peer import Peer
from kvstore.peers.register import Register
from kvstore.peers.tier import PeerTier
from kvstore.runner import ThreadRunner
from kvstore.spaces import Spaces
from kvstore.tenants import LOCAL_TENANT, PRIVATE_SCOPE

WIRES = 8
TIMEOUT_S = 60.0
CLOSE_S = 10.0
TRY_S = 0.01


class ThroughPeers:
    """Loads the blocks of a ring from a node that has them in memory."""

    knob = 0

    def __init__(self, ring: Ring, writer: ThroughClient, tier: PeerTier, runner: ThreadRunner,
                 directory: Directory, refs: list[BlockRef]) -> None:  # fmt: skip
        self._ring = ring
        self._writer = writer
        self._tier = tier
        self._runner = runner
        self._directory = directory
        self._refs = refs

    @classmethod
    async def open(cls, ring: Ring, owner: int, where: Mapping[str, Any]) -> Self:
        """The asking half of a node; the blocks go to the other node by shared memory."""
        secret = await asyncio.to_thread(Path(where["secret_file"]).read_bytes)
        writer = await ThroughClient.connect(ring, owner, "shm", where["lender"])
        redis = Redis.from_url(where["redis_url"], socket_timeout=TIMEOUT_S)
        clock, spaces, metrics = SystemClock(), Spaces(), Metrics()
        own = Neighbour(f"asker-{owner}", "")
        directory = Directory(redis, clock, own)
        credentials = Credentials(secret, own.node_id, own.endpoint)
        runner, room = ThreadRunner(WIRES), asyncio.Semaphore(WIRES)
        space_id = writer.space.space_id
        owned = namespace(secret, LOCAL_TENANT, PRIVATE_SCOPE, space_id)
        spaces.learn(owned, space_id, "uint8")
        tier = PeerTier(
            directory,
            Register(redis, own),
            Circle(lambda node: Peer(node, credentials, None, clock, runner, room)),
            spaces,
            metrics,
            timeout_s=TIMEOUT_S,
        )
        refs = [BlockRef(owned, key) for key in writer.keys]
        return cls(ring, writer, tier, runner, directory, refs)

    async def prepare(self, op: str) -> None:
        """The other node has all blocks, and has said so."""
        await self._writer.prepare("get")
        await self._directory.refresh()
        async with asyncio.timeout(TIMEOUT_S):
            # The other node is another process, and says so behind its answers.
            while None in await self._tier.locate(self._refs):  # noqa: ASYNC110
                await asyncio.sleep(TRY_S)

    async def get(self, places: range) -> None:
        """Into the ring."""
        targets = self._ring.targets(places)
        loads = [Load(self._refs[p], into) for p, into in zip(places, targets, strict=True)]
        if not all(await self._tier.load(loads)):
            raise NotThisWay("the other node did not lend every block")

    async def close(self) -> None:
        """Hangs up."""
        await self._tier.close()
        await self._directory.close()
        await self._runner.close(CLOSE_S)
        await self._writer.close()
