"""The writing half of the disk tier: one change of the log at a time, also if its caller gives up.

Records are appended to one open segment. Room comes from dropping the oldest segment whole, after
what is still hot in it was written forward.
"""

import asyncio
import errno
import logging
from collections.abc import Awaitable, Callable, Container, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

from kvstore.api.errors import TierError
from kvstore.metrics import Metrics
from kvstore.record import Header, Kind, check_payload
from kvstore.runner import Runner, run_each
from kvstore.staging import Staging
from kvstore.tiers.disk_index import DiskIndex, Entry, survivors
from kvstore.tiers.disk_reader import DiskReader
from kvstore.tiers.segment import SEQUENCE_BITS, Placed
from kvstore.tiers.segment_log import Found, SegmentLog
from kvstore.tiers.staged import Staged

_log = logging.getLogger("kvstore.disk")

T = TypeVar("T")

FORGETS_UNREAD = 1 << 32
"""More forget records than a segment that cannot be read may hold."""
SYNCED_EACH = 64
"""Forget records of longer discards are synced together, which costs others less time."""
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
WRITES_AT_ONCE = 4
"""So many threads write a batch at most; more are no faster, and readers need threads too."""


def _nothing() -> None:
    return


class DiskWriter:
    """Appends, makes room, forgets, syncs and seals.

    Every public coroutine raises TierError if the device fails.
    """

    def __init__(
        self,
        log: SegmentLog,
        index: DiskIndex,
        reader: DiskReader,
        runner: Runner,
        staging: Staging,
        metrics: Metrics,
    ) -> None:
        self._segments = log
        self._index = index
        self._reader = reader
        self._runner = runner
        self._staging = staging
        self._metrics = metrics
        self._sequence = 0
        self._forgets = 0
        """How many forget records the log has seen; every record says it."""
        self._unconfirmed: list[Header] = []
        """Forget records that were written, and may not be on the device."""
        self._yielded_bytes = 0
        """What has left a full volume since something was written last."""
        self._no_room = False
        """Not everything of the last batch could be written, for want of room."""
        self._writing = asyncio.Lock()
        self._changes: set[asyncio.Task[object]] = set()

    def recover(self, records: list[Found]) -> None:
        """Takes up where the records that were found leave off, and fills the index."""
        self._forgets = max((found.forgets for found in records), default=0)
        if self._segments.unread_id > max((found.segment_id for found in records), default=0):
            _log.warning("what the newest segment forgot is unknown: the disk begins empty")
            self._forgets += FORGETS_UNREAD
            return
        for found in survivors(records):
            self._index.insert(found)

    async def append(self, records: Sequence[Staged]) -> None:
        """Writes and indexes what is new of these blocks, and gives the records back.

        They are held from here on until they were written or will not be, whoever still waits.
        """
        for record in records:
            record.hold()

        def give_back() -> None:
            for record in records:
                record.give_back()

        await self._change(lambda: self._append_blocks(records), give_back)

    async def forget_blocks(self, names: Sequence[bytes]) -> int:
        """Forgets blocks for good, on the device; how many were here, with what descended."""

        async def forget() -> int:
            # First here: what is being written forward must not stand behind its forget record.
            copies = self._index.remove(names)
            # Also of what the index lacks: a block that left it with its parent may still lie in
            # a segment, and would rise at a restart once the parent is stored again.
            await self._forget([Header(kind=Kind.FORGET_BLOCK, name=name) for name in names])
            return copies

        return await self._change(forget)

    async def forget_namespace(self, tag: bytes) -> int:
        """Forgets everything under a tag for good, on the device; how many were here."""

        async def forget() -> int:
            copies = self._index.remove(self._index.of_namespace(tag))
            await self._forget([Header(kind=Kind.FORGET_NAMESPACE, tag=tag)])
            return copies

        return await self._change(forget)

    async def sync(self) -> None:
        """Returns when all that was stored is on the device."""
        await self._change(self._sync)

    async def seal(self) -> None:
        """Ends the log in order."""
        await self._change(self._seal)

    async def _change(
        self, change: Callable[[], Awaitable[T]], over: Callable[[], None] = _nothing
    ) -> T:
        """Carries a change of the log through, one at a time, also if its caller gives up.

        Unless it has not begun by then: behind a device that hangs no queue grows. `over` is
        called when it has ended, or never begins.

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
        task.add_done_callback(lambda task: over())
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

    async def _append_blocks(self, records: Sequence[Staged]) -> None:
        await self._confirm_forgotten()
        await self._append_or_yield(records)

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
        twins = [Staged.copied(numbered, b"", self._staging) for _ in range(2)]
        # One of them would be as good as none once it is damaged.
        if len(await self._append_or_yield(twins, together=True)) < len(twins):
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

    async def _sync(self) -> None:
        await self._confirm_forgotten()
        await self._runner.run(self._segments.sync)

    async def _seal(self) -> None:
        try:
            await self._confirm_forgotten()
        finally:
            await self._runner.run(self._segments.close)

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
                record.give_back()

    async def _yield_oldest(self) -> bool:
        """Gives up a spare file, or the oldest segment; False where that cannot help.

        What we have of a volume that others fill is the room there is: new blocks in place of the
        oldest are worth more than a tier that takes nothing. But where two segments' room did not
        help, more would not either.
        """
        oldest = self._segments.oldest_sealed()
        if self._yielded_bytes >= 2 * self._segments.segment_bytes:
            return False
        before_bytes = self._segments.used_bytes
        if self._segments.has_spare:
            await self._runner.run(self._segments.remove_spare)
        elif oldest is not None:
            _log.warning("disk: the volume is full, segment %d makes room", oldest)
            await self._drop(oldest, reuse=False)
        else:
            return False
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
            self._sequence = max(self._sequence, self._segments.open_id << SEQUENCE_BITS) + 1
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
        outcomes = await run_each(self._runner, self._write_one, placed, at_once=WRITES_AT_ONCE)
        written = [outcome for outcome in outcomes if isinstance(outcome, Placed)]
        await self._runner.run(partial(self._segments.keep, written))
        for place in written:
            header = place.header
            parent_here = header.parent is None or self._index.find(header.parent) is not None
            if header.kind is Kind.BLOCK and parent_here:
                self._index.insert(Found.of(place, self._segments.open_id))
        errors = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
        self._no_room |= any(isinstance(e, OSError) and e.errno in NO_ROOM for e in errors)
        if errors and (not written or not isinstance(errors[0], OSError)):
            raise errors[0]
        return written

    def _write_one(self, placed: tuple[Placed, Staged]) -> Placed | Exception | None:
        """Where and with which header a record lies now; why it does not; None if it is refused."""
        place, record = placed
        try:
            header = record.write(place.header, partial(self._segments.write, place))
        except Exception as error:  # noqa: BLE001 - it is said of this record, not of the others
            return error
        return Placed(place.offset, header) if header is not None else None

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
                await self._drop(oldest, reuse=True)
            except OSError:
                if self._segments.doubtful:
                    # The copies may never come to the device. What they were made of is there.
                    for entry, page in forwarded:
                        self._index.move_back(entry, oldest, page)
                raise

    async def _drop(self, segment_id: int, *, reuse: bool) -> None:
        self._index.drop_segment(segment_id)
        await self._runner.run(partial(self._segments.drop, segment_id, reuse=reuse))
        self._metrics.disk_segments_dropped.inc()

    async def _forward(self, entry: Entry, waiting: Header) -> None:
        """Writes a block again into the open segment, if beside `waiting` there is room for it."""
        copies: list[Staged] = []

        def copy(header: Header, payload: memoryview) -> bytes:
            check_payload(header, entry.name, payload)
            copies.append(Staged.copied(header, payload, self._staging))
            return header.digest

        try:
            if await self._reader.read(entry, copy) is None:
                return
            if self._segments.has_room(copies[0].header, waiting):
                await self._append(copies)
                self._metrics.disk_forwarded_bytes.inc(entry.stored_bytes)
        except OSError as error:
            _log.warning("a block is lost with its segment: %s", error)
        finally:
            for record in copies:
                record.give_back()
