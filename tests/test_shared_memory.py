"""Clients on the node's host, which read and write its arena themselves."""

import asyncio
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from kvstore.api.clock import SystemClock
from kvstore.api.errors import ConfigError, KvstoreError, Unavailable
from kvstore.api.local import HELLO, LENGTH, REFUSED, TICKET_BYTES
from kvstore.api.messages import Messages
from kvstore.api.v1 import kvstore_pb2 as pb
from kvstore.api.wire import pack_keys
from kvstore.attachment import Attachment
from kvstore.local_calls import MAX_CALLS, LocalCalls
from kvstore.local_socket import LocalSocket
from kvstore.server import NodeServer
from kvstore.tenants import token_hash
from kvstore_client import AsyncClient, Space
from kvstore_client.arena import MappedArena
from kvstore_client.attached import Attached
from kvstore_client.budgets import Deadline
from kvstore_client.caller import Caller
from kvstore_client.local_transfers import place
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

BLOCKS = 40
FITTING = 1 << 16
"""A block for each slab."""


async def attach(nodes: Nodes, server: NodeServer, token: str | None = None) -> AsyncClient:
    """A client that has the arena."""
    client = nodes.connect(server, token)
    await client.open_space(descriptor_of())
    assert client._neighbour.attached is not None
    return client


def local(server: NodeServer) -> LocalSocket:
    assert server._local is not None
    return server._local


async def gone(server: NodeServer) -> None:
    """Returns when the node has noticed that all clients have hung up."""
    while serving := set(local(server)._serving):
        await asyncio.wait(serving)


def attached(client: AsyncClient) -> Attached:
    found = client._neighbour.attached
    assert found is not None
    return found


def patience(client: AsyncClient) -> Deadline:
    return Deadline(client.clock, 60.0)


async def served(server: NodeServer, op: str) -> float:
    """How many calls of a kind succeeded; those that have their answer are over by then."""
    assert await server.calls.finished(60.0)
    return counter(server, "requests", op=op, status="ok")


async def commit(client: AsyncClient, number: int, blocks: int) -> pb.LocalReply:
    """Says that the first of a write's slots are filled."""
    request = pb.LocalRequest(number=number, commit=pb.LocalCommit(blocks=blocks))
    return await attached(client).call(request, patience(client))


def fill(client: AsyncClient, space: Space, keys: list[bytes], reply: pb.LocalReply) -> None:
    """Writes to all slots of a reply what belongs there."""
    for index, offset in zip(reply.slots.indexes, reply.slots.offsets, strict=True):
        attached(client).arena.write(offset, memoryview(bytearray(expected(space, keys[index]))))


async def idle(server: NodeServer) -> None:
    """Checks every invariant, and that nothing is held."""
    await quiet(server.node.tiers)
    check_node(server)


async def reserve(client: AsyncClient, space: Space, keys: list[bytes]) -> pb.LocalReply:
    """Begins a write that nobody goes on with."""
    begin = pb.WriteBegin(space_id=space.space_id, keys=pack_keys(keys))
    link = attached(client)
    return await link.call(pb.LocalRequest(number=link.number(), reserve=begin), patience(client))


async def acquire(client: AsyncClient, space: Space, keys: list[bytes]) -> pb.LocalReply:
    """Begins a read that nobody goes on with."""
    request = pb.ReadRequest(space_id=space.space_id, keys=pack_keys(keys))
    link = attached(client)
    return await link.call(pb.LocalRequest(number=link.number(), acquire=request), patience(client))


async def test_blocks_move_without_the_stream(nodes: Nodes) -> None:
    """What one client on the host wrote another one reads, through the arena alone."""
    server = await nodes.start()
    writer, reader = await attach(nodes, server), await attach(nodes, server)
    space = await writer.open_space(descriptor_of())
    keys = keys_of("chat", BLOCKS)
    assert await store(writer, space, keys) == [True] * BLOCKS
    match = await reader.match([space], keys)
    assert match.blocks == BLOCKS
    assert await load(reader, space, keys, lease=match) == ["memory"] * BLOCKS
    await reader.release(match)
    for method in ("read", "write"):
        assert await served(server, method) == 0
    assert await served(server, "local_acquire") == 1
    assert not writer.counters
    assert not reader.counters


async def test_the_stream_reads_what_was_written_to_the_arena(nodes: Nodes) -> None:
    """The node itself computed the digest that a client of another host checks."""
    server = await nodes.start()
    writer = await attach(nodes, server)
    space = await writer.open_space(descriptor_of())
    keys = keys_of("chat", BLOCKS)
    await store(writer, space, keys)
    far = AsyncClient(server.endpoint, budgets=PATIENT, shared_memory=False)
    async with far:
        assert await load(far, space, keys) == ["memory"] * BLOCKS
        assert not far.counters


async def test_what_was_written_to_the_arena_goes_below(nodes: Nodes) -> None:
    """It is demoted with its digest, and comes back from disk to the arena."""
    server = await nodes.start()
    client = await attach(nodes, server)
    space = await client.open_space(descriptor_of())
    chains = [keys_of(f"chat {number}", BLOCKS) for number in range(8)]
    for keys in chains:
        assert await store(client, space, keys) == [True] * BLOCKS
    came: list[str | None] = []
    for keys in chains:
        match = await client.match([space], keys)
        came += await load(client, space, keys[: match.blocks], lease=match)
        await client.release(match)
    assert len(came) == 8 * BLOCKS
    assert "disk" in came
    assert None not in came
    assert counter(server, "corrupt", tier="disk") == 0
    assert await served(server, "read") == 0


async def test_what_cannot_be_shared_comes_by_the_stream(nodes: Nodes) -> None:
    """Without a lease the chain is not known, and cold blocks have no place in memory."""
    server = await nodes.start()
    client = await attach(nodes, server)
    space = await client.open_space(descriptor_of())
    chains = [keys_of(f"chat {number}", BLOCKS) for number in range(8)]
    for keys in chains:
        await store(client, space, keys)
    for keys in chains:
        came = await load(client, space, keys)
        assert None not in came
    assert await served(server, "read") > 0
    assert await load(client, space, keys_of("nowhere", 3)) == [None] * 3
    assert not client.counters


async def test_readers_and_eviction_race_without_a_wrong_byte(
    nodes: Nodes, rng: random.Random
) -> None:
    """Six clients write and read four times as much as fits, and every byte is looked at."""
    server = await nodes.start()
    clients = [await attach(nodes, server) for _ in range(6)]
    space = await clients[0].open_space(descriptor_of())
    chains = [keys_of(f"chat {number}", 24) for number in range(30)]

    async def work(client: AsyncClient, source: random.Random) -> int:
        came = 0
        for _ in range(25):
            keys = source.choice(chains)[: source.randrange(1, 25)]
            match = await client.match([space], keys)
            found = await load(client, space, keys, lease=match)
            came += sum(tier is not None for tier in found)
            if source.random() < 0.7:
                await store(client, space, keys)
            await client.release(match)
        return came

    came = await asyncio.gather(*(work(each, random.Random(rng.random())) for each in clients))
    assert all(came)
    assert all(not client.counters["load_corrupt"] for client in clients)
    assert counter(server, "evicted_blocks", fate="demoted") > 0
    await idle(server)


async def test_a_reader_who_sleeps_past_his_lease_reads_the_same_bytes(nodes: Nodes) -> None:
    """What he has acquired is not reused before he says that he is done, or hangs up."""
    server = await nodes.start(leases={"max_lease_s": 0.05})
    client, other = await attach(nodes, server), await attach(nodes, server)
    space = await client.open_space(descriptor_of())
    keys = keys_of("sleeper", 8)
    await store(client, space, keys)
    reply = await acquire(client, space, keys)
    assert [block.here for block in reply.blocks.blocks] == [True] * 8
    for number in range(12):
        await store(other, space, keys_of(f"pressure {number}", BLOCKS))
    await other.discard(space, keys)
    into = bytearray(space.block_bytes)
    for key, block in zip(keys, reply.blocks.blocks, strict=True):
        attached(client).arena.read(block.offset, memoryview(into))
        assert into == expected(space, key)
    await client.close()
    await gone_of(server, 1)
    assert local(server)._room.held_bytes == 0


async def gone_of(server: NodeServer, left: int) -> None:
    """Returns when only so many clients are attached."""
    while len(serving := set(local(server)._serving)) > left:
        await asyncio.wait(serving, return_when=asyncio.FIRST_COMPLETED)


async def test_a_window_that_is_being_copied_outlives_a_refused_call(nodes: Nodes) -> None:
    """Who asks for the next one still copies it; only he knows when that is over."""
    server = await nodes.start()
    client = await attach(nodes, server)
    space = await client.open_space(descriptor_of())
    keys = keys_of("chat", 4)
    await store(client, space, keys)
    reply = await acquire(client, space, keys)
    held_bytes = local(server)._room.held_bytes
    assert held_bytes
    server.calls.drain()
    asking = pb.LocalRequest(number=reply.number, next=pb.LocalNext())
    with pytest.raises(Unavailable):
        await attached(client).call(asking, patience(client))
    assert local(server)._room.held_bytes == held_bytes
    await client.close()
    await gone(server)
    assert local(server)._room.held_bytes == 0


@pytest.mark.parametrize("moving", [store, load])
async def test_a_client_that_hangs_up_copies_no_more(
    nodes: Nodes, moving: Callable[..., Awaitable[object]]
) -> None:
    """From then on the node gives the slots to others."""
    server = await nodes.start(bulk={"enabled": False})
    client = await attach(nodes, server)
    space = await client.open_space(descriptor_of())
    keys = keys_of("chat", 8)
    if moving is load:
        await store(client, space, keys)
    link, copied = attached(client), []
    copy = link.arena.read if moving is load else link.arena.write

    def hang_up(offset: int, block: memoryview) -> None:
        copied.append(offset)
        copy(offset, block)
        link._messages.close()

    link.arena.write = link.arena.read = hang_up  # type: ignore[assignment, method-assign]
    await moving(client, space, keys)
    assert len(copied) == 1


async def test_a_client_holds_no_more_than_it_may(nodes: Nodes) -> None:
    """Past its part of the arena it is served by the stream, and nobody else notices."""
    server = await nodes.start(
        shared_memory={"client_fraction": 0.1, "memory_fraction": 0.15},
        memory={"capacity_bytes": 2 << 20},
    )
    client, other = await attach(nodes, server), await attach(nodes, server)
    space = await client.open_space(descriptor_of())
    held = [await reserve(client, space, keys_of(f"held {n}", 8)) for n in range(6)]
    assert sum(len(reply.slots.indexes) for reply in held) * 8192 <= 0.1 * (2 << 20)
    assert held[-1].slots.full
    assert not held[-1].slots.indexes
    keys = keys_of("by the stream", BLOCKS)
    assert await store(client, space, keys) == [True] * BLOCKS
    assert await served(server, "write") == 1
    assert await load(client, space, keys) == ["memory"] * BLOCKS
    assert await store(other, space, keys_of("other", BLOCKS)) == [True] * BLOCKS
    assert not client.counters


async def test_a_client_with_room_for_one_block_reads_them_one_by_one(nodes: Nodes) -> None:
    """Each makes room for the next one; none is asked of the stream."""
    server = await nodes.start(shared_memory={"client_fraction": 0.1})
    client = await attach(nodes, server)
    space = await client.open_space(descriptor_of(FITTING))
    keys = keys_of("chat", 6)
    assert await store(client, space, keys) == [True] * 6
    assert await load(client, space, keys) == ["memory"] * 6
    assert await served(server, "read") == 0
    await idle(server)


async def test_an_arena_full_of_leases_refuses_without_an_error(nodes: Nodes) -> None:
    """Everything is held by readers: the writer learns that nothing was taken, and lives on."""
    server = await nodes.start(
        disk={"enabled": False}, leases={"memory_fraction": 0.9},
        shared_memory={"memory_fraction": 0.9, "client_fraction": 0.9},
    )  # fmt: skip
    client = await attach(nodes, server)
    space = await client.open_space(descriptor_of(FITTING))
    keys = keys_of("all", 16)
    assert await store(client, space, keys[:14]) == [True] * 14
    for part in (keys[:7], keys[7:14]):
        held = await acquire(client, space, part)
        assert [block.here for block in held.blocks.blocks] == [True] * 7
    stored = await store(client, space, keys_of("more", 4))
    assert stored == [True, True, False, False]
    assert not client.counters


async def test_slots_are_committed_in_parts(nodes: Nodes) -> None:
    """The others stay the writer's: nobody finds them before he says that they are filled."""
    server = await nodes.start(bulk={"enabled": False})
    client, other = await attach(nodes, server), await attach(nodes, server)
    space = await client.open_space(descriptor_of())
    keys = keys_of("parts", 8)
    reply = await reserve(client, space, keys)
    assert reply.slots.in_parts
    assert list(reply.slots.indexes) == list(range(8))
    fill(client, space, keys, reply)
    part = await commit(client, reply.number, 3)
    assert list(part.slots.held) == [0, 1, 2]
    assert not part.slots.indexes
    assert not part.slots.full
    assert (await other.match([space], keys)).blocks == 3
    with pytest.raises(KvstoreError, match=r"commit\.blocks: 6 of 5"):
        await commit(client, reply.number, 6)
    assert list((await commit(client, reply.number, 0)).slots.held) == list(range(8))
    assert local(server)._room.held_bytes == 0
    assert await load(other, space, keys) == ["memory"] * 8
    await idle(server)


async def test_more_slots_come_while_the_others_are_filled(nodes: Nodes) -> None:
    """Of what one client may hold at most half is one write's, however many messages it takes."""
    server = await nodes.start(
        shared_memory={"client_fraction": 0.1}, memory={"capacity_bytes": 2 << 20}
    )
    client, other = await attach(nodes, server), await attach(nodes, server)
    space = await client.open_space(descriptor_of())
    keys = keys_of("long", BLOCKS)
    reply = await reserve(client, space, keys)
    window = len(reply.slots.indexes)
    assert 4 <= window <= 0.05 * (2 << 20) / 8192
    number, given = reply.number, 0
    while reply.slots.indexes:
        fill(client, space, keys, reply)
        given += len(reply.slots.indexes)
        assert local(server)._room.held_bytes <= 0.05 * (2 << 20)
        reply = await commit(client, number, min(2, BLOCKS - given + window))
    assert given == BLOCKS
    assert list((await commit(client, number, 0)).slots.held) == list(range(BLOCKS))
    assert await load(other, space, keys) == ["memory"] * BLOCKS
    await idle(server)


async def test_a_store_says_what_is_filled_before_all_is(nodes: Nodes) -> None:
    """So that the node takes it meanwhile."""
    server = await nodes.start(
        memory={"capacity_bytes": 96 << 20, "slab_bytes": 4 << 20},
        shared_memory={"client_fraction": 0.9, "memory_fraction": 0.9},
    )
    client = await attach(nodes, server)
    space = await client.open_space(descriptor_of(1 << 20))
    keys = keys_of("chat", BLOCKS)
    assert await store(client, space, keys) == [True] * BLOCKS
    assert await served(server, "local_reserve") == 1
    assert await served(server, "local_commit") == 2
    assert await load(client, space, keys) == ["memory"] * BLOCKS


async def test_slots_that_are_being_filled_outlive_a_refused_commit(nodes: Nodes) -> None:
    """Their writer fills the others meanwhile; only he knows when that is over."""
    server = await nodes.start()
    client = await attach(nodes, server)
    space = await client.open_space(descriptor_of())
    reply = await reserve(client, space, keys_of("chat", 8))
    held_bytes = local(server)._room.held_bytes
    assert held_bytes
    server.calls.drain()
    with pytest.raises(Unavailable):
        await commit(client, reply.number, 4)
    assert local(server)._room.held_bytes == held_bytes
    await client.close()
    await gone(server)
    assert local(server)._room.held_bytes == 0


class OldNode:
    """Speaks as nodes did whose every commit takes all slots that they have given."""

    def __init__(self, messages: Messages, arena: MappedArena, size: int, window: int) -> None:
        self._messages = messages
        self._arena = arena
        self._size = size
        self._window = window
        self._blocks = 0
        self._given = 0
        self.taken: list[bytes] = []

    def hear(self, message: bytes) -> None:
        request = pb.LocalRequest.FromString(message)
        if request.HasField("reserve"):
            self._blocks = len(request.reserve.keys) // 32
        elif not request.HasField("commit"):
            return
        for index in range(len(self.taken), self._given):
            start = index % self._window * self._size
            self.taken.append(bytes(self._arena.view(start, self._size)))
        indexes = range(self._given, min(self._given + self._window, self._blocks))
        self._given = indexes.stop
        slots = pb.LocalSlots(
            indexes=indexes,
            offsets=[index % self._window * self._size for index in indexes],
            held=range(len(self.taken)),
        )
        reply = pb.LocalReply(number=request.number, slots=slots)
        self._messages.say(reply.SerializeToString())


async def test_a_node_that_takes_all_slots_at_once_is_told_when_all_are_filled() -> None:
    """An older one would take an empty slot for a block."""
    size, files = 8 << 20, [os.memfd_create("old")]
    os.ftruncate(files[0], 4 * size)
    files.append(os.dup(files[0]))
    pair = socket.socketpair()
    for end in pair:
        end.setblocking(False)
    here, there = (Messages(end) for end in pair)
    node = OldNode(there, MappedArena(files[0], 4 * size), size, window=4)
    serving = asyncio.create_task(there.listen(node.hear))
    link = Attached(MappedArena(files[1], 4 * size), here)
    blocks = [bytes([number]) * size for number in range(6)]
    held = [False] * 6
    begin = pb.WriteBegin(keys=bytes(6 * 32))
    views = [memoryview(bytearray(block)) for block in blocks]
    assert await place(link, begin, views, held, Deadline(SystemClock(), 60.0))
    assert node.taken == blocks
    assert all(held)
    await link.close()
    await serving


async def test_more_calls_than_may_run_wait_unread(nodes: Nodes) -> None:
    """Each of them is answered in the end."""
    server = await nodes.start()
    client = await attach(nodes, server)
    space = await client.open_space(descriptor_of())
    here, there = socket.socketpair()
    for end in (here, there):
        end.setblocking(False)
    line, far = Messages(here), Messages(there)
    calls = LocalCalls(
        server.node, server.calls, Attachment(server.node.tiers, local(server)._room), None, line
    )
    answered: list[int] = []
    listening = asyncio.create_task(
        far.listen(lambda message: answered.append(pb.LocalReply.FromString(message).number))
    )
    read = pb.ReadRequest(space_id=space.space_id, keys=pack_keys(keys_of("nowhere", 1)))
    count = MAX_CALLS + 50
    for number in range(count):
        far.say(pb.LocalRequest(number=number, acquire=read).SerializeToString())
    serving = asyncio.create_task(line.listen(calls.take))
    most = 0
    while len(answered) < count:
        most = max(most, calls._count)
        await asyncio.sleep(0)
    assert most == MAX_CALLS
    assert sorted(answered) == list(range(count))
    far.close()
    await asyncio.gather(listening, serving, calls.end())


async def test_a_run_of_which_one_block_had_no_room_is_not_all_placed(nodes: Nodes) -> None:
    """Its writer hears that the last one is left; no room is made for it by its own parent."""
    server = await nodes.start(disk={"enabled": False}, leases={"memory_fraction": 0.9})
    client = await attach(nodes, server)
    space = await client.open_space(descriptor_of(FITTING))
    keys = keys_of("all", 14)
    assert await store(client, space, keys) == [True] * 14
    match = await client.match([space], keys)
    assert [run.leased for run in match.spaces[0]] == [True]
    more = keys_of("more", 3)
    reply = await reserve(client, space, more)
    indexes, held, number = list(reply.slots.indexes), [0, 1], reply.number
    assert indexes == held
    fill(client, space, more, reply)
    slots = (await commit(client, number, 0)).slots
    assert list(slots.held) == held
    assert slots.full
    assert (await client.match([space], more)).blocks == 2
    await client.release(match)


WRITER = """
import asyncio, sys
from kvstore_client import AsyncClient
from tests.sim.nodes import descriptor_of
from tests.sim.blocks import keys_of
from tests.sim.rig import quiet
from tests.test_shared_memory import acquire, commit, fill, reserve
from tests.sim.nodes import PATIENT, store

async def main():
    client = AsyncClient(sys.argv[1], budgets=PATIENT)
    space = await client.open_space(descriptor_of())
    await store(client, space, keys_of("read", 4))
    keys = keys_of("half written", 8)
    reply = await reserve(client, space, keys)
    assert len(reply.slots.indexes) == 8
    if sys.argv[2] == "some":
        fill(client, space, keys, reply)
        await commit(client, reply.number, 3)
    reply = await acquire(client, space, keys_of("read", 4))
    assert sum(block.here for block in reply.blocks.blocks) == 4
    print("holding", flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.mark.parametrize(("committed", "count"), [("none", 0), ("some", 3)])
async def test_a_writer_killed_between_reserve_and_commit_leaves_nothing(
    nodes: Nodes, committed: str, count: int
) -> None:
    """His slots, and what he was reading, come back when the kernel ends his connection.

    What he had committed by then stays.
    """
    server = await nodes.start()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", WRITER, server.endpoint, committed, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert await process.stdout.readline() == b"holding\n"
    used_bytes = server.node.tiers.memory.usage()[0].used_bytes
    assert local(server)._room.held_bytes > 0
    process.send_signal(signal.SIGKILL)
    await process.wait()
    await gone(server)
    assert local(server)._room.held_bytes == 0
    assert server.node.tiers.memory.usage()[0].used_bytes == used_bytes - (8 - count) * 8192
    client = await attach(nodes, server)
    space = await client.open_space(descriptor_of())
    assert (await client.match([space], keys_of("half written", 8))).blocks == count
    assert await load(client, space, keys_of("half written", 8)[:count]) == ["memory"] * count
    await idle(server)


async def test_a_restarted_node_is_attached_to_again(nodes: Nodes) -> None:
    """Its old arena is of no use any more; calls succeed meanwhile."""
    server = await nodes.start()
    settings = nodes.settings(server={"listen": server.endpoint})
    client = await attach(nodes, server)
    space = await client.open_space(descriptor_of())
    first = attached(client)
    await nodes.stop(server)
    again = await nodes.start(settings)
    await asyncio.wait([first._listening])
    keys = keys_of("chat", BLOCKS)
    while await store(client, space, keys) != [True] * BLOCKS:  # noqa: ASYNC110
        await asyncio.sleep(0)
    client._neighbour._next_try_s = 0.0
    await client.open_space(space.descriptor)
    assert attached(client) is not first
    assert await load(client, space, keys) == ["memory"] * BLOCKS
    assert await served(again, "local_acquire") == 1


@pytest.mark.parametrize("tenants", [1, 2])
async def test_tenants_do_not_share_an_arena(nodes: Nodes, tmp_path: Path, tenants: int) -> None:
    """Who maps it can read all of it: it is handed out where there is but one tenant."""
    file = tmp_path / "tokens.toml"
    file.write_text(
        "".join(
            f'[tenants.t{n}]\ntoken_sha256 = ["{token_hash(f"token {n}".replace(" ", "-"))}"]\n'
            for n in range(tenants)
        )
    )
    server = await nodes.start(auth={"tokens_file": file})
    client = nodes.connect(server, "token-0")
    space = await client.open_space(descriptor_of())
    assert (client._neighbour.attached is not None) == (tenants == 1)
    keys = keys_of("chat", BLOCKS)
    assert await store(client, space, keys) == [True] * BLOCKS
    assert await load(client, space, keys) == ["memory"] * BLOCKS
    stranger = nodes.connect(server, "wrong")
    with pytest.raises(KvstoreError):
        await stranger.open_space(descriptor_of())
    assert stranger._neighbour.attached is None


async def knock(server: NodeServer, ticket: bytes) -> tuple[int, int]:
    """What the node answers to a ticket, and how many files came with it."""

    def speak() -> tuple[int, int]:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(30)
            connection.connect(str(local(server).path))
            connection.sendall(ticket)
            answer, files, _, _ = socket.recv_fds(connection, HELLO.size, 1)
            for file in files:
                os.close(file)
            return HELLO.unpack(answer)[0], len(files)

    return await asyncio.to_thread(speak)


async def test_a_ticket_is_good_once_and_for_a_while(nodes: Nodes) -> None:
    """Guessed, used and old ones open nothing."""
    server = await nodes.start()
    client = nodes.connect(server)
    caller: Caller = client._caller
    invitation = await caller.unary(caller.stub.Attach, pb.AttachRequest(), patience(client))
    assert await knock(server, bytes(TICKET_BYTES)) == (REFUSED, 0)
    assert (await knock(server, invitation.ticket))[1] == 1
    assert await knock(server, invitation.ticket) == (REFUSED, 0)
    late = local(server).ticket(None)
    given = local(server)._tickets._given
    for ticket, known in given.items():
        given[ticket] = known._replace(expires_s=0.0)
    assert await knock(server, late.ticket) == (REFUSED, 0)
    await gone(server)


AS_ANOTHER_USER = """
import asyncio, os, sys
from kvstore_client import AsyncClient
from tests.sim.nodes import PATIENT, descriptor_of, load, store
from tests.sim.blocks import keys_of

async def main():
    os.setgid(65534)
    os.setuid(65534)
    async with AsyncClient(sys.argv[1], budgets=PATIENT) as client:
        space = await client.open_space(descriptor_of())
        assert client._neighbour.attached is None
        keys = keys_of("chat", 8)
        assert await store(client, space, keys) == [True] * 8
        assert await load(client, space, keys) == ["memory"] * 8

asyncio.run(main())
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("reachable", [False, True])
async def test_another_user_of_the_host_is_served_by_the_stream(
    nodes: Nodes, reachable: bool
) -> None:
    """Also where he reaches the socket: the kernel says who he is."""
    with tempfile.TemporaryDirectory(prefix="kvstore-") as home:
        directory = Path(home)
        server = await nodes.start(shared_memory={"directory": directory / "sockets"})
        if reachable:
            for path in (directory, directory / "sockets"):
                path.chmod(0o755)
            local(server).path.chmod(0o666)
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", AS_ANOTHER_USER, server.endpoint, stderr=subprocess.PIPE
        )
        _, errors = await process.communicate()
        assert process.returncode == 0, errors.decode()
        assert await served(server, "write") == 1


AS_A_CONTAINER = """
import asyncio, sys
from pathlib import Path
from benchmarks.crash.own_mounts import Forbidden, enter_own_mounts, mount_tmpfs
from kvstore_client import AsyncClient
from tests.sim.nodes import PATIENT, descriptor_of, load, store
from tests.sim.blocks import keys_of

async def main():
    async with AsyncClient(sys.argv[1], budgets=PATIENT) as client:
        space = await client.open_space(descriptor_of())
        keys = keys_of("chat", 8)
        assert await store(client, space, keys) == [True] * 8
        assert await load(client, space, keys) == ["memory"] * 8
        assert client._neighbour.attached is not None

try:
    enter_own_mounts()
    mount_tmpfs(Path("/dev/shm"), 64 << 10)
except Forbidden as error:
    print(error)
    sys.exit(77)
asyncio.run(main())
"""


async def test_a_container_that_sees_the_socket_shares_the_arena(nodes: Nodes) -> None:
    """Its /dev/shm is another one, and smaller than the arena."""
    server = await nodes.start()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", AS_A_CONTAINER, server.endpoint, stdout=-1, stderr=-1
    )
    output, errors = await process.communicate()
    if process.returncode == 77:
        pytest.skip(output.decode().strip())
    assert process.returncode == 0, errors.decode()
    assert await served(server, "write") == 0
    assert await served(server, "local_commit") > 0


@pytest.mark.parametrize(
    "nonsense",
    [
        LENGTH.pack(1 << 31),
        LENGTH.pack(5) + b"\xff" * 5,
        LENGTH.pack(100) + b"half",
    ],
)
async def test_nonsense_ends_the_connection_and_nothing_else(nodes: Nodes, nonsense: bytes) -> None:
    """What such a client held comes back, and others are served."""
    server = await nodes.start()
    client, other = await attach(nodes, server), await attach(nodes, server)
    space = await client.open_space(descriptor_of())
    await reserve(client, space, keys_of("held", 8))
    connection = attached(client)._messages._connection
    connection.sendall(nonsense)
    connection.shutdown(socket.SHUT_WR)
    await gone_of(server, 1)
    assert local(server)._room.held_bytes == 0
    assert await store(other, space, keys_of("chat", BLOCKS)) == [True] * BLOCKS


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"reserve": pb.WriteBegin(space_id=bytes(32), keys=bytes(31))},
        {"reserve": pb.WriteBegin(space_id=bytes(31), keys=bytes(32))},
        {"acquire": pb.ReadRequest(space_id=bytes(32), keys=bytes(32), scopes=["s"] * 17)},
        {"acquire": pb.ReadRequest(space_id=bytes(32), keys=bytes(33))},
        {"commit": pb.LocalCommit()},
        {"next": pb.LocalNext()},
    ],
    ids=["empty", "keys", "space", "scopes", "read keys", "commit", "next"],
)
async def test_a_bad_call_is_refused_and_the_next_one_served(
    nodes: Nodes, fields: dict[str, Any]
) -> None:
    """With the words of the same mistake over gRPC."""
    server = await nodes.start()
    client = await attach(nodes, server)
    space = await client.open_space(descriptor_of())
    link = attached(client)
    with pytest.raises(KvstoreError, match=r"\w+: "):
        await link.call(pb.LocalRequest(number=link.number(), **fields), patience(client))
    assert await store(client, space, keys_of("chat", BLOCKS)) == [True] * BLOCKS
    assert client._neighbour._attached is not None
    await idle(server)


async def test_a_number_under_way_is_not_used_again(nodes: Nodes) -> None:
    """Two writes of one number would mix up their slots."""
    server = await nodes.start()
    client = await attach(nodes, server)
    space = await client.open_space(descriptor_of())
    reply = await reserve(client, space, keys_of("held", 8))
    begin = pb.WriteBegin(space_id=space.space_id, keys=pack_keys(keys_of("more", 8)))
    with pytest.raises(KvstoreError, match="under way"):
        await attached(client).call(
            pb.LocalRequest(number=reply.number, reserve=begin), patience(client)
        )


async def cancelled_store(client: AsyncClient, space: Space, turns: int) -> None:
    task = asyncio.create_task(store(client, space, keys_of(f"cancelled {turns}", 30)))
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def cancelled_load(client: AsyncClient, space: Space, turns: int) -> None:
    keys = keys_of("cancelled load", 30)
    await store(client, space, keys)
    task = asyncio.create_task(load(client, space, keys))
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@pytest.mark.parametrize("call", [cancelled_store, cancelled_load])
async def test_a_call_that_is_cancelled_gives_everything_back(
    nodes: Nodes, call: Callable[[AsyncClient, Space, int], Awaitable[None]]
) -> None:
    """Wherever it is, without the connection's end."""
    server = await nodes.start()
    client = await attach(nodes, server)
    space = await client.open_space(descriptor_of())
    for turns in range(0, 60, 2):
        await call(client, space, turns)
    # The node takes one message after the other: what came before this call is done.
    assert await load(client, space, keys_of("nowhere", 1)) == [None]
    assert local(server)._room.held_bytes == 0
    await idle(server)


async def test_a_directory_that_cannot_be_used_is_named(nodes: Nodes, tmp_path: Path) -> None:
    """A long one, and one that is a file; without the setting the node does without."""
    for directory in (tmp_path / ("d" * 120), tmp_path / "secret" / "sockets"):
        (tmp_path / "secret").write_bytes(bytes(32))
        with pytest.raises(ConfigError, match=r"shared_memory\.directory: "):
            await nodes.start(shared_memory={"directory": directory})
    deep = tmp_path / ("d" * 120)
    server = await nodes.start(disk={"path": deep / "blocks"})
    assert server._local is None
    client = nodes.connect(server)
    space = await client.open_space(descriptor_of())
    assert client._neighbour.attached is None
    assert await store(client, space, keys_of("chat", 3)) == [True] * 3


async def test_a_socket_that_a_killed_node_left_is_nobodys(nodes: Nodes) -> None:
    """The next node with that name listens there; a living one is not pushed aside."""
    server = await nodes.start()
    path = local(server).path
    await nodes.stop(server)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as left:
        left.bind(str(path))
    again = await nodes.start(nodes.settings(server={"listen": server.endpoint}))
    assert local(again).path == path
    await attach(nodes, again)
    twin = LocalSocket(path.parent, again.endpoint, again.node, again.calls, local(again)._room)
    with pytest.raises(ConfigError, match="another node listens"):
        await twin.start()


async def test_a_mute_node_is_waited_for_in_place_once() -> None:
    """However many calls begin meanwhile: each would hold the loop up for another `PROMPT_MS`."""
    size = 8192
    file = os.memfd_create("mute")
    os.ftruncate(file, size)
    here, there = socket.socketpair()
    here.setblocking(False)
    messages = Messages(here)
    link = Attached(MappedArena(file, size), messages)
    waits: list[int] = []
    wait = messages.wait

    def waiting(most_ms: int) -> None:
        waits.append(most_ms)
        wait(most_ms)

    messages.wait = waiting  # type: ignore[method-assign]
    deadline = Deadline(SystemClock(), 0.2)
    with there:
        asked = [
            link.call(pb.LocalRequest(number=link.number(), next=pb.LocalNext()), deadline)
            for _ in range(100)
        ]
        await asyncio.gather(*asked, return_exceptions=True)
        await link.close()
    assert len(waits) <= 1
