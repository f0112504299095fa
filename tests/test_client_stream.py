"""Loads that tell of blocks while later ones are on their way: in order, once, and for good."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.api.tier import BlockRef, Loaded
from kvstore.api.v1 import kvstore_pb2 as pb
from kvstore_client import AsyncClient, Client, Space
from kvstore_client.leading import Leading
from kvstore_client.loop_thread import LoopThread
from tests.client_rig import BLOCK_BYTES, PATIENT, altered, buffers, descriptor, fill
from tests.scripted_node import ScriptedNode, block, serving
from tests.sim.blocks import keys_of
from tests.sim.faulty import Faulty
from tests.sim.nodes import Nodes, descriptor_of, expected, store

pytest_plugins = ["tests.client_fixtures"]

MINE = 0xEE
"""What the owner of a buffer puts there once it was told that the block is here."""


class Owner:
    """Hears of blocks, looks at their bytes at once, and then uses the buffers for itself."""

    def __init__(self, into: Sequence[bytearray], wanted: Sequence[bytes]) -> None:
        self._into = into
        self._wanted = wanted
        self.told = 0

    def hear(self, loaded: Loaded) -> None:
        assert loaded.tier
        assert self._into[self.told] == self._wanted[self.told], "told before it was complete"
        self._into[self.told][:] = bytes([MINE]) * len(self._into[self.told])
        self.told += 1

    def check(self) -> None:
        """Nothing was written to a buffer after its block was told."""
        for buffer in self._into[: self.told]:
            assert set(buffer) == {MINE}, "written to after it was told"


def owner_of(space: Space, count: int) -> tuple[list[bytearray], Owner]:
    """Buffers for the scripted node's blocks, and who owns them."""
    into = buffers(count, space.block_bytes)
    return into, Owner(into, [block(number, space.block_bytes) for number in range(count)])


@given(st.permutations(range(8)), st.integers(0, 8))
def test_blocks_are_told_in_order_whatever_order_they_come_in(order: list[int], came: int) -> None:
    told: list[Loaded] = []
    leading = Leading(told.append)
    for place in order[:came]:
        leading.here(place, Loaded(str(place), b""))
    first_missing = next(place for place in range(9) if place not in order[:came])
    assert [loaded.tier for loaded in told] == [str(place) for place in range(first_missing)]


async def test_blocks_are_told_while_later_ones_are_on_their_way(
    node: ScriptedNode, client: AsyncClient, space: Space
) -> None:
    keys = fill(node, space, 4)
    two, go_on = asyncio.Event(), asyncio.Event()

    async def script(request: pb.ReadRequest, context: Any) -> AsyncIterator[pb.ReadReply]:
        for index, key in enumerate(keys):
            if index == 2:
                await go_on.wait()
            yield pb.ReadReply(pieces=node.pieces(index, space.space_id, key))

    node.play("Read", script)
    into, owner = owner_of(space, 4)

    def hear(loaded: Loaded) -> None:
        owner.hear(loaded)
        if owner.told == 2:
            two.set()

    loading = asyncio.create_task(client.load(space, keys, into, on_loaded=hear))
    await two.wait()
    assert not loading.done()
    go_on.set()
    assert len(await loading) == owner.told == 4
    owner.check()


async def test_a_damaged_block_ends_what_is_told(
    node: ScriptedNode, client: AsyncClient, space: Space
) -> None:
    """Those behind it are of no use, and nobody is told of them."""
    keys = fill(node, space, 4)

    def damage(pieces: list[pb.Piece]) -> list[pb.Piece]:
        pieces[2].data = pieces[2].data[:-1] + bytes([pieces[2].data[-1] ^ 1])
        return pieces

    node.play("Read", altered(node, damage))
    into, owner = owner_of(space, 4)
    assert len(await client.load(space, keys, into, on_loaded=owner.hear)) == owner.told == 2
    owner.check()
    assert client.counters == {"load_corrupt": 1}


async def test_a_read_that_is_repeated_tells_and_writes_each_block_once(
    node: ScriptedNode, client: AsyncClient, space: Space
) -> None:
    """The node forgets the space in the middle of its third block: what was told is not asked for
    again."""
    keys = fill(node, space, 5)

    async def script(request: pb.ReadRequest, context: Any) -> AsyncIterator[pb.ReadReply]:
        for index in range(2):
            yield pb.ReadReply(pieces=node.pieces(index, space.space_id, keys[index]))
        [half] = node.pieces(2, space.space_id, keys[2])
        half.data = half.data[:100]
        yield pb.ReadReply(pieces=[half])
        await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "space_id: not opened")

    node.play("Read", script)
    into, owner = owner_of(space, 5)
    assert len(await client.load(space, keys, into, on_loaded=owner.hear)) == owner.told == 5
    owner.check()
    again = [request for request in node.requests if isinstance(request, pb.ReadRequest)][-1]
    assert again.keys == b"".join(keys[2:])
    assert client.counters == {"space_reopened": 1}


async def test_a_node_that_sends_again_what_is_here_writes_nothing(
    node: ScriptedNode, client: AsyncClient, space: Space
) -> None:
    """Also where any blocks are wanted: a repeated read asks for the holes alone."""
    keys = fill(node, space, 4)

    async def script(request: pb.ReadRequest, context: Any) -> AsyncIterator[pb.ReadReply]:
        yield pb.ReadReply(pieces=[pb.Piece(block=0, header=pb.BlockHeader())])
        yield pb.ReadReply(pieces=node.pieces(1, space.space_id, keys[1]))
        await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "space_id: not opened")

    node.play("Read", script)
    answers = await client.load_any(space, keys, buffers(4))
    assert all(answers)
    again = [request for request in node.requests if isinstance(request, pb.ReadRequest)][-1]
    assert again.keys == keys[0] + keys[2] + keys[3]


BLOCKS = 40
"""More than one window of the shared memory that a client may hold."""


async def shared(nodes: Nodes, **sections: Any) -> tuple[AsyncClient, Space]:
    """A client that has the arena of a real node."""
    client = nodes.connect(await nodes.start(**sections))
    space = await client.open_space(descriptor_of())
    assert client._neighbour.attached is not None
    return client, space


async def test_blocks_are_told_through_shared_memory(nodes: Nodes) -> None:
    client, space = await shared(nodes)
    keys = keys_of("chat", BLOCKS)
    await store(client, space, keys)
    into = buffers(BLOCKS, space.block_bytes)
    owner = Owner(into, [expected(space, key) for key in keys])
    assert len(await client.load(space, keys, into, on_loaded=owner.hear)) == BLOCKS == owner.told
    owner.check()


async def test_what_shared_memory_brought_is_not_streamed_again(nodes: Nodes) -> None:
    """The connection ends behind the first window; the rest comes by the stream."""
    client, space = await shared(nodes)
    keys = keys_of("chat", BLOCKS)
    await store(client, space, keys)
    into = buffers(BLOCKS, space.block_bytes)
    owner = Owner(into, [expected(space, key) for key in keys])
    attached = client._neighbour.attached
    assert attached is not None
    tiers: list[str] = []

    def hear(loaded: Loaded) -> None:
        owner.hear(loaded)
        tiers.append(loaded.tier)
        if owner.told == 3:
            attached._messages.close()

    assert len(await client.load(space, keys, into, on_loaded=hear)) == BLOCKS == owner.told
    owner.check()
    assert attached.closed, "all came before the connection had ended"


async def test_a_long_prefix_begins_to_come_before_its_end_is_read_from_disk(nodes: Nodes) -> None:
    """Memory is empty; the disk is held at the last blocks until the first ones were told."""
    size = 1 << 20
    memory = {"capacity_bytes": 32 << 20, "slab_bytes": 4 << 20}
    disk = {"capacity_bytes": 128 << 20, "segment_bytes": 16 << 20}
    keys = keys_of("long chat", 20)
    first = await nodes.start(memory=memory, disk=disk)
    writer = nodes.connect(first)
    space = await writer.open_space(descriptor_of(size))
    assert all(await store(writer, space, keys))
    await nodes.stop(first)

    one_was_told = asyncio.Event()

    async def hold(operation: str, refs: Sequence[BlockRef]) -> None:
        if operation == "load" and any(ref.key == keys[-1] for ref in refs):
            await one_was_told.wait()

    client = nodes.connect(
        await nodes.start(wrap=lambda tier: Faulty(tier, hold), memory=memory, disk=disk)
    )
    space = await client.open_space(descriptor_of(size))
    match = await client.match([space], keys)
    assert [run.tier for run in match.spaces[0]] == ["disk"]
    into = buffers(len(keys), size)
    owner = Owner(into, [expected(space, key) for key in keys])

    def hear(loaded: Loaded) -> None:
        owner.hear(loaded)
        one_was_told.set()

    loaded = await client.load(space, keys, into, lease=match, on_loaded=hear)
    assert len(loaded) == owner.told == len(keys)
    owner.check()
    await client.release(match)


class Held:
    """A scripted node in a thread of its own, which stops in the middle of a read."""

    def __init__(self, told: int) -> None:
        self.told = told
        self.node = ScriptedNode()
        self.ended = threading.Event()
        self._thread = LoopThread("scripted-node")
        self._context = serving(self.node)
        self.endpoint, _ = self._thread.run(self._context.__aenter__())
        self._go_on = asyncio.Event()

    async def script(self, request: pb.ReadRequest, context: Any) -> AsyncIterator[pb.ReadReply]:
        keys = [request.keys[at : at + 32] for at in range(0, len(request.keys), 32)]
        try:
            for index, key in enumerate(keys):
                if index == self.told:
                    await self._go_on.wait()
                yield pb.ReadReply(pieces=self.node.pieces(index, request.space_id, key))
        finally:
            self.ended.set()

    def go_on(self) -> None:
        """Lets the read come to its end."""

        async def set_it() -> None:
            self._go_on.set()

        self._thread.run(set_it())

    def stop(self) -> None:
        self._thread.run(self._context.__aexit__(None, None, None))
        self._thread.stop()


@pytest.fixture
def held() -> Any:
    """A node that stops after two blocks."""
    node = Held(2)
    yield node
    node.stop()


@pytest.fixture
def threaded(held: Held) -> Any:
    """A client of it, for threads."""
    with Client(held.endpoint, budgets=PATIENT) as client:
        yield client


def begin(held: Held, client: Client, count: int) -> tuple[Space, list[bytes], list[bytearray]]:
    """An open space with blocks, and buffers for them."""
    space = client.open_space(descriptor())
    keys = fill(held.node, space, count)
    held.node.play("Read", held.script)
    return space, keys, buffers(count)


def test_steps_of_a_load_come_while_it_is_under_way(held: Held, threaded: Client) -> None:
    space, keys, into = begin(held, threaded, 5)
    came: list[Loaded] = []
    for step in threaded.load_stream(space, keys, into):
        assert step, "a step without blocks"
        came += step
        if len(came) == 2:
            assert not held.ended.is_set()
            held.go_on()
    assert [bytes(buffer) for buffer in into] == [block(at, BLOCK_BYTES) for at in range(5)]
    assert len(came) == 5
    assert not threaded.counters


def test_a_load_that_is_left_early_is_over_when_that_returns(held: Held, threaded: Client) -> None:
    """Whoever closes it, or breaks in between, has the buffers for himself."""
    space, keys, into = begin(held, threaded, 5)
    steps = threaded.load_stream(space, keys, into)
    came = 0
    while came < 2:
        came += len(next(steps))
    steps.close()
    for buffer in into:
        buffer[:] = bytes([MINE]) * len(buffer)
    assert held.ended.wait(30), "the node still reads"
    held.go_on()
    assert len(threaded.load(space, keys, buffers(5))) == 5
    assert {byte for buffer in into for byte in buffer} == {MINE}
    assert not threaded.counters


def test_a_load_that_was_never_begun_asks_nobody(held: Held, threaded: Client) -> None:
    space, keys, into = begin(held, threaded, 5)
    threaded.load_stream(space, keys, into).close()
    assert held.node.calls["Read"] == 0


def test_a_closed_client_gives_no_steps_and_counts(held: Held) -> None:
    client = Client(held.endpoint, budgets=PATIENT)
    space, keys, into = begin(held, client, 5)
    client.close()
    assert list(client.load_stream(space, keys, into)) == []
    assert client.counters["load_failed"] == 1


def test_a_mistake_of_the_caller_is_raised_at_the_first_step(held: Held, threaded: Client) -> None:
    space, keys, into = begin(held, threaded, 5)
    with pytest.raises(ValueError, match="buffers"):
        next(threaded.load_stream(space, keys, into[:3]))


def test_the_thread_that_hears_may_be_asked_too(held: Held, threaded: Client) -> None:
    """`load` of the client for threads calls back as well."""
    space, keys, into = begin(held, threaded, 5)
    held.go_on()
    told: list[Loaded] = []
    hear: Callable[[Loaded], None] = told.append
    assert threaded.load(space, keys, into, on_loaded=hear) == told
    assert len(told) == 5
