"""Calls that stop in the middle, at a random chunk: nobody takes the rest, or sends it."""

import asyncio
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kvstore.api.v1 import kvstore_pb2 as pb
from kvstore.api.wire import pack_keys
from kvstore_client import Space
from tests.sim.blocks import keys_of
from tests.sim.nodes import descriptor_of, digest_of, expected

if TYPE_CHECKING:
    from kvstore.api.v1.kvstore_pb2_grpc import KVStoreAsyncStub

BLOCK_BYTES = 64 << 10
SPACE = Space.of(descriptor_of(BLOCK_BYTES))
WARM, COLD = keys_of("warm", 64), keys_of("cold", 320)
RUNS = [keys_of(f"run {number}", 12) for number in range(24)]
READ_BLOCKS = 320
"""Twenty messages: more than the connection takes on its own, so that the node has to wait."""
LEASE_MS = 1000
TIMEOUT_S = 60.0
MOMENT_S = 0.003
OPERATIONS = ("read", "write", "match")


class Unfinished:
    """Begins calls and leaves them as they are."""

    def __init__(self, stub: "KVStoreAsyncStub", rng: random.Random) -> None:
        self._stub = stub
        self._rng = rng

    async def begin(self, operation: str) -> Any:
        """A call that has gone a random part of its way. Errors of the call are no news."""
        return await getattr(self, f"_{operation}")()

    async def _read(self) -> Any:
        lease_id = b""
        chain = self._rng.choice([WARM, COLD])
        if self._rng.random() < 0.3:
            lease_id = (await self._stub.Match(_match(chain), timeout=TIMEOUT_S)).lease_id
        at = self._rng.randrange(len(chain))
        keys = pack_keys(((chain[at:] + chain[:at]) * 8)[:READ_BLOCKS])
        request = pb.ReadRequest(space_id=SPACE.space_id, keys=keys, lease_id=lease_id)
        call = self._stub.Read(request, timeout=TIMEOUT_S)
        for _ in range(self._rng.randrange(4)):
            await call.read()
        return call

    async def _write(self) -> Any:
        keys = self._rng.choice(RUNS)
        packed = pack_keys(keys)
        discard = pb.DiscardRequest(space_id=SPACE.space_id, keys=packed)
        await self._stub.Discard(discard, timeout=TIMEOUT_S)
        call = self._stub.Write(timeout=TIMEOUT_S)
        begin = pb.WriteBegin(space_id=SPACE.space_id, keys=packed)
        await call.write(pb.WriteRequest(begin=begin))
        if self._rng.random() < 0.2:
            return call
        reply = await call.read()
        wanted = list(reply.offer.wanted) if isinstance(reply, pb.WriteReply) else []
        for index in wanted[: self._rng.randrange(8)]:
            await call.write(pb.WriteRequest(pieces=[_piece(index, keys, BLOCK_BYTES)]))
        if self._rng.random() < 0.8 and len(wanted) > 8:
            part = self._rng.randrange(1, BLOCK_BYTES)
            await call.write(pb.WriteRequest(pieces=[_piece(wanted[8], keys, part)]))
        return call

    async def _match(self) -> Any:
        call = self._stub.Match(_match(self._rng.choice([WARM, COLD])), timeout=TIMEOUT_S)
        await asyncio.sleep(self._rng.random() * MOMENT_S)
        return call


def _match(chain: Sequence[bytes]) -> pb.MatchRequest:
    return pb.MatchRequest(space_ids=[SPACE.space_id], keys=pack_keys(chain), lease_ms=LEASE_MS)


def _piece(index: int, keys: Sequence[bytes], size: int) -> pb.Piece:
    data = expected(SPACE, keys[index])
    header = pb.BlockHeader(bytes=len(data), digest=digest_of(SPACE, keys[index], data))
    return pb.Piece(block=index, header=header, data=data[:size])
