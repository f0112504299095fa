"""Messages, each behind its length, over a connected socket; both ends of an attachment have one.

Straight on the socket, without a stream in between: what is said is on its way at once, and what
has come is heard in the same turn of the event loop. Right after a copy, which leaves nothing in
the caches, each further step would cost as much as the message itself.
"""

import asyncio
import select
import socket
from collections.abc import Callable

from kvstore.api.local import LENGTH
from kvstore.api.wire import MESSAGE_BYTES

RECEIVE_BYTES = 1 << 18
MAX_GOING_BYTES = 4 * MESSAGE_BYTES
"""Of one without patience: past it the other side is taken for hung."""


class Messages:
    """One end of a connection, whose socket must not block. Owns the socket from now on.

    `listen` has messages heard; `close`, or the other side, ends it. Use it in one event loop.

    While more than `patience_bytes` wait to be taken by the other side, it is not heard either.
    One of both ends must always hear: otherwise they may wait for each other. It hangs up instead
    when `MAX_GOING_BYTES` wait.
    """

    def __init__(self, connection: socket.socket, patience_bytes: int | None = None) -> None:
        self._connection = connection
        self._file = connection.fileno()
        self._patience_bytes = patience_bytes
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._hear: Callable[[bytes], None] | None = None
        self._come = bytearray()
        self._going = bytearray()
        self._paused = False
        self._poll = select.poll()
        self._poll.register(self._file, select.POLLIN)

    @property
    def closed(self) -> bool:
        """True once the connection has ended: nothing is said or heard any more."""
        return self._ended.done()

    async def listen(self, hear: Callable[[bytes], None]) -> None:
        """Calls `hear` with each message until the connection ends.

        Raises what `hear` raises, OSError, or ValueError for what is no message: with each of
        these the connection has ended.
        """
        if self.closed:
            return
        self._hear = hear
        self._attend()
        self._hear_all()  # Who waited in place before may have received what nobody heard.
        try:
            await self._ended
        finally:
            self.close()

    def say(self, message: bytes) -> None:
        """Sends a message. That the other side has gone is heard, and not said here."""
        if self.closed:
            return
        packed = LENGTH.pack(len(message)) + message
        if not self._going:
            packed = packed[self._send(packed) :]
            if not packed:
                return
            self._loop.add_writer(self._file, self._writable)
        self._going += packed
        if self._patience_bytes is None and len(self._going) > MAX_GOING_BYTES:
            self._end(OSError(f"{len(self._going)} bytes are not taken by the other side"))
        self._attend()

    def wait(self, most_ms: int) -> None:
        """Hears what comes next, in place: nothing else runs in the loop meanwhile."""
        if not self.closed and self._poll.poll(most_ms):
            self._readable()

    def pause(self) -> None:
        """Nothing is heard until `resume`, not even that the other side hangs up."""
        self._paused = True
        self._attend()

    def resume(self) -> None:
        """Hears on, first of all what has come already."""
        self._paused = False
        self._attend()
        self._hear_all()

    def close(self) -> None:
        """Hangs up. Later calls change nothing."""
        self._end(None)

    @property
    def _deaf(self) -> bool:
        patience_bytes = self._patience_bytes
        impatient = patience_bytes is not None and len(self._going) > patience_bytes
        return self._paused or impatient

    def _attend(self) -> None:
        """Has the loop tell of what comes, or not."""
        if self.closed:
            return
        if self._deaf:
            self._loop.remove_reader(self._file)
        elif self._hear is not None:
            self._loop.add_reader(self._file, self._readable)

    def _readable(self) -> None:
        if self.closed:
            return
        try:
            data = self._connection.recv(RECEIVE_BYTES)
        except (BlockingIOError, InterruptedError):
            return  # It was heard in place.
        except OSError as error:
            self._end(error)
            return
        if not data:
            self._end(ValueError("it ended inside a message") if self._come else None)
            return
        self._come += data
        self._hear_all()

    def _hear_all(self) -> None:
        try:
            while not self._deaf and not self.closed and self._hear is not None:
                message = self._next()
                if message is None:
                    return
                self._hear(message)
        except Exception as error:  # noqa: BLE001  Raised by `listen`.
            self._end(error)

    def _next(self) -> bytes | None:
        """The next message, if all of it has come. Raises ValueError for one that is too long."""
        if len(self._come) < LENGTH.size:
            return None
        [length] = LENGTH.unpack_from(self._come)
        if length > MESSAGE_BYTES:
            raise ValueError(f"a message of {length} bytes; at most {MESSAGE_BYTES} are taken")
        end = LENGTH.size + length
        if len(self._come) < end:
            return None
        message = bytes(self._come[LENGTH.size : end])
        del self._come[:end]
        return message

    def _writable(self) -> None:
        was_deaf = self._deaf
        del self._going[: self._send(self._going)]
        if not self._going:
            self._loop.remove_writer(self._file)
        if was_deaf and not self._deaf:
            self.resume()

    def _send(self, data: bytes | bytearray) -> int:
        """How much of it went; all of it where nobody is left to take it."""
        try:
            return self._connection.send(data)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError:
            return len(data)

    def _end(self, error: Exception | None) -> None:
        if self._ended.done():
            if self._connection.fileno() >= 0:  # `listen` was cancelled, and this with it.
                self._let_go()
            return
        self._let_go()
        if error is None:
            self._ended.set_result(None)
        else:
            self._ended.set_exception(error)
            self._ended.exception()  # Seen: where nobody listens, nobody wants to know.

    def _let_go(self) -> None:
        self._loop.remove_reader(self._file)
        self._loop.remove_writer(self._file)
        self._connection.close()
