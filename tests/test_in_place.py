"""Callers who copy blocks from and to the node's arena themselves."""

import asyncio
import concurrent.futures
import itertools
from collections.abc import Awaitable, Coroutine, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar

import pytest

from kvstore import local_calls
from kvstore.api.v1 import kvstore_pb2 as pb
from kvstore.attachment import Attachment, Slots
from kvstore.server import NodeServer
from kvstore_client import AsyncClient, Client, Space
from kvstore_client.in_place import EmptySlot, GivenBlock, ReadInPlace, WriteInPlace
from kvstore_client.loop_thread import LoopThread
from tests.sim.blocks import keys_of
from tests.sim.nodes import (
    PATIENT,
    Nodes,
    check_node,
    counter,
    descriptor_of,
    expected,
    load,
    store,
)
from tests.sim.rig import quiet

Given = TypeVar("Given", EmptySlot, GivenBlock)

BLOCKS = 40
NOWHERE = keys_of("nowhere", 1)
"""Blocks that nobody stores."""


async def attach(nodes: Nodes, server: NodeServer) -> tuple[AsyncClient, Space]:
    client = nodes.connect(server)
    space = await client.open_space(descriptor_of())
    assert client.arena is not None
    return client, space


async def writing(
    client: AsyncClient, space: Space, keys: list[bytes], held: list[bool], **options: bytes
) -> WriteInPlace:
    write = await client.write_in_place(
        space, keys, held, parent_key=options.get("parent_key", b"")
    )
    assert write is not None
    return write


async def reading(client: AsyncClient, space: Space, keys: list[bytes]) -> ReadInPlace:
    read = await client.read_in_place(space, keys)
    assert read is not None
    return read


async def given_by(step: Awaitable[list[Given] | None]) -> list[Given]:
    """What a step gives that is not the last."""
    given = await step
    assert given is not None
    return given


def fill(space: Space, keys: list[bytes], slots: list[EmptySlot]) -> None:
    for slot in slots:
        slot.view[:] = expected(space, keys[slot.place])


async def write_all(client: AsyncClient, space: Space, keys: list[bytes]) -> list[bool]:
    held = [False] * len(keys)
    write = await writing(client, space, keys, held)
    while slots := await write.step():
        fill(space, keys, slots)
    return held


async def read_all(client: AsyncClient, space: Space, keys: list[bytes]) -> list[str]:
    """The tiers of the blocks that were given, each looked at byte by byte."""
    read = await reading(client, space, keys)
    tiers: list[str] = []
    while given := await read.step():
        for key, block in zip(keys[len(tiers) :], given, strict=False):
            assert bytes(block.view) == expected(space, key)
            tiers.append(block.loaded.tier)
    return tiers


async def idle(server: NodeServer, client: AsyncClient, space: Space) -> None:
    """Nothing is held any more, once the node has heard all that the client has said so far."""
    assert await read_all(client, space, NOWHERE) == []
    await check_idle(server)


async def check_idle(server: NodeServer) -> None:
    assert server._local is not None
    assert server._local._room.held_bytes == 0
    await quiet(server.node.tiers)
    check_node(server)


async def cancelled(step: Coroutine[Any, Any, Any]) -> None:
    """A step that is cancelled when it has said what it wants, and waits for the answer."""
    task = asyncio.create_task(step)
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_slots_that_nobody_filled_are_not_committed(nodes: Nodes) -> None:
    """A cancelled commit named more slots; the caller has never heard of them: it is over."""
    server = await nodes.start(
        shared_memory={"client_fraction": 0.1}, memory={"capacity_bytes": 2 << 20}
    )
    client, space = await attach(nodes, server)
    keys = keys_of("chat", BLOCKS)
    write = await writing(client, space, keys, [False] * BLOCKS)
    slots = await given_by(write.step())
    assert 0 < len(slots) < BLOCKS
    fill(space, keys, slots)
    await cancelled(write.step())
    assert await write.step() is None
    await load(client, space, keys)  # Compares each block that comes.
    await check_idle(server)


async def test_half_of_large_slots_are_committed_while_the_other_half_is_filled(
    nodes: Nodes,
) -> None:
    """What was given last, and was not filled to its end, is not committed."""
    server = await nodes.start(
        memory={"capacity_bytes": 128 << 20, "slab_bytes": 4 << 20},
        shared_memory={"client_fraction": 0.9, "memory_fraction": 0.9},
    )
    client = nodes.connect(server)
    space = await client.open_space(descriptor_of(4 << 20))
    assert client.arena is not None
    keys, held = keys_of("large", 10), [False] * 10
    write = await writing(client, space, keys, held)
    sizes = []
    while slots := await write.step():
        sizes.append(len(slots))
        for slot in slots:
            slot.view[:] = bytes([slot.place]) * len(slot.view)
    assert (sizes, held) == ([5, 5], [True] * 10)
    read = await reading(client, space, keys)
    seen = [block.view[-1] for _ in range(2) for block in await given_by(read.step())]
    assert seen == list(range(10))[: len(seen)]
    others = keys_of("others", 4)
    write = await writing(client, space, others, [False] * 4)
    [slot, *_] = await given_by(write.step())
    slot.view[:] = bytes(4 << 20)
    await write.end()
    assert await client.locate(space, others) == [None] * 4
    await read.end()
    await idle(server, client, space)


async def test_a_read_is_over_when_a_step_is_cancelled(nodes: Nodes) -> None:
    """It does not begin anew, as if its first blocks came next; and nothing stays held."""
    server = await nodes.start(memory={"capacity_bytes": 16 << 20})
    client, space = await attach(nodes, server)
    keys = keys_of("chat", BLOCKS)
    await write_all(client, space, keys)
    assert server._local is not None
    server._local._room.client_bytes = 8 * 8192 * 2
    read = await reading(client, space, keys)
    assert 0 < len(await given_by(read.step())) < BLOCKS
    await cancelled(read.step())
    assert await read.step() is None
    await load(client, space, NOWHERE)
    await check_idle(server)


async def test_what_was_written_in_place_is_read_by_everybody(nodes: Nodes) -> None:
    """In place, by copies, and by the stream."""
    server = await nodes.start()
    client, space = await attach(nodes, server)
    keys = keys_of("chat", BLOCKS)
    assert await write_all(client, space, keys) == [True] * BLOCKS
    assert await read_all(client, space, keys) == ["memory"] * BLOCKS
    assert await load(client, space, keys) == ["memory"] * BLOCKS
    async with AsyncClient(server.endpoint, budgets=PATIENT, shared_memory=False) as far:
        assert await load(far, space, keys) == ["memory"] * BLOCKS
    assert not client.counters
    await idle(server, client, space)


async def test_slots_are_given_for_what_the_node_lacks(nodes: Nodes) -> None:
    """What it has is held before anything is copied."""
    server = await nodes.start()
    client, space = await attach(nodes, server)
    keys = keys_of("chat", 8)
    await store(client, space, keys[:5])
    held = [False] * 8
    write = await writing(client, space, keys, held)
    slots = await given_by(write.step())
    assert [slot.place for slot in slots] == [5, 6, 7]
    assert held == [True] * 5 + [False] * 3
    fill(space, keys, slots)
    assert await write.step() is None
    assert held == [True] * 8
    await idle(server, client, space)


async def test_a_write_that_ends_early_leaves_what_was_committed(nodes: Nodes) -> None:
    """And nothing of the slots that it was still filling."""
    server = await nodes.start()
    client, space = await attach(nodes, server)
    keys = keys_of("chat", 8)
    held = [False] * 8
    write = await writing(client, space, keys, held)
    fill(space, keys, (await given_by(write.step()))[:3])
    await write.end()
    await write.end()
    await idle(server, client, space)
    assert held == [False] * 8
    assert await load(client, space, keys) == [None] * 8
    assert counter(server, "corrupt", tier="memory") == 0


async def test_a_read_ends_at_the_first_block_that_is_not_there(nodes: Nodes) -> None:
    server = await nodes.start()
    client, space = await attach(nodes, server)
    keys = keys_of("chat", 12)
    await store(client, space, keys[:7])
    assert await read_all(client, space, keys) == ["memory"] * 7
    assert await read_all(client, space, keys_of("nowhere", 3)) == []
    await idle(server, client, space)


async def test_a_read_that_ends_early_gives_everything_back(nodes: Nodes) -> None:
    """Also the window that was on its way."""
    server = await nodes.start()
    client, space = await attach(nodes, server)
    keys = keys_of("chat", BLOCKS)
    await store(client, space, keys)
    for _ in range(3):
        read = await reading(client, space, keys)
        assert await read.step()
        await read.end()
    await idle(server, client, space)
    assert not client.counters


async def test_blocks_that_are_given_can_only_be_read(nodes: Nodes) -> None:
    """They are everybody's."""
    server = await nodes.start()
    client, space = await attach(nodes, server)
    keys = keys_of("chat", 1)
    await store(client, space, keys)
    read = await reading(client, space, keys)
    [block] = await given_by(read.step())
    with pytest.raises(TypeError):
        block.view[0] = 0
    await read.end()


async def test_a_node_that_hangs_up_ends_a_write_without_an_error(nodes: Nodes) -> None:
    """It is counted."""
    server = await nodes.start()
    client, space = await attach(nodes, server)
    keys = keys_of("chat", 4)
    held = [False] * 4
    write = await writing(client, space, keys, held)
    fill(space, keys, await given_by(write.step()))
    assert server._local is not None
    await server._local.close()
    assert await write.step() is None
    assert held == [False] * 4
    assert client.counters["store_failed"] == 1


async def test_a_space_that_the_node_forgot_is_opened_again(nodes: Nodes) -> None:
    server = await nodes.start()
    client, space = await attach(nodes, server)
    keys = keys_of("chat", 4)
    server.node.spaces.clear()
    assert await write_all(client, space, keys) == [True] * 4
    server.node.spaces.clear()
    assert await read_all(client, space, keys) == ["memory"] * 4
    assert client.counters["space_reopened"] == 2


async def test_without_an_arena_there_is_nothing_to_write_to(nodes: Nodes) -> None:
    server = await nodes.start(shared_memory={"enabled": False})
    client = nodes.connect(server)
    space = await client.open_space(descriptor_of())
    keys = keys_of("chat", 2)
    assert client.arena is None
    assert await client.write_in_place(space, keys, [False] * 2) is None
    assert await client.read_in_place(space, keys) is None
    with pytest.raises(ValueError, match="held: one for each key"):
        await client.write_in_place(space, keys, [])


# Copies that run by themselves, while the next step is asked for.


async def flood(client: AsyncClient, space: Space, turn: list[int]) -> None:
    """Whatever nobody holds is evicted, and its slots are written to."""
    turn.append(len(turn))
    assert all(await store(client, space, keys_of(f"flood {turn[-1]}", 200)))


async def test_what_a_trailing_read_gives_stays_until_the_step_after_the_next(
    nodes: Nodes,
) -> None:
    """Also the last window, without a lease: the end is announced by a step that gives nothing."""
    server = await nodes.start()
    client, space = await attach(nodes, server)
    keys, turn = keys_of("chat", BLOCKS), list[int]()
    await store(client, space, keys)
    assert server._local is not None
    share_bytes = server.node.tiers.memory.share_bytes(space.block_bytes)
    lease = await client.match([space], keys)
    read = await client.read_in_place(space, keys, lease=lease, trailing=True)
    assert read is not None
    places, before, sizes = iter(keys), list[tuple[bytes, GivenBlock]](), list[int]()
    while (given := await read.step()) is not None:
        sizes.append(len(given))
        now = list(zip(itertools.islice(places, len(given)), given, strict=True))
        assert await read_all(client, space, NOWHERE) == []  # It has heard what was asked ahead.
        assert server._local._room.held_bytes >= share_bytes * len(before + now)
        if sum(sizes) == BLOCKS:
            await client.release(lease)
            await flood(client, space, turn)
        for key, block in before + now:
            assert bytes(block.view) == expected(space, key)
        before = now
    assert len(sizes) > 3
    assert sizes[-1] == 0
    assert len(turn) == 2
    assert read.ended
    await idle(server, client, space)


async def test_a_trailing_read_goes_on_when_what_is_copied_has_all_the_room(nodes: Nodes) -> None:
    """A step without blocks says so: the one after it lets go of them."""
    server = await nodes.start()
    client, space = await attach(nodes, server)
    keys = keys_of("chat", BLOCKS)
    await store(client, space, keys)
    assert server._local is not None
    read = await client.read_in_place(space, keys, trailing=True)
    assert read is not None
    server._local._room.capacity_bytes = 16 * 8192
    sizes = []
    while (given := await read.step()) is not None:
        sizes.append(len(given))
    assert sum(sizes) == BLOCKS
    assert 0 in sizes[:-1]
    server._local._room.capacity_bytes = 1 << 20
    await idle(server, client, space)


async def test_what_a_trailing_write_gives_is_committed_by_the_step_after_the_next(
    nodes: Nodes,
) -> None:
    server = await nodes.start()
    client, space = await attach(nodes, server)
    keys, held, turn = keys_of("chat", BLOCKS), [False] * BLOCKS, list[int]()
    write = await client.write_in_place(space, keys, held, trailing=True)
    assert write is not None
    before, steps = list[EmptySlot](), 0
    while (slots := await write.step()) is not None:
        assert not any(held[slot.place] for slot in [*before, *slots])
        await flood(client, space, turn)
        fill(space, keys, before)
        before, steps = slots, steps + 1
    assert held == [True] * BLOCKS
    assert steps > 3
    assert write.ended
    assert all(await load(client, space, keys))
    await idle(server, client, space)


async def test_a_node_that_hangs_up_ends_a_trailing_write_when_its_copies_are_finished(
    nodes: Nodes,
) -> None:
    """Until then the write holds on to what it was given."""
    server = await nodes.start()
    client, space = await attach(nodes, server)
    keys, held = keys_of("chat", BLOCKS), [False] * BLOCKS
    write = await client.write_in_place(space, keys, held, trailing=True)
    assert write is not None
    assert await write.step()
    assert server._local is not None
    await server._local.close()
    while slots := await write.step():
        assert not any(held)
    assert slots == []
    assert not write.ended
    assert await write.step() is None
    assert write.ended
    assert client.counters["store_failed"] == 1


@pytest.mark.parametrize("steps", [1, 2, 3])
async def test_a_trailing_write_or_read_that_ends_early_leaves_nothing_held(
    nodes: Nodes, steps: int
) -> None:
    server = await nodes.start()
    client, space = await attach(nodes, server)
    keys = keys_of("chat", BLOCKS)
    write = await client.write_in_place(space, keys, [False] * BLOCKS, trailing=True)
    assert write is not None
    for _ in range(steps):
        fill(space, keys, await given_by(write.step()))
    await write.end()
    await store(client, space, keys)
    read = await client.read_in_place(space, keys, trailing=True)
    assert read is not None
    for _ in range(steps):
        assert await read.step()
    await read.end()
    await idle(server, client, space)
    assert await load(client, space, keys) == ["memory"] * BLOCKS


@pytest.mark.parametrize("trailing", [False, True])
async def test_a_node_that_takes_all_slots_at_a_time_is_told_when_all_are_filled(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch, trailing: bool
) -> None:
    """As nodes did before there were parts; also where the first slots were few."""
    put, commit = local_calls._put_slots, Attachment.commit

    def put_as_before(reply: pb.LocalReply, slots: Slots) -> None:
        put(reply, slots)
        reply.slots.in_parts = False

    async def commit_as_before(self: Attachment, number: int, blocks: int = 0) -> Slots:
        return await commit(self, number)

    monkeypatch.setattr(local_calls, "_put_slots", put_as_before)
    monkeypatch.setattr(Attachment, "commit", commit_as_before)
    server = await nodes.start()
    client, space = await attach(nodes, server)
    keys, held = keys_of("chat", 12), [False] * 12
    assert server._local is not None
    server._local._room.capacity_bytes = 8192
    write = await client.write_in_place(space, keys, held, trailing=trailing)
    assert write is not None
    before, filled, sizes = list[EmptySlot](), set[int](), list[int]()
    while (slots := await write.step()) is not None:
        server._local._room.capacity_bytes = 1 << 20
        assert {place for place in range(12) if held[place]} <= filled
        sizes.append(len(slots))
        for part in (before, slots) if not trailing else (before,):
            fill(space, keys, part)
            filled |= {slot.place for slot in part}
        before = slots
    assert (sizes[0], max(sizes), held) == (1, 11, [True] * 12)
    await idle(server, client, space)


# The same for threads.


class NodeThread:
    """A node in a thread of its own, so that the test's thread may block."""

    def __init__(self, home: Path) -> None:
        self._thread = LoopThread("node")
        self._nodes = Nodes(home)
        self.server = self._thread.run(self._nodes.start())

    @property
    def held_bytes(self) -> int:
        assert self.server._local is not None
        return self.server._local._room.held_bytes

    def check_idle(self, client: Client, space: Space) -> None:
        assert list(client.read_in_place(space, NOWHERE)) == []
        self._thread.run(check_idle(self.server))

    def stop(self) -> None:
        self._thread.run(self._nodes.finish())
        self._thread.stop()


@pytest.fixture
def far(tmp_path: Path) -> Iterator[NodeThread]:
    node = NodeThread(tmp_path)
    yield node
    node.stop()


def test_threads_write_and_read_step_by_step(far: NodeThread) -> None:
    with Client(far.server.endpoint, budgets=PATIENT) as client:
        space = client.open_space(descriptor_of())
        keys = keys_of("chat", BLOCKS)
        held = [False] * BLOCKS
        for slots in client.write_in_place(space, keys, held):
            fill(space, keys, slots)
        assert held == [True] * BLOCKS
        given: list[GivenBlock] = []
        for blocks in client.read_in_place(space, keys):
            for key, block in zip(keys[len(given) :], blocks, strict=False):
                assert bytes(block.view) == expected(space, key)
            given += blocks
        assert len(given) == BLOCKS
        assert not client.counters
        far.check_idle(client, space)


def test_a_thread_that_stops_in_the_middle_leaves_nothing_held(far: NodeThread) -> None:
    with Client(far.server.endpoint, budgets=PATIENT) as client:
        space = client.open_space(descriptor_of())
        keys = keys_of("chat", BLOCKS)
        with closing(client.write_in_place(space, keys, [False] * BLOCKS)) as steps:
            fill(space, keys, next(steps))
        far.check_idle(client, space)
        for slots in client.write_in_place(space, keys, [False] * BLOCKS):
            fill(space, keys, slots)
        with closing(client.read_in_place(space, keys)) as blocks:
            next(blocks)
        far.check_idle(client, space)
    assert list(client.write_in_place(space, keys, [False] * BLOCKS)) == []
    assert list(client.read_in_place(space, keys)) == []


class Interrupt:
    """Ctrl-C, once, in a thread that waits for a call which has just been answered."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._wait = concurrent.futures.wait
        self.armed = False
        monkeypatch.setattr(concurrent.futures, "wait", self._waited)

    def _waited(
        self, outcomes: list[concurrent.futures.Future[Any]], timeout_s: float | None = None
    ) -> None:
        self._wait(outcomes, timeout_s)
        if self.armed and outcomes[0].done():
            self.armed = False
            raise KeyboardInterrupt


@pytest.mark.parametrize("trailing", [False, True])
def test_a_thread_that_is_interrupted_at_its_first_step_leaves_nothing_held(
    far: NodeThread, monkeypatch: pytest.MonkeyPatch, trailing: bool
) -> None:
    interrupt = Interrupt(monkeypatch)
    with Client(far.server.endpoint, budgets=PATIENT) as client:
        space, keys = client.open_space(descriptor_of()), keys_of("chat", BLOCKS)
        interrupt.armed = True
        with pytest.raises(KeyboardInterrupt):
            next(client.write_in_place(space, keys, [False] * BLOCKS, trailing=trailing))
        far.check_idle(client, space)
        assert all(client.store(space, keys, [memoryview(expected(space, key)) for key in keys]))
        interrupt.armed = True
        with pytest.raises(KeyboardInterrupt):
            next(client.read_in_place(space, keys, trailing=trailing))
        far.check_idle(client, space)


def test_an_interrupted_thread_waits_for_its_copies_before_they_are_let_go_of(
    far: NodeThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is given an empty step first, as at every end."""
    interrupt = Interrupt(monkeypatch)
    with Client(far.server.endpoint, budgets=PATIENT) as client:
        space, keys = client.open_space(descriptor_of()), keys_of("chat", BLOCKS)
        assert all(client.store(space, keys, [memoryview(expected(space, key)) for key in keys]))
        steps = client.read_in_place(space, keys, trailing=True)
        assert next(steps)
        interrupt.armed = True
        assert next(steps) == []
        assert list(client.read_in_place(space, NOWHERE)) == []
        assert far.held_bytes > 0
        with pytest.raises(KeyboardInterrupt):
            next(steps)
        far.check_idle(client, space)
