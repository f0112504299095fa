"""The floor of Redis: the same values on a bare socket, in parts, many commands in flight.

Nothing is parsed: every answer is as long as it has to be, and is compared with what it has to be.
"""

import socket
from urllib.parse import urlsplit

from benchmarks.dataplane.raw_socket import receive_exactly
from benchmarks.dataplane.ring import Ring

PART_BYTES = 2 << 20
_OK = b"+OK\r\n"


class RawResp:
    """SET and GET of the blocks of a ring. A batch is one pipeline.

    The knob is how many parts are asked for ahead: Redis makes all answers at once, in memory
    that it has to find, which costs more than the batch itself.
    """

    knob = 2

    def __init__(self, ring: Ring, owner: int, url: str) -> None:
        self._ring = ring
        self._owner = owner
        self._socket = _connect(url)
        self._is_filled = False

    async def prepare(self, op: str) -> None:
        """Sets every value once: from then on a put replaces one, as it does on our own path."""
        if not self._is_filled:
            self.put(range(self._ring.blocks))
            self._is_filled = True

    def put(self, places: range) -> None:
        """Out of the ring. Answers are so short that they wait in the socket until all is sent."""
        parts = self._parts(self._ring.sources(places), places)
        for key, part in parts:
            head = b"*3\r\n$3\r\nSET\r\n$%d\r\n%s\r\n$%d\r\n" % (len(key), key, len(part))
            _send_all(self._socket, [memoryview(head), part, memoryview(b"\r\n")])
        self._expect(_OK * len(parts))

    def get(self, places: range) -> None:
        """Into the ring, straight from the socket."""
        parts = self._parts(self._ring.targets(places), places)
        asks = [b"*2\r\n$3\r\nGET\r\n$%d\r\n%s\r\n" % (len(key), key) for key, _ in parts]
        self._socket.sendall(b"".join(asks[: self.knob]))
        before = b""
        for number, (_, part) in enumerate(parts):
            if number:
                self._socket.sendall(b"".join(asks[number + self.knob - 1 : number + self.knob]))
            self._expect(before + b"$%d\r\n" % len(part))
            receive_exactly(self._socket, part)
            before = b"\r\n"
        self._expect(before)

    async def close(self) -> None:
        """Hangs up."""
        self._socket.close()

    def _parts(self, blocks: list[memoryview], places: range) -> list[tuple[bytes, memoryview]]:
        return [
            (b"floor:%d:%d:%d" % (self._owner, place, at), block[at : at + PART_BYTES])
            for block, place in zip(blocks, places, strict=True)
            for at in range(0, len(block), PART_BYTES)
        ]

    def _expect(self, words: bytes) -> None:
        answer = bytearray(len(words))
        receive_exactly(self._socket, memoryview(answer))
        if answer != words:
            raise OSError(f"Redis answered {bytes(answer[:80])!r}")


def _connect(url: str) -> socket.socket:
    """A connection to redis://:password@host:port, past the greeting."""
    parts = urlsplit(url)
    assert parts.hostname is not None and parts.port is not None
    connection = socket.create_connection((parts.hostname, parts.port))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if parts.password:
        connection.sendall(f"AUTH {parts.password}\r\n".encode())
        answer = bytearray(len(_OK))
        receive_exactly(connection, memoryview(answer))
        if answer != _OK:
            raise OSError("Redis did not take the password")
    return connection


def _send_all(connection: socket.socket, views: list[memoryview]) -> None:
    """All of the views, in as few calls of the system as it takes."""
    while views:
        sent = connection.sendmsg(views)
        while views and sent >= len(views[0]):
            sent -= len(views.pop(0))
        if sent:
            views[0] = views[0][sent:]
