"""RESP on the socket of one of redis-py's connections: values go straight from and to memory.

redis-py finds the server, authenticates and keeps the connection; but it packs and parses a value
through several copies. What is sent here is never joined, and what comes is received where it is
to lie.
"""

import socket
import ssl

from kvstore.api.errors import TierError

AHEAD_BYTES = 4096
"""Read at once where a line is expected; no line of an answer may be longer."""
GATHER_BYTES = 1 << 20
GATHER_VIEWS = 128
"""What is gathered before it is sent: this much, or so many pieces."""
SKIM_BYTES = 1 << 16
_KEPT = (b"OOM", b"WRONGTYPE")
"""Errors about one command. Others (READONLY, LOADING, NOAUTH …) are about the server, which may
be another one when the connection is made anew."""


class Refused(TierError):
    """When Redis answers a command with an error; the answers behind it can be read."""


class Garbled(TierError):
    """When what comes is no answer to what was asked, or ends in the middle of one."""


class Wire:
    """Commands go out in the order in which they were given, and their answers come in that order.

    Belongs to one thread at a time. OSError (TimeoutError among them) from any method means what
    it means for a socket. Views that were given to `set` are read until `flush` has returned.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._joins = isinstance(connection, ssl.SSLSocket)
        self._outgoing: list[bytes | memoryview] = []
        self._outgoing_bytes = 0
        self._ahead = bytearray(AHEAD_BYTES)
        self._start = 0
        self._end = 0
        self._is_spoilt = False
        self.owed = 0
        """Answers that were not yet read to their end."""

    @property
    def is_idle(self) -> bool:
        """Whether somebody else may use the connection: no answer is on its way to us."""
        return not self.owed and not self._outgoing and not self._is_spoilt

    def shut(self) -> None:
        """Ends the connection under whoever waits at it; any thread may call."""
        # Not the method of an SSLSocket, which would take its state away from that thread.
        socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    # Asking.

    def get(self, key: bytes) -> None:
        """Asks for a value; `value` takes the answer."""
        self._gather(b"*2\r\n$3\r\nGET\r\n$%d\r\n%s\r\n" % (len(key), key))
        self.owed += 1

    def set(self, key: bytes, views: list[bytes | memoryview], ttl_s: int) -> None:
        """Stores one value, which lies in several places; `refusal` takes the answer."""
        size = sum(len(view) for view in views)
        ttl = b"%d" % ttl_s
        self._gather(b"*5\r\n$3\r\nSET\r\n$%d\r\n%s\r\n$%d\r\n" % (len(key), key, size))
        for view in views:
            self._gather(view)
        self._gather(b"\r\n$2\r\nEX\r\n$%d\r\n%s\r\n" % (len(ttl), ttl))
        self.owed += 1
        if self._outgoing_bytes >= GATHER_BYTES or len(self._outgoing) >= GATHER_VIEWS:
            self.flush()

    def flush(self) -> None:
        """Sends what was asked so far."""
        views, self._outgoing, self._outgoing_bytes = self._outgoing, [], 0
        if self._joins:
            for view in views:
                self._socket.sendall(view)
            return
        while views:
            sent = self._socket.sendmsg(views)
            done = 0
            while done < len(views) and sent >= len(views[done]):
                sent -= len(views[done])
                done += 1
            del views[:done]
            if sent:
                views[0] = memoryview(views[0])[sent:]

    def _gather(self, view: bytes | memoryview) -> None:
        if len(view):
            self._outgoing.append(view)
            self._outgoing_bytes += len(view)

    # Answers.

    def refusal(self) -> Refused | None:
        """The error with which Redis answered a `set`; None if it was done."""
        line = self._line()
        self.owed -= 1
        if line == b"+OK":
            return None
        return self._refused(line)

    def value(self) -> int | None:
        """How long the value is that comes next; None if there is none.

        All of it has to be received or skipped, and then `end` called, before the next answer.
        Raises `Refused` for an error, which is then the whole answer.
        """
        line = self._line()
        if line[:1] == b"$" and line[1:].isdigit():
            return int(line[1:])
        self.owed -= 1
        if line == b"$-1":
            return None
        raise self._refused(line)

    def receive(self, view: memoryview) -> None:
        """Fills `view` with what comes next of a value."""
        held = min(len(view), self._end - self._start)
        view[:held] = self._ahead[self._start : self._start + held]
        self._start += held
        while held < len(view):
            held += self._more(view[held:])

    def skip(self, size: int) -> None:
        """Lets go of what comes next of a value."""
        page = memoryview(bytearray(min(size, SKIM_BYTES)))
        while size:
            part = page[:size]
            self.receive(part)
            size -= len(part)

    def end(self) -> None:
        """Behind the last byte of a value."""
        if self._line():
            raise Garbled("redis: a value is longer than it was said to be")
        self.owed -= 1

    def _line(self) -> bytes:
        """The next line, without its end."""
        while (end := self._ahead.find(b"\r\n", self._start, self._end)) < 0:
            held = self._end - self._start
            if held == AHEAD_BYTES:
                raise Garbled("redis: an answer without an end")
            self._ahead[:held] = self._ahead[self._start : self._end]
            self._start, self._end = 0, held
            self._end += self._more(memoryview(self._ahead)[held:])
        line = bytes(self._ahead[self._start : end])
        self._start = end + 2
        return line

    def _more(self, view: memoryview) -> int:
        count = self._socket.recv_into(view)
        if not count:
            raise Garbled("redis: the connection was closed before the answer was whole")
        return count

    def _refused(self, line: bytes) -> Refused:
        if line[:1] != b"-":
            self._is_spoilt = True
            raise Garbled(f"redis: {line[:80]!r} is no answer to what was asked")
        self._is_spoilt = self._is_spoilt or line[1:].partition(b" ")[0] not in _KEPT
        return Refused(f"redis: {line[1:].decode(errors='replace')}")
