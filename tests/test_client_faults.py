"""The client against nodes that are dead, silent, unwilling, forgetful or dying."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from kvstore.api.channel import open_channel
from kvstore.api.clock import SystemClock
from kvstore.api.errors import (
    KvstoreError,
    Unavailable,
    UnknownSpace,
)
from kvstore.api.hint import ReuseHint
from kvstore.api.v1 import kvstore_pb2 as pb
from kvstore.api.v1.kvstore_pb2_grpc import add_KVStoreServicer_to_server
from kvstore_client import AsyncClient, Match, Space
from kvstore_client.budgets import Deadline
from kvstore_client.caller import Caller
from tests.client_rig import (
    BLOCK_BYTES,
    PATIENT,
    READY,
    SHORT_S,
    buffers,
    descriptor,
    fill,
    hanging,
    hanging_stream,
    within,
)
from tests.scripted_node import ScriptedNode, block, key, refusing, serving

pytest_plugins = ["tests.client_fixtures"]


async def test_a_dead_endpoint_is_a_miss(unused_endpoint: str) -> None:
    """Nobody listens: every hot call misses and counts, every other raises `Unavailable`."""
    space = Space.of(descriptor())
    async with AsyncClient(unused_endpoint, budgets=PATIENT) as client:
        with within():
            assert await client.match([space], [key(1)]) == Match.none()
            assert await client.load(space, [key(1)], buffers(1)) == []
            assert await client.load_any(space, [key(1)], buffers(1)) == [None]
            assert await client.store(space, [key(1)], [bytes(BLOCK_BYTES)]) == [False]
            await client.release(Match(1, (), b"lease"))
            await client.hint(space, [key(1)], ReuseHint())
            assert not await client.health()
            for call in (client.open_space(space.descriptor), client.status()):
                with pytest.raises(Unavailable):
                    await call
        assert client.counters == {
            "match_failed": 1,
            "load_failed": 2,
            "store_failed": 1,
            "release_failed": 1,
            "hint_failed": 1,
        }
        assert not client.connected


async def test_a_silent_node_is_late(node: ScriptedNode, client: AsyncClient, space: Space) -> None:
    """Past the budget it is a miss, whatever the node does."""
    node.play("Match", hanging)
    node.play("Read", hanging_stream)
    node.play("Write", hanging_stream)
    with within():
        assert await client.match([space], [key(1)], budget_s=SHORT_S) == Match.none()
        assert await client.load(space, [key(1)], buffers(1), budget_s=SHORT_S) == []
        stored = await client.store(space, [key(1)], [bytes(BLOCK_BYTES)], budget_s=SHORT_S)
    assert stored == [False]
    assert client.counters == {"match_late": 1, "load_late": 1, "store_late": 1}


async def test_a_spent_budget_asks_nobody(
    node: ScriptedNode, client: AsyncClient, space: Space
) -> None:
    """An engine may hand in what it has left, be it nothing."""
    assert await client.match([space], [key(1)], budget_s=0) == Match.none()
    assert await client.load(space, [key(1)], buffers(1), budget_s=-1) == []
    assert client.counters == {"match_late": 1, "load_late": 1}
    assert set(node.calls) == {"OpenSpace"}


async def test_at_the_deadline_load_gives_what_arrived_and_writes_no_more(
    node: ScriptedNode, client: AsyncClient, space: Space
) -> None:
    """Two blocks and half of a third in time: two answers, and the buffers stay as they are."""
    keys = fill(node, space, 4)
    go_on = asyncio.Event()
    sent = asyncio.Event()

    async def script(request: pb.ReadRequest, context: object) -> AsyncIterator[pb.ReadReply]:
        for index in (0, 1):
            yield pb.ReadReply(pieces=node.pieces(index, space.space_id, keys[index]))
        third = node.pieces(2, space.space_id, keys[2])[0]
        rest = third.data[100:]
        third.data = third.data[:100]
        yield pb.ReadReply(pieces=[third])
        try:
            await go_on.wait()
            yield pb.ReadReply(pieces=[pb.Piece(block=2, data=rest)])
        finally:
            sent.set()

    node.play("Read", script)
    into = buffers(4)
    loaded = await client.load(space, keys, into, budget_s=1.0)
    before = [bytes(buffer) for buffer in into]
    go_on.set()
    await sent.wait()
    await client.status()
    assert len(loaded) == 2
    assert [bytes(buffer) for buffer in into] == before
    assert before[1] == block(1, BLOCK_BYTES)
    assert client.counters == {"load_late": 1}


async def test_a_cancelled_load_writes_no_more(
    node: ScriptedNode, client: AsyncClient, space: Space
) -> None:
    """Cancelling the caller's task is not swallowed, and ends the call at the node."""
    keys = fill(node, space, 1)
    reading, cancelled = asyncio.Event(), asyncio.Event()

    async def script(request: pb.ReadRequest, context: object) -> AsyncIterator[pb.ReadReply]:
        reading.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()
        yield pb.ReadReply(pieces=node.pieces(0, space.space_id, keys[0]))

    node.play("Read", script)
    into = buffers(1)
    task = asyncio.create_task(client.load(space, keys, into))
    await reading.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await cancelled.wait()
    assert bytes(into[0]) == bytes(BLOCK_BYTES)


async def test_a_load_that_has_enough_hangs_up(
    node: ScriptedNode, client: AsyncClient, space: Space
) -> None:
    """At the first hole the rest is of no use: the node is told to stop sending."""
    keys = fill(node, space, 3)
    stopped = asyncio.Event()

    async def script(request: pb.ReadRequest, context: object) -> AsyncIterator[pb.ReadReply]:
        yield pb.ReadReply(pieces=[pb.Piece(block=0, header=pb.BlockHeader())])
        try:
            await asyncio.Event().wait()
        finally:
            stopped.set()

    node.play("Read", script)
    assert await client.load(space, keys, buffers(3)) == []
    await stopped.wait()
    assert not client.counters


async def test_a_read_that_begins_again_begins_at_the_front(
    node: ScriptedNode, client: AsyncClient, space: Space
) -> None:
    """The node forgets the space after its first block: the repetition gives all three."""
    keys = fill(node, space, 3)

    async def script(request: pb.ReadRequest, context: Any) -> AsyncIterator[pb.ReadReply]:
        yield pb.ReadReply(pieces=node.pieces(0, space.space_id, keys[0]))
        await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "space_id: not opened")

    node.play("Read", script)
    assert len(await client.load(space, keys, buffers(3))) == 3
    assert client.counters == {"space_reopened": 1}


async def test_a_budget_ends_what_is_no_call(unused_endpoint: str) -> None:
    """The deadline does not hang on gRPC alone."""
    caller = Caller(open_channel(unused_endpoint), None, SystemClock())
    with within():
        deadline = Deadline(SystemClock(), SHORT_S)
        assert await caller.quietly("match", asyncio.Event().wait, deadline) is None
        with pytest.raises(Unavailable):
            await caller.strictly(asyncio.Event().wait, Deadline(SystemClock(), SHORT_S))
    assert caller.losses.counters == {"match_late": 1}
    await caller.channel.close()


async def test_a_cancellation_that_is_swallowed_is_one_all_the_same(unused_endpoint: str) -> None:
    """gRPC loses the one that meets the end of a call that is being set up."""
    waiting = asyncio.Event()

    async def attempt() -> None:
        waiting.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise KvstoreError("the call ended, as far as gRPC knows") from None

    async with open_channel(unused_endpoint) as channel:
        clock = SystemClock()
        caller = Caller(channel, None, clock)
        call = asyncio.create_task(caller.quietly("store", attempt, Deadline(clock, 60)))
        await waiting.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call


async def test_a_node_that_dies_during_a_load_leaves_what_arrived(node: ScriptedNode) -> None:
    """One block in, then the server is gone: one answer, long before the budget."""
    async with (
        serving(node) as (endpoint, server),
        AsyncClient(endpoint, budgets=PATIENT) as client,
    ):
        space = await client.open_space(descriptor())
        keys = fill(node, space, 3)
        sent = asyncio.Event()

        async def script(request: pb.ReadRequest, context: object) -> AsyncIterator[pb.ReadReply]:
            yield pb.ReadReply(pieces=node.pieces(0, space.space_id, keys[0]))
            sent.set()
            await asyncio.Event().wait()

        node.play("Read", script)
        into = buffers(3)
        loading = asyncio.create_task(client.load(space, keys, into))
        await sent.wait()
        await server.stop(0)
        with within():
            assert len(await loading) == 1
        assert bytes(into[0]) == block(0, BLOCK_BYTES)
        assert client.counters == {"load_failed": 1}


@pytest.mark.parametrize(
    "code",
    [
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.INVALID_ARGUMENT,
    ],
)
async def test_a_refusal_is_a_miss(
    node: ScriptedNode, client: AsyncClient, space: Space, code: grpc.StatusCode
) -> None:
    """Load shedding and missing rights are counted as refusals, with nothing opened again."""

    async def refusing_stream(request: object, context: Any) -> AsyncIterator[Any]:
        await context.abort(code, "no")
        yield

    async def refusing_late(
        messages: AsyncIterator[pb.WriteRequest], context: Any
    ) -> AsyncIterator[Any]:
        await anext(messages)
        yield pb.WriteReply(offer=pb.WriteOffer(wanted=[1]))
        await anext(messages)
        await context.abort(code, "no")

    node.play("Match", refusing(code))
    node.play("Read", refusing_stream)
    node.play("Write", refusing_stream, refusing_late)
    keys, blocks = [key(1), key(2)], [bytes(BLOCK_BYTES)] * 2
    assert await client.match([space], keys) == Match.none()
    assert await client.load(space, keys, buffers(2)) == []
    assert await client.store(space, keys, blocks) == [False, False]
    assert await client.store(space, keys, blocks) == [True, False], "the offer said: present"
    assert client.counters == {"match_refused": 1, "load_refused": 1, "store_refused": 2}
    assert node.calls["OpenSpace"] == 1


async def test_a_large_store_survives_a_node_that_stops_listening(
    node: ScriptedNode, client: AsyncClient
) -> None:
    """The node ends the call while pieces are still being sent: False, and no exception."""
    space = await client.open_space(descriptor(8 << 20))

    async def deaf(messages: AsyncIterator[pb.WriteRequest], context: Any) -> AsyncIterator[Any]:
        await anext(messages)
        yield pb.WriteReply(offer=pb.WriteOffer(wanted=[0, 1]))
        await anext(messages)

    node.play("Write", deaf)
    keys, blocks = [key(1), key(2)], [bytes(8 << 20)] * 2
    assert await client.store(space, keys, blocks) == [False, False]
    assert client.counters == {"store_failed": 1}


async def test_a_forgotten_space_is_opened_again(
    node: ScriptedNode, client: AsyncClient, space: Space
) -> None:
    """Every call opens it and repeats itself once; the caller notices nothing."""
    keys = fill(node, space, 2)
    node.opened.clear()
    assert (await client.match([space], keys)).blocks == 2
    node.opened.clear()
    assert len(await client.load(space, keys, buffers(2))) == 2
    node.opened.clear()
    assert await client.store(space, [key(5)], [block(5, BLOCK_BYTES)]) == [True]
    node.opened.clear()
    assert await client.locate(space, keys) == ["memory", "memory"]
    assert client.counters == {"space_reopened": 4}


async def test_a_space_that_stays_unknown_is_a_miss(
    node: ScriptedNode, client: AsyncClient, space: Space
) -> None:
    """The call is repeated once and not forever."""
    unknown = refusing(grpc.StatusCode.FAILED_PRECONDITION)
    node.play("Match", unknown, unknown)
    node.play("Locate", unknown, unknown)
    assert await client.match([space], [key(1)]) == Match.none()
    assert node.calls["Match"] == 2
    assert client.counters == {"space_reopened": 1, "match_failed": 1}
    with pytest.raises(UnknownSpace):
        await client.locate(space, [key(1)])


async def test_opening_again_stays_within_the_budget(
    node: ScriptedNode, client: AsyncClient, space: Space
) -> None:
    """A node that forgot the space and then falls silent costs no more than a silent one."""
    node.opened.clear()
    node.play("OpenSpace", hanging)
    with within():
        assert await client.match([space], [key(1)], budget_s=SHORT_S) == Match.none()
    assert client.counters == {"match_late": 1}


async def test_all_spaces_of_a_match_are_opened_again(
    node: ScriptedNode, client: AsyncClient, space: Space
) -> None:
    """One per rank: none is left out."""
    spaces = [await client.open_space(descriptor(tp_rank=rank, tp_size=3)) for rank in range(3)]
    for one in spaces:
        fill(node, one, 1)
    node.opened.clear()
    found = await client.match(spaces, [key(0)])
    assert (found.blocks, len(found.spaces)) == (1, 3)


async def test_a_restarted_node_is_found_again() -> None:
    """The next call after its return succeeds, without a new client."""
    first = ScriptedNode()
    async with serving(first) as (endpoint, server):
        client = AsyncClient(endpoint, budgets=PATIENT)
        space = await client.open_space(descriptor())
        await server.stop(0)
    assert (await client.match([space], [key(1)])).blocks == 0
    again = ScriptedNode()
    fill(again, space, 1)
    second = grpc.aio.server()
    add_KVStoreServicer_to_server(again, second)
    assert second.add_insecure_port(endpoint)
    await second.start()
    with within():
        channel = client._caller.channel
        while (state := channel.get_state(try_to_connect=True)) is not READY:
            await channel.wait_for_state_change(state)
        assert (await client.match([space], [key(0)])).blocks == 1
    await client.close()
    await second.stop(None)


class OlderNode(ScriptedNode):
    """It knows neither shared memory nor the bulk path."""

    async def Attach(self, request: pb.AttachRequest, context: Any) -> pb.AttachReply:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
        raise AssertionError

    async def Connect(self, request: pb.ConnectRequest, context: Any) -> pb.ConnectReply:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
        raise AssertionError


async def test_an_older_node_is_used_without_a_word() -> None:
    """What it does not know is no error of anybody, and is not asked again at every call."""
    async with serving(OlderNode()) as (endpoint, _), AsyncClient(endpoint, budgets=PATIENT) as one:
        space = await one.open_space(descriptor())
        tries = [one._neighbour._trying, one._bulk._trying]
        for trying in tries:
            assert trying is not None
            await asyncio.wait([trying])
            assert trying.exception() is None
        assert await one.store(space, [key(0)], [block(0, BLOCK_BYTES)]) == [True]
        assert [one._neighbour._trying, one._bulk._trying] == tries
        assert not one.counters


async def test_a_new_client_does_not_wait_for_what_another_was_refused(
    unused_endpoint: str,
) -> None:
    """It tries for itself, while the other one waits before it tries again."""
    async with AsyncClient(unused_endpoint, budgets=PATIENT) as refused:
        with pytest.raises(Unavailable):
            await refused.open_space(descriptor())
        async with (
            serving(ScriptedNode(), at=unused_endpoint),
            AsyncClient(unused_endpoint, budgets=PATIENT) as client,
        ):
            await client.open_space(descriptor())
