"""Our own path to the disk: `DiskTier.store` and `load`, over real files, codec raw.

At the level of the tier, because above it gRPC is the narrower way. Several clients are several
calls at a time in one process, as they are in a node. A put is over once the bytes are on the
device: after the store, the segment that it wrote to is synced. Every put is of new blocks, and
the log drops its oldest segments as it would in the long run. A get is cold: the files are opened
past the page cache, where the file system can. Buffers are the ring's: like slots of a node's arena
they begin on a page and have keepers, so that bytes move straight from and to them.
"""

import hashlib
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from benchmarks.dataplane.ring import Ring
from benchmarks.dataplane.through_client import NotThisWay
from kvstore.api.clock import SystemClock
from kvstore.api.digest import block_digest
from kvstore.api.tier import Block, BlockRef, Load
from kvstore.codec import Raw
from kvstore.files import DirectoryFiles
from kvstore.metrics import Metrics
from kvstore.runner import ThreadRunner
from kvstore.tiers.disk import DiskTier
from kvstore.tiers.segment import file_name, segment_ids

SEGMENT_BYTES = 256 << 20
THREADS = 8
"""Both as a node has them unless it is told otherwise."""
SYNC_AFTER_S = 30.0
CLOSE_S = 10.0
_NAMESPACE = hashlib.sha256(b"dataplane disk").digest()


class ThroughDisk:
    """Stores the blocks of a ring under ever new names, and loads those that were stored last."""

    knob = 0

    def __init__(
        self, ring: Ring, tier: DiskTier, files: DirectoryFiles, root: Path, runner: ThreadRunner
    ) -> None:
        self._ring = ring
        self._tier = tier
        self._files = files
        self._root = root
        self._runner = runner
        self._numbers = itertools.count()
        self._stored: dict[int, BlockRef] = {}
        self._is_filled = False
        self._capacity_bytes = tier.usage()[0].capacity_bytes
        self._put_bytes = 0
        # Digests are the writer's; whose name they are bound to does not matter to a tier.
        self._digests = [
            block_digest(_NAMESPACE, bytes(32), block) for block in ring.sources(range(ring.blocks))
        ]

    @classmethod
    async def open(cls, ring: Ring, home: Path) -> Self:
        """An empty tier with room for two turns of the ring, and what the log needs."""
        root = home / "disk"
        files, runner = DirectoryFiles(root), ThreadRunner(THREADS)
        tier = await DiskTier.open(
            files,
            Raw(),
            runner,
            SystemClock(),
            Metrics(),
            capacity_bytes=2 * ring.blocks * ring.block_bytes + 6 * SEGMENT_BYTES,
            segment_bytes=SEGMENT_BYTES,
            sync_after_s=SYNC_AFTER_S,
            on_sealed=lambda *sealed: None,
        )
        return cls(ring, tier, files, root, runner)

    async def prepare(self, op: str) -> None:
        """Before a put the log is full, as in the long run; before a get every block is there.

        The log then writes over what its oldest segments left, as the floor does over its file.
        """
        if op == "put":
            while self._put_bytes <= self._capacity_bytes:
                await self.put(range(self._ring.blocks))
            self._is_filled = False
        elif not self._is_filled:
            await self.put(range(self._ring.blocks))
            self._is_filled = True

    async def put(self, places: range) -> None:
        """Out of the ring, onto the device."""
        blocks = [
            Block(self._renamed(place), None, self._digests[place], data, _RingKeeper())
            for place, data in zip(places, self._ring.sources(places), strict=True)
        ]
        _check_all(await self._tier.store(blocks))
        self._put_bytes += len(blocks) * self._ring.block_bytes
        await self._runner.run(self._sync_newest)

    async def get(self, places: range) -> None:
        """Into the ring."""
        targets = self._ring.targets(places)
        loads = [
            Load(self._stored[p], into, _RingKeeper())
            for p, into in zip(places, targets, strict=True)
        ]
        _check_all(await self._tier.load(loads))

    async def close(self) -> None:
        """Ends the tier; its files are removed with their directory."""
        await self._tier.close()
        await self._runner.close(CLOSE_S)
        self._files.shut()

    def _renamed(self, place: int) -> BlockRef:
        key = hashlib.sha256(next(self._numbers).to_bytes(8, "little")).digest()
        self._stored[place] = BlockRef(_NAMESPACE, key)
        return self._stored[place]

    def _sync_newest(self) -> None:
        """The log itself syncs a segment when it is full; the last one is still open."""
        # By the path, and not by the tier's own handle of the directory: two listings at a time
        # over one handle share its position, and each would see a part.
        newest = file_name(max(segment_ids(os.listdir(self._root))))
        handle = os.open(self._root / newest, os.O_RDONLY)
        try:
            os.fdatasync(handle)
        finally:
            os.close(handle)


class _RingKeeper:
    """Holds a buffer of the ring, which outlives the tier, as a node holds a slot of its arena."""

    def __init__(self) -> None:
        self._holds = 0

    @property
    def held(self) -> bool:
        return self._holds > 0

    def hold(self) -> None:
        self._holds += 1

    def release(self) -> None:
        self._holds -= 1


def _check_all(answers: Sequence[object]) -> None:
    if not all(answers):
        raise NotThisWay("the tier did not take, or did not have, every block")
