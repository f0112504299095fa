"""One connection of the bulk path, as both of its ends use it.

The client says `GREETING` and the ticket that `Connect` gave it, the node answers WELCOME or not.
From then on messages stand behind their length, and blocks between them: the bytes of each, as
many as its space says, and then its digest.
"""

import asyncio
import socket
import ssl
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

from kvstore.api.digest import DIGEST_BYTES, BlockDigest, block_digest
from kvstore.api.errors import KvstoreError
from kvstore.api.local import LENGTH
from kvstore.api.wire import MESSAGE_BYTES

GREETING = b"kvbulk/1"
WELCOME = b"\x01"
REFUSED = b"\x00"
CHUNK_BYTES = 2 << 20
"""So much is digested and sent, or received and digested, while it lies in the cache."""
SCRATCH_BYTES = 64 << 10
MOST_VIEWS = 512
"""That one call of the system takes; Linux allows 1024."""
KEEPALIVE_S = 10
"""Of silence, after which the kernel asks three times whether the other end is still there."""
_ASK_S = 5

Answer = TypeVar("Answer")


class Hangup(Exception):
    """When the connection is of no use any more: it broke, or was shut down from this end."""


class Parcel(NamedTuple):
    """A block on its way. Without a digest its sender computes it meanwhile."""

    space_id: bytes
    key: bytes
    view: memoryview
    digest: bytes = b""


class BulkSocket:
    """Messages and blocks over a connection, in calls that block: they belong into a thread.

    One thread at a time uses it; `shut` may come from any other, and ends the call under way.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._is_tls = isinstance(connection, ssl.SSLSocket)
        self._is_shut = False
        connection.setblocking(True)

    @property
    def is_shut(self) -> bool:
        """Whether it has ended, as far as this end knows."""
        return self._is_shut

    @property
    def is_quiet(self) -> bool:
        """True as long as nothing has come that nobody asked for, such as the other end's end."""
        try:
            self._connection.setblocking(False)
            try:
                # Without TLS: what it says of its own, its end above all, lies there as well.
                socket.socket.recv(self._connection, 1, socket.MSG_PEEK)
            except BlockingIOError:
                return not self._is_shut
            finally:
                self._connection.setblocking(True)
        except OSError:
            pass
        return False

    async def spoken_to(self) -> None:
        """Returns when there is something to receive."""
        if not (isinstance(self._connection, ssl.SSLSocket) and self._connection.pending()):
            await readable(self._connection)

    def send_bytes(self, data: bytes) -> None:
        """As they are. Raises Hangup."""
        self._send([data])

    def send_message(self, packed: bytes) -> None:
        """Raises Hangup."""
        self._send([LENGTH.pack(len(packed)), packed])

    def receive_message(self) -> bytes:
        """Raises Hangup, and KvstoreError for one that is longer than any may be."""
        head = bytearray(LENGTH.size)
        self._receive([memoryview(head)])
        [length] = LENGTH.unpack(head)
        if length > MESSAGE_BYTES:
            raise KvstoreError(f"a message of {length} bytes; at most {MESSAGE_BYTES} are taken")
        packed, part = bytearray(), memoryview(bytearray(min(length, SCRATCH_BYTES)))
        while len(packed) < length:
            more = part[: length - len(packed)]
            self._receive([more])
            packed += more
        return bytes(packed)

    def send_blocks(self, parcels: Iterable[Parcel]) -> None:
        """All of them, each with its digest behind it. Raises Hangup."""
        waiting: list[memoryview | bytes] = []
        waiting_bytes = 0
        for space_id, key, view, digest in parcels:
            running = None if digest else BlockDigest(space_id, key, len(view))
            for start in range(0, len(view), CHUNK_BYTES):
                chunk = view[start : start + CHUNK_BYTES]
                if running is not None:
                    running.update(chunk)
                waiting.append(chunk)
                waiting_bytes += len(chunk)
                if waiting_bytes >= CHUNK_BYTES or len(waiting) >= MOST_VIEWS:
                    self._send(waiting)
                    waiting, waiting_bytes = [], 0
            waiting.append(digest or (running.digest() if running is not None else b""))
        self._send(waiting)

    def receive_blocks(self, parcels: Iterable[Parcel]) -> Iterator[bytes]:
        """For each its digest, once it lies in its view; empty: it came damaged. Raises Hangup."""
        group: list[Parcel] = []
        group_bytes = 0
        for parcel in parcels:
            if group and group_bytes + len(parcel.view) > CHUNK_BYTES:
                yield from self._receive_group(group)
                group, group_bytes = [], 0
            if len(parcel.view) > CHUNK_BYTES:
                yield self._receive_large(parcel)
                continue
            group.append(parcel)
            group_bytes += len(parcel.view)
            if len(group) >= MOST_VIEWS // 2:
                yield from self._receive_group(group)
                group, group_bytes = [], 0
        yield from self._receive_group(group)

    def skip_block(self, size: int) -> None:
        """Lets a block pass by for which there is no room. Raises Hangup."""
        scratch = memoryview(bytearray(SCRATCH_BYTES))
        left = size + DIGEST_BYTES
        while left:
            part = scratch[:left]
            self._receive([part])
            left -= len(part)

    def shut(self) -> None:
        """Ends the connection in both directions, and what waits for it. Any thread may call."""
        self._is_shut = True
        try:
            # TLS has words of its own for this, which would wait for who is using it.
            socket.socket.shutdown(self._connection, socket.SHUT_RDWR)
        except OSError:
            return  # It had ended by itself.

    def close(self) -> None:
        """Lets go of it. No thread uses it any more."""
        self.shut()
        self._connection.close()

    def _receive_group(self, group: Sequence[Parcel]) -> Iterator[bytes]:
        tails = bytearray(DIGEST_BYTES * len(group))
        views: list[memoryview] = []
        for number, parcel in enumerate(group):
            views += [parcel.view, _tail(tails, number)]
        self._receive(views)
        for number, (space_id, key, view, _) in enumerate(group):
            digest = bytes(_tail(tails, number))
            yield digest if block_digest(space_id, key, view) == digest else b""

    def _receive_large(self, parcel: Parcel) -> bytes:
        view, tail = parcel.view, bytearray(DIGEST_BYTES)
        running = BlockDigest(parcel.space_id, parcel.key, len(view))
        for start in range(0, len(view), CHUNK_BYTES):
            chunk = view[start : start + CHUNK_BYTES]
            is_last = start + len(chunk) == len(view)
            self._receive([chunk, memoryview(tail)] if is_last else [chunk])
            running.update(chunk)
        digest = bytes(tail)
        return digest if running.digest() == digest else b""

    def _send(self, data: Sequence[memoryview | bytes]) -> None:
        left = [memoryview(part) for part in data if len(part)]
        try:
            while left:
                if self._is_shut:
                    raise Hangup("the connection was shut down")
                if self._is_tls:
                    self._connection.sendall(left.pop(0))
                else:
                    left = _behind(left, self._connection.sendmsg(left))
        except OSError as error:
            raise Hangup(str(error)) from None

    def _receive(self, into: Sequence[memoryview]) -> None:
        left = [view for view in into if len(view)]
        try:
            while left:
                if self._is_shut:
                    raise Hangup("the connection was shut down")
                if self._is_tls:
                    count = self._connection.recv_into(left[0])
                else:
                    count = self._connection.recvmsg_into(left, 0, socket.MSG_WAITALL)[0]
                if not count:
                    raise Hangup("the other end has hung up")
                left = _behind(left, count)
        except OSError as error:
            raise Hangup(str(error)) from None


def prepare(connection: socket.socket) -> None:
    """What both ends want of a connection: no delay, and word of an end that has vanished."""
    connection.setblocking(False)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _ASK_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)


async def readable(connection: socket.socket) -> None:
    """Returns when there is something to receive, or the end of it."""
    loop = asyncio.get_running_loop()
    await _event(connection, loop.add_reader, loop.remove_reader)


async def unblocked(connection: socket.socket, attempt: Callable[[], Answer]) -> Answer:
    """What `attempt` answers, which is repeated as long as it would have to wait for the network.

    For greetings, of which few come at a time and which take no thread of the node.
    """
    loop = asyncio.get_running_loop()
    while True:
        try:
            return attempt()
        except (BlockingIOError, ssl.SSLWantReadError):
            await _event(connection, loop.add_reader, loop.remove_reader)
        except ssl.SSLWantWriteError:
            await _event(connection, loop.add_writer, loop.remove_writer)


async def undisturbed(job: asyncio.Future[Answer], stop: Callable[[], object]) -> Answer:
    """What a job answers. A caller who is cancelled stops the job, and leaves when it has ended."""
    cancelled = False
    while not job.done():
        try:
            await asyncio.wait([job])
        except asyncio.CancelledError:
            cancelled = True
            stop()
    if cancelled:
        if not job.cancelled():
            job.exception()  # Nobody else will ask.
        raise asyncio.CancelledError
    return job.result()


async def _event(
    connection: socket.socket, add: Callable[..., object], remove: Callable[[int], object]
) -> None:
    file = connection.fileno()
    event = asyncio.Event()
    add(file, event.set)
    try:
        await event.wait()
    finally:
        remove(file)


def _tail(tails: bytearray, number: int) -> memoryview:
    return memoryview(tails)[number * DIGEST_BYTES : (number + 1) * DIGEST_BYTES]


def _behind(views: list[memoryview], count: int) -> list[memoryview]:
    """What is left of them behind the first `count` bytes."""
    for number, view in enumerate(views):
        if count < len(view):
            return [view[count:], *views[number + 1 :]]
        count -= len(view)
    return []
