"""A block as it lies in Redis: one record (`kvstore.record`), in parts of bounded size.

The first part begins with the header; its length is that of all others but the last.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import Enum, auto

from kvstore.api.tier import BlockRef, Load
from kvstore.codec import CodecId
from kvstore.names import block_name, namespace_tag
from kvstore.record import HEADER_BYTES, Damaged, Header, check_payload, decode_block
from kvstore.staging import Loan, Staging
from kvstore.tiers.redis_wire import Refused, Wire

PREFIX = b"kvstore:b1:"
LONGEST_BYTES = (64 << 20) + HEADER_BYTES
"""No node writes a longer part; whoever did is not listened to until the end."""
ASKED_BYTES = 4 << 20
"""Of answers on their way at a time: Redis makes them all at once, in memory of its own."""
ASKED_PARTS = 64
UNANSWERED_PARTS = 16
"""Sent and not yet answered, at most: a server that refuses is not sent a whole batch."""

Part = tuple[bytes, list[bytes | memoryview]]
"""The key of a value, and the value as views of where it lies."""


class Miss(Enum):
    """Why a block is not delivered."""

    ABSENT = auto()
    INCOMPLETE = auto()
    """Redis evicts each part for itself."""
    DAMAGED = auto()


def part_key(ref: BlockRef, part: int) -> bytes:
    """Where a part lies."""
    tag = namespace_tag(ref.namespace).hex().encode()
    return b"%s%s:%s:%d" % (PREFIX, tag, block_name(ref).hex().encode(), part)


def parts_of(header: Header, first_bytes: int) -> int:
    """How many parts the record has whose first one is so long."""
    return -(-(HEADER_BYTES + header.stored_bytes) // max(first_bytes, HEADER_BYTES))


def cut(
    ref: BlockRef, header: Header, payload: memoryview | bytes, part_bytes: int
) -> Iterator[Part]:
    """The parts of a block, none of them copied.

    The first one comes last: who finds it shall find the others as well. `part_bytes` bounds what
    a part holds of the payload, so that a block of just that size is one value; the header comes
    on top, and by it all parts are longer.
    """
    step = part_bytes + HEADER_BYTES
    view = memoryview(payload)
    for part in range(parts_of(header, step) - 1, 0, -1):
        start = part * step - HEADER_BYTES
        yield part_key(ref, part), [view[start : start + step]]
    yield part_key(ref, 0), [header.pack(), view[:part_bytes]]


def put(wire: Wire, parts: Iterable[Part], ttl_s: int) -> None:
    """Sets all values. Raises the first `Refused`; what was sent behind it may be there."""
    refused: Refused | None = None
    for key, views in parts:
        wire.set(key, views, ttl_s)
        while wire.owed > UNANSWERED_PARTS and refused is None:
            wire.flush()
            refused = wire.refusal()
        if refused is not None:
            break
    wire.flush()
    while wire.owed:
        refused = wire.refusal() or refused
    if refused is not None:
        raise refused


class Reading:
    """One block on its way out of Redis: where its parts go, and what became of it.

    The payload goes straight to the caller's buffer where it is stored as it is, and to borrowed
    memory where it has to be decoded first; `close` returns that, and may be called again.
    """

    def __init__(
        self, load: Load, part_bytes: int, staging: Staging, now: Callable[[], float]
    ) -> None:
        self._load = load
        self._first_bytes = HEADER_BYTES + min(part_bytes, len(load.into))
        self._staging = staging
        self._now = now
        self._loan: Loan | None = None
        self._header = Header()
        self._payload = memoryview(b"")
        self._step = HEADER_BYTES
        self._lacking = 0
        self.is_open = False
        """Whether more of its parts are of use."""
        self.miss: Miss | None = Miss.ABSENT
        """None once the block is in its buffer, intact."""
        self.digest = b""
        """Its writer's, then."""
        self.received_bytes = 0
        self.judged_s = 0.0
        """How long it took to verify and decode it."""

    def key(self, part: int) -> bytes:
        """Where a part of it lies."""
        return part_key(self._load.ref, part)

    def size(self, part: int) -> int:
        """How long a part has to be; of the first one, before it came: is likely to be."""
        if not part:
            return self._first_bytes
        return min(self._step, HEADER_BYTES + self._header.stored_bytes - part * self._step)

    def begin(self, size: int, head: memoryview) -> range:
        """The first part is here, so long and with this header. Which others are needed?"""
        try:
            header = Header.unpack(head)
        except Damaged:
            header = Header()
        into = self._load.into
        fits = header.block_bytes == len(into) and size <= HEADER_BYTES + header.stored_bytes
        if not fits or not header.stored_bytes:
            self.fail(Miss.DAMAGED)
            return range(0)
        self._header, self._step = header, size
        if header.codec is CodecId.RAW and header.stored_bytes == len(into):
            self._payload = into
        else:
            self._loan = self._staging.borrow(header.stored_bytes)
            self._payload = self._loan.view
        self.is_open = True
        self._lacking = parts_of(header, size)
        return range(1, self._lacking)

    def place(self, part: int, size: int) -> memoryview | None:
        """Where a part of so many bytes goes, without the header; None: nowhere, it is not ours."""
        if not self.is_open:
            return None
        if part and size != self.size(part):
            self.fail(Miss.DAMAGED)
            return None
        start = part * self._step
        return self._payload[max(start - HEADER_BYTES, 0) : start + size - HEADER_BYTES]

    def arrived(self) -> None:
        """One part lies where it belongs. With the last one, the block is verified and decoded."""
        self._lacking -= 1
        if self._lacking:
            return
        started_s = self._now()
        try:
            self._judge()
        except Damaged:
            self.fail(Miss.DAMAGED)
        else:
            self.miss, self.digest = None, self._header.digest
            self.close()
        self.received_bytes = HEADER_BYTES + self._header.stored_bytes
        self.judged_s = self._now() - started_s

    def _judge(self) -> None:
        name, into = block_name(self._load.ref), self._load.into
        if self._loan is None:
            check_payload(self._header, name, self._payload)
        else:
            decode_block(self._header, name, self._payload, into)

    def accept(self, part: int, value: bytes | None) -> range:
        """Takes a part that was received elsewhere. Which others are needed?"""
        if value is None:
            self.lack(part)
            return range(0)
        view = memoryview(value)
        more = range(0) if part else self.begin(len(value), view[:HEADER_BYTES])
        place = self.place(part, len(value))
        if place is not None:
            place[:] = view[len(value) - len(place) :]
            self.arrived()
        return more

    def lack(self, part: int) -> None:
        """A part is not there."""
        if part and self.is_open:
            self.fail(Miss.INCOMPLETE)

    def fail(self, miss: Miss) -> None:
        """It will not be delivered, for this reason; what else comes of it is let go of."""
        self.miss = miss
        self.close()

    def close(self) -> None:
        """Takes no more, and returns borrowed memory."""
        self.is_open = False
        if self._loan is not None:
            self._payload = memoryview(b"")
            self._loan.give_back()


def fetch(wire: Wire, readings: Sequence[Reading]) -> None:
    """Receives blocks, each part where it belongs, with a bounded number on their way.

    Raises the first `Refused`, after all others were read. What is longer than any part ends the
    reading: it is damaged, and what would have come behind it is absent this time.
    """
    waiting = deque((reading, 0) for reading in readings)
    others: deque[tuple[Reading, int]] = deque()
    """Of blocks that have begun: they come before new ones, which need memory of their own."""
    asked: deque[tuple[Reading, int, int]] = deque()
    asked_bytes = 0
    refused: Refused | None = None
    while waiting or others or asked:
        while (waiting or others) and _has_room(len(asked), asked_bytes):
            reading, part = (others or waiting).popleft()
            if part and not reading.is_open:
                continue
            wire.get(reading.key(part))
            asked.append((reading, part, reading.size(part)))
            asked_bytes += asked[-1][2]
        wire.flush()
        if not asked:
            break
        reading, part, size = asked.popleft()
        asked_bytes -= size
        try:
            more = _receive(wire, reading, part)
        except Refused as error:
            refused = refused or error
            continue
        if more is None:
            return
        others.extend((reading, other) for other in more)
    if refused is not None:
        raise refused


def _has_room(parts: int, size: int) -> bool:
    return not parts or (parts < ASKED_PARTS and size < ASKED_BYTES)


def _receive(wire: Wire, reading: Reading, part: int) -> range | None:
    """Takes one answer, and says which parts it makes necessary; None: not to be read on."""
    size = wire.value()
    if size is None:
        reading.lack(part)
        return range(0)
    if size > LONGEST_BYTES:
        reading.fail(Miss.DAMAGED)
        return None
    more = range(0)
    head = memoryview(b"")
    if not part:
        head = memoryview(bytearray(min(size, HEADER_BYTES)))
        wire.receive(head)
        more = reading.begin(size, head)
    place = reading.place(part, size)
    if place is None:
        wire.skip(size - len(head))
    else:
        wire.receive(place)
    wire.end()
    if place is not None:
        reading.arrived()
    return more
