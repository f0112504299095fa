"""What one process has computed, another restores: in all ways to load, from every tier."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests_engines.vllm.asking import engine, full_blocks, generate, kvstore, prompt
from tests_engines.vllm.models import Models
from tests_engines.vllm.report import (
    COMPUTED,
    EXTERNAL,
    LOCAL,
    Engine,
    assert_restored,
    assert_same,
)
from tests_engines.vllm.rig import Node, Runner, redis_server

PROMPTS = (prompt(1, 700), prompt(2, 1000))
BLOCKS = full_blocks(*PROMPTS)
RESTORED_TOKENS = BLOCKS * 128
ALL_TOKENS = sum(len(each["tokens"]) for each in PROMPTS)

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "asynchronous": ({}, {}),
    "synchronous": ({"load_async": False}, {}),
    "large-chunks": ({}, {"max_num_batched_tokens": 2048}),
    "small-chunks": ({}, {"max_num_batched_tokens": 192}),
    "bulk-path": ({"shared_memory": False}, {}),
    "grpc-alone": ({"shared_memory": False, "bulk": False}, {}),
}
"""Settings of the connector and of vLLM; all read what an engine with the usual ones stored."""


def _both(name: str, tiny: Models, connector: dict[str, Any] | None, **llm: Any) -> dict[str, Any]:
    steps = (generate("first", *PROMPTS), generate("again", *PROMPTS))
    return engine(name, tiny["llama"], connector, *steps, **llm)


@pytest.fixture(scope="module")
def plain(runner: Runner, tiny: Models) -> Engine:
    """The oracle, which knows of no store: what it computes, then the same from its own cache."""
    [made] = runner.run(_both("plain", tiny, None))
    return made


@pytest.fixture(scope="module")
def saved(runner: Runner, tiny: Models, node: Node) -> Engine:
    """An engine that stored all it computed."""
    [made] = runner.run(_both("saving", tiny, kvstore(node.endpoint)))
    node.wait_for(BLOCKS)
    return made


@pytest.fixture(scope="module")
def loaded(runner: Runner, tiny: Models, node: Node, saved: Engine) -> dict[str, Engine]:
    """Engines of another process over the node's memory, each another way."""
    made = runner.run(
        *(
            _both(name, tiny, kvstore(node.endpoint, **extra), **llm)
            for name, (extra, llm) in CASES.items()
        )
    )
    return {each.name: each for each in made}


def assert_warm(engine: Engine, saved: Engine, plain: Engine) -> None:
    """All came from the store, as it was computed; the output is what vLLM's own cache gives."""
    assert_restored(engine, saved, blocks=BLOCKS)
    assert engine.failed_blocks == 0
    first = engine["first"]
    assert first.prompt_tokens(EXTERNAL) == RESTORED_TOKENS
    assert first.prompt_tokens(COMPUTED) == ALL_TOKENS - RESTORED_TOKENS
    assert first.counters["vllm:external_prefix_cache_hits"] == RESTORED_TOKENS
    assert first.counters["vllm:external_prefix_cache_queries"] == ALL_TOKENS
    assert_same(first, plain["again"])


def test_saving_changes_nothing(saved: Engine, plain: Engine) -> None:
    """Whoever stores computes as if there were no store, and finds nothing in an empty one."""
    assert_same(saved["first"], plain["first"])
    assert_same(saved["again"], plain["again"])
    assert saved["first"].prompt_tokens(COMPUTED) == ALL_TOKENS
    assert saved["again"].prompt_tokens(LOCAL) == RESTORED_TOKENS
    assert len(saved.first_digests("computed")) == BLOCKS


@pytest.mark.parametrize("name", CASES)
def test_another_process_restores_it(
    loaded: dict[str, Engine], saved: Engine, plain: Engine, name: str
) -> None:
    """Whole blocks from the store, only the rest computed, the same bytes and the same output."""
    assert_warm(loaded[name], saved, plain)


@pytest.mark.parametrize("name", CASES)
def test_what_was_restored_is_in_the_cache_of_vllm(
    loaded: dict[str, Engine], plain: Engine, name: str
) -> None:
    """The second time nothing is asked of the store's bytes."""
    again = loaded[name]["again"]
    assert again.prompt_tokens(LOCAL) == RESTORED_TOKENS
    assert again.prompt_tokens(EXTERNAL) == 0
    assert_same(again, plain["again"])


def test_a_node_that_was_restarted_serves_it_from_disk(
    runner: Runner,
    tiny: Models,
    node: Node,
    loaded: dict[str, Engine],
    saved: Engine,
    plain: Engine,
) -> None:
    """Its memory is empty; the source that vLLM is told of is the disk."""
    node.restart()
    assert node.blocks("memory") == 0
    [made] = runner.run(_both("disk", tiny, kvstore(node.endpoint)))
    assert_warm(made, saved, plain)
    source = "vllm:prompt_tokens_cached_by_source{source=disk}"
    assert made["first"].counters.get(source) == RESTORED_TOKENS


@pytest.fixture
def over_redis(home: Any) -> Iterator[Node]:
    """A node without a disk, over a Redis that keeps what it had when it is restarted."""
    with redis_server() as redis:
        flags = {"redis_blocks_url": redis.url, "disk_enabled": "false"}
        secret = home / "secret"
        secret.write_bytes(bytes(range(32)))
        secret.chmod(0o600)
        with Node(home / "over-redis", cluster_secret_file=str(secret), **flags) as node:
            yield node


def test_a_node_that_was_restarted_serves_it_from_redis(
    runner: Runner, tiny: Models, over_redis: Node, plain: Engine
) -> None:
    """The same over Redis alone."""
    [saved] = runner.run(_both("saving to redis", tiny, kvstore(over_redis.endpoint)))
    over_redis.restart()
    assert over_redis.blocks("memory") == 0
    [made] = runner.run(_both("redis", tiny, kvstore(over_redis.endpoint)))
    assert_warm(made, saved, plain)


def test_prompts_of_one_batch_are_restored_together(
    runner: Runner, tiny: Models, node: Node, loaded: dict[str, Engine], saved: Engine
) -> None:
    """Several loads at once, and a prompt that goes on where the stored one ends."""
    longer = prompt(2, 1500)
    steps = generate("first", *PROMPTS, longer, together=True)
    [made] = runner.run(engine("together", tiny["llama"], kvstore(node.endpoint), steps))
    [alone] = runner.run(engine("alone", tiny["llama"], None, steps))
    restored = [name for name, _ in made.restored_blocks]
    assert len(set(restored)) == BLOCKS
    computed = saved.first_digests("computed")
    assert all(computed[name] == digest for name, digest in made.restored_blocks)
    assert made["first"].tokens == alone["first"].tokens
