"""What lies below the node's memory is spoiled or does not answer: the engine does not notice."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from kvstore_workers.redis_server import RedisServer
from tests_engines.vllm import recording
from tests_engines.vllm.asking import ask, engine, generate, kvstore
from tests_engines.vllm.hurting import (
    AFTER,
    BLOCKS,
    BUDGETS,
    CLOSE,
    OVER,
    READY,
    STEPS,
    STORED,
    assert_output,
    assert_unharmed,
    oracle,
)
from tests_engines.vllm.models import Models
from tests_engines.vllm.report import EXTERNAL, Engine, assert_restored
from tests_engines.vllm.rig import Events, Node, Runner, redis_server, spoil_values

MODELS = ("llama", "gemma3")
BOTH = (generate("stored", STORED), generate("after", AFTER))


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    """A Redis of these tests' own."""
    with redis_server() as redis:
        yield redis


@pytest.fixture(scope="module")
def over_redis(home: Path, redis: RedisServer) -> Iterator[Node]:
    """A node that has nothing but Redis below its memory."""
    secret = home / "secret"
    secret.write_bytes(bytes(range(32)))
    secret.chmod(0o600)
    flags = {"disk_enabled": "false", "cluster_secret_file": str(secret)}
    with Node(home / "over-redis", redis_blocks_url=redis.url, **flags) as node:
        yield node


@dataclass
class First:
    """What the first process made: the oracles, and what was stored on disk and in Redis."""

    plain: dict[str, Engine]
    on_disk: dict[str, Engine]
    in_redis: Engine


@pytest.fixture(scope="module")
def first(runner: Runner, tiny: Models, node: Node, over_redis: Node) -> First:
    """All is below: the memory of both nodes is empty."""
    made = runner.run(
        *(oracle(model, tiny[model]) for model in MODELS),
        *(engine(model, tiny[model], kvstore(node.endpoint), *BOTH) for model in MODELS),
        engine("llama", tiny["llama"], kvstore(over_redis.endpoint), *BOTH),
    )
    over_redis.restart()
    plain, on_disk = made[:2], made[2:4]
    named = [{each.name: each for each in some} for some in (plain, on_disk)]
    return First(*named, made[4])


@pytest.fixture(scope="module")
def spoiled(
    runner: Runner, tiny: Models, node: Node, first: First
) -> tuple[list[Engine], list[Engine], float]:
    """Engines that meet spoiled blocks on disk, then those that meet what they left; how many."""
    node.stop()
    assert node.flip_bits(0.25) + node.flip_bits(0.75) >= 2
    node.start()
    met = []

    def over() -> None:
        met.append(sum(count for name, count in node.counters().items() if "corrupt" in name))
        node.restart()

    ours = kvstore(node.endpoint)
    with Events() as events:
        events.on("restart", over)
        made = runner.run(
            *(engine(model, tiny[model], ours, *BOTH) for model in MODELS),
            engine("between", tiny["llama"], None, ask("restart")),
            *(engine(model, tiny[model], ours, *BOTH) for model in MODELS),
            events=events,
        )
    return made[:2], made[3:], met[0]


@pytest.mark.parametrize("index", range(len(MODELS)), ids=MODELS)
def test_a_spoiled_block_on_disk_is_never_restored(
    spoiled: tuple[list[Engine], list[Engine], float], first: First, index: int
) -> None:
    """One bit: the node drops the block, the engine computes it, stores it, and restores it."""
    met, healed = spoiled[0][index], spoiled[1][index]
    assert spoiled[2] >= len(MODELS), "a spoiled block was not met"
    saved, plain = first.on_disk[met.name], first.plain[met.name]
    assert_restored(met, saved, blocks=len(met.restored_blocks))
    assert_output(met, plain)
    less = met["stored"].prompt_tokens(EXTERNAL) + met["after"].prompt_tokens(EXTERNAL)
    assert met.failed_blocks > 0 or less < (BLOCKS + 4) * 128
    assert healed["stored"].prompt_tokens(EXTERNAL) == BLOCKS * 128
    assert healed["after"].prompt_tokens(EXTERNAL) == 4 * 128
    assert healed.failed_blocks == 0
    # A block that was computed again rounds as its batch did, so it is not the old one to a bit.
    assert_restored(healed, met, saved, blocks=len(healed.restored_blocks))
    assert healed["stored"].difference(plain["warm"]) < CLOSE


Action = Callable[[RedisServer], object]
REDIS_FAULTS: dict[str, tuple[str, Action]] = {
    "unhurt": (READY, lambda redis: None),
    "frozen-before-the-match": (READY, RedisServer.freeze),
    "frozen-before-the-load": (recording.MATCHED, RedisServer.freeze),
    "spoiled": (READY, lambda redis: spoil_values(redis.url)),
    "killed": (READY, RedisServer.kill),
}


@pytest.fixture(scope="module")
def over_hurt_redis(
    runner: Runner, tiny: Models, redis: RedisServer, over_redis: Node, first: First
) -> dict[str, Engine]:
    """An engine a fault; the node's memory is empty before each."""
    left = list(REDIS_FAULTS)
    with Events() as events:

        def begin() -> None:
            moment, action = REDIS_FAULTS[left.pop(0)]
            events.on(OVER, over)
            events.on(moment, lambda: action(redis))

        def over() -> None:
            assert events.waiting == [], "the moment never came"
            if left:
                redis.thaw()
                over_redis.kill()
                over_redis.start()
                begin()

        begin()
        ours = kvstore(over_redis.endpoint, **BUDGETS)
        made = runner.run(
            *(engine(name, tiny["llama"], ours, *STEPS) for name in REDIS_FAULTS), events=events
        )
    return {each.name: each for each in made}


@pytest.mark.parametrize("fault", REDIS_FAULTS)
def test_redis_is_hurt(over_hurt_redis: dict[str, Engine], first: First, fault: str) -> None:
    """All that the node could give lies in a Redis that is gone, hangs, or has every value spoiled.

    It is killed last; before, when it is not hurt, everything comes from it.
    """
    made = over_hurt_redis[fault]
    assert_unharmed(made, first.plain["llama"])
    assert_restored(made, first.in_redis, blocks=len(made.restored_blocks))
    if fault == "unhurt":
        assert made["stored"].prompt_tokens(EXTERNAL) == BLOCKS * 128
    elif fault != "frozen-before-the-load":
        assert made.restored_blocks == []
