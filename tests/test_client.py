"""The client against an honest node, and against its caller's mistakes."""

import asyncio
import logging
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import pytest

from kvstore.api.errors import (
    InvalidArgument,
    KvstoreError,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
)
from kvstore.api.hint import Reuse, ReuseHint
from kvstore.api.v1 import kvstore_pb2 as pb
from kvstore.api.wire import MAX_KEYS
from kvstore_client import AsyncClient, Budgets, Match, Run, Space
from kvstore_client.losses import LOG_INTERVAL_S, Losses
from tests.client_rig import (
    BLOCK_BYTES,
    PATIENT,
    buffers,
    descriptor,
    fill,
)
from tests.scripted_node import Health, ScriptedNode, block, key, refusing, serving

pytest_plugins = ["tests.client_fixtures"]


@pytest.mark.parametrize("size_bytes", [1, 1000, 1 << 20, (5 << 19) + 7])
async def test_what_is_stored_comes_back(
    node: ScriptedNode, client: AsyncClient, size_bytes: int
) -> None:
    """Blocks smaller and larger than a message return bit for bit, each into its own buffer."""
    space = await client.open_space(descriptor(size_bytes))
    keys = [key(number) for number in range(5)]
    blocks = [block(number, size_bytes) for number in range(5)]
    assert await client.store(space, keys, blocks) == [True] * 5
    found = await client.match([space], keys)
    assert (found.blocks, found.load_estimate_s) == (5, 0.25)
    assert found.spaces == ((Run(5, "memory", True),),)
    into = buffers(5, size_bytes)
    loaded = await client.load(space, keys, into, lease=found)
    assert [answer.tier for answer in loaded] == ["memory"] * 5
    assert [bytes(buffer) for buffer in into] == blocks
    assert node.requests[-1].lease_id == found.lease_id == b"lease"
    assert not client.counters


async def test_small_blocks_share_messages(
    node: ScriptedNode, client: AsyncClient, space: Space
) -> None:
    """A hundred blocks of 3 KiB travel in one message, and chain up below their parent."""
    keys = [key(number) for number in range(100)]
    blocks = [block(number, BLOCK_BYTES) for number in range(100)]
    assert all(await client.store(space, keys, blocks, parent_key=key(999)))
    assert node.calls["write messages"] == 1
    assert node.parents[space.space_id, keys[0]] == key(999)
    assert node.parents[space.space_id, keys[1]] == keys[0]


async def test_what_the_node_has_is_not_sent_again(
    node: ScriptedNode, client: AsyncClient, space: Space
) -> None:
    """Only the blocks that the offer wants move."""
    fill(node, space, 2)
    keys = [key(number) for number in range(3)]
    blocks = [block(number, BLOCK_BYTES) for number in range(3)]
    assert await client.store(space, keys[:2], blocks[:2]) == [True, True]
    assert node.calls["write messages"] == 0
    assert await client.store(space, keys, blocks) == [True] * 3
    assert node.blocks[space.space_id, keys[2]][0] == blocks[2]


async def test_fields_reach_the_node(node: ScriptedNode, space: Space, client: AsyncClient) -> None:
    """Scopes, hints, lease, request id and parents arrive as they were given."""
    hint = ReuseHint(b"session", Reuse.AUTOMATIC, 1500)
    keys = fill(node, space, 1)
    await client.match([space], keys, scopes=["a", ""], lease_ms=7, hint=hint, request_id=b"r")
    asked = node.requests[-1]
    assert (list(asked.scopes), asked.lease_ms, asked.request_id) == (["a", ""], 7, b"r")
    assert (asked.hint.session_id, asked.hint.reuse) == (b"session", pb.REUSE_AUTOMATIC)
    await client.store(
        space, keys, [bytes(BLOCK_BYTES)], scope="s", parent_key=key(9), parent_scope="p", hint=hint
    )
    begin = node.requests[-1]
    assert (begin.scope, begin.parent_key, begin.parent_scope) == ("s", key(9), "p")
    assert begin.hint.expected_return_ms == 1500
    await client.hint(space, keys, hint, scope="s")
    assert (node.requests[-1].scope, node.requests[-1].hint.session_id) == ("s", b"session")


async def test_a_prefix_ends_at_a_hole_and_single_blocks_do_not(
    node: ScriptedNode, client: AsyncClient, space: Space
) -> None:
    """`load` answers the leading blocks, `load_any` all that are there."""
    keys = fill(node, space, 5)
    del node.blocks[space.space_id, keys[2]]
    assert len(await client.load(space, keys, buffers(5))) == 2
    into = buffers(5)
    answers = await client.load_any(space, keys, into)
    assert [answer is not None for answer in answers] == [True, True, False, True, True]
    assert bytes(into[4]) == block(4, BLOCK_BYTES)
    assert not client.counters, "a miss is data, not a loss"


async def test_control_calls_answer(node: ScriptedNode, client: AsyncClient, space: Space) -> None:
    """Locate, discard, clear, status, release and health do what they say."""
    keys = fill(node, space, 3)
    assert await client.locate(space, [*keys, key(77)]) == ["memory"] * 3 + [None]
    assert await client.discard(space, keys[:1]) == 1
    assert await client.clear_space(space) == 2
    assert await client.clear_space(space.space_id) == 0
    assert (await client.status()).node_id == "node-a"
    await client.release(Match(1, (), b"lease"))
    assert node.released.get_nowait() == b"lease"
    await client.release(Match.none())
    assert node.calls["Release"] == 1
    assert await client.health()


async def test_an_empty_question_asks_nobody(
    node: ScriptedNode, client: AsyncClient, space: Space
) -> None:
    """No keys, no call."""
    assert await client.match([space], []) == Match.none()
    assert await client.load(space, [], []) == []
    assert await client.store(space, [], []) == []
    assert set(node.calls) == {"OpenSpace"}


async def test_the_token_travels_with_every_call(node: ScriptedNode) -> None:
    """Also with streams and with the repetition after a space was opened again."""
    async with (
        serving(node) as (endpoint, _),
        AsyncClient(endpoint, token="secret-1", budgets=PATIENT) as client,
    ):
        space = await client.open_space(descriptor())
        node.opened.clear()
        await client.store(space, [key(1)], [bytes(BLOCK_BYTES)])
        await client.load(space, [key(1)], buffers(1))
        assert sum(node.calls.values()) - node.calls["write messages"] == len(node.tokens)
        assert set(node.tokens) == {"Bearer secret-1"}
        assert "secret-1" not in repr(client)


async def test_watch_yields_events_until_the_client_closes(node: ScriptedNode) -> None:
    """Events arrive in order; closing ends the loop without an exception."""
    async with serving(node) as (endpoint, _):
        client = AsyncClient(endpoint, budgets=PATIENT)
        events = await client.watch()
        node.events.put_nowait(pb.WatchReply(segment_sealed=pb.SegmentSealed(segment_id=3)))
        node.events.put_nowait(pb.WatchReply(draining=pb.Draining()))
        first = await anext(events)
        assert isinstance(first, pb.SegmentSealed)
        assert first.segment_id == 3
        assert isinstance(await anext(events), pb.Draining)
        waiting = asyncio.ensure_future(anext(events, None))
        await client.close()
        assert await waiting is None
        with pytest.raises(Unavailable):
            await client.watch()


async def test_events_end_with_the_node_or_its_death(node: ScriptedNode) -> None:
    """An orderly end is an end; a node that is gone is `Unavailable`."""
    async with serving(node) as (endpoint, server), AsyncClient(endpoint) as client:
        events = await client.watch()
        node.events.put_nowait(None)
        assert [event async for event in events] == []
        events = await client.watch()
        await events.aclose()
        events = await client.watch()
        await server.stop(0)
        with pytest.raises(Unavailable):
            await anext(events)


async def test_what_the_caller_holds_counts_as_matched(
    node: ScriptedNode, client: AsyncClient, space: Space
) -> None:
    """It reaches the node; a node that denies it or is silent takes nothing away."""
    keys = fill(node, space, 3)
    assert (await client.match([space], keys, held_blocks=2)).blocks == 3
    assert node.requests[-1].held_blocks == 2
    assert (await client.match([space], [key(8), key(9)], held_blocks=1)).blocks == 1
    assert (await client.match([space], keys, held_blocks=2, budget_s=0)).blocks == 2
    assert client.counters == {"match_failed": 1, "match_late": 1}


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, InvalidArgument),
        (grpc.StatusCode.UNAUTHENTICATED, Unauthenticated),
        (grpc.StatusCode.PERMISSION_DENIED, PermissionDenied),
        (grpc.StatusCode.UNIMPLEMENTED, Unavailable),
    ],
)
async def test_control_calls_raise_what_the_status_stands_for(
    node: ScriptedNode, client: AsyncClient, code: grpc.StatusCode, error: type[KvstoreError]
) -> None:
    """Nothing of gRPC reaches the caller."""
    node.play("OpenSpace", refusing(code))
    node.play("Status", refusing(code))
    with pytest.raises(error, match="as the script says"):
        await client.open_space(descriptor())
    with pytest.raises(error):
        await client.status()


async def test_ids_that_differ_are_noticed(node: ScriptedNode, client: AsyncClient) -> None:
    """A node with another canonical form would never match: better to say so at once."""

    async def script(request: object, context: object) -> pb.OpenSpaceReply:
        return pb.OpenSpaceReply(space_id=bytes(32))

    node.play("OpenSpace", script)
    with pytest.raises(KvstoreError, match="same version"):
        await client.open_space(descriptor())


async def test_the_callers_mistakes_raise_at_once(
    node: ScriptedNode, client: AsyncClient, space: Space
) -> None:
    """Each message names the argument; the node is not troubled."""
    good, short = [bytearray(BLOCK_BYTES)], [bytearray(BLOCK_BYTES - 1)]
    calls: list[tuple[Callable[[], Awaitable[object]], str]] = [
        (lambda: client.load(space, [key(1)], []), "buffers: one for each key"),
        (lambda: client.load(space, [key(1)], short), r"buffers\[0\]: .* 3072 bytes, got 3071"),
        (lambda: client.load(space, [b"x"], good), r"keys\[0\]: 32 bytes"),
        (lambda: client.load_any(space, [key(1)], [memoryview(bytes(BLOCK_BYTES))]), "writable"),
        (
            lambda: client.load(space, [key(1)], [memoryview(bytearray(2 * BLOCK_BYTES))[::2]]),
            "contiguous",
        ),
        (lambda: client.load(space, [key(1)], good, scopes="abc"), "scopes: a list"),
        (lambda: client.load(space, [key(1)], good, budget_s=float("nan")), "budget_s"),
        (lambda: client.store(space, [key(1)], []), "blocks: one for each key"),
        (lambda: client.store(space, [key(1)], good, parent_key=b"x"), "parent_key"),
        (lambda: client.store(space, [key(1)], good, digests=[]), "digests"),
        (lambda: client.match([], [key(1)]), "spaces: 1"),
        (lambda: client.match([space], [key(1)], lease_ms=-1), "lease_ms"),
        (lambda: client.match([space], [key(1)], request_id=bytes(33)), "request_id"),
        (lambda: client.match([space], [key(1)] * (MAX_KEYS + 1)), "keys: at most 65536"),
    ]
    for call, message in calls:
        with pytest.raises(ValueError, match=message):
            await call()
    assert set(node.calls) == {"OpenSpace"}
    assert not client.counters


@pytest.mark.parametrize("token", ["", "two words", "line\n", "ümlaut"])
async def test_a_token_that_cannot_travel_is_refused(token: str) -> None:
    """Before any call, and without repeating it in the message."""
    with pytest.raises(ValueError, match="token: must be printable") as caught:
        AsyncClient("127.0.0.1:1", token=token)
    assert not token or token not in str(caught.value)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), 1e9])
def test_budgets_name_the_field(value: float) -> None:
    """A budget out of range does not become a default."""
    with pytest.raises(ValueError, match=r"budgets\.load_s"):
        Budgets(load_s=value)


async def test_health_is_true_only_if_the_node_serves(node: ScriptedNode) -> None:
    """NOT_SERVING is an answer, and not health."""
    health = Health()
    async with serving(node, health) as (endpoint, _), AsyncClient(endpoint) as client:
        assert await client.health()
        health.answer = b"\x08\x02"
        assert not await client.health()


async def test_a_closed_client_misses_and_raises_unavailable(
    node: ScriptedNode, client: AsyncClient, space: Space
) -> None:
    """Calls under way when it closes end as misses too."""
    reading = asyncio.Event()

    async def script(request: object, context: object) -> AsyncIterator[Any]:
        reading.set()
        await asyncio.Event().wait()
        yield

    node.play("Read", script)
    loading = asyncio.create_task(client.load(space, [key(1)], buffers(1)))
    await reading.wait()
    await client.close()
    await client.close()
    assert await loading == []
    assert await client.match([space], [key(1)]) == Match.none()
    with pytest.raises(Unavailable):
        await client.status()
    assert client.counters == {"load_failed": 1, "match_failed": 1}


class HandClock:
    """A clock that a test turns."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic_s(self) -> float:
        """What the test set."""
        return self.now_s

    def wall_s(self) -> float:
        """The same."""
        return self.now_s

    async def sleep(self, seconds: float) -> None:
        """Turns the clock."""
        self.now_s += seconds


def test_losses_are_logged_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    """A thousand misses are a thousand counts and one line; another kind has its own line."""
    clock = HandClock()
    losses = Losses(clock, logging.getLogger("kvstore.client"))
    for _ in range(1000):
        losses.count_error("match", TimeoutError("spent"))
    losses.count_error("load", TimeoutError("spent"))
    assert losses.counters == {"match_late": 1000, "load_late": 1}
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    clock.now_s += LOG_INTERVAL_S
    losses.count_error("match", TimeoutError("spent"))
    assert "1001 so far" in caplog.messages[-1]
    with pytest.raises(KeyError):
        losses.count("made_up", "not in MEANINGS")


def test_the_import_is_light() -> None:
    """A program that only wants the client pays for neither torch nor the server's libraries."""
    heavy = {"torch", "ray", "redis", "numpy", "pydantic", "click", "rich", "kvstore_workers"}
    script = (
        "import sys, kvstore_client; "
        f"found = {heavy!r} & set(sys.modules); "
        "ours = [m for m in sys.modules if m.startswith('kvstore.') and m.split('.')[1] != 'api']; "
        "sys.exit(f'{found} {ours}' if found or ours else 0)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
