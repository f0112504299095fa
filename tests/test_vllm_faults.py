"""KVStoreConnector when the store, the adapter's own code or a rank fails: the engine goes on.

The small engine checks its KV cache to the byte before every token that it computes, so a test
that comes to its end has met no wrong one.
"""

import asyncio
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from kvstore.api.v1 import kvstore_pb2 as pb
from tests.client_rig import altered, hanging_stream
from tests.scripted_node import NodeThread
from tests.stand_ins.vllm_mini_engine import Request, full, window
from tests.vllm_rig import PROMPT, Start, answers

pytest_plugins = ["tests.vllm_fixtures"]

ONE = [full()]
TWO = [full(), window(100)]
"""The window is longer than the prompt, so that a node without match rules can answer."""


def cut(blocks: int) -> Callable[[list[pb.Piece]], list[pb.Piece]]:
    """The node has lost all but the first blocks since the match."""

    def alter(pieces: list[pb.Piece]) -> list[pb.Piece]:
        gone = [pb.Piece(block=each.block, header=pb.BlockHeader()) for each in pieces[blocks:]]
        return pieces[:blocks] + gone

    return alter


def flip(block: int) -> Callable[[list[pb.Piece]], list[pb.Piece]]:
    """One bit of one block is another."""

    def alter(pieces: list[pb.Piece]) -> list[pb.Piece]:
        data = bytearray(pieces[block].data)
        data[3] ^= 1
        pieces[block].data = bytes(data)
        return pieces

    return alter


DAMAGES = {
    "lost": (cut(5), 5),
    "all lost": (cut(0), 0),
    "corrupt": (flip(5), 5),
    "corrupt at once": (flip(0), 0),
}
"""What happens to a load, and how many blocks before that are intact."""


async def restored_after(
    remote: NodeThread, start: Start, alter: Any, *groups: Any, **more: Any
) -> tuple[Request, Any]:
    """A request whose load meets that, in an engine that starts with the node's blocks there."""
    first = await asyncio.to_thread(start, remote, *groups, **more)
    (wrote,) = await answers(first, PROMPT, outputs=7)
    second = await asyncio.to_thread(start, remote, *groups, **more)
    forget_at_match(remote, altered(remote.node, alter))
    (read,) = await answers(second, PROMPT, outputs=7)
    assert read.tokens == wrote.tokens
    await stored_rightly(remote, start, *groups, **more)
    return read, second


def forget_at_match(remote: NodeThread, read: Any = None) -> None:
    """The node forgets all that it has found, so that a save after that is no repetition.

    `read` answers the next load as if it had not.
    """
    node = remote.node

    async def matching(request: pb.MatchRequest, context: Any) -> pb.MatchReply:
        reply = await node.Match(request, context)
        kept, node.blocks = node.blocks, {}
        if read is not None:
            node.play("Read", *[_remembering(node, kept, read)] * 2)
        return reply

    node.play("Match", matching)


def _remembering(node: Any, kept: Any, read: Any) -> Any:
    async def reading(request: pb.ReadRequest, context: Any) -> AsyncIterator[pb.ReadReply]:
        now, node.blocks = node.blocks, kept
        replies = [reply async for reply in read(request, context)]
        node.blocks = now
        for reply in replies:
            yield reply

    return reading


async def stored_rightly(remote: NodeThread, start: Start, *groups: Any, **more: Any) -> None:
    """Another engine meets no wrong byte in what the last one has stored."""
    remote.node.scripts.clear()
    third = await asyncio.to_thread(start, remote, *groups, **more)
    (read,) = await answers(third, PROMPT, outputs=7)
    assert read.reason == "length"


@pytest.mark.parametrize("beside", [True, False], ids=["beside", "within the step"])
@pytest.mark.parametrize("damage", DAMAGES)
async def test_what_a_load_does_not_bring_is_computed(
    damage: str, beside: bool, remote: NodeThread, start: Start
) -> None:
    """With one group the blocks before the damage stay restored, wherever it was."""
    settings = {"load_async": beside}
    alter, intact = DAMAGES[damage]
    read, engine = await restored_after(remote, start, alter, ONE, settings=settings)
    assert read.restored == 4 * intact
    assert engine.stats()["loads|part" if intact else "loads|failed"] == 1
    assert engine.scheduler._scheduler._asked == {}


@pytest.mark.parametrize("damage", DAMAGES)
async def test_with_several_groups_a_damaged_load_is_computed_whole(
    damage: str, remote: NodeThread, start: Start
) -> None:
    """Pages have no names there that the engine could be told, so the request is."""
    alter, intact = DAMAGES[damage]
    _, engine = await restored_after(remote, start, alter, TWO)
    assert engine.computed_tokens == len(PROMPT) + 6
    assert engine.stats()["loads|part" if intact else "loads|failed"] == 1


async def test_what_fails_on_one_rank_fails_for_the_request(
    remote: NodeThread, start: Start
) -> None:
    """The other rank has restored its part; the engine takes neither."""
    read, engine = await restored_after(remote, start, cut(5), TWO, ranks=2)
    assert engine.computed_tokens == len(PROMPT) + 6
    assert read.reason == "length"


async def test_a_rank_that_lost_a_tail_cuts_the_other_ranks_too(
    remote: NodeThread, start: Start
) -> None:
    """With one group the engine computes from the first page on that any rank lacks."""
    read, _ = await restored_after(remote, start, cut(5), ONE, ranks=2)
    assert read.restored == 20


async def test_a_load_that_does_not_end_is_over_with_its_budget(
    remote: NodeThread, start: Start
) -> None:
    """And what comes later is written to no page."""
    first = await asyncio.to_thread(start, remote, TWO)
    await answers(first, PROMPT)
    remote.node.play("Read", hanging_stream)
    second = await asyncio.to_thread(start, remote, TWO, settings={"load_budget_s": 0.3})
    (read,) = await answers(second, PROMPT)
    assert second.computed_tokens == len(PROMPT)
    assert read.reason == "length"


async def test_a_request_that_is_aborted_while_it_loads_is_let_go(
    remote: NodeThread, start: Start
) -> None:
    """Its pages are free when the load has ended, not before; its lease is given back."""
    first = await asyncio.to_thread(start, remote)
    await answers(first, PROMPT)
    gate = threading.Event()

    async def waiting(request: Any, context: Any) -> Any:
        await asyncio.to_thread(gate.wait)
        async for reply in altered(remote.node, lambda pieces: pieces)(request, context):
            yield reply

    remote.node.play("Read", waiting)
    second = await asyncio.to_thread(start, remote)
    request = second.add(PROMPT)

    def until_loading() -> None:
        while not request.loading:
            second.step()
        second.step()
        second.abort(request)
        second.step()

    await asyncio.to_thread(until_loading)
    free = len(second.free)
    assert request.loading
    gate.set()
    await asyncio.to_thread(_steps_until, second, lambda: not request.loading)
    assert len(second.free) == free + 12
    assert second.scheduler._scheduler._asked == {}
    await asyncio.to_thread(second.add, PROMPT)
    await asyncio.to_thread(second.run)


def _steps_until(engine: Any, done: Callable[[], bool]) -> None:
    while not done():
        engine.step()


HOOKS = {
    "asking": ("_scheduler", "matched"),
    "planning": ("_scheduler", "_plan_load"),
    "filling": ("_scheduler", "fill"),
    "beginning": ("_worker", "_start_load"),
    "saving": ("_worker", "save"),
    "ending": ("_scheduler", "finished"),
    "fencing": ("_worker", "before_step"),
}


@pytest.mark.parametrize("beside", [True, False], ids=["beside", "within the step"])
@pytest.mark.parametrize("hook", HOOKS)
async def test_a_mistake_of_ours_is_kept_from_the_engine(
    hook: str,
    beside: bool,
    remote: NodeThread,
    start: Start,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever raises, each request comes to its end with the right tokens, and it is counted."""
    settings = {"load_async": beside}
    first = await asyncio.to_thread(start, remote, settings=settings)
    (wrote,) = await answers(first, PROMPT, outputs=3)
    second = await asyncio.to_thread(start, remote, settings=settings)
    side, method = HOOKS[hook]
    connector = second.scheduler if side == "_scheduler" else second.ranks[0].connector

    def fails(*args: Any, **more: Any) -> Any:
        raise RuntimeError("planted")

    monkeypatch.setattr(getattr(connector, side), method, fails)
    forget_at_match(remote)
    (read,) = await answers(second, PROMPT, outputs=3)
    assert read.tokens == wrote.tokens
    await stored_rightly(remote, start, settings=settings)
    counted = second.stats()
    assert sum(amount for name, amount in counted.items() if name.startswith("errors|")) >= 1


async def test_saves_that_find_no_room_are_counted(remote: NodeThread, start: Start) -> None:
    """Three blocks fit while the node does not take them; the others are dropped."""
    remote.node.play("Write", *[hanging_stream] * 20)
    engine = await asyncio.to_thread(
        start, remote, settings={"max_saving_bytes": 200, "store_budget_s": 0.5}
    )
    (wrote,) = await answers(engine, PROMPT, outputs=3)
    counted = engine.stats()
    assert counted["unsaved_blocks|dropped"] == 10
    assert counted["unsaved_blocks|failed"] == 3
    assert wrote.reason == "length"


def test_an_adapter_that_cannot_be_read_does_not_hold_up_the_end() -> None:
    """The interpreter joins the threads of pools when it ends, and a file system may hang."""
    code = """
import threading
from tests.stand_ins.vllm_connector import standing_in
with standing_in():
    from kvstore_client.vllm.adapters import Adapters
    adapters = Adapters(lambda path: threading.Event().wait())
    adapters.read("somewhere")
    adapters.close()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
