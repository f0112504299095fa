"""What the tests of the client share: spaces, blocks, misbehaviour and patience."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc

from kvstore.api.digest import block_digest
from kvstore.api.space import SpaceDescriptor
from kvstore.api.v1 import kvstore_pb2 as pb
from kvstore_client import Budgets, Space
from tests.scripted_node import ScriptedNode, block, key

BLOCK_BYTES = 3 << 10
PATIENT = Budgets(open_s=30, match_s=30, load_s=30, store_s=30, control_s=30)
SHORT_S = 0.25
READY = grpc.ChannelConnectivity.READY
FAR_BELOW_FOREVER_S = 20.0


def descriptor(block_bytes: int = BLOCK_BYTES, **changes: Any) -> SpaceDescriptor:
    """A space of small blocks."""
    values: dict[str, Any] = {
        "model": "tiny",
        "revision": "1",
        "dtype": "bfloat16",
        "layout": "LKHD",
        "block_tokens": 16,
        "block_bytes": block_bytes,
    }
    return SpaceDescriptor(**(values | changes))


def buffers(count: int, size_bytes: int = BLOCK_BYTES) -> list[bytearray]:
    """Empty buffers."""
    return [bytearray(size_bytes) for _ in range(count)]


def fill(node: ScriptedNode, space: Space, count: int) -> list[bytes]:
    """Puts blocks 0 … count - 1 into the node and answers their keys."""
    for number in range(count):
        data = block(number, space.block_bytes)
        digest = block_digest(space.space_id, key(number), data)
        node.blocks[space.space_id, key(number)] = (data, digest)
    return [key(number) for number in range(count)]


@contextlib.contextmanager
def within(limit_s: float = FAR_BELOW_FOREVER_S) -> Any:
    """Fails if what is inside waited for a node that never answers."""
    start_s = time.monotonic()
    yield
    assert time.monotonic() - start_s < limit_s


def altered(
    node: ScriptedNode, alter: Callable[[list[pb.Piece]], list[pb.Piece]]
) -> Callable[[pb.ReadRequest, object], AsyncIterator[pb.ReadReply]]:
    """A read that first puts all its honest pieces through `alter`."""

    async def script(request: pb.ReadRequest, context: object) -> AsyncIterator[pb.ReadReply]:
        keys = [request.keys[at : at + 32] for at in range(0, len(request.keys), 32)]
        pieces = [p for i, k in enumerate(keys) for p in node.pieces(i, request.space_id, k)]
        for piece in alter(pieces):
            yield pb.ReadReply(pieces=[piece])

    return script


async def hanging(request: object, context: object) -> Any:
    """Never answers."""
    await asyncio.Event().wait()


async def hanging_stream(request: object, context: object) -> AsyncIterator[Any]:
    """Never answers."""
    await asyncio.Event().wait()
    yield
