"""A herd: callers who all ask for one cold block at once, over real gRPC; one read is enough.

A block is cold when only the tier below has it, because the node was just started over it. The
callers come over several connections, half a second apart at most: some after a match, under a
lease; some without either; some of both kinds. What the tier was asked is counted at the tier.
"""

import asyncio
import contextlib
import random
import tempfile
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from benchmarks.proof import Claim, Finding, Proof, Setting, Size, main
from kvstore.server import NodeServer
from kvstore_client import AsyncClient, Space
from kvstore_workers.redis_server import RedisServer
from tests.sim.blocks import keys_of
from tests.sim.nodes import PATIENT, Nodes, counter, descriptor_of, expected, store

CALLERS: dict[Size, int] = {"test": 150, "short": 1000, "long": 1000}
BLOCK_BYTES = 64 << 10
CONNECTIONS = 4
SPREAD_S = 0.5
MEMORY = {"capacity_bytes": 64 << 20, "slab_bytes": 1 << 20}
DISK = {"capacity_bytes": 256 << 20, "segment_bytes": 16 << 20}
WAYS = ("with a lease", "without a lease", "mixed")
BELOW = ("disk", "redis")


@dataclass
class Seen:
    """What the herds over one tier saw."""

    herds: int = 0
    most_reads: int = 0
    extra_reads: int = 0
    callers: int = 0
    unserved: int = 0
    ways: dict[str, int] = field(default_factory=dict)

    def herd(self, way: str, reads: int, served: Sequence[bool]) -> None:
        """One herd is over."""
        self.herds += 1
        self.most_reads = max(self.most_reads, reads)
        self.extra_reads += abs(reads - 1)
        self.callers += len(served)
        self.unserved += served.count(False)
        self.ways[way] = max(self.ways.get(way, 0), reads)

    def finding(self) -> Finding:
        """The figure is the number of reads of the worst herd, and nobody may go without."""
        ok = self.herds > 0 and self.extra_reads == 0 and self.unserved == 0
        details = {
            "herds": self.herds, "callers": self.callers, "unserved": self.unserved,
            "most reads": self.ways,
        }  # fmt: skip
        return Finding(float(self.most_reads), ok, self.herds, self.extra_reads, "", details)


def run(setting: Setting) -> Sequence[Finding]:
    """The herds over the disk, then those over Redis."""
    return asyncio.run(_run(setting))


async def _run(setting: Setting) -> list[Finding]:
    findings = []
    for below in BELOW:
        with tempfile.TemporaryDirectory(prefix="kvstore-herd-") as home:
            async with _redis(below) as url:
                nodes = Nodes(Path(home))
                try:
                    findings.append((await _herds(setting, nodes, below, url)).finding())
                finally:
                    await nodes.finish()
    return findings


@contextlib.asynccontextmanager
async def _redis(below: str) -> AsyncIterator[str]:
    if below != "redis":
        yield ""
        return
    with RedisServer(policy="noeviction") as server:
        yield server.url


async def _herds(setting: Setting, nodes: Nodes, below: str, url: str) -> Seen:
    options: dict[str, Any] = {"memory": MEMORY, "disk": DISK}
    if below == "redis":
        options |= {"disk": {"enabled": False}, "redis": {"blocks_url": url}}
    count = -(-setting.trials // len(BELOW))
    keys = [keys_of(f"herd {number}", 1)[0] for number in range(count)]
    await _store(nodes, options, keys)
    server = await nodes.start(**options)
    seen = Seen()
    async with _connected(server) as clients:
        space = await clients[0].open_space(descriptor_of(BLOCK_BYTES))
        for number, key in enumerate(keys):
            rng = random.Random(f"{setting.seed} {below} {number}")
            way = WAYS[number % len(WAYS)]
            before = _reads(server, below)
            callers = [
                _call(rng.choice(clients), space, key, way, rng.random() * SPREAD_S, rng.random())
                for _ in range(CALLERS[setting.size])
            ]
            served = await asyncio.gather(*callers)
            seen.herd(way, _reads(server, below) - before, served)
            setting.tick(1)
    return seen


async def _store(nodes: Nodes, options: dict[str, Any], keys: list[bytes]) -> None:
    """Leaves the blocks below, and in no memory."""
    server = await nodes.start(**options)
    client = nodes.connect(server)
    space = await client.open_space(descriptor_of(BLOCK_BYTES))
    for key in keys:
        assert await store(client, space, [key]) == [True]
    await nodes.stop(server)


@contextlib.asynccontextmanager
async def _connected(server: NodeServer) -> AsyncIterator[list[AsyncClient]]:
    async with contextlib.AsyncExitStack() as exits:
        clients = []
        for _ in range(CONNECTIONS):
            # Channels of one process share their connection unless they are told not to.
            options = [("grpc.use_local_subchannel_pool", 1)]
            channel = grpc.aio.insecure_channel(server.endpoint, options=options)
            await exits.enter_async_context(channel)
            client = AsyncClient(server.endpoint, budgets=PATIENT, channel=channel)
            clients.append(await exits.enter_async_context(client))
        yield clients


async def _call(
    client: AsyncClient, space: Space, key: bytes, way: str, delay_s: float, draw: float
) -> bool:
    """Whether one caller got the block, and every byte of it right."""
    await asyncio.sleep(delay_s)
    lease = None
    if way == "with a lease" or (way == "mixed" and draw < 0.5):
        lease = await client.match([space], [key])
    buffer = bytearray(BLOCK_BYTES)
    [loaded] = await client.load_any(space, [key], [buffer], lease=lease)
    if lease is not None:
        await client.release(lease)
    return loaded is not None and buffer == expected(space, key)


def _reads(server: NodeServer, tier: str) -> int:
    """How many blocks the tier was asked for so far."""
    results = ("hit", "miss")
    return int(
        sum(counter(server, "tier_operations", tier=tier, op="load", result=r) for r in results)
    )


PROOF = Proof(
    module="herd",
    about=__doc__ or "",
    claims=[
        Claim("herd: callers of one cold block on disk", "reads of the tier", "exactly 1"),
        Claim("herd: callers of one cold block in Redis", "reads of the tier", "exactly 1"),
    ],
    trials={"test": 6, "short": 12, "long": 60},
    run=run,
)

if __name__ == "__main__":
    main(PROOF)
