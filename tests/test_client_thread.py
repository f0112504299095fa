"""The client for threads, and the client as a tier."""

import asyncio
import concurrent.futures
import inspect
import signal
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.api.digest import block_digest
from kvstore.api.errors import InvalidArgument, TierError, Unavailable
from kvstore.api.hint import ReuseHint
from kvstore.api.space import SpaceDescriptor
from kvstore.api.tier import Block, BlockRef, Load, Tier
from kvstore.api.v1 import kvstore_pb2 as pb
from kvstore_client import AsyncClient, Client, Match, RemoteTier, loop_thread, remote_tier
from kvstore_client.loop_thread import LoopThread
from kvstore_client.remote_tier import chain_runs
from tests.client_rig import BLOCK_BYTES, PATIENT, descriptor
from tests.scripted_node import NodeThread, ScriptedNode, block, key, serving
from tests.sim.clock import ManualClock


@pytest.fixture
def remote() -> Iterator[NodeThread]:
    """A node that is served elsewhere."""
    node = NodeThread()
    yield node
    node.stop()


@pytest.fixture
def client(remote: NodeThread) -> Iterator[Client]:
    """A patient client of that node."""
    with Client(remote.endpoint, budgets=PATIENT) as client:
        yield client


def test_every_method_has_its_twin() -> None:
    """What one client can do, the other can, with the same arguments."""
    own = {"connected"}
    for name, method in inspect.getmembers(AsyncClient):
        if name.startswith("_") or name in own:
            continue
        twin = getattr(Client, name, None)
        assert twin is not None, name
        if inspect.isfunction(method) and inspect.isfunction(twin):
            ours = inspect.signature(method).parameters
            assert inspect.signature(twin).parameters == ours, name


def test_the_whole_path(remote: NodeThread, client: Client) -> None:
    """Open, store, match, load, release, locate, discard, clear, status, hint, health."""
    space = client.open_space(descriptor())
    keys = [key(number) for number in range(4)]
    blocks = [block(number, BLOCK_BYTES) for number in range(4)]
    assert client.store(space, keys, blocks) == [True] * 4
    match = client.match([space], keys)
    into = [bytearray(BLOCK_BYTES) for _ in keys]
    assert len(client.load(space, keys, into, lease=match)) == match.blocks == 4
    assert [bytes(buffer) for buffer in into] == blocks
    client.release(match)
    client.hint(space, keys, ReuseHint())
    assert client.locate(space, keys[:1]) == ["memory"]
    assert client.discard(space, keys[:1]) == 1
    assert client.load_any(space, keys, into)[0] is None
    assert client.clear_space(space) == 3
    assert client.status().node_id == "node-a"
    assert client.health()
    assert not client.counters
    with pytest.raises(InvalidArgument, match="space_id"):
        client.clear_space(b"short")
    with pytest.raises(ValueError, match="buffers"):
        client.load(space, keys, [])


def test_threads_share_a_client(client: Client) -> None:
    """Eight threads, each with its own blocks: nobody gets another's bytes."""
    space = client.open_space(descriptor())

    def work(worker: int) -> bool:
        numbers = range(worker * 100, worker * 100 + 20)
        keys = [key(number) for number in numbers]
        blocks = [block(number, BLOCK_BYTES) for number in numbers]
        into = [bytearray(BLOCK_BYTES) for _ in keys]
        stored = client.store(space, keys, blocks)
        loaded = client.load(space, keys, into)
        return all(stored) and len(loaded) == 20 and [bytes(b) for b in into] == blocks

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(16)))


def test_watch_ends_when_the_client_closes(remote: NodeThread, client: Client) -> None:
    """An event arrives; a thread that waits for the next one is let go by `close`."""
    remote.node.events.put_nowait(pb.WatchReply(draining=pb.Draining()))
    first = threading.Event()
    seen = []

    def follow() -> None:
        for event in client.watch():
            seen.append(event)
            first.set()

    thread = threading.Thread(target=follow)
    thread.start()
    assert first.wait(30)
    client.close()
    thread.join(30)
    assert not thread.is_alive()
    assert len(seen) == 1


def test_a_closed_client_misses(remote: NodeThread) -> None:
    """Hot calls miss, others raise `Unavailable`; a call under way gives back its thread."""
    client = Client(remote.endpoint, budgets=PATIENT)
    space = client.open_space(descriptor())
    reading = threading.Event()

    async def script(request: object, context: object) -> AsyncIterator[Any]:
        reading.set()
        await asyncio.Event().wait()
        yield

    remote.node.play("Read", script)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        into = [bytearray(BLOCK_BYTES)]
        loading = pool.submit(client.load, space, [key(1)], into)
        assert reading.wait(30)
        client.close()
        assert loading.result(30) == []
    client.close()
    assert client.match([space], [key(1)]) == Match.none()
    assert client.load_any(space, [key(1)], into) == [None]
    assert client.store(space, [key(1)], [bytes(BLOCK_BYTES)]) == [False]
    client.release(Match(1, (), b"lease"))
    client.hint(space, [key(1)], ReuseHint())
    assert not client.health()
    assert client.counters["load_failed"] == 2
    for call in (client.status, client.watch):
        with pytest.raises(Unavailable):
            call()


def test_ctrl_c_ends_a_load_before_it_leaves(remote: NodeThread, client: Client) -> None:
    """The interrupt reaches the caller after the call has ended at the node's side of the wire."""
    space = client.open_space(descriptor())
    ended = threading.Event()

    async def script(request: object, context: object) -> AsyncIterator[Any]:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        yield

    remote.node.play("Read", script)
    # A test run in the background inherits a SIGINT that is ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            client.load(space, [key(1)], [bytearray(BLOCK_BYTES)])
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended.wait(30)
    assert client.status().node_id == "node-a", "the client goes on"


def test_too_many_releases_are_left_to_expire(remote: NodeThread, client: Client) -> None:
    """Releases do not wait, so their number is limited."""
    asked = threading.Event()
    let_go = asyncio.Event()

    async def script(request: object, context: object) -> None:
        asked.set()
        await let_go.wait()

    remote.node.play("Release", *[script] * 2000)
    for _ in range(1500):
        client.release(Match(1, (), b"lease"))
    assert asked.wait(30)
    assert client.counters["release_dropped"] == 1500 - 1024


def test_a_bad_token_leaves_no_thread() -> None:
    """A constructor that raises cleans up after itself."""
    with pytest.raises(ValueError, match="token"):
        Client("127.0.0.1:1", token="two words")
    assert "kvstore-client" not in [thread.name for thread in threading.enumerate()]


# The client as a tier


def a_block(descriptor: SpaceDescriptor, number: int, parent: int | None) -> Block:
    """A block whose bytes belong to its number."""
    data = block(number, descriptor.block_bytes)
    space_id = descriptor.space_id
    return Block(
        BlockRef(space_id, key(number)),
        None if parent is None else BlockRef(space_id, key(parent)),
        block_digest(space_id, key(number), data),
        memoryview(data),
    )


async def test_a_node_is_a_tier() -> None:
    """Batches mix spaces and branches; every parent link and every byte arrives."""
    one, two, strange = descriptor(), descriptor(block_bytes=512), descriptor(model="other")
    links = [(1, None), (2, 1), (3, 2), (4, 2), (5, 4), (6, 3)]
    batch = [a_block(of, n, parent) for n, parent in links for of in (one, two)]
    node = ScriptedNode()
    async with serving(node) as (endpoint, _), AsyncClient(endpoint, budgets=PATIENT) as client:
        tier: Tier = RemoteTier(client, [one, two])
        refs = [one_block.ref for one_block in batch]
        assert await tier.wants(refs) == [True] * 12
        assert await tier.store(batch) == [True] * 12
        for item in batch:
            wanted = item.parent.key if item.parent else b""
            assert node.parents[item.ref.namespace, item.ref.key] == wanted
        assert await tier.wants(refs) == [False] * 12
        assert await tier.locate(refs[:2]) == ["memory", "memory"]
        loads = [Load(item.ref, memoryview(bytearray(len(item.data)))) for item in batch]
        answers = await tier.load(loads)
        assert [answer and answer.digest for answer in answers] == [b.digest for b in batch]
        assert [load.into == item.data for load, item in zip(loads, batch, strict=True)]
        foreign = a_block(strange, 1, None)
        assert await tier.store([foreign]) == [False]
        assert await tier.wants([foreign.ref]) == [False]
        wrong_length = Load(refs[0], memoryview(bytearray(7)))
        assert await tier.load([Load(foreign.ref, foreign.data), wrong_length]) == [None, None]
        assert await tier.discard([refs[0], foreign.ref]) == 1
        assert await tier.clear(two.space_id) == 6
        assert await tier.clear(strange.space_id) == 0
        assert tier.usage()[0].serving
        await tier.close()
        assert set(client.counters) <= {"space_reopened"}


async def test_a_tier_out_of_reach_is_a_miss() -> None:
    """Only who asks for oblivion learns of it."""
    async with serving(ScriptedNode()) as (endpoint, _):
        pass
    one = descriptor()
    item = a_block(one, 1, None)
    async with AsyncClient(endpoint, budgets=PATIENT) as client:
        tier = RemoteTier(client, [one])
        assert await tier.locate([item.ref]) == [None]
        assert await tier.wants([item.ref]) == [False]
        assert await tier.load([Load(item.ref, memoryview(bytearray(BLOCK_BYTES)))]) == [None]
        assert await tier.store([item]) == [False]
        assert not tier.usage()[0].serving
        assert client.counters["locate_failed"] == 2
        with pytest.raises(TierError, match="discard"):
            await tier.discard([item.ref])
        with pytest.raises(TierError, match="clear"):
            await tier.clear(one.space_id)


class SlowNode(ScriptedNode):
    """Each of its answers takes two thirds of a budget, on the test's clock."""

    def __init__(self, clock: ManualClock) -> None:
        super().__init__()
        self._clock = clock

    async def Locate(self, request: pb.LocateRequest, context: Any) -> pb.LocateReply:
        await self._clock.advance(PATIENT.match_s * 2 / 3)
        return await super().Locate(request, context)

    async def Read(self, request: pb.ReadRequest, context: Any) -> AsyncIterator[pb.ReadReply]:
        await self._clock.advance(PATIENT.load_s * 2 / 3)
        async for reply in super().Read(request, context):
            yield reply

    async def Write(
        self, request_iterator: AsyncIterator[pb.WriteRequest], context: Any
    ) -> AsyncIterator[pb.WriteReply]:
        await self._clock.advance(PATIENT.store_s * 2 / 3)
        async for reply in super().Write(request_iterator, context):
            yield reply


async def test_all_runs_of_a_batch_share_one_budget() -> None:
    """A batch of many roots takes no longer than one; who is late stands for the rest."""
    clock, one = ManualClock(), descriptor()
    batch = [a_block(one, number, None) for number in range(6)]
    node = SlowNode(clock)
    async with (
        serving(node) as (endpoint, _),
        AsyncClient(endpoint, budgets=PATIENT, clock=clock) as client,
    ):
        await client.open_space(one)
        assert await RemoteTier(client, [one]).store(batch) == [True] + [False] * 5
        assert node.calls["Write"] == 2
        assert client.counters == {"store_late": 2}


async def test_all_messages_of_a_batch_share_one_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not fit one message is asked for in the time that the first has left."""
    monkeypatch.setattr(remote_tier, "MAX_KEYS", 1)
    clock, one = ManualClock(), descriptor()
    batch = [a_block(one, number, None) for number in range(6)]
    node = SlowNode(clock)
    node.blocks = {(b.ref.namespace, b.ref.key): (bytes(b.data), b.digest) for b in batch}
    async with (
        serving(node) as (endpoint, _),
        AsyncClient(endpoint, budgets=PATIENT, clock=clock) as client,
    ):
        await client.open_space(one)
        tier = RemoteTier(client, [one])
        places = await tier.locate([item.ref for item in batch])
        loads = [Load(item.ref, memoryview(bytearray(BLOCK_BYTES))) for item in batch]
        loaded = [answer is not None for answer in await tier.load(loads)]
        assert places == ["memory"] * 2 + [None] * 4
        assert loaded == [True] * 2 + [False] * 4
        assert (node.calls["Locate"], node.calls["Read"]) == (2, 2)


@given(st.lists(st.integers(min_value=-1, max_value=30), max_size=30))
def test_runs_cover_a_forest_parents_first(choices: list[int]) -> None:
    """Whatever the tree, runs are chains, hang on earlier runs and hold each block once."""
    one = descriptor(block_bytes=1)
    parents = [min(choice, number - 1) for number, choice in enumerate(choices)]
    blocks = [
        a_block(one, number, parent if parent >= 0 else None)
        for number, parent in enumerate(parents)
    ]
    runs = chain_runs(blocks, range(len(blocks)))
    sent: set[int] = set()
    for run in runs:
        first = parents[run.places[0]]
        assert run.parent_key == (key(first) if first >= 0 else b"")
        assert first < 0 or first in sent
        for before, after in zip(run.places, run.places[1:], strict=False):
            assert parents[after] == before
        sent.update(run.places)
    assert sorted(place for run in runs for place in run.places) == list(range(len(blocks)))


def test_a_call_may_begin_while_another_one_is_handed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a forgotten iterator does that is collected in that moment."""
    loop, inner = LoopThread("test"), list[concurrent.futures.Future[str]]()

    async def answer(word: str) -> str:
        return word

    class Collecting(loop_thread.Outcome[str]):
        def __init__(self, loop_of_it: asyncio.AbstractEventLoop) -> None:
            super().__init__(loop_of_it)
            if not inner:
                monkeypatch.undo()
                inner.append(loop.submit(answer("inner")))

    monkeypatch.setattr(loop_thread, "Outcome", Collecting)
    outer = list[str]()
    caller = threading.Thread(target=lambda: outer.append(loop.run(answer("outer"))), daemon=True)
    caller.start()
    caller.join(10.0)
    assert outer == ["outer"]
    assert inner[0].result(10.0) == "inner"
    loop.stop()
