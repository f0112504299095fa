"""The disk tier: a log of segments of fixed size, an index in memory, warm after a crash.

Blocks are appended to one open segment. A full or ageing segment is sealed: footer, then sync.
"Stored" means handed to the operating system, which survives a crash of this process; "sealed"
means on the device, which survives a crash of the machine. Room comes from dropping the oldest
segment whole, after what is still hot in it was written forward.
"""

import asyncio
import errno
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Container, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple, TypeVar

from kvstore.api.clock import Clock
from kvstore.api.errors import TierError
from kvstore.api.tier import Block, BlockRef, Load, Loaded, Usage
from kvstore.codec import Codec
from kvstore.files import PAGE_BYTES, Files
from kvstore.gate import Gate
from kvstore.metrics import Metrics
from kvstore.names import block_name, namespace_tag
from kvstore.record import (
    HEADER_BYTES,
    Damaged,
    Header,
    Kind,
    check_payload,
    decode_block,
    encode_block,
)
from kvstore.runner import Runner
from kvstore.staging import Loan, Staging
from kvstore.tiers.disk_index import DiskIndex, Entry, survivors
from kvstore.tiers.segment import Placed, imitates_records, pack_header_page, pages
from kvstore.tiers.segment_log import SEQUENCE_BITS, Found, SegmentLog

_log = logging.getLogger("kvstore.disk")

T = TypeVar("T")

GROUP_BYTES = 16 << 20
"""So much of a batch is encoded, written or read at once."""
STAGING_BYTES = 64 << 20
"""So much of the memory that this takes is kept for the next."""


FORGETS_UNREAD = 1 << 32
"""More forget records than a segment that cannot be read may hold."""
SCRUB_PAUSE_S = 0.1
"""A scrub reads for about so long at its rate, then waits."""
SCRUB_FAILURES = 3
"""After so many blocks in a row that cannot be read it is the device that is broken."""
SYNCED_EACH = 64
"""Forget records of longer discards are synced together, which costs others less time."""
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


class Scrubbed(NamedTuple):
    """How far a scrub is. Bytes as stored; `damaged` blocks were dropped."""

    blocks: int
    size_bytes: int
    damaged: int
    total: int


class Staged(NamedTuple):
    """A record that is ready to be written, but for its place in the log."""

    header: Header
    loan: Loan
    """The whole record; its first page is filled when it is written."""


class DiskTier:
    """Blocks in the files of one directory, never more than `capacity_bytes` of them.

    Prefix-closed: a block is refused unless its parent is here. Make one with `open`.
    """

    name = "disk"

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
        self._sequence = 0
        self._forgets = 0
        """How many forget records the log has seen; every record says it."""
        self._unconfirmed: list[Header] = []
        """Forget records that were written, and may not be on the device."""
        self._yielded_bytes = 0
        """What has left a full volume since something was written last."""
        self._damaged = 0
        """How many blocks were found damaged, and dropped."""
        self._no_room = False
        """Not everything of the last batch could be written, for want of room."""
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
        staging = Staging(STAGING_BYTES)
        log = SegmentLog(files, capacity_bytes, segment_bytes, on_sealed, staging)
        tier = cls(log, codec, runner, clock, metrics, staging)
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
        answers: list[Loaded | OSError | None] = []
        for group in _groups(loads, lambda load: len(load.into)):
            answers += await asyncio.gather(*(self._load(load) for load in group))
        self._drop_foreign(loads)
        errors = [answer for answer in answers if isinstance(answer, OSError)]
        if errors and not any(isinstance(answer, Loaded) for answer in answers):
            raise TierError(f"disk: {errors[0]}")
        return [answer if isinstance(answer, Loaded) else None for answer in answers]

    async def store(self, blocks: Sequence[Block]) -> list[bool]:
        held: list[bool] = []
        for group in _groups(blocks, lambda block: len(block.data)):
            held += await self._store(group)
        return held

    async def discard(self, refs: Sequence[BlockRef]) -> int:
        names = [block_name(ref) for ref in refs]

        async def forget() -> int:
            # First here: what is being written forward must not stand behind its forget record.
            copies = self._index.remove(names)
            # Also of what the index lacks: a block that left it with its parent may still lie in
            # a segment, and would rise at a restart once the parent is stored again.
            await self._forget([Header(kind=Kind.FORGET_BLOCK, name=name) for name in names])
            return copies

        return await self._change(forget)

    async def clear(self, namespace: bytes) -> int:
        tag = namespace_tag(namespace)

        async def forget() -> int:
            copies = self._index.remove(self._index.of_namespace(tag))
            await self._forget([Header(kind=Kind.FORGET_NAMESPACE, tag=tag)])
            return copies

        return await self._change(forget)

    def usage(self) -> list[Usage]:
        used = self._segments.used_bytes
        return [Usage(self.name, self._segments.capacity_bytes, used, len(self._index))]

    async def scrub(self, bytes_per_s: float) -> AsyncGenerator[Scrubbed, None]:
        """Reads every block once, at a bounded rate, and drops what is damaged.

        Says now and then how far it is; the last word stands for the whole. Raises TierError
        once the device fails again and again, which says nothing of the blocks.
        """
        total, blocks, size, before = len(self._index), 0, 0, self._damaged
        due_bytes = failures = 0
        for entry in self._index.by_segment():
            try:
                await self._read(entry, partial(_judge, entry.name))
                failures = 0
            except OSError as error:
                failures += 1
                if failures == SCRUB_FAILURES:
                    raise TierError(f"disk: {error}") from error
            blocks, size = blocks + 1, size + entry.record_bytes
            due_bytes += entry.record_bytes
            if due_bytes >= bytes_per_s * SCRUB_PAUSE_S:
                yield Scrubbed(blocks, size, self._damaged - before, total)
                await self._clock.sleep(due_bytes / bytes_per_s)
                due_bytes = 0
        yield Scrubbed(blocks, size, self._damaged - before, total)

    async def close(self) -> None:
        if self._syncer is not None:
            self._syncer.cancel()
        try:
            await self._change(self._seal)
        except TierError as error:
            _log.warning("the last segment could not be sealed: %s", error)

    def check(self) -> None:
        """Recomputes every invariant; AssertionError tells which one broke."""
        self._index.check()
        self._segments.check()

    def _find(self, ref: BlockRef) -> Entry | None:
        entry = self._index.find(block_name(ref))
        if entry is not None and 0 < entry.expires_s <= self._clock.wall_s():
            self._index.remove([entry.name])
            return None
        return entry

    async def _change(self, change: Callable[[], Awaitable[T]]) -> T:
        """Carries a change of the log through, one at a time, also if its caller gives up.

        Unless it has not begun by then: behind a device that hangs no queue grows.

        A thread that writes cannot be stopped. If its caller's end let the next change begin:
        1. A store waits for a thread and is cancelled; the lock is free.
        2. Others fill the segment, seal it and open the next.
        3. The thread comes to the write of step 1 and writes over what they stored.
        """

        begun = False

        async def locked() -> T:
            nonlocal begun
            async with self._writing:
                begun = True
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
        except asyncio.CancelledError:
            if not begun:
                task.cancel()
            raise

    async def _load(self, load: Load) -> Loaded | OSError | None:
        entry = self._find(load.ref)
        if entry is None or entry.block_bytes != len(load.into):
            return None
        gate = Gate()

        def fill(header: Header, payload: memoryview) -> bytes:
            name = block_name(load.ref)
            return gate.through(lambda: decode_block(header, name, payload, load.into))

        try:
            digest = await self._read(entry, fill)
        except asyncio.CancelledError:
            gate.close()  # From here on nothing writes to `into`.
            raise
        except OSError as error:
            return error
        if digest is None:
            return None
        entry.used = True
        return Loaded(self.name, digest)

    def _drop_foreign(self, loads: Sequence[Load]) -> None:
        """Forgets what has another length than is asked: its name says the length, so it lies."""
        for load in loads:
            entry = self._find(load.ref)
            if entry is not None and entry.block_bytes != len(load.into):
                self._metrics.corrupt.labels(self.name).inc()
                self._index.remove([entry.name])

    async def _read(
        self, entry: Entry, judge: Callable[[Header, memoryview], bytes]
    ) -> bytes | None:
        """What `judge`, in a thread, makes of a record; None if it left, or was damaged and left.

        Raises OSError, with the record forgotten, if the device cannot read it.
        """
        segment_id, offset, size = place = _place_of(entry)
        payload_end = PAGE_BYTES + entry.stored_bytes

        def read() -> bytes:
            with self._staging.lent(size) as pages:
                started = self._clock.monotonic_s()
                if self._segments.read_into(segment_id, pages, offset) < payload_end:
                    raise Damaged("record: its segment ends before it")
                self._codec.moved("get", size, self._clock.monotonic_s() - started)
                return judge(Header.unpack(pages[:HEADER_BYTES]), pages[PAGE_BYTES:payload_end])

        try:
            return await self._runner.run(read)
        except (Damaged, OSError) as error:
            if self._index.find(entry.name) is not entry or place != _place_of(entry):
                return None  # It left its segment, which was dropped, during the read.
            _log.warning("a damaged block was dropped from segment %d: %s", segment_id, error)
            self._metrics.corrupt.labels(self.name).inc()
            self._damaged += 1
            self._index.remove([entry.name])
            if isinstance(error, OSError):
                raise
            return None
        except KeyError:
            return None  # Its segment was dropped between the look-up and the read.

    async def _store(self, blocks: Sequence[Block]) -> list[bool]:
        """Encodes a few blocks side by side and appends them."""
        fresh = [block for block in self._rooted(blocks) if self._find(block.ref) is None]
        if fresh:
            encode = partial(staged, codec=self._codec, staging=self._staging)
            now_s = self._clock.wall_s()
            work = [self._runner.run(partial(encode, block, now_s=now_s)) for block in fresh]
            records = [record for record in await asyncio.gather(*work) if record is not None]
            await self._change(lambda: self._append_blocks(records))
        return [self._find(block.ref) is not None for block in blocks]

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

    async def _append_or_yield(
        self, records: Sequence[Staged], *, together: bool = False
    ) -> list[Placed]:
        """As `_append`; where the volume is full, the oldest segments make room. Ends the loans.

        `together`: in one segment, all or some at once.
        """
        headers = [record.header for record in records]
        written: list[Placed] = []
        try:
            while True:
                self._no_room = False
                try:
                    if together and not self._segments.has_room(*headers):
                        await self._make_room(headers[0])
                    written += await self._append(records)
                except OSError as error:
                    if error.errno not in NO_ROOM or not await self._yield_oldest():
                        raise
                    continue
                if written:
                    self._yielded_bytes = 0
                if not self._no_room or not await self._yield_oldest():
                    return written
        finally:
            # Not earlier: what has left with a segment that made room is written once more.
            for record in records:
                record.loan.give_back()

    async def _yield_oldest(self) -> bool:
        """Gives up the oldest segment; False if there is none, or it would not help.

        What we have of a volume that others fill is the room there is: new blocks in place of the
        oldest are worth more than a tier that takes nothing. But where two segments' room did not
        help, more would not either.
        """
        oldest = self._segments.oldest_sealed()
        if oldest is None or self._yielded_bytes >= 2 * self._segments.segment_bytes:
            return False
        _log.warning("disk: the volume is full, segment %d makes room", oldest)
        before_bytes = self._segments.used_bytes
        await self._drop(oldest)
        self._yielded_bytes += before_bytes - self._segments.used_bytes
        return True

    async def _append(self, records: Sequence[Staged]) -> list[Placed]:
        """Writes records, several at once, and indexes them; which there are now.

        Parents come before children. Passed over is what is here already, has lost its parent, or
        is larger than a segment. Raises OSError if nothing could be written of what should be.
        """
        written: list[Placed] = []
        placed: list[tuple[Placed, Staged]] = []
        names: set[bytes] = set()
        for record in records:
            header = record.header
            if self._is_superfluous(header, names) or not self._segments.fits(header):
                continue
            if not self._segments.has_room(header):
                written += await self._write(placed)
                placed, names = [], set()
                await self._make_room(header)
                if self._is_superfluous(header, names):
                    continue  # The parent left with the segment that had to go.
            self._sequence += 1
            forgets = self._forgets if header.kind is Kind.BLOCK else header.forgets
            header = header.resequenced(self._sequence, forgets)
            place = self._segments.place(header)
            placed.append((place, record))
            names.add(header.name)
        return written + await self._write(placed)

    def _is_superfluous(self, header: Header, placed: Container[bytes]) -> bool:
        """Whether a block is here already, or its parent is not; `placed`: on their way."""
        if header.kind is not Kind.BLOCK:
            return False
        if header.name in placed or (self._index.find(header.name) and not header.sequence):
            return True
        parent = header.parent
        return parent is not None and parent not in placed and self._index.find(parent) is None

    async def _write(self, placed: Sequence[tuple[Placed, Staged]]) -> list[Placed]:
        if not placed:
            return []
        work = [
            self._runner.run(partial(self._write_one, place, record)) for place, record in placed
        ]
        outcomes = await asyncio.gather(*work, return_exceptions=True)
        written = [
            place for (place, _), outcome in zip(placed, outcomes, strict=True) if outcome is None
        ]
        await self._runner.run(partial(self._segments.keep, written))
        for place in written:
            header = place.header
            parent_here = header.parent is None or self._index.find(header.parent) is not None
            if header.kind is Kind.BLOCK and parent_here:
                self._index.insert(Found.of(place, self._segments.open_id))
        errors = [outcome for outcome in outcomes if outcome is not None]
        self._no_room |= any(isinstance(e, OSError) and e.errno in NO_ROOM for e in errors)
        if errors and (not written or not isinstance(errors[0], OSError)):
            raise errors[0]
        return written

    def _write_one(self, place: Placed, record: Staged) -> None:
        record.loan.view[:PAGE_BYTES] = pack_header_page(place.header)
        started = self._clock.monotonic_s()
        self._segments.write(place, record.loan.view)
        self._codec.moved("put", len(record.loan.view), self._clock.monotonic_s() - started)

    async def _forget(self, headers: Sequence[Header]) -> None:
        """Writes forget records, each twice, and waits until the device has them.

        A block is a miss if its record is damaged; a forget record would undo what it forgot.
        """
        await self._confirm_forgotten()
        for header in headers:
            # One after the other: where one cannot be written, none behind it may stand there, or
            # the next start would miss it, and believe nothing that is older.
            numbered = replace(header, forgets=self._forgets + 1)
            await self._write_twins(numbered)
            self._forgets += 1
            self._unconfirmed.append(numbered)
            # Of two, a power cut may keep the later one alone: the other would be missed.
            if len(headers) <= SYNCED_EACH or header is headers[-1]:
                await self._runner.run(self._segments.sync)
                self._unconfirmed.clear()

    async def _write_twins(self, numbered: Header) -> None:
        twins = [Staged(numbered, self._staging.borrow(PAGE_BYTES)) for _ in range(2)]
        if not await self._append_or_yield(twins, together=True):
            raise OSError(errno.EIO, "not all of it could be forgotten for good")

    async def _confirm_forgotten(self) -> None:
        """Writes the forget records again of which a sync has failed, ahead of anything else.

        What is written now says that they were given out: were none of them there after a power
        cut, the next start would believe nothing that is older.
        """
        if self._unconfirmed:
            for numbered in self._unconfirmed:
                await self._write_twins(numbered)
            await self._runner.run(self._segments.sync)
            self._unconfirmed.clear()

    async def _append_blocks(self, records: Sequence[Staged]) -> None:
        try:
            await self._confirm_forgotten()
            await self._append_or_yield(records)
        finally:
            for record in records:
                record.loan.give_back()

    async def _sync(self) -> None:
        await self._confirm_forgotten()
        await self._runner.run(self._segments.sync)

    async def _seal(self) -> None:
        try:
            await self._confirm_forgotten()
        finally:
            await self._runner.run(self._segments.close)

    async def _make_room(self, header: Header) -> None:
        """Seals the open segment, begins another with room for a record, drops the oldest."""
        try:
            await self._runner.run(self._segments.roll)
        finally:
            # It deletes what was surplus earlier and could not be deleted.
            for segment_id in self._segments.take_dropped():
                self._index.drop_segment(segment_id)
        budget_bytes = self._segments.segment_bytes // 2
        while (oldest := self._segments.surplus()) is not None:
            forwarded: list[tuple[Entry, int]] = []
            for entry in self._index.worth_forwarding(oldest, budget_bytes):
                if entry.segment_id == oldest:
                    budget_bytes -= entry.record_bytes
                    forwarded.append((entry, entry.page))
                    await self._forward(entry, header)
            try:
                await self._drop(oldest)
            except OSError:
                if self._segments.doubtful:
                    # The copies may never come to the device. What they were made of is there.
                    for entry, page in forwarded:
                        self._index.move_back(entry, oldest, page)
                raise

    async def _drop(self, segment_id: int) -> None:
        self._index.drop_segment(segment_id)
        await self._runner.run(partial(self._segments.drop, segment_id))
        self._metrics.disk_segments_dropped.inc()

    async def _forward(self, entry: Entry, waiting: Header) -> None:
        """Writes a block again into the open segment, if beside `waiting` there is room for it."""
        loans: list[Staged] = []

        def copy(header: Header, payload: memoryview) -> bytes:
            check_payload(header, entry.name, payload)
            loan = self._staging.borrow(PAGE_BYTES + pages(len(payload)))
            end = PAGE_BYTES + len(payload)
            loan.view[PAGE_BYTES:end] = payload
            loan.view[end:] = bytes(len(loan.view) - end)
            loans.append(Staged(header, loan))
            return header.digest

        try:
            if await self._read(entry, copy) is None:
                return
            if self._segments.has_room(loans[0].header, waiting):
                await self._append(loans)
                self._metrics.disk_forwarded_bytes.inc(entry.stored_bytes)
        except OSError as error:
            _log.warning("a block is lost with its segment: %s", error)
        finally:
            for record in loans:
                record.loan.give_back()

    def _recover(self, records: list[Found]) -> None:
        # Segments that could not be read have numbers of their own: none may be given again.
        self._sequence = self._segments.last_id << SEQUENCE_BITS
        self._sequence = max([self._sequence, *(found.sequence for found in records)])
        self._forgets = max((found.forgets for found in records), default=0)
        if self._segments.unread_id > max((found.segment_id for found in records), default=0):
            _log.warning("what the newest segment forgot is unknown: the disk begins empty")
            self._forgets += FORGETS_UNREAD
            return
        for found in survivors(records):
            self._index.insert(found)

    async def _sync_when_due(self, sync_after_s: float) -> None:
        while True:
            await self._clock.sleep(sync_after_s)
            try:
                await self._change(self._sync)
            except TierError as error:
                _log.warning("what was stored lately is not on the device yet: %s", error)


def staged(block: Block, codec: Codec, staging: Staging, now_s: float) -> Staged | None:
    """The record of a block. It owns its bytes: the write may outlive the block's buffer.

    None for a block that holds what could be taken for other blocks' records.
    """
    header, payload = encode_block(block, codec, now_s=now_s)
    if imitates_records(memoryview(payload)):
        return None
    loan = staging.borrow(PAGE_BYTES + pages(len(payload)))
    end = PAGE_BYTES + len(payload)
    loan.view[PAGE_BYTES:end] = payload
    loan.view[end:] = bytes(len(loan.view) - end)
    return Staged(header, loan)


def _judge(name: bytes, header: Header, payload: memoryview) -> bytes:
    check_payload(header, name, payload)
    return header.digest


def _place_of(entry: Entry) -> tuple[int, int, int]:
    return entry.segment_id, entry.offset, entry.record_bytes


def _groups(things: Sequence[T], size: Callable[[T], int]) -> Iterator[list[T]]:
    """The things in their order, about `GROUP_BYTES` at a time."""
    group: list[T] = []
    group_bytes = 0
    for thing in things:
        group.append(thing)
        group_bytes += size(thing)
        if group_bytes >= GROUP_BYTES:
            yield group
            group, group_bytes = [], 0
    if group:
        yield group
