"""What one process has computed, another restores: in all ways to load, from every tier."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests_engines.vllm.asking import ask, engine, full_blocks, generate, kvstore, prompt
from tests_engines.vllm.models import Models
from tests_engines.vllm.report import (
    COMPUTED,
    EXTERNAL,
    LOCAL,
    Engine,
    assert_restored,
    assert_same,
)
from tests_engines.vllm.rig import Events, Node, Runner, redis_server

PROMPTS = (prompt(1, 700), prompt(2, 1000))
BLOCKS = full_blocks(*PROMPTS)
RESTORED_TOKENS = BLOCKS * 128
LONGER = prompt(2, 1500)
CLOSE = 1e-4
"""Between log probabilities of float32 that were summed in batches of other shapes."""
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


def _both(name: str, model: Path, connector: dict[str, Any] | None, **llm: Any) -> dict[str, Any]:
    steps = (generate("first", *PROMPTS), generate("again", *PROMPTS))
    return engine(name, model, connector, *steps, **llm)


@dataclass
class Runs:
    """What two processes made, one after the other."""

    plain: Engine
    """The oracle, which knows of no store: what it computes, then the same from its own cache."""
    alone: Engine
    """The same for prompts in one batch."""
    saved: Engine
    saved_to_redis: Engine
    loaded: dict[str, Engine]
    """By the names of `CASES`, and `disk`, `redis` and `together`."""


@pytest.fixture(scope="module")
def over_redis(home: Path) -> Iterator[Node]:
    """A node without a disk, over a Redis that keeps what it had when it is restarted."""
    with redis_server() as redis:
        secret = home / "secret"
        secret.write_bytes(bytes(range(32)))
        secret.chmod(0o600)
        own = {"redis_blocks_url": redis.url, "cluster_secret_file": str(secret)}
        with Node(home / "over-redis", disk_enabled="false", **own) as node:
            yield node


@pytest.fixture(scope="module")
def runs(runner: Runner, tiny: Models, node: Node, over_redis: Node) -> Runs:
    """One process stores, another restores: from memory in all ways, from a disk, from a Redis."""
    ours, redis = kvstore(node.endpoint), kvstore(over_redis.endpoint)
    together = generate("first", *PROMPTS, LONGER, together=True)
    llama = tiny["llama"]
    plain, alone, saved, saved_to_redis = runner.run(
        _both("plain", llama, None),
        engine("alone", llama, None, together),
        _both("saving", llama, ours),
        _both("saving to redis", llama, redis),
    )
    node.wait_for(BLOCKS)
    over_redis.restart()

    def empty_memory() -> None:
        node.restart()
        assert node.blocks("memory") == 0

    with Events() as events:
        events.on("disk", empty_memory)
        made = runner.run(
            *(
                _both(name, llama, kvstore(node.endpoint, **extra), **llm)
                for name, (extra, llm) in CASES.items()
            ),
            engine("last before disk", llama, None, ask("disk")),
            _both("disk", llama, ours),
            _both("redis", llama, redis),
            engine("together", llama, ours, together),
            events=events,
        )
        assert events.waiting == []
    return Runs(plain, alone, saved, saved_to_redis, {each.name: each for each in made})


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


def test_saving_changes_nothing(runs: Runs) -> None:
    """Whoever stores computes as if there were no store, and finds nothing in an empty one."""
    for saved in (runs.saved, runs.saved_to_redis):
        assert_same(saved["first"], runs.plain["first"])
        assert_same(saved["again"], runs.plain["again"])
        assert saved["first"].prompt_tokens(COMPUTED) == ALL_TOKENS
        assert saved["again"].prompt_tokens(LOCAL) == RESTORED_TOKENS
        assert len(saved.first_digests("computed")) == BLOCKS


@pytest.mark.parametrize("name", CASES)
def test_another_process_restores_it(runs: Runs, name: str) -> None:
    """Whole blocks from the store, only the rest computed, the same bytes and the same output."""
    assert_warm(runs.loaded[name], runs.saved, runs.plain)


@pytest.mark.parametrize("name", CASES)
def test_what_was_restored_is_in_the_cache_of_vllm(runs: Runs, name: str) -> None:
    """The second time nothing is asked of the store's bytes."""
    again = runs.loaded[name]["again"]
    assert again.prompt_tokens(LOCAL) == RESTORED_TOKENS
    assert again.prompt_tokens(EXTERNAL) == 0
    assert_same(again, runs.plain["again"])


@pytest.mark.parametrize("tier", ["disk", "redis"])
def test_a_node_that_was_restarted_serves_it_from_below(runs: Runs, tier: str) -> None:
    """Its memory was empty. vLLM is told that it came from slower storage."""
    saved = runs.saved if tier == "disk" else runs.saved_to_redis
    assert_warm(runs.loaded[tier], saved, runs.plain)


def test_hits_are_labelled_by_where_they_lay(runs: Runs) -> None:
    """Memory of this host, and disk."""
    label = "vllm:prompt_tokens_cached_by_source{source=%s}"
    assert runs.loaded["asynchronous"]["first"].counters[label % "host"] == RESTORED_TOKENS
    assert runs.loaded["disk"]["first"].counters[label % "disk"] == RESTORED_TOKENS


def test_prompts_of_one_batch_are_restored_together(runs: Runs) -> None:
    """Several loads at once, one of a prompt that goes on where the stored one ends."""
    made = runs.loaded["together"]
    names = {name for name, _ in made.restored_blocks}
    computed = runs.saved.first_digests("computed")
    assert names == set(computed)
    assert all(computed[name] == digest for name, digest in made.restored_blocks)
    assert made["first"].difference(runs.alone["first"]) < CLOSE
