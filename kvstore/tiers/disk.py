"""The disk tier: a log of segments of fixed size, an index in memory, warm after a crash.

Blocks are appended to one open segment. A full or ageing segment is sealed: footer, then sync.
"Stored" means handed to the operating system, which survives a crash of this process; "sealed"
means on the device, which survives a crash of the machine. Room comes from dropping the oldest
segment whole, after what is still hot in it was written forward.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

from kvstore.api.clock import Clock
from kvstore.api.errors import TierError
from kvstore.api.tier import Block, BlockRef, Keeper, Load, Loaded, Usage
from kvstore.codec import Codec
from kvstore.files import Files
from kvstore.metrics import Metrics
from kvstore.names import block_name, namespace_tag
from kvstore.runner import Runner, run_each
from kvstore.staging import Staging
from kvstore.tiers.disk_index import DiskIndex, Entry
from kvstore.tiers.disk_reader import TIER, DiskReader, judge
from kvstore.tiers.disk_writer import DiskWriter
from kvstore.tiers.segment_log import SegmentLog
from kvstore.tiers.staged import Staged, stage
from kvstore.tiers.timed_files import TimedFiles

_log = logging.getLogger("kvstore.disk")

GROUP_BYTES = 16 << 20
"""So much of a batch is copied, or encoded, and written at once."""
KEPT_PART = 4
"""A block that may be written from where it lies counts as so much less: most take no memory."""
STAGED_AT_ONCE = 8
"""So many threads encode or copy blocks at most. Where they are left as they are one is faster."""
STAGING_BYTES = 64 << 20
"""So much of the memory that this takes is kept for the next."""
SCRUB_PAUSE_S = 0.1
"""A scrub reads for about so long at its rate, then waits."""
SCRUB_FAILURES = 3
"""After so many blocks in a row that cannot be read it is the device that is broken."""


class Scrubbed(NamedTuple):
    """How far a scrub is. Bytes as stored; `damaged` blocks were dropped."""

    blocks: int
    size_bytes: int
    damaged: int
    total: int


class DiskTier:
    """Blocks in the files of one directory, never more than `capacity_bytes` of them.

    Prefix-closed: a block is refused unless its parent is here. Make one with `open`.
    """

    name = TIER

    def __init__(
        self,
        log: SegmentLog,
        codec: Codec,
        runner: Runner,
        clock: Clock,
        metrics: Metrics,
        staging: Staging,
    ) -> None:
        self._segments = log
        self._staging = staging
        self._codec = codec
        self._runner = runner
        self._clock = clock
        self._metrics = metrics
        self._index = DiskIndex()
        self._reader = DiskReader(log, self._index, runner, staging, metrics)
        self._writer = DiskWriter(log, self._index, self._reader, runner, staging, metrics)
        self._syncer: asyncio.Task[None] | None = None

    @classmethod
    async def open(
        cls,
        files: Files,
        codec: Codec,
        runner: Runner,
        clock: Clock,
        metrics: Metrics,
        *,
        capacity_bytes: int,
        segment_bytes: int,
        sync_after_s: float,
        on_sealed: Callable[[int, int, int], None],
    ) -> "DiskTier":
        """The tier over what earlier runs left in the directory, however they ended.

        `on_sealed(segment_id, blocks, bytes)` is called with the blocks that have come to be on the
        device, which happens `sync_after_s` after they were stored at the latest.
        """
        staging = Staging(STAGING_BYTES)
        timed = TimedFiles(files, codec, clock)
        log = SegmentLog(timed, capacity_bytes, segment_bytes, on_sealed, staging)
        tier = cls(log, codec, runner, clock, metrics, staging)
        tier._writer.recover(await runner.run(log.recover))
        _log.info("disk: %d blocks in %d segments", len(tier._index), log.count)
        tier._syncer = asyncio.create_task(tier._sync_when_due(sync_after_s))
        return tier

    @property
    def index(self) -> DiskIndex:
        """Which blocks are here, by name."""
        return self._index

    async def locate(self, refs: Sequence[BlockRef]) -> list[str | None]:
        return [self.name if self._find(ref) is not None else None for ref in refs]

    async def wants(self, refs: Sequence[BlockRef]) -> list[bool]:
        return [self._find(ref) is None for ref in refs]

    async def load(self, loads: Sequence[Load]) -> list[Loaded | None]:
        """Raises TierError if every block that is here was unreadable: then the device is gone."""
        answers = await asyncio.gather(*(self._load(load) for load in loads))
        self._drop_foreign(loads)
        errors = [answer for answer in answers if isinstance(answer, OSError)]
        if errors and not any(isinstance(answer, Loaded) for answer in answers):
            raise TierError(f"disk: {errors[0]}")
        return [answer if isinstance(answer, Loaded) else None for answer in answers]

    def has(self, name: bytes, size: int) -> bool:
        """Whether the block of this name is here, and of this length."""
        entry = self._find_named(name)
        return entry is not None and entry.block_bytes == size

    async def read_named(
        self, name: bytes, into: memoryview, keeper: Keeper | None = None
    ) -> bytes | None:
        """As `load`, of a block whose name is all that is known of it; its writer's digest.

        Raises OSError if the device cannot read it.
        """
        entry = self._find_named(name)
        if entry is None or entry.block_bytes != len(into):
            return None
        digest: bytes | None = None
        place: tuple[int, int] | None = None
        # A block that was written forward while its load waited is read where it lies now.
        while digest is None and self._find_named(name) is entry:
            if place == (entry.segment_id, entry.page):
                return None
            place = entry.segment_id, entry.page
            digest = await self._reader.load(entry, into, keeper)
        if digest is not None:
            entry.used = True
        return digest

    async def store(self, blocks: Sequence[Block]) -> list[bool]:
        fresh = [block for block in self._rooted(blocks) if self._find(block.ref) is None]
        waiting: list[Staged] = []
        try:
            for group in _groups(fresh):
                waiting += await self._staged(group)
                if sum(record.borrowed_bytes for record in waiting) >= GROUP_BYTES:
                    records, waiting = waiting, []
                    await self._writer.append(records)
            if waiting:
                records, waiting = waiting, []
                await self._writer.append(records)
        finally:
            for record in waiting:
                record.give_back()
        return [self._find(block.ref) is not None for block in blocks]

    async def discard(self, refs: Sequence[BlockRef]) -> int:
        return await self._writer.forget_blocks([block_name(ref) for ref in refs])

    async def clear(self, namespace: bytes) -> int:
        return await self._writer.forget_namespace(namespace_tag(namespace))

    async def forget_named(self, names: Sequence[bytes], tag: bytes = b"") -> int:
        """As `discard`, and as `clear` of the namespace with a tag, if one is given."""
        copies = await self._writer.forget_blocks(names) if names else 0
        return copies + (await self._writer.forget_namespace(tag) if tag else 0)

    def usage(self) -> list[Usage]:
        used = self._segments.used_bytes
        return [Usage(self.name, self._segments.capacity_bytes, used, len(self._index))]

    async def scrub(self, bytes_per_s: float) -> AsyncGenerator[Scrubbed, None]:
        """Reads every block once, at a bounded rate, and drops what is damaged.

        Says now and then how far it is; the last word stands for the whole. Raises TierError
        once the device fails again and again, which says nothing of the blocks.
        """
        total, blocks, size, before = len(self._index), 0, 0, self._reader.damaged
        due_bytes = failures = 0
        for entry in self._index.by_segment():
            try:
                await self._reader.read(entry, partial(judge, entry.name))
                failures = 0
            except OSError as error:
                failures += 1
                if failures == SCRUB_FAILURES:
                    raise TierError(f"disk: {error}") from error
            blocks, size = blocks + 1, size + entry.record_bytes
            due_bytes += entry.record_bytes
            if due_bytes >= bytes_per_s * SCRUB_PAUSE_S:
                yield Scrubbed(blocks, size, self._reader.damaged - before, total)
                await self._clock.sleep(due_bytes / bytes_per_s)
                due_bytes = 0
        yield Scrubbed(blocks, size, self._reader.damaged - before, total)

    async def close(self) -> None:
        if self._syncer is not None:
            self._syncer.cancel()
        try:
            await self._writer.seal()
        except TierError as error:
            _log.warning("the last segment could not be sealed: %s", error)
        await self._reader.close()

    def check(self) -> None:
        """Recomputes every invariant; AssertionError tells which one broke."""
        self._index.check()
        self._segments.check()

    def _find(self, ref: BlockRef) -> Entry | None:
        return self._find_named(block_name(ref))

    def _find_named(self, name: bytes) -> Entry | None:
        entry = self._index.find(name)
        if entry is not None and 0 < entry.expires_s <= self._clock.wall_s():
            self._index.remove([entry.name])
            return None
        return entry

    async def _load(self, load: Load) -> Loaded | OSError | None:
        try:
            digest = await self.read_named(block_name(load.ref), load.into, load.keeper)
        except OSError as error:
            return error
        return Loaded(self.name, digest) if digest is not None else None

    def _drop_foreign(self, loads: Sequence[Load]) -> None:
        """Forgets what has another length than is asked: its name says the length, so it lies."""
        for load in loads:
            entry = self._find(load.ref)
            if entry is not None and entry.block_bytes != len(load.into):
                self._metrics.corrupt.labels(self.name).inc()
                self._index.remove([entry.name])

    async def _staged(self, blocks: Sequence[Block]) -> list[Staged]:
        """The records of a few blocks, which are encoded or copied side by side, if they are."""
        staged = partial(
            stage, codec=self._codec, staging=self._staging, now_s=self._clock.wall_s()
        )
        busy = any(b.keeper is None or self._codec.works_on(b.ref.namespace) for b in blocks)
        at_once = STAGED_AT_ONCE if busy else 1
        records = await run_each(self._runner, staged, blocks, at_once=at_once)
        return [record for record in records if record is not None]

    def _rooted(self, blocks: Sequence[Block]) -> list[Block]:
        """The blocks whose parent is here, or among them."""
        rooted: dict[BlockRef, Block] = {}
        for block in blocks:
            parent = self._find(block.parent) if block.parent is not None else None
            if parent is not None:
                parent.used = True
            elif block.parent is not None and block.parent not in rooted:
                self._metrics.disk_orphans.inc()
                continue
            rooted[block.ref] = block
        return list(rooted.values())

    async def _sync_when_due(self, sync_after_s: float) -> None:
        while True:
            await self._clock.sleep(sync_after_s)
            try:
                await self._writer.sync()
            except TierError as error:
                _log.warning("what was stored lately is not on the device yet: %s", error)


def _groups(blocks: Sequence[Block]) -> Iterator[list[Block]]:
    """The blocks in their order, about `GROUP_BYTES` of memory at a time."""
    group: list[Block] = []
    group_bytes = 0
    for block in blocks:
        group.append(block)
        group_bytes += len(block.data) // (KEPT_PART if block.keeper is not None else 1)
        if group_bytes >= GROUP_BYTES:
            yield group
            group, group_bytes = [], 0
    if group:
        yield group
