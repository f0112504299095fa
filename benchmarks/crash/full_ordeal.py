"""A node whose disk is really full, and what has to hold while it is, and afterwards.

Each round fills the volume behind the node's back, loads the node until its writes fail, makes
room again, and waits until the disk tier takes blocks.
"""

import asyncio
import contextlib
import errno
import os
import random
import shutil
import time
from pathlib import Path

from benchmarks.crash.own_mounts import VOLUME_BYTES
from benchmarks.crash.system_calls import Call, SystemCalls, standing_in
from kvstore.server import NodeServer
from kvstore_client import AsyncClient, Space
from tests.sim.blocks import keys_of
from tests.sim.nodes import Nodes, descriptor_of, load, store

LEFT_BYTES = 1 << 20
"""What is left when a round begins: it soon is not enough."""
SEGMENT_BYTES = 256 << 10
BLOCK_BYTES = 6000
CHAIN_BLOCKS = 8
CHAINS_WHEN_FULL = 20
MOST_CHAINS = 400
"""In one round; a few dozen are more than there is room for."""
BACK_WITHIN_S = 5.0
RETRY_S = 0.05
EMPTY_SHARE = 0.5


class Watcher:
    """Counts the system calls that failed because there was no room."""

    def __init__(self) -> None:
        self.full = 0

    def __call__(self, call: Call) -> object:
        """Makes a call."""
        try:
            return call.complete()
        except OSError as error:
            self.full += error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise


class Ordeal:
    """Rounds of one node on one volume."""

    def __init__(self, volume: Path, nodes: Nodes, watcher: Watcher, rng: random.Random) -> None:
        self._volume = volume
        self._nodes = nodes
        self._watcher = watcher
        self._rng = rng
        self._chains = 0
        self.failures: list[str] = []
        self.slowest_s = 0.0
        self.back_s: list[float] = []
        self.requests = 0

    async def round(self) -> None:
        """Full, then not full any more, with a start of the node before each.

        Some rounds begin with an empty disk, others with what earlier ones left on it, which may be
        all that the volume holds.
        """
        if self._rng.random() < EMPTY_SHARE:
            shutil.rmtree(self._volume / "blocks", ignore_errors=True)
        server = await self._nodes.start(
            memory={"capacity_bytes": 256 << 10, "slab_bytes": 64 << 10},
            disk={
                "path": self._volume / "blocks",
                "capacity_bytes": 4 * VOLUME_BYTES,
                "segment_bytes": SEGMENT_BYTES,
            },
        )
        client = self._nodes.connect(server)
        space = await client.open_space(descriptor_of(BLOCK_BYTES))
        ballast = self._volume / "ballast"
        fill(ballast, shutil.disk_usage(self._volume).free - LEFT_BYTES)
        before, first = self._watcher.full, self._chains
        while self._watcher.full == before and self._chains < first + MOST_CHAINS:
            await self._request(client, space)
        if self._watcher.full == before:
            self.failures.append("the volume did not fill up")
        for _ in range(CHAINS_WHEN_FULL):
            await self._request(client, space)
        ballast.unlink()
        await self._wait_until_back(server, client, space)
        if client.counters:
            self.failures.append(f"the client lost answers: {dict(client.counters)}")
        await client.close()
        await self._nodes.stop(server)

    async def _request(self, client: AsyncClient, space: Space) -> None:
        """Stores a chain, and reads an earlier one; every byte that comes is judged."""
        self._chains += 1
        started_s = time.monotonic()
        try:
            await store(client, space, keys_of(f"full {self._chains}", CHAIN_BLOCKS))
            keys = keys_of(f"full {self._rng.randrange(1, self._chains + 1)}", CHAIN_BLOCKS)
            await client.match([space], keys)
            await load(client, space, keys)
        except Exception as error:  # noqa: BLE001 - whatever it is, it must not be
            self.failures.append(f"{type(error).__name__} instead of an answer: {error}")
        self.requests += 3
        self.slowest_s = max(self.slowest_s, time.monotonic() - started_s)

    async def _wait_until_back(self, server: NodeServer, client: AsyncClient, space: Space) -> None:
        """Until the disk takes blocks and gives them back."""
        started_s = time.monotonic()
        before = _held(server)
        while _held(server) <= before + CHAIN_BLOCKS:
            if time.monotonic() - started_s > BACK_WITHIN_S:
                self.failures.append(f"the disk takes nothing {BACK_WITHIN_S:g} s after it may")
                return
            await self._request(client, space)
            await asyncio.sleep(RETRY_S)
        self.back_s.append(time.monotonic() - started_s)


def _held(server: NodeServer) -> float:
    """How many blocks the disk tier has taken in its life."""
    labels = {"tier": "disk", "op": "store", "result": "held"}
    registry = server.node.metrics.registry
    return registry.get_sample_value("kvstore_tier_operations_total", labels) or 0.0


def fill(ballast: Path, size_bytes: int) -> None:
    """Takes room, really."""
    with ballast.open("wb") as file, contextlib.suppress(OSError):
        while size_bytes > 0:
            size_bytes -= file.write(bytes(min(size_bytes, 1 << 16)))
            file.flush()


def takes_direct(probe: Path) -> bool:
    """Whether files can be opened past the page cache here."""
    try:
        os.close(os.open(probe, os.O_CREAT | os.O_RDWR | os.O_DIRECT, 0o600))
    except OSError:
        return False
    return True


async def ordeal(volume: Path, home: Path, rounds: int, seed: str) -> dict[str, object]:
    """What was seen in so many rounds."""
    watcher, nodes = Watcher(), Nodes(home)
    trial = Ordeal(volume, nodes, watcher, random.Random(seed))
    with standing_in(SystemCalls(watcher)):
        try:
            for _ in range(rounds):
                await trial.round()
        finally:
            await nodes.finish()
    return {
        "rounds": rounds,
        "failures": trial.failures,
        "requests": trial.requests,
        "slowest_request_s": round(trial.slowest_s, 3),
        "slowest_back_s": round(max(trial.back_s, default=0.0), 3),
        "writes_without_room": watcher.full,
        "direct_io": takes_direct(volume / "probe"),
    }
