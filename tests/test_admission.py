"""What calls may hold, who waits, who is shed, and what a caller sees of it."""

import asyncio
import random
from contextlib import AsyncExitStack, suppress
from typing import TYPE_CHECKING

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvstore.admission import Admission, Limits
from kvstore.api.errors import Shed
from kvstore.api.v1 import kvstore_pb2 as pb
from kvstore.api.v1.kvstore_pb2_grpc import KVStoreStub
from kvstore.api.wire import descriptor_to_wire, pack_keys
from kvstore.server import NodeServer
from kvstore_client import AsyncClient, Space
from tests.sim.blocks import keys_of
from tests.sim.clock import ManualClock, settle
from tests.sim.nodes import Nodes, counter, descriptor_of, expected, load, raw_channel, store
from tests.sim.rig import assert_idle

if TYPE_CHECKING:
    from kvstore.api.v1.kvstore_pb2_grpc import KVStoreAsyncStub

PATIENCE_S = 30.0
LIMITS = Limits(calls=4, waiting_calls=3, wait_s=60, inflight_bytes=1000, client_bytes=600)


@pytest.fixture
def clock() -> ManualClock:
    """Time that a test moves."""
    return ManualClock()


@pytest.fixture
def admission(clock: ManualClock) -> Admission:
    """A small one."""
    return Admission(LIMITS, clock)


class Calls:
    """Calls that hold what they were admitted for until they are told to end."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._ends: dict[str, asyncio.Event] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self.admitted: list[str] = []

    async def begin(self, name: str, client: str, size: int, left_s: float = 1000) -> None:
        """A call comes in; nothing is said of whether it was admitted."""
        self._ends[name] = asyncio.Event()
        self._tasks[name] = asyncio.create_task(self._run(name, client, size, left_s))
        await settle()

    async def end(self, name: str) -> None:
        """A call ends, or its caller goes away."""
        self._ends[name].set()
        await settle()

    async def vanish(self, name: str) -> None:
        """A caller goes away."""
        self._tasks[name].cancel()
        await settle()

    async def reason(self, name: str) -> str:
        """Why a call was shed; nothing if it was not."""
        with suppress(asyncio.CancelledError):
            try:
                async with asyncio.timeout(PATIENCE_S):
                    await self._tasks[name]
            except Shed as shed:
                return shed.reason
        return ""

    async def _run(self, name: str, client: str, size: int, left_s: float) -> None:
        async with self._admission.admitted(client, size, left_s):
            self.admitted.append(name)
            self._admission.check()
            await self._ends[name].wait()
        self._admission.check()


async def test_bytes_are_bounded_for_each_client_and_in_total(admission: Admission) -> None:
    """Who meets his own limit waits without holding others up; who meets everybody's, in order."""
    calls = Calls(admission)
    await calls.begin("a1", "a", 500)
    await calls.begin("a2", "a", 500)
    await calls.begin("b1", "b", 400)
    await calls.begin("b2", "b", 100)
    assert calls.admitted == ["a1", "b1", "b2"]
    assert (admission.calls, admission.inflight_bytes, admission.waiting_calls) == (3, 1000, 1)
    await calls.begin("c1", "c", 100)
    await calls.end("b2")
    assert calls.admitted == ["a1", "b1", "b2", "c1"], "a2 still meets its own limit"
    await calls.end("a1")
    assert calls.admitted[-1] == "a2"
    for name in ("a2", "b1", "c1"):
        await calls.end(name)
    assert (admission.calls, admission.inflight_bytes, admission.waiting_calls) == (0, 0, 0)


async def test_a_large_call_is_not_overtaken_by_small_ones(admission: Admission) -> None:
    """Otherwise it might wait for good."""
    calls = Calls(admission)
    await calls.begin("a", "a", 600)
    await calls.begin("large", "b", 600)
    await calls.begin("small", "c", 10)
    assert calls.admitted == ["a"]
    await calls.end("a")
    assert calls.admitted == ["a", "large", "small"]


async def test_a_call_larger_than_its_limit_is_admitted_alone(admission: Admission) -> None:
    """A block may be larger than what a client may hold; it is served, but nothing beside it."""
    calls = Calls(admission)
    await calls.begin("huge", "a", 10**9)
    await calls.begin("small", "a", 1)
    assert calls.admitted == ["huge"]
    assert admission.inflight_bytes == LIMITS.client_bytes


async def test_few_wait_and_the_rest_is_shed_at_once(admission: Admission) -> None:
    """With the reason; and a wait that would outlast the caller's patience does not begin."""
    calls = Calls(admission)
    for number in range(4 + 3):
        await calls.begin(str(number), str(number), 10)
    assert len(calls.admitted) == 4
    await calls.begin("late", "late", 10)
    assert await calls.reason("late") == "calls"
    await calls.end("0")
    assert calls.admitted[-1] == "4"


async def test_who_would_wait_too_long_is_shed_at_once(
    admission: Admission, clock: ManualClock
) -> None:
    """By how long calls lasted lately: with seconds to spare he waits, with a moment not."""
    calls = Calls(admission)
    for number in range(50):
        await calls.begin(str(number), "a", 600)
        await clock.advance(2.0)
        await calls.end(str(number))
    await calls.begin("holder", "a", 600)
    await calls.begin("patient", "a", 600, left_s=60)
    await calls.begin("hurried", "a", 600, left_s=1)
    assert await calls.reason("hurried") == "client_bytes"
    assert admission.waiting_calls == 1
    await calls.end("holder")
    assert calls.admitted[-1] == "patient"


async def test_a_wait_in_vain_ends_in_time(clock: ManualClock) -> None:
    """Nothing was known of how long calls last; he is shed after his patience, not later."""
    limits = Limits(calls=1, waiting_calls=3, wait_s=0.01, inflight_bytes=10, client_bytes=10)
    admission = Admission(limits, clock)
    calls = Calls(admission)
    await calls.begin("holder", "a", 10)
    await calls.begin("waiter", "b", 10)
    assert await calls.reason("waiter") == "late"
    assert (admission.calls, admission.waiting_calls) == (1, 0)


async def test_random_callers_who_come_go_and_vanish(rng: random.Random) -> None:
    """Nothing is lost, whatever the order; at the end nobody holds or waits."""
    admission = Admission(LIMITS, ManualClock())
    calls = Calls(admission)
    names: list[str] = []
    for number in range(600):
        if names and rng.random() < 0.5:
            name = names.pop(rng.randrange(len(names)))
            await rng.choice([calls.end, calls.vanish])(name)
        else:
            names.append(str(number))
            await calls.begin(names[-1], rng.choice("abc"), rng.randrange(700))
        admission.check()
    for name in names:
        await calls.end(name)
    assert (admission.calls, admission.inflight_bytes, admission.waiting_calls) == (0, 0, 0)
    assert not admission._client_calls
    assert not admission._client_bytes


# Over gRPC.

BLOCK_BYTES = 1 << 20
MEMORY = {"capacity_bytes": 16 << 20, "slab_bytes": 1 << 20}
DISK = {"capacity_bytes": 64 << 20, "segment_bytes": 8 << 20}
NARROW = {"inflight_bytes": 8 << 20, "inflight_bytes_per_client": 4 << 20, "waiting_calls": 0}


async def filled(
    nodes: Nodes, server: NodeServer, count: int
) -> tuple[AsyncClient, Space, list[bytes]]:
    """A client, a space of large blocks, and a chain of them that is stored."""
    client = nodes.connect(server)
    space = await client.open_space(descriptor_of(BLOCK_BYTES))
    keys = keys_of("chain", count)
    assert await store(client, space, keys) == [True] * count
    return client, space, keys


def connection(server: NodeServer) -> grpc.aio.Channel:
    """A connection of its own: channels of one process share one otherwise."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    return grpc.aio.insecure_channel(server.endpoint, options=options)


async def unread(
    stub: "KVStoreAsyncStub", space: Space, keys: list[bytes]
) -> "grpc.aio.UnaryStreamCall[pb.ReadRequest, pb.ReadReply]":
    """A read of which nobody takes more than the first message."""
    call = stub.Read(pb.ReadRequest(space_id=space.space_id, keys=pack_keys(keys)))
    assert isinstance(await call.read(), pb.ReadReply)
    return call


async def test_a_node_with_too_much_on_its_way_says_so_and_stays_reachable(nodes: Nodes) -> None:
    """RESOURCE_EXHAUSTED names the setting and when to come back; health and status answer."""
    server = await nodes.start(server=NARROW, memory=MEMORY)
    client, space, keys = await filled(nodes, server, 8)
    async with AsyncExitStack() as stack:
        for _ in range(2):
            channel = await stack.enter_async_context(connection(server))
            await unread(KVStoreStub(channel), space, keys * 20)
        channel = await stack.enter_async_context(connection(server))
        call = KVStoreStub(channel).Read(
            pb.ReadRequest(space_id=space.space_id, keys=pack_keys(keys))
        )
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await call.read()
        assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "server.inflight_bytes: " in (error.value.details() or "")
        trailing = dict(error.value.trailing_metadata() or ())
        assert int(trailing["grpc-retry-pushback-ms"]) > 0
        assert await client.health()
        status = await client.status()
        assert status.counters["kvstore_inflight_calls"] == 2
        assert status.counters["kvstore_inflight_bytes"] == 8 << 20
        assert await load(client, space, keys[:1]) == [None]
        assert client.counters == {"load_refused": 1}
    assert counter(server, "shed_calls", reason="bytes") == 2
    async with asyncio.timeout(PATIENCE_S):
        while server.calls.admission.calls:
            await settle()
    assert await load(client, space, keys[:1]) == ["memory"]


async def test_one_client_does_not_crowd_out_the_others(nodes: Nodes) -> None:
    """Who holds all that he may is refused; his neighbour is served."""
    server = await nodes.start(server=NARROW, memory=MEMORY)
    client, space, keys = await filled(nodes, server, 4)
    async with connection(server) as channel:
        stub = KVStoreStub(channel)
        await unread(stub, space, keys * 20)
        call = stub.Read(pb.ReadRequest(space_id=space.space_id, keys=pack_keys(keys)))
        with pytest.raises(grpc.aio.AioRpcError, match=r"server\.inflight_bytes_per_client"):
            await call.read()
        assert await load(client, space, keys) == ["memory"] * 4
    assert await server.calls.finished(PATIENCE_S)


async def one_step() -> None:
    """Lets every coroutine that could go on take a single step."""
    await asyncio.sleep(0)


async def test_a_cancelled_read_gives_everything_back_at_once(nodes: Nodes) -> None:
    """Its pins and bytes, without waiting for a collector of garbage."""
    server = await nodes.start(memory=MEMORY)
    _, space, keys = await filled(nodes, server, 4)
    async with raw_channel(server) as channel:
        call = await unread(KVStoreStub(channel), space, keys * 20)
        assert any(slot.pins for slot in server.node.tiers.memory.slots())
        call.cancel()
        async with asyncio.timeout(PATIENCE_S):
            while server.calls.admission.calls:
                await one_step()  # Not one more: a call that is over holds nothing.
        assert_idle(server.node.tiers.memory)
    assert counter(server, "requests", op="read", status="cancelled") == 1


async def test_a_call_without_a_deadline_gets_one(nodes: Nodes) -> None:
    """It ends with the node's own, and names the setting."""
    server = await nodes.start(server={"max_deadline_s": 0.05}, memory=MEMORY)
    async with raw_channel(server) as channel:
        stub = KVStoreStub(channel)
        await stub.OpenSpace(pb.OpenSpaceRequest(descriptor=descriptor_to_wire(descriptor_of())))
        call = stub.Write()
        begin = pb.WriteBegin(
            space_id=Space.of(descriptor_of()).space_id, keys=pack_keys(keys_of("chain", 1))
        )
        await call.write(pb.WriteRequest(begin=begin))
        assert isinstance(await call.read(), pb.WriteReply)
        with pytest.raises(grpc.aio.AioRpcError, match=r"server\.max_deadline_s") as error:
            await call.read()
        assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert not server.calls.admission.calls


async def test_a_write_that_is_refused_in_the_middle_hears_why(nodes: Nodes) -> None:
    """Also while its caller is still sending: the status is the node's, not gRPC's own."""
    server = await nodes.start(memory=MEMORY)
    client = nodes.connect(server)
    space = await client.open_space(descriptor_of(BLOCK_BYTES))
    keys = keys_of("chain", 8)
    async with raw_channel(server) as channel:
        call = KVStoreStub(channel).Write()
        begin = pb.WriteBegin(space_id=space.space_id, keys=pack_keys(keys))
        await call.write(pb.WriteRequest(begin=begin))
        assert isinstance(await call.read(), pb.WriteReply)
        for key in keys:
            header = pb.BlockHeader(bytes=1, digest=bytes(16))
            piece = pb.Piece(block=0, header=header, data=expected(space, key))
            await call.write(pb.WriteRequest(pieces=[piece]))
        await call.done_writing()
        with pytest.raises(grpc.aio.AioRpcError, match=r"pieces\.header\.bytes") as error:
            await call.read()
        assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert_idle(server.node.tiers.memory)


# The end of a node.


async def test_a_drain_waits_for_calls_and_then_hands_them_back(nodes: Nodes) -> None:
    """New ones are refused at once; what does not come to its end gets UNAVAILABLE, in time."""
    server = await nodes.start(server={"drain_timeout_s": 2.0}, memory=MEMORY, disk=DISK)
    client, space, keys = await filled(nodes, server, 2)
    async with raw_channel(server) as channel:
        call = KVStoreStub(channel).Write()
        begin = pb.WriteBegin(space_id=space.space_id, keys=pack_keys(keys_of("other", 1)))
        await call.write(pb.WriteRequest(begin=begin))
        assert isinstance(await call.read(), pb.WriteReply)
        events = await client.watch()
        stopping = asyncio.create_task(nodes.stop(server))
        assert isinstance(await anext(events), pb.Draining)
        assert await load(client, space, keys) == [None] * 2
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await call.read()
        assert error.value.code() is grpc.StatusCode.UNAVAILABLE
        async with asyncio.timeout(PATIENCE_S):
            await stopping
    again = await nodes.start(memory=MEMORY, disk=DISK)
    client = nodes.connect(again)
    assert await load(client, space, keys) == ["disk"] * 2, "what was stored was flushed"


async def test_who_only_watches_the_health_delays_no_drain(nodes: Nodes) -> None:
    """Such a stream has no end of its own."""
    server = await nodes.start(server={"drain_timeout_s": 600})
    async with raw_channel(server) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        async with asyncio.timeout(PATIENCE_S):
            await nodes.stop(server)
