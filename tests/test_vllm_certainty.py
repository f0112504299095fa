"""KVStoreConnector stores and restores only what is certain: pages, weights, adapters, settings."""

import asyncio
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvstore.server import NodeServer
from tests.stand_ins.vllm_mini_engine import Blocks, Lora, full
from tests.vllm_rig import PROMPT, Start, answers

pytest_plugins = ["tests.vllm_fixtures"]


def step_of(engine: Any, *requests: Any) -> Any:
    """What the scheduler says of a step that ends these prompts."""
    scheduled = {each.request_id: each.num_tokens - each.num_computed_tokens for each in requests}
    return SimpleNamespace(
        num_scheduled_tokens=scheduled,
        total_num_scheduled_tokens=sum(scheduled.values()),
        finished_req_ids=set(),
        kv_connector_block_state=SimpleNamespace(
            boundary_state_offloads={},
            get_block_ids=lambda name: tuple(list(t) for t in engine.requests[name].tables),
        ),
    )


def matched(engine: Any, request: Any, held: int) -> Any:
    hook = engine.scheduler
    answer = hook.get_num_new_matched_tokens(request, held)
    if answer[0] is None:
        hook._scheduler._asked[request.request_id].question.future.result(30)
        answer = hook.get_num_new_matched_tokens(request, held)
    return answer


async def test_pages_that_are_loaded_within_a_step_are_saved_by_no_other_request_of_it(
    node: NodeServer, start: Start
) -> None:
    """vLLM lets a second request have them at once, as its own prefix cache's."""
    first = await asyncio.to_thread(start, node, [full()])
    await answers(first, PROMPT)
    engine = await asyncio.to_thread(start, node, [full()], settings={"load_async": False})

    def step() -> Any:
        one, other = engine.add(PROMPT), engine.add(PROMPT)
        pages = list(range(1, 13))
        assert matched(engine, one, 0) == (48, False)
        one.tables, one.num_computed_tokens = [[*pages, 13]], 48
        engine.scheduler.update_state_after_alloc(one, Blocks([pages]), 48)
        assert matched(engine, other, 48) == (0, False)
        other.tables, other.num_computed_tokens = [[*pages, 14]], 48
        engine.scheduler.update_state_after_alloc(other, Blocks(other.tables), 0)
        return engine.scheduler.build_connector_meta(step_of(engine, one, other))

    message = await asyncio.to_thread(step)
    assert len(message.loads) == 1
    assert message.saves == [], "whether these pages hold what they should is not known yet"


async def test_a_request_that_runs_on_over_a_reset_stores_nothing_more(
    node: NodeServer, start: Start
) -> None:
    """What it computes rests on KV of before the reset, so the new name is not its own."""
    engine = await asyncio.to_thread(start, node, [full()])

    def run() -> list[Any]:
        engine.add(PROMPT)
        while not engine.running:
            engine.step()
        saves: list[Any] = []
        build = engine.scheduler.build_connector_meta

        def watched(output: Any) -> Any:
            message = build(output)
            saves.extend(message.saves)
            return message

        engine.scheduler.reset_cache()
        engine.scheduler.build_connector_meta = watched
        engine.run()
        return saves

    assert await asyncio.to_thread(run) == []


async def test_the_length_that_chooses_a_rope_is_part_of_the_space(
    node: NodeServer, start: Start, model: Path
) -> None:
    """LongRoPE has other factors where the engine may go beyond the length of training."""
    text = {"rope_parameters": {"rope_type": "longrope"}, "original_max_position_embeddings": 4096}
    config = SimpleNamespace(to_dict=lambda: text)
    more = {"model_config__hf_text_config": config}
    short = await asyncio.to_thread(
        lambda: start(node, [full()], model_config__max_model_len=4096, **more)
    )
    await answers(short, PROMPT)
    long = await asyncio.to_thread(
        lambda: start(node, [full()], model_config__max_model_len=8192, **more)
    )
    (read,) = await answers(long, PROMPT)
    assert read.restored == 0


class Digest:
    """What lies at a path, as the test says."""

    def __init__(self) -> None:
        self.content = "old"
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, path: str) -> str:
        self.gate.wait(30)
        return self.content


def test_each_use_of_an_adapter_is_confirmed_after_it_has_run(stand_in: None) -> None:
    """vLLM drops adapters that rest and reads them again, so each request may meet new weights."""
    from kvstore_client.vllm.adapters import Adapters

    digest = Digest()
    adapters = Adapters(digest)
    lora = Lora("a", 1, "somewhere")
    one = adapters.use(lora)
    adapters.read("").result()
    one.ran()
    adapters.read("").result()
    assert one.savable
    other = adapters.use(lora)
    adapters.read("").result()
    digest.content = "new"  # Before the engine, which had dropped the adapter, reads it again.
    other.ran()
    adapters.read("").result()
    assert not other.savable


async def test_an_adapter_that_cannot_be_read_in_time_holds_no_request_up(
    node: NodeServer, start: Start
) -> None:
    """A file system that hangs is not waited for longer than the node."""
    settings = {"match_budget_s": 0.05}
    engine = await asyncio.to_thread(start, node, [full()], settings=settings)
    digest = Digest()
    digest.gate.clear()
    engine.scheduler._scheduler._adapters._digest = digest
    request = engine.add(PROMPT, lora=Lora("a", 1, "somewhere"))
    until_s = time.monotonic() + 5
    answer: Any = (None, False)
    while answer[0] is None and time.monotonic() < until_s:
        answer = await asyncio.to_thread(engine.scheduler.get_num_new_matched_tokens, request, 0)
    digest.gate.set()
    assert answer == (0, False)


def test_weights_that_were_never_read_are_not_named_by_the_files(
    stand_in: None, model: Path
) -> None:
    """load_format dummy: the checkpoint lies there and the engine has other weights."""
    from kvstore_client.vllm.spaces import revision_of

    config = SimpleNamespace(
        model_config=SimpleNamespace(model=str(model), revision=None),
        load_config=SimpleNamespace(load_format="dummy"),
        speculative_config=None,
    )
    with pytest.raises(ValueError, match="dummy"):
        revision_of(config, "")


async def test_a_reset_succeeds_where_the_weights_have_no_name(
    node: NodeServer, start: Start
) -> None:
    """There is nothing to forget; False makes vLLM's pause and sleep fail."""
    engine = await asyncio.to_thread(start, node, [full()])
    side = engine.scheduler._scheduler
    side._home._revision = Future()
    side._home._revision.set_exception(ValueError("the checkpoint changes while it is read"))
    side._home.spaces = []
    assert engine.scheduler.reset_cache()


def test_pages_are_named_only_where_the_engine_has_one_group_in_all(
    stand_in: None, model: Path
) -> None:
    """Groups that are not stored count as well: vLLM raises for pages it cannot place."""
    from kvstore_client.vllm.layout import layout_of
    from tests.stand_ins.vllm_connector import KVCacheConfig, KVCacheGroupSpec

    class Some(KVCacheConfig):
        prefix_cacheable_group_ids = (0,)

    groups = [KVCacheGroupSpec(["a"], full()), KVCacheGroupSpec(["b"], full())]
    assert not layout_of(None, Some(10, groups)).single


async def test_pages_of_a_failed_load_are_saved_by_no_request_that_comes_later(
    node: NodeServer, start: Start
) -> None:
    """vLLM leaves them in its prefix cache while their request computes them again, in chunks."""
    first = await asyncio.to_thread(start, node, [full()])
    await answers(first, PROMPT)
    engine = await asyncio.to_thread(start, node, [full()], settings={"load_async": False})

    def steps() -> Any:
        one = engine.add(PROMPT)
        pages = list(range(1, 13))
        assert matched(engine, one, 0) == (48, False)
        one.tables, one.num_computed_tokens = [[*pages, 13]], 48
        engine.scheduler.update_state_after_alloc(one, Blocks([pages]), 48)
        engine.scheduler.build_connector_meta(step_of(engine, one))
        outcome = SimpleNamespace(
            finished_recving=set(),
            failed_recving=set(),
            invalid_block_ids=set(pages),
            kv_connector_worker_meta=None,
        )
        engine.scheduler.update_connector_output(outcome)
        one.num_computed_tokens = 0
        late = engine.add(PROMPT)
        assert matched(engine, late, 48) == (0, False)
        late.tables, late.num_computed_tokens = [[*pages, 14]], 48
        engine.scheduler.update_state_after_alloc(late, Blocks(late.tables), 0)
        output = step_of(engine, one, late)
        output.num_scheduled_tokens[one.request_id] = 4  # A chunk: one page of twelve.
        return engine.scheduler.build_connector_meta(output)

    message = await asyncio.to_thread(steps)
    saved = {page for s in message.saves for r in s.runs for block in r.pages for page in block}
    assert not saved & set(range(2, 13)), "these pages are not computed yet"
