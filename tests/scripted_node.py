"""A small node that keeps blocks in a dict and misbehaves on purpose where a test says so."""

import asyncio
import contextlib
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc

from kvstore.api.keys import KEY_BYTES
from kvstore.api.v1 import kvstore_pb2 as pb
from kvstore.api.v1 import kvstore_pb2_grpc as pb_grpc
from kvstore.api.wire import MESSAGE_BYTES, PIECE_BYTES, descriptor_from_wire, unpack_keys
from kvstore_client.loop_thread import LoopThread

Context = grpc.aio.ServicerContext[Any, Any]
UnaryScript = Callable[[Any, Context], Awaitable[Any]]
ReadScript = Callable[[pb.ReadRequest, Context], AsyncIterator[pb.ReadReply]]
WriteScript = Callable[[AsyncIterator[pb.WriteRequest], Context], AsyncIterator[pb.WriteReply]]


def refusing(code: grpc.StatusCode) -> UnaryScript:
    """A script that ends a call with a status."""

    async def script(request: object, context: Context) -> None:
        await context.abort(code, "as the script says")

    return script


class ScriptedNode(pb_grpc.KVStoreServicer):
    """Keeps blocks by space and key. `scripts[method]` replaces that many of the next calls."""

    def __init__(self) -> None:
        self.blocks: dict[tuple[bytes, bytes], tuple[bytes, bytes]] = {}
        self.parents: dict[tuple[bytes, bytes], bytes] = {}
        self.opened: dict[bytes, int] = {}
        self.calls: Counter[str] = Counter()
        self.requests: list[Any] = []
        self.tokens: list[str] = []
        self.released = asyncio.Queue[bytes]()
        self.scripts: dict[str, deque[Any]] = {}
        self.events = asyncio.Queue[pb.WatchReply | None]()

    def play(self, method: str, *scripts: Any) -> None:
        """Replaces the next calls of a method by these scripts, one each."""
        self.scripts.setdefault(method, deque()).extend(scripts)

    def _note(self, method: str, request: object, context: Context) -> Any:
        self.calls[method] += 1
        self.requests.append(request)
        for name, value in context.invocation_metadata() or ():
            if name == "authorization":
                self.tokens.append(str(value))
        waiting = self.scripts.get(method)
        return waiting.popleft() if waiting else None

    async def _check_space(self, space_id: bytes, context: Context) -> int:
        if space_id not in self.opened:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "space_id: not opened")
        return self.opened[space_id]

    async def OpenSpace(self, request: pb.OpenSpaceRequest, context: Any) -> pb.OpenSpaceReply:
        if script := self._note("OpenSpace", request, context):
            reply: pb.OpenSpaceReply = await script(request, context)
            return reply
        descriptor = descriptor_from_wire(request.descriptor)
        self.opened[descriptor.space_id] = descriptor.block_bytes
        return pb.OpenSpaceReply(space_id=descriptor.space_id, max_message_bytes=MESSAGE_BYTES)

    async def Attach(self, request: pb.AttachRequest, context: Any) -> pb.AttachReply:
        return pb.AttachReply()  # Nothing is shared.

    async def Connect(self, request: pb.ConnectRequest, context: Any) -> pb.ConnectReply:
        return pb.ConnectReply()  # There is no bulk path.

    async def Match(self, request: pb.MatchRequest, context: Any) -> pb.MatchReply:
        if script := self._note("Match", request, context):
            reply: pb.MatchReply = await script(request, context)
            return reply
        keys = unpack_keys(request.keys)
        for space_id in request.space_ids:
            await self._check_space(space_id, context)
        length = 0
        while length < len(keys) and all(
            (space_id, keys[length]) in self.blocks for space_id in request.space_ids
        ):
            length += 1
        runs = [pb.Run(blocks=length, tier="memory", leased=True)] if length else []
        return pb.MatchReply(
            matched_blocks=length,
            lease_id=b"lease" if length and request.lease_ms else b"",
            lease_ms=request.lease_ms if length else 0,
            spaces=[pb.SpaceMatch(runs=runs) for _ in request.space_ids],
            load_estimate_us=250_000,
        )

    async def Locate(self, request: pb.LocateRequest, context: Any) -> pb.LocateReply:
        if script := self._note("Locate", request, context):
            reply: pb.LocateReply = await script(request, context)
            return reply
        await self._check_space(request.space_id, context)
        names = ((request.space_id, key) for key in unpack_keys(request.keys))
        return pb.LocateReply(tiers=["memory" if name in self.blocks else "" for name in names])

    async def Read(self, request: pb.ReadRequest, context: Any) -> AsyncIterator[pb.ReadReply]:
        if script := self._note("Read", request, context):
            async for reply in script(request, context):
                yield reply
            return
        await self._check_space(request.space_id, context)
        for index, key in enumerate(unpack_keys(request.keys)):
            for piece in self.pieces(index, request.space_id, key):
                yield pb.ReadReply(pieces=[piece])

    def pieces(self, index: int, space_id: bytes, key: bytes) -> list[pb.Piece]:
        """How an honest node answers for one block."""
        if (space_id, key) not in self.blocks:
            return [pb.Piece(block=index, header=pb.BlockHeader())]
        data, digest = self.blocks[space_id, key]
        header = pb.BlockHeader(bytes=len(data), digest=digest, tier="memory")
        starts = range(0, len(data), PIECE_BYTES)
        parts = [pb.Piece(block=index, data=data[at : at + PIECE_BYTES]) for at in starts]
        parts[0].header.CopyFrom(header)
        return parts

    async def Write(
        self, request_iterator: AsyncIterator[pb.WriteRequest], context: Any
    ) -> AsyncIterator[pb.WriteReply]:
        if script := self._note("Write", None, context):
            async for reply in script(request_iterator, context):
                yield reply
            return
        begin = (await anext(request_iterator)).begin
        self.requests[-1] = begin
        await self._check_space(begin.space_id, context)
        keys = unpack_keys(begin.keys)
        wanted = [at for at, key in enumerate(keys) if (begin.space_id, key) not in self.blocks]
        yield pb.WriteReply(offer=pb.WriteOffer(wanted=wanted))
        await self._take(begin, keys, request_iterator)
        held = [at for at, key in enumerate(keys) if (begin.space_id, key) in self.blocks]
        yield pb.WriteReply(done=pb.WriteDone(held=held))

    async def _take(
        self,
        begin: pb.WriteBegin,
        keys: list[bytes],
        messages: AsyncIterator[pb.WriteRequest],
    ) -> None:
        data = bytearray()
        header = pb.BlockHeader()
        async for message in messages:
            self.calls["write messages"] += 1
            assert sum(len(piece.data) for piece in message.pieces) <= PIECE_BYTES
            for piece in message.pieces:
                if piece.HasField("header"):
                    header = piece.header
                    data = bytearray()
                data += piece.data
                if len(data) == header.bytes:
                    name = (begin.space_id, keys[piece.block])
                    self.blocks[name] = (bytes(data), header.digest)
                    first = piece.block == 0
                    self.parents[name] = begin.parent_key if first else keys[piece.block - 1]

    async def Release(self, request: pb.ReleaseRequest, context: Any) -> pb.ReleaseReply:
        if script := self._note("Release", request, context):
            await script(request, context)
        self.released.put_nowait(request.lease_id)
        return pb.ReleaseReply()

    async def Hint(self, request: pb.HintRequest, context: Any) -> pb.HintReply:
        if script := self._note("Hint", request, context):
            await script(request, context)
        return pb.HintReply()

    async def Discard(self, request: pb.DiscardRequest, context: Any) -> pb.DiscardReply:
        if script := self._note("Discard", request, context):
            await script(request, context)
        await self._check_space(request.space_id, context)
        names = [(request.space_id, key) for key in unpack_keys(request.keys)]
        gone = [self.blocks.pop(name, None) for name in names]
        return pb.DiscardReply(discarded_blocks=sum(block is not None for block in gone))

    async def ClearSpace(self, request: pb.ClearSpaceRequest, context: Any) -> pb.ClearSpaceReply:
        if script := self._note("ClearSpace", request, context):
            await script(request, context)
        await self._check_space(request.space_id, context)
        names = [name for name in self.blocks if name[0] == request.space_id]
        for name in names:
            del self.blocks[name]
        return pb.ClearSpaceReply(cleared_blocks=len(names))

    async def Status(self, request: pb.StatusRequest, context: Any) -> pb.StatusReply:
        if script := self._note("Status", request, context):
            await script(request, context)
        return pb.StatusReply(
            version="0.1.0",
            node_id="node-a",
            uptime_s=12.5,
            spaces=len(self.opened),
            leases=1,
            leased_bytes=4096,
            counters={"kvstore_corrupt_total": 0.0},
            tiers=[
                pb.TierStatus(
                    name="memory", capacity_bytes=2**30, used_bytes=2**29, blocks=7, serving=True
                ),
                pb.TierStatus(name="redis", used_bytes=10, serving=False),
            ],
            nodes=[pb.NodeStatus(node_id="node-b", endpoint="10.0.0.2:7070")],
        )

    async def Watch(self, request: pb.WatchRequest, context: Any) -> AsyncIterator[pb.WatchReply]:
        self._note("Watch", request, context)
        await context.send_initial_metadata(())
        while (event := await self.events.get()) is not None:
            yield event

    async def Scrub(self, request: pb.ScrubRequest, context: Any) -> AsyncIterator[pb.ScrubReply]:
        self._note("Scrub", request, context)
        yield pb.ScrubReply()


class Health(grpc.GenericRpcHandler):
    """The standard health service, with an answer that tests choose."""

    def __init__(self) -> None:
        self.answer = b"\x08\x01"

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        """The handler of `Check`."""
        if details.method != "/grpc.health.v1.Health/Check":
            return None
        return grpc.unary_unary_rpc_method_handler(self._check)

    async def _check(self, request: bytes, context: object) -> bytes:
        return self.answer


@contextlib.asynccontextmanager
async def serving(
    node: ScriptedNode, health: Health | None = None, at: str = "127.0.0.1:0"
) -> AsyncIterator[tuple[str, grpc.aio.Server]]:
    """The endpoint at which the node answers, and the server that a test may stop."""
    server = grpc.aio.server()
    pb_grpc.add_KVStoreServicer_to_server(node, server)
    server.add_generic_rpc_handlers((health or Health(),))
    port = server.add_insecure_port(at)
    await server.start()
    try:
        yield f"127.0.0.1:{port}", server
    finally:
        await server.stop(None)


def key(number: int) -> bytes:
    """A key that a test can read."""
    return number.to_bytes(KEY_BYTES, "big")


def block(number: int, size_bytes: int) -> bytes:
    """Bytes that belong to a key, different at every offset that a mix-up could confuse."""
    unit = b"".join((number * 1_000_003 + at).to_bytes(4, "little") for at in range(256))
    return (unit * (size_bytes // len(unit) + 1))[:size_bytes]


class NodeThread:
    """A scripted node in a thread of its own, so that the test's thread may block."""

    def __init__(self) -> None:
        self._thread = LoopThread("scripted-node")
        self.node, self._context, self.endpoint = self._thread.run(self._start())

    async def _start(self) -> tuple[ScriptedNode, Any, str]:
        node = ScriptedNode()
        context = serving(node)
        endpoint, _ = await context.__aenter__()
        return node, context, endpoint

    def stop(self) -> None:
        """Ends server and thread."""
        self._thread.run(self._context.__aexit__(None, None, None))
        self._thread.stop()
