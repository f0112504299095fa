"""KVStoreConnector in a small engine that checks its KV cache, over nodes that really serve."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from kvstore.server import NodeServer
from tests.client_rig import hanging
from tests.scripted_node import NodeThread
from tests.stand_ins.vllm_mini_engine import Blocks, Lora, Request, full, state, window
from tests.vllm_rig import PROMPT, Start, answers, output, weights

pytest_plugins = ["tests.vllm_fixtures"]

GROUPS = {
    "full": [full()],
    "window": [full(), window(7)],
    "long window": [window(23), full()],
    "small pages": [full(8), window(5, block_size=2)],
    "state": [state(8), full(8)],
    "all kinds": [full(8), window(9, block_size=4), state(8)],
}


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS.keys())
async def test_what_one_engine_computes_another_restores(
    groups: list[Any], node: NodeServer, start: Start
) -> None:
    """The same tokens, and KV that is right to the byte wherever the engine looks at it."""
    first = await asyncio.to_thread(start, node, groups)
    (wrote,) = await answers(first, PROMPT, outputs=9)
    second = await asyncio.to_thread(start, node, groups)
    (read,) = await answers(second, PROMPT, outputs=9)
    assert wrote.restored == 0
    assert read.restored == 48
    assert read.tokens == wrote.tokens
    assert second.computed_tokens == first.computed_tokens - 48
    assert second.stats()["loads|whole"] == 1


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS.keys())
async def test_a_longer_prompt_restores_what_a_shorter_one_left(
    groups: list[Any], node: NodeServer, start: Start
) -> None:
    """Answers of the first turn are the beginning of the second one's question."""
    engine = await asyncio.to_thread(start, node, groups)
    (turn,) = await answers(engine, PROMPT, outputs=20)
    again = await asyncio.to_thread(start, node, groups)
    (next_turn,) = await answers(again, [*turn.tokens[:-1], 1, 2, 3, 4, 5], outputs=2)
    assert next_turn.restored >= 64
    assert next_turn.restored % again.unit == 0


async def test_one_token_at_least_is_computed(node: NodeServer, start: Start) -> None:
    """A prompt that is stored whole is restored but for its last block: its logits are wanted."""
    first = await asyncio.to_thread(start, node)
    await answers(first, PROMPT[:48])
    second = await asyncio.to_thread(start, node)
    (read,) = await answers(second, PROMPT[:48])
    assert read.restored == 44


async def test_what_the_node_holds_is_not_copied_out_again(
    remote: NodeThread, start: Start
) -> None:
    """Neither what was just stored nor what was just loaded; and each block names its parent."""
    first = await asyncio.to_thread(start, remote)
    await answers(first, PROMPT, outputs=9)
    second = await asyncio.to_thread(start, remote, settings={"load_async": False})
    await answers(second, PROMPT)
    await answers(second, [*PROMPT[:24], *PROMPT])
    assert first.stats()["saved_blocks|"] == 14
    assert second.stats()["saved_blocks|"] == 12
    keys = {key for _, key in remote.node.blocks}
    parents = list(remote.node.parents.values())
    assert parents.count(b"") == 1
    assert set(parents) - {b""} < keys
    assert len(set(parents)) == len(parents) - 1, "two prompts part after their sixth block"


async def test_each_rank_restores_its_own_part(node: NodeServer, start: Start) -> None:
    """Two workers hold different heads: each has a space of its own."""
    first = await asyncio.to_thread(start, node, GROUPS["window"], ranks=2)
    await answers(first, PROMPT)
    second = await asyncio.to_thread(start, node, GROUPS["window"], ranks=2)
    (read,) = await answers(second, PROMPT)
    assert read.restored == 48
    other = await asyncio.to_thread(start, node, GROUPS["window"])
    (alone,) = await answers(other, PROMPT)
    assert alone.restored == 0, "a rank of two is not a rank of one"


async def test_ranks_that_hold_the_same_share_one_space(node: NodeServer, start: Start) -> None:
    """One of them writes, all read: a latent is stored once."""
    first = await asyncio.to_thread(start, node, ranks=2, replicas=2)
    await answers(first, PROMPT)
    assert first.stats()["saved_blocks|"] == 12
    second = await asyncio.to_thread(start, node, ranks=2, replicas=2)
    (read,) = await answers(second, PROMPT)
    assert read.restored == 48
    assert second.stats()["loaded_blocks|memory"] == 24


async def test_salts_never_meet(node: NodeServer, start: Start) -> None:
    """What was computed under one salt is not there for another, nor for none."""
    first = await asyncio.to_thread(start, node)
    await answers(first, PROMPT, salt="one")
    second = await asyncio.to_thread(start, node)
    for salt in ("two", ""):
        (read,) = await answers(second, PROMPT, salt=salt)
        assert read.restored == 0
    (read,) = await answers(second, PROMPT, salt="one")
    assert read.restored == 48


async def test_an_adapter_that_was_replaced_is_another_one(
    node: NodeServer, start: Start, tmp_path: Path
) -> None:
    """The same name and path, other weights: nothing of the old ones is restored."""
    path = weights(tmp_path / "adapter", b"old")
    lora = Lora("a", 1, str(path))
    first = await asyncio.to_thread(start, node)
    await answers(first, PROMPT, outputs=6, lora=lora)
    same = await asyncio.to_thread(start, node)
    (read,) = await answers(same, PROMPT, lora=lora)
    assert read.restored == 48
    weights(path, b"new")
    replaced = await asyncio.to_thread(start, node)
    (read,) = await answers(replaced, PROMPT, outputs=6, lora=lora)
    assert read.restored == 0


async def test_an_adapter_replaced_under_a_running_engine_is_not_stored(
    node: NodeServer, start: Start, tmp_path: Path
) -> None:
    """The engine goes on with the old weights: what they compute has no certain name."""
    path = weights(tmp_path / "adapter", b"old")
    lora = Lora("a", 1, str(path))
    engine = await asyncio.to_thread(start, node)
    await answers(engine, PROMPT[:20], outputs=6, lora=lora)
    weights(path, b"new")
    await answers(engine, PROMPT, outputs=6, lora=lora)
    fresh = await asyncio.to_thread(start, node)
    (read,) = await answers(fresh, PROMPT, outputs=6, lora=lora)
    assert read.restored == 0


async def test_pages_that_are_used_again_at_once_do_not_spoil_a_save(
    node: NodeServer, start: Start
) -> None:
    """Few pages, many requests: each save is of what its step computed."""
    first = await asyncio.to_thread(start, node, GROUPS["window"], pages=42)
    prompts = [[number, *PROMPT] for number in range(8)]

    def churn() -> None:
        for prompt in prompts:
            request = first.add(prompt, outputs=3)
            first.step()
            while request not in first.running:
                first.step()
            first.step()
            first.preempt(request)
            first.run()
        first.saved()

    await asyncio.to_thread(churn)
    second = await asyncio.to_thread(start, node, GROUPS["window"])
    for prompt in prompts:
        (read,) = await answers(second, prompt)
        assert read.restored == 48


async def test_a_preempted_request_is_restored(node: NodeServer, start: Start) -> None:
    """Its pages are gone, its blocks are stored."""
    engine = await asyncio.to_thread(start, node)
    request = engine.add(PROMPT, outputs=8)

    def run() -> None:
        while request.num_tokens < len(PROMPT) + 3:
            engine.step()
        engine.saved()
        engine.preempt(request)
        engine.run()

    await asyncio.to_thread(run)
    assert request.restored == 52


async def test_without_a_node_the_engine_computes(start: Start) -> None:
    """Nobody listens: no exception, no wait beyond the budget, the same tokens."""
    engine = await asyncio.to_thread(
        start, "127.0.0.1:1", settings={"match_budget_s": 0.05, "store_budget_s": 0.05}
    )
    (read,) = await answers(engine, PROMPT, outputs=3)
    assert read.restored == 0
    assert engine.stats()["unsaved_blocks|failed"] == 13


async def test_a_node_that_does_not_answer_costs_the_budget_once(
    remote: NodeThread, start: Start
) -> None:
    """The question is asked once, its answer is nothing."""
    remote.node.play("Match", *[hanging] * 9)
    engine = await asyncio.to_thread(start, remote, settings={"match_budget_s": 2})
    (read,) = await answers(engine, PROMPT)
    assert read.restored == 0
    assert remote.node.calls["Match"] == 1


async def test_a_question_is_asked_once_however_often_the_scheduler_asks(
    node: NodeServer, start: Start
) -> None:
    """Also after the answer: a request may wait long for pages."""
    engine = await asyncio.to_thread(start, node)
    await answers(engine, PROMPT)
    request = engine.add(PROMPT)
    side = engine.scheduler

    def ask() -> list[Any]:
        while (answer := side.get_num_new_matched_tokens(request, 0))[0] is None:
            pass
        return [answer, *(side.get_num_new_matched_tokens(request, 0) for _ in range(50))]

    given = await asyncio.to_thread(ask)
    assert set(given) == {(48, True)}
    assert side.get_num_new_matched_tokens(request, 32) == (16, True)
    assert side.get_num_new_matched_tokens(request, 48) == (0, False)
    assert side._scheduler._asked[request.request_id].attempt == 1
    await asyncio.to_thread(engine.run)


async def test_many_requests_of_one_prefix_load_it_once(node: NodeServer, start: Start) -> None:
    """While one loads, the others wait for what it brings."""
    first = await asyncio.to_thread(start, node)
    await answers(first, PROMPT)
    engine = await asyncio.to_thread(start, node)
    requests = [engine.add([*PROMPT, number]) for number in range(3)]
    side = engine.scheduler

    def until_answered(request: Request) -> None:
        while side.get_num_new_matched_tokens(request, 0)[0] is None:
            pass

    await asyncio.to_thread(until_answered, requests[0])
    tables = [list(range(1, 14))]
    side.update_state_after_alloc(requests[0], Blocks(tables), 48)
    for request in requests[1:]:
        question = side.get_num_new_matched_tokens(request, 0)
        assert question == (None, False)
        await asyncio.to_thread(side._scheduler._asked[request.request_id].question.future.result)
        assert side.get_num_new_matched_tokens(request, 0) == (None, False)
    # Where one fails the others do not try in turn, each for as long.
    side.update_connector_output(
        output(finished={requests[0].request_id}, failed={requests[0].request_id})
    )
    for request in requests[1:]:
        assert side.get_num_new_matched_tokens(request, 0) == (0, False)
    assert side.get_num_new_matched_tokens(requests[0], 0) == (0, False)
    engine.waiting.clear()
