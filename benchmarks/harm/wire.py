"""Harm to frames on real gRPC connections, both ways: a real node, and a real client."""

import asyncio
import contextlib
import random
import shutil
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc

from benchmarks.harm.disk import fast_directory
from benchmarks.harm.frames import in_messages, mutate_frames, mutate_pieces, pieces_of
from benchmarks.tally import Tally
from kvstore.api.digest import block_digest
from kvstore.api.tier import BlockRef
from kvstore.api.v1 import kvstore_pb2 as pb
from kvstore.api.v1 import kvstore_pb2_grpc as pb_grpc
from kvstore.api.wire import pack_keys
from kvstore_client import AsyncClient, Space
from tests.sim.blocks import data_of, keys_of
from tests.sim.nodes import PATIENT, Nodes, descriptor_of, raw_channel

WRITES, READS = "write frames over gRPC", "read frames over gRPC"
BLOCK_BYTES = 300
BLOCKS = 4
RUNS = 24
CONTROLS = 2
WRITE, READ = "/kvstore.v1.KVStore/Write", "/kvstore.v1.KVStore/Read"
DECLARED = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}
"""How a write may end, if its bytes are messages."""
NO_MESSAGE = "DecodeError"
"""Stands in gRPC's own answer to bytes that are none, which comes with UNKNOWN."""


class LyingNode(grpc.GenericRpcHandler):
    """Answers every read with frames that were made before, and every other call with nothing."""

    def __init__(self) -> None:
        self.frames: dict[bytes, list[bytes]] = {}
        """What to answer to a read that asks for these keys."""

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        """The handler of `Read`."""
        if details.method != READ:
            return None
        return grpc.unary_stream_rpc_method_handler(self._read)

    async def _read(self, request: bytes, context: object) -> AsyncIterator[bytes]:
        for frame in self.frames[pb.ReadRequest.FromString(request).keys]:
            yield frame


class WireHarm:
    """Half of its trials mutate what a node receives, the other half what a client receives."""

    def __init__(self) -> None:
        self._home = fast_directory("kvstore-wire-")
        self._exits = contextlib.AsyncExitStack()
        self._space = Space.of(descriptor_of(BLOCK_BYTES))
        self._runs = [keys_of(f"wire {number}", BLOCKS) for number in range(RUNS)]
        self._lying = LyingNode()
        self._ready = False

    async def trials(self, rng: random.Random, note: str, tally: Tally) -> None:
        """One batch of writes, and one of reads."""
        if not self._ready:
            await self._start()
            self._ready = True
        await self._harm_writes(rng, note, tally)
        await self._harm_reads(rng, note, tally)

    async def _start(self) -> None:
        nodes = Nodes(self._home)
        self._exits.push_async_callback(nodes.finish)
        server = await nodes.start(disk={"enabled": False})
        channel = raw_channel(server)
        self._exits.push_async_callback(channel.close)
        self._stub: Any = pb_grpc.KVStoreStub(channel)
        self._write: Any = channel.stream_stream(WRITE)
        client = nodes.connect(server)
        await client.open_space(self._space.descriptor)
        lying = grpc.aio.server()
        lying.add_generic_rpc_handlers((self._lying,))
        port = lying.add_insecure_port("127.0.0.1:0")
        await lying.start()
        self._exits.push_async_callback(lying.stop, None)
        self._client = AsyncClient(f"127.0.0.1:{port}", budgets=PATIENT)
        self._exits.push_async_callback(self._client.close)

    # To the node.

    async def _harm_writes(self, rng: random.Random, note: str, tally: Tally) -> None:
        kinds, writes = [], []
        for number, keys in enumerate(self._runs):
            begin = pb.WriteBegin(space_id=self._space.space_id, keys=pack_keys(keys))
            pieces = pieces_of(rng, self._blocks(keys), "")
            kind = ""
            if number >= CONTROLS and rng.random() < 0.5:
                kind = mutate_pieces(rng, pieces)
            messages = [pb.WriteRequest(begin=begin)]
            messages += [pb.WriteRequest(pieces=each) for each in in_messages(rng, pieces)]
            frames = [message.SerializeToString() for message in messages]
            if number >= CONTROLS and not kind:
                kind = mutate_frames(rng, frames)
            kinds.append(kind)
            writes.append(self._send(frames))
        statuses = await asyncio.gather(*writes)
        held = await self._held()
        for keys, kind, status in zip(self._runs, kinds, statuses, strict=True):
            got = [held.get(key) for key in keys]
            right = [data for _, data in self._blocks(keys)]
            if not kind:
                tally.control(WRITES, got == right, note)
                continue
            tally.tried(WRITES, kind)
            if status:
                tally.failed(WRITES, f"{kind} ended with {status}", note)
            if any(data not in (None, wanted) for data, wanted in zip(got, right, strict=True)):
                tally.failed(WRITES, f"{kind} left wrong bytes", note)
        await self._stub.ClearSpace(pb.ClearSpaceRequest(space_id=self._space.space_id))

    async def _send(self, frames: Sequence[bytes]) -> str:
        """The status with which the node ends a write of these frames, if it may not."""
        call = self._write(iter(frames), timeout=PATIENT.store_s)
        with contextlib.suppress(grpc.aio.AioRpcError):
            async for _ in call:
                pass
        status: grpc.StatusCode = await call.code()
        if status in DECLARED or NO_MESSAGE in (await call.details() or ""):
            return ""
        return status.name

    async def _held(self) -> dict[bytes, bytes]:
        """What the node holds of all runs, without the client's judgement."""
        keys = [key for run in self._runs for key in run]
        request = pb.ReadRequest(space_id=self._space.space_id, keys=pack_keys(keys))
        held: dict[bytes, bytes] = {}
        async for reply in self._stub.Read(request, timeout=PATIENT.load_s):
            for piece in reply.pieces:
                if piece.data:
                    held[keys[piece.block]] = held.get(keys[piece.block], b"") + piece.data
        return held

    # To the client.

    async def _harm_reads(self, rng: random.Random, note: str, tally: Tally) -> None:
        kinds = []
        for number, keys in enumerate(self._runs):
            pieces = pieces_of(rng, self._blocks(keys), "memory")
            kind = ""
            if number >= CONTROLS and rng.random() < 0.5:
                kind = mutate_pieces(rng, pieces)
            messages = in_messages(rng, pieces)
            frames = [pb.ReadReply(pieces=each).SerializeToString() for each in messages]
            if number >= CONTROLS and not kind:
                kind = mutate_frames(rng, frames)
            kinds.append(kind)
            self._lying.frames[pack_keys(keys)] = frames
        delivered = await asyncio.gather(*(self._load(keys) for keys in self._runs))
        for keys, kind, got in zip(self._runs, kinds, delivered, strict=True):
            right = [data for _, data in self._blocks(keys)]
            if not kind:
                tally.control(READS, got == right, note)
                continue
            tally.tried(READS, kind)
            if any(data not in (None, wanted) for data, wanted in zip(got, right, strict=True)):
                tally.failed(READS, f"{kind} gave wrong bytes", note)

    async def _load(self, keys: list[bytes]) -> list[bytes | None]:
        """What the client delivers; it never raises."""
        buffers = [bytearray(BLOCK_BYTES) for _ in keys]
        answers = await self._client.load_any(self._space, keys, buffers)
        pairs = zip(answers, buffers, strict=True)
        return [bytes(buffer) if answer is not None else None for answer, buffer in pairs]

    def _blocks(self, keys: list[bytes]) -> list[tuple[bytes, bytes]]:
        """Digest and bytes of the blocks of a run."""
        space_id = self._space.space_id
        data = [data_of(BlockRef(space_id, key), BLOCK_BYTES) for key in keys]
        return [
            (block_digest(space_id, key, each), each) for key, each in zip(keys, data, strict=True)
        ]

    async def close(self) -> None:
        """Stops everything."""
        await self._exits.aclose()
        shutil.rmtree(self._home, ignore_errors=True)
