"""The floor of the bulk path: one TCP stream between two processes, `recv_into` on both ends.

A call is a header, then the bytes in one direction; a put is answered with one byte.
"""

import socket
import struct
import threading

from benchmarks.dataplane.ring import Ring, faulted_in

_REQUEST = struct.Struct("<cQQ")
"""What is asked for (`h`: this much memory; `p`: put; `g`: get), where, and how much."""
_DONE = b"."


class RawSocket:
    """The client's end."""

    knob = 0

    def __init__(self, ring: Ring, port: int) -> None:
        self._ring = ring
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.sendall(_REQUEST.pack(b"h", 0, ring.blocks * ring.block_bytes))
        self._hear_done()
        self._is_filled = False

    async def prepare(self, op: str) -> None:
        """Fills the other end once, so that a get brings what was put."""
        if op == "get" and not self._is_filled:
            self.put(range(self._ring.blocks))
            self._is_filled = True

    def put(self, places: range) -> None:
        """Out of the ring, in one call of the system for all blocks."""
        data = self._ring.source(places)
        start = places.start * self._ring.block_bytes
        self._socket.sendall(_REQUEST.pack(b"p", start, len(data)))
        self._socket.sendall(data)
        self._hear_done()

    def get(self, places: range) -> None:
        """Into the ring."""
        into = self._ring.target(places)
        start = places.start * self._ring.block_bytes
        self._socket.sendall(_REQUEST.pack(b"g", start, len(into)))
        receive_exactly(self._socket, into)

    async def close(self) -> None:
        """Hangs up."""
        self._socket.close()

    def _hear_done(self) -> None:
        answer = bytearray(1)
        receive_exactly(self._socket, memoryview(answer))


class RawSocketServer:
    """The other end: a thread for each connection, each with memory of its own."""

    def __init__(self) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            connection, _ = self._listening.accept()
            threading.Thread(target=_serve, args=(connection,), daemon=True).start()


def _serve(connection: socket.socket) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    arena = memoryview(b"")
    request = bytearray(_REQUEST.size)
    with connection:
        while True:
            try:
                receive_exactly(connection, memoryview(request))
            except ConnectionError:
                return
            what, start, size = _REQUEST.unpack(request)
            if what == b"h":
                arena = faulted_in(size)
                connection.sendall(_DONE)
            elif what == b"p":
                receive_exactly(connection, arena[start : start + size])
                connection.sendall(_DONE)
            else:
                connection.sendall(arena[start : start + size])


def receive_exactly(connection: socket.socket, into: memoryview) -> None:
    """Fills `into`. Raises ConnectionError if the other end hangs up before."""
    done = 0
    while done < len(into):
        count = connection.recv_into(into[done:])
        if count == 0:
            raise ConnectionError("the other end hung up")
        done += count
