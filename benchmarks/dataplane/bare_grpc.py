"""The floor of the gRPC stream: grpcio with messages of plain bytes, and nothing else.

No protobuf, no digests, no index; on either end one copy between the messages and the memory that
the blocks come from or go to. The size of the messages is the knob; the channel has the options of
our own, and the other end keeps its memory as a node does. The call that does nothing is
the floor of a match.
"""

import struct
from collections.abc import AsyncIterator
from typing import Any

import grpc

from benchmarks.dataplane.ring import Ring, faulted_in
from kvstore.api.wire import STREAM_OPTIONS

_OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.use_local_subchannel_pool", 1),
    *STREAM_OPTIONS,
]
_SERVICE = "kvstore.dataplane.Floor"
_REQUEST = struct.Struct("<QQQQ")
"""Whose memory, where in it, how many bytes, and in messages of how many."""


class BareGrpc:
    """The client's end."""

    knob = 1 << 20

    def __init__(self, ring: Ring, owner: int, port: int) -> None:
        self._ring = ring
        self._owner = owner
        self._is_filled = False
        self._channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=_OPTIONS)
        self._open: Any = self._channel.unary_unary(f"/{_SERVICE}/Open")
        self._nothing: Any = self._channel.unary_unary(f"/{_SERVICE}/Nothing")
        self._put: Any = self._channel.stream_unary(f"/{_SERVICE}/Put")
        self._get: Any = self._channel.unary_stream(f"/{_SERVICE}/Get")

    async def prepare(self, op: str) -> None:
        """Takes memory on the other end, and fills it so that a get brings what was put."""
        size = self._ring.blocks * self._ring.block_bytes
        await self._open(_REQUEST.pack(self._owner, 0, size, 0))
        if op == "get" and not self._is_filled:
            await self.put(range(self._ring.blocks))
            self._is_filled = True

    async def put(self, places: range) -> None:
        """Out of the ring."""
        data, step = self._ring.source(places), self.knob
        call = self._put()
        await call.write(self._request(places, len(data)))
        for start in range(0, len(data), step):
            await call.write(bytes(data[start : start + step]))
        await call.done_writing()
        await call

    async def get(self, places: range) -> None:
        """Into the ring."""
        into = self._ring.target(places)
        done = 0
        async for message in self._get(self._request(places, len(into))):
            into[done : done + len(message)] = message
            done += len(message)
        assert done == len(into), f"{done} of {len(into)} bytes came"

    async def match(self, places: range) -> None:
        """Nothing, there and back."""
        await self._nothing(b"")

    async def close(self) -> None:
        """Hangs up."""
        await self._channel.close()

    def _request(self, places: range, size: int) -> bytes:
        return _REQUEST.pack(self._owner, places.start * self._ring.block_bytes, size, self.knob)


class BareGrpcServer:
    """The other end. `start` it in the event loop that will serve."""

    def __init__(self) -> None:
        self._arenas: dict[int, memoryview] = {}
        self._server = grpc.aio.server(options=_OPTIONS)
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        handlers: dict[str, Any] = {
            "Open": grpc.unary_unary_rpc_method_handler(self._open),
            "Nothing": grpc.unary_unary_rpc_method_handler(_nothing),
            "Put": grpc.stream_unary_rpc_method_handler(self._put),
            "Get": grpc.unary_stream_rpc_method_handler(self._get),
        }
        generic = grpc.method_handlers_generic_handler(_SERVICE, handlers)
        self._server.add_generic_rpc_handlers((generic,))

    async def start(self) -> None:
        """Answers from now on."""
        await self._server.start()

    async def stop(self) -> None:
        """Ends at once."""
        await self._server.stop(None)

    async def _open(self, request: bytes, context: Any) -> bytes:
        owner, _, size, _ = _REQUEST.unpack(request)
        if owner not in self._arenas:
            self._arenas[owner] = faulted_in(size)
        return b""

    async def _put(self, requests: AsyncIterator[bytes], context: Any) -> bytes:
        owner, start, _, _ = _REQUEST.unpack(await anext(requests))
        arena = self._arenas[owner]
        async for message in requests:
            arena[start : start + len(message)] = message
            start += len(message)
        return b""

    async def _get(self, request: bytes, context: Any) -> None:
        owner, start, size, step = _REQUEST.unpack(request)
        data = self._arenas[owner][start : start + size]
        for at in range(0, size, step):
            await context.write(bytes(data[at : at + step]))


async def _nothing(request: bytes, context: Any) -> bytes:
    return b""
