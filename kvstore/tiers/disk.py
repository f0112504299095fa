"""The disk tier: a log of segments of fixed size, an index in memory, warm after a crash.

Blocks are appended to one open segment. A full or ageing segment is sealed: footer, then sync.
"Stored" means handed to the operating system, which survives a crash of this process; "sealed"
means on the device, which survives a crash of the machine. Room comes from dropping the oldest
segment whole, after what is still hot in it was written forward.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TypeVar

from kvstore.api.clock import Clock
from kvstore.api.errors import TierError
from kvstore.api.tier import Block, BlockRef, Load, Loaded, Usage
from kvstore.codec import Codec
from kvstore.files import Files
from kvstore.metrics import Metrics
from kvstore.names import block_name, namespace_tag
from kvstore.record import Damaged, Header, Kind, decode_block, encode_block
from kvstore.runner import Runner
from kvstore.tiers.disk_index import DiskIndex, Entry, survivors
from kvstore.tiers.segment import PAGE_BYTES, record_bytes
from kvstore.tiers.segment_log import Found, SegmentLog

_log = logging.getLogger("kvstore.disk")

T = TypeVar("T")


class DiskTier:
    """Blocks in the files of one directory, never more than `capacity_bytes` of them.

    Prefix-closed: a block is refused unless its parent is here. Make one with `open`.
    """

    name = "disk"

    def __init__(
        self, log: SegmentLog, codec: Codec, runner: Runner, clock: Clock, metrics: Metrics
    ) -> None:
        self._segments = log
        self._codec = codec
        self._runner = runner
        self._clock = clock
        self._metrics = metrics
        self._index = DiskIndex()
        self._sequence = 0
        self._writing = asyncio.Lock()
        self._changes: set[asyncio.Task[object]] = set()
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
        log = SegmentLog(files, capacity_bytes, segment_bytes, on_sealed)
        tier = cls(log, codec, runner, clock, metrics)
        tier._recover(await runner.run(log.recover))
        _log.info("disk: %d blocks in %d segments", len(tier._index), log.count)
        tier._syncer = asyncio.create_task(tier._sync_when_due(sync_after_s))
        return tier

    async def locate(self, refs: Sequence[BlockRef]) -> list[str | None]:
        return [self.name if self._find(ref) is not None else None for ref in refs]

    async def wants(self, refs: Sequence[BlockRef]) -> list[bool]:
        return [self._find(ref) is None for ref in refs]

    async def load(self, loads: Sequence[Load]) -> list[Loaded | None]:
        """Raises TierError if every block that is here was unreadable: then the device is gone."""
        answers = await asyncio.gather(*(self._load(load) for load in loads))
        errors = [answer for answer in answers if isinstance(answer, OSError)]
        if errors and not any(isinstance(answer, Loaded) for answer in answers):
            raise TierError(f"disk: {errors[0]}")
        return [answer if isinstance(answer, Loaded) else None for answer in answers]

    async def store(self, blocks: Sequence[Block]) -> list[bool]:
        return [await self._store(block) for block in blocks]

    async def discard(self, refs: Sequence[BlockRef]) -> int:
        names = [block_name(ref) for ref in refs]

        async def forget() -> int:
            # Also of what the index lacks: a block that left it with its parent may still lie in
            # a segment, and would rise at a restart once the parent is stored again.
            for name in names:
                await self._append(Header(kind=Kind.FORGET_BLOCK, name=name), b"")
            await self._runner.run(self._segments.sync)
            return self._index.remove(names)

        return await self._change(forget)

    async def clear(self, namespace: bytes) -> int:
        tag = namespace_tag(namespace)

        async def forget() -> int:
            await self._append(Header(kind=Kind.FORGET_NAMESPACE, tag=tag), b"")
            await self._runner.run(self._segments.sync)
            return self._index.remove(self._index.of_namespace(tag))

        return await self._change(forget)

    def usage(self) -> list[Usage]:
        used = self._segments.used_bytes
        return [Usage(self.name, self._segments.capacity_bytes, used, len(self._index))]

    async def close(self) -> None:
        if self._syncer is not None:
            self._syncer.cancel()
        try:
            await self._change(lambda: self._runner.run(self._segments.close))
        except TierError as error:
            _log.warning("the last segment could not be sealed: %s", error)

    def check(self) -> None:
        """Recomputes every invariant; AssertionError tells which one broke."""
        self._index.check()
        self._segments.check()

    def _find(self, ref: BlockRef) -> Entry | None:
        entry = self._index.find(block_name(ref))
        if entry is not None and 0 < entry.header.expires_s <= self._clock.wall_s():
            return None
        return entry

    async def _change(self, change: Callable[[], Awaitable[T]]) -> T:
        """Carries a change of the log through, one at a time, also if its caller gives up.

        A thread that writes cannot be stopped. If its caller's end let the next change begin:
        1. A store waits for a thread and is cancelled; the lock is free.
        2. Others fill the segment, seal it and open the next.
        3. The thread comes to the write of step 1 and writes over what they stored.
        """

        async def locked() -> T:
            async with self._writing:
                return await change()

        task = asyncio.create_task(locked())
        self._changes.add(task)
        task.add_done_callback(self._changes.discard)
        # Where nobody waits any more, nobody asks for the error either.
        task.add_done_callback(lambda task: task.cancelled() or task.exception())
        try:
            return await asyncio.shield(task)
        except OSError as error:
            raise TierError(f"disk: {error}") from error

    async def _load(self, load: Load) -> Loaded | OSError | None:
        entry = self._find(load.ref)
        if entry is None or entry.header.block_bytes != len(load.into):
            return None
        scratch = bytearray(len(load.into))
        header, segment_id, offset = entry.header, entry.segment_id, entry.offset
        name = block_name(load.ref)

        def read() -> bytes:
            payload = self._segments.read(segment_id, header.stored_bytes, offset + PAGE_BYTES)
            return decode_block(header, name, memoryview(payload), memoryview(scratch))

        try:
            digest = await self._runner.run(read)
        except (Damaged, OSError) as error:
            place = (entry.segment_id, entry.offset)
            if self._index.find(name) is not entry or place != (segment_id, offset):
                return None  # It left its segment, which was dropped, during the read.
            _log.warning("a damaged block was dropped from segment %d: %s", segment_id, error)
            self._metrics.corrupt.labels(self.name).inc()
            self._index.remove([name])
            return error if isinstance(error, OSError) else None
        except KeyError:
            return None  # Its segment was dropped between the look-up and the read.
        entry.used = True
        # Copied here and not by the thread: after a cancelled load nothing may write to `into`.
        load.into[:] = scratch
        return Loaded(self.name, digest)

    async def _store(self, block: Block) -> bool:
        parent = self._find(block.parent) if block.parent is not None else None
        if block.parent is not None and parent is None:
            self._metrics.disk_orphans.inc()
            return False
        if parent is not None:
            parent.used = True
        if self._find(block.ref) is not None:
            return True

        def encode() -> tuple[Header, bytes]:
            header, payload = encode_block(block, self._codec, now_s=self._clock.wall_s())
            # Owned, because the write may outlive the caller and with him `block.data`.
            return header, bytes(payload)

        header, payload = await self._runner.run(encode)
        return await self._change(lambda: self._append_block(header, payload))

    async def _append_block(self, header: Header, payload: bytes) -> bool:
        if self._index.find(header.name) is not None:
            return True  # Somebody else stored it while this one waited.
        if header.parent is not None and self._index.find(header.parent) is None:
            return False  # The parent was forgotten meanwhile.
        return await self._append(header, payload)

    async def _append(self, header: Header, payload: bytes) -> bool:
        """Writes a record and indexes it; False if it is larger than a segment can be."""
        if not self._segments.fits(header):
            return False
        if not self._segments.has_room(header):
            await self._make_room(header)
            parent = header.parent
            if parent is not None and self._index.find(parent) is None:
                return False  # The parent left with the segment that had to go.
        self._sequence += 1
        header = header.resequenced(self._sequence)
        place = self._segments.place(header)
        await self._runner.run(lambda: self._segments.write(place, payload))
        if header.kind is Kind.BLOCK:
            self._index.insert(header, self._segments.open_id, place.offset)
        return True

    async def _make_room(self, header: Header) -> None:
        """Seals the open segment, begins another with room for a record, drops the oldest."""
        await self._runner.run(self._segments.roll)
        budget_bytes = self._segments.segment_bytes // 2
        while (oldest := self._segments.surplus()) is not None:
            for entry in self._index.worth_forwarding(oldest, budget_bytes):
                if self._segments.has_room(entry.header, header):
                    budget_bytes -= record_bytes(entry.header)
                    await self._forward(entry)
            gone = [entry.header.name for entry in self._index.in_segment(oldest)]
            self._index.remove(gone)
            await self._runner.run(partial(self._segments.drop, oldest))
            self._metrics.disk_segments_dropped.inc()

    async def _forward(self, entry: Entry) -> None:
        """Writes a block again into the open segment, as it lies on disk, if the device can."""
        try:
            await self._copy_forward(entry)
        except OSError as error:
            _log.warning("a block is lost with segment %d: %s", entry.segment_id, error)

    async def _copy_forward(self, entry: Entry) -> None:
        old = entry.header
        payload = await self._runner.run(
            lambda: self._segments.read(
                entry.segment_id, old.stored_bytes, entry.offset + PAGE_BYTES
            )
        )
        if await self._append(old, payload):
            self._metrics.disk_forwarded_bytes.inc(old.stored_bytes)

    def _recover(self, records: list[Found]) -> None:
        self._sequence = max((found.header.sequence for found in records), default=0)
        for found in survivors(records):
            self._index.insert(found.header, found.segment_id, found.offset)

    async def _sync_when_due(self, sync_after_s: float) -> None:
        while True:
            await self._clock.sleep(sync_after_s)
            try:
                await self._change(lambda: self._runner.run(self._segments.sync))
            except TierError as error:
                _log.warning("what was stored lately is not on the device yet: %s", error)
