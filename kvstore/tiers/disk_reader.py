"""The reading half of the disk tier: records of blocks, verified, or a miss."""

import asyncio
import errno
import logging
from collections.abc import Callable
from functools import partial

from kvstore.api.tier import Keeper
from kvstore.codec import CodecId
from kvstore.files import PAGE_BYTES, begins_on_a_page
from kvstore.gate import Abandoned, Gate
from kvstore.metrics import Metrics
from kvstore.record import HEADER_BYTES, Damaged, Header, check_payload, decode_block
from kvstore.runner import Runner
from kvstore.staging import Staging
from kvstore.tiers.disk_index import DiskIndex, Entry
from kvstore.tiers.segment import pages
from kvstore.tiers.segment_log import SegmentLog

_log = logging.getLogger("kvstore.disk")

TIER = "disk"
"""What the tier is called in answers, metrics and logs."""
READS_AT_ONCE = 8
"""So many records are being read at most, those included for which nobody waits any more."""

_Place = tuple[int, int, int]
"""Segment, offset and length of a record."""


class DiskReader:
    """Reads records in threads. What turns out to be damaged leaves the index.

    Invariant: at most `READS_AT_ONCE` threads are at it, and as many buffers are held: a device
    that hangs gets no more of either.
    """

    def __init__(
        self,
        log: SegmentLog,
        index: DiskIndex,
        runner: Runner,
        staging: Staging,
        metrics: Metrics,
    ) -> None:
        self._segments = log
        self._index = index
        self._runner = runner
        self._staging = staging
        self._metrics = metrics
        self._room = asyncio.Semaphore(READS_AT_ONCE)
        self._reading: set[asyncio.Task[bytes]] = set()
        self.damaged = 0
        """How many blocks were found damaged, and dropped."""

    async def load(self, entry: Entry, into: memoryview, keeper: Keeper | None) -> bytes | None:
        """Fills the buffer with a block of its length; as `read` in all else.

        Straight from the file where the block is stored as it is, and the buffer begins on a page
        and has a keeper. With a keeper the thread may write to it behind its caller's back.
        """
        name = entry.name
        if keeper is not None and entry.stored_bytes == len(into) and begins_on_a_page(into):
            fill_straight = partial(self._fill, _place_of(entry), name, into)
            return await self._judged(entry, fill_straight, keeper)
        if keeper is not None:
            return await self.read(entry, partial(_decode, name, into), keeper)
        gate = Gate()

        def fill(header: Header, payload: memoryview) -> bytes:
            return gate.through(partial(_decode, name, into, header, payload))

        try:
            return await self.read(entry, fill)
        except asyncio.CancelledError:
            gate.close()  # From here on nothing writes to `into`.
            raise

    async def read(
        self,
        entry: Entry,
        judge: Callable[[Header, memoryview], bytes],
        keeper: Keeper | None = None,
    ) -> bytes | None:
        """What `judge`, in a thread, makes of a record; None if it left, or was damaged and left.

        Raises OSError, with the record forgotten, if the device cannot read it.
        """
        segment_id, offset, size = _place_of(entry)
        end = PAGE_BYTES + entry.stored_bytes

        def read() -> bytes:
            with self._staging.lent(size) as record:
                if self._segments.read_into(segment_id, [record], offset) < end:
                    raise Damaged("record: its segment ends before it")
                return judge(Header.unpack(record[:HEADER_BYTES]), record[PAGE_BYTES:end])

        return await self._judged(entry, read, keeper)

    async def close(self) -> None:
        """Returns when no thread reads any more, also of those for which nobody waited."""
        if self._reading:
            await asyncio.wait(self._reading)

    def _fill(self, place: _Place, name: bytes, into: memoryview) -> bytes:
        """Reads a record whose payload is as long as the block, into the block's own buffer."""
        segment_id, offset, _ = place
        whole = len(into) // PAGE_BYTES * PAGE_BYTES
        rest = len(into) - whole
        with self._staging.lent(PAGE_BYTES + pages(rest)) as around:
            first, last = around[:PAGE_BYTES], around[PAGE_BYTES:]
            buffers = [part for part in (first, into[:whole], last) if len(part)]
            if self._segments.read_into(segment_id, buffers, offset) < PAGE_BYTES + len(into):
                raise Damaged("record: its segment ends before it")
            into[whole:] = last[:rest]
            header = Header.unpack(first[:HEADER_BYTES])
        if header.codec is not CodecId.RAW or header.block_bytes != len(into):
            return decode_block(header, name, memoryview(bytes(into)), into)
        check_payload(header, name, into)
        return header.digest

    async def _judged(
        self, entry: Entry, read: Callable[[], bytes], keeper: Keeper | None = None
    ) -> bytes | None:
        place = _place_of(entry)
        try:
            return await self._run(read, keeper)
        except (Damaged, OSError) as error:
            if self._index.find(entry.name) is not entry or place != _place_of(entry):
                return None  # It left its segment, which was dropped, during the read.
            if isinstance(error, OSError) and error.errno == errno.ENOMEM:
                raise  # It is memory that was wanting, and the block is as it was.
            _log.warning("a damaged block was dropped from segment %d: %s", place[0], error)
            self._metrics.corrupt.labels(TIER).inc()
            self.damaged += 1
            self._index.remove([entry.name])
            if isinstance(error, OSError):
                raise
            return None
        except KeyError:
            return None  # Its segment was dropped between the look-up and the read.

    async def _run(self, read: Callable[[], bytes], keeper: Keeper | None) -> bytes:
        """What a thread reads. It holds its buffer until it ends, also if its caller gives up."""
        given_up = False

        def unless_given_up() -> bytes:
            if given_up:
                raise Abandoned
            return read()

        def over(reading: asyncio.Task[bytes]) -> None:
            self._reading.discard(reading)
            self._room.release()
            if keeper is not None:
                keeper.release()
            if not reading.cancelled():
                reading.exception()  # Where nobody waits any more, nobody asks for it either.

        await self._room.acquire()
        if keeper is not None:
            keeper.hold()
        reading = asyncio.create_task(self._runner.run(unless_given_up))
        self._reading.add(reading)
        reading.add_done_callback(over)
        try:
            return await asyncio.shield(reading)
        except asyncio.CancelledError:
            given_up = True
            raise


def judge(name: bytes, header: Header, payload: memoryview) -> bytes:
    """The digest of the block called `name`. Raises `Damaged` if this is not its record."""
    check_payload(header, name, payload)
    return header.digest


def _decode(name: bytes, into: memoryview, header: Header, payload: memoryview) -> bytes:
    return decode_block(header, name, payload, into)


def _place_of(entry: Entry) -> _Place:
    return entry.segment_id, entry.offset, entry.record_bytes
