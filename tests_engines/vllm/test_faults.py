"""The store is killed, frozen, slow or spoiled at every moment: the engine does not notice.

It never dies, never waits past the budget, and says what it would have said without a store.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests_engines.vllm import recording
from tests_engines.vllm.asking import ask, engine, full_blocks, generate, kvstore, prompt
from tests_engines.vllm.models import Models
from tests_engines.vllm.proxy import Proxy
from tests_engines.vllm.report import EXTERNAL, Engine, Step, assert_restored, assert_same
from tests_engines.vllm.rig import Events, Node, Runner, redis_server, spoil_values

MATCH_BUDGET_S = 0.5
LOAD_BUDGET_S = 1.5
SLACK_S = 3.0
"""For threads to be woken on a busy machine. A frozen store answers after minutes: never, here."""
CLOSE = 1e-4
"""Where a part was restored before the fault, the rest is computed in a batch of another shape."""

STORED = prompt(1, 1500)
"""What every engine finds in the store, unless the store is hurt."""
AFTER = prompt(3, 600)
"""What it computes afterwards: it must go on."""
BLOCKS = full_blocks(STORED)
ALL_TOKENS = len(STORED["tokens"])
MODELS = ("llama", "gemma3")
"""One group of layers, and two: their loads fail by different ways through vLLM."""


@pytest.fixture(scope="module")
def plain(runner: Runner, tiny: Models) -> dict[str, Engine]:
    """Without a store: computed from the start, and over what vLLM itself kept."""
    steps = (generate("stored", STORED), generate("warm", STORED), generate("after", AFTER))
    made = runner.run(*(engine(model, tiny[model], None, *steps) for model in MODELS))
    return {each.name: each for each in made}


@pytest.fixture(scope="module")
def saved(runner: Runner, tiny: Models, node: Node) -> dict[str, Engine]:
    """The blocks of `STORED` of both models, on the node's disk."""
    wanted = kvstore(node.endpoint)
    made = runner.run(
        *(engine(model, tiny[model], wanted, generate("stored", STORED)) for model in MODELS)
    )
    node.restart()
    assert node.blocks("disk") >= 2 * BLOCKS
    return {each.name: each for each in made}


@pytest.fixture
def back(node: Node) -> Iterator[Node]:
    """The node, which serves again afterwards."""
    yield node
    node.kill()
    node.start()


def _impatient(endpoint: str, **extra: Any) -> dict[str, Any]:
    budgets = {"match_budget_s": MATCH_BUDGET_S, "load_budget_s": LOAD_BUDGET_S}
    return kvstore(endpoint, **budgets, **extra)


def _hurt(
    runner: Runner, tiny: Models, model: str, wanted: dict[str, Any], events: Events
) -> Engine:
    """An engine that is about to load, then computes something else."""
    steps = (ask("ready"), generate("stored", STORED), ask("between"), generate("after", AFTER))
    [made] = runner.run(engine(model, tiny[model], wanted, *steps), events=events)
    return made


def assert_unharmed(made: Engine, plain: dict[str, Engine]) -> None:
    """Both requests ended as without a store, and nobody waited longer than he may."""
    oracle = plain[made.name]
    for step in made.steps.values():
        assert [output["finish_reason"] for output in step.outputs] == ["length"]
    assert_same(made["after"], oracle["after"])
    _assert_output(made["stored"], oracle, made)
    assert made.longest_match_s < MATCH_BUDGET_S + SLACK_S
    assert made.longest_load_s < LOAD_BUDGET_S + SLACK_S
    seconds, hook = made.longest_hook_s
    assert seconds < LOAD_BUDGET_S + SLACK_S, hook


def _assert_output(step: Step, oracle: Engine, made: Engine) -> None:
    """Equal to the last bit where as much was restored as an oracle had; close in between."""
    if not made.restored_blocks:
        assert_same(step, oracle["stored"])
    elif made.failed_blocks == 0 and step.prompt_tokens(EXTERNAL) == BLOCKS * 128:
        assert_same(step, oracle["warm"])
    else:
        assert step.difference(oracle["stored"]) < CLOSE


Hurt = Callable[[Node, Events], None]

MOMENTS: dict[str, Hurt] = {
    "killed-before-the-match": lambda node, events: events.on("ready", node.kill),
    "frozen-before-the-match": lambda node, events: events.on("ready", node.freeze),
    "killed-between-match-and-load": lambda node, events: events.on(recording.PROMISED, node.kill),
    "frozen-between-match-and-load": lambda node, events: events.on(
        recording.PROMISED, node.freeze
    ),
    "killed-before-a-save": lambda node, events: events.on(recording.SAVING, node.kill),
    "frozen-before-a-save": lambda node, events: events.on(recording.SAVING, node.freeze),
    "killed-after-a-save": lambda node, events: events.on(recording.SAVED, node.kill),
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("moment", MOMENTS)
def test_the_store_is_gone(
    runner: Runner, tiny: Models, back: Node, saved: dict[str, Engine], plain: dict[str, Engine],
    moment: str, model: str,
) -> None:  # fmt: skip
    """Killed or frozen at a moment that the engine itself waits at."""
    with Events() as events:
        MOMENTS[moment](back, events)
        made = _hurt(runner, tiny, model, _impatient(back.endpoint), events)
    assert_unharmed(made, plain)
    assert events.waiting == [], "the moment never came"
    if "save" in moment:
        assert_restored(made, saved[model], blocks=len(made.restored_blocks))
        assert made.restored_blocks
    else:
        assert made.restored_blocks == []


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("way", ["answers", "requests"])
def test_the_store_dies_while_bytes_are_on_their_way(
    runner: Runner, tiny: Models, back: Node, saved: dict[str, Engine], plain: dict[str, Engine],
    way: str, model: str,
) -> None:  # fmt: skip
    """In the middle of a load (answers) or of a save (requests), over the network path."""
    with Proxy(back.endpoint) as proxy, Events() as events:
        moment = recording.PROMISED if way == "answers" else recording.SAVING
        events.on(moment, lambda: proxy.cut_after(way, 1 << 20, back.kill))
        wanted = _impatient(proxy.endpoint, shared_memory=False, bulk=False)
        made = _hurt(runner, tiny, model, wanted, events)
        assert proxy.cuts == 1, "too few bytes went this way"
    assert_unharmed(made, plain)
    strange = set(made.restored_blocks) - set(saved[model].first_digests("computed").items())
    assert not strange
    assert (made.failed_blocks > 0) == (way == "answers")


def test_a_slow_store_is_not_waited_for(
    runner: Runner, tiny: Models, back: Node, saved: dict[str, Engine], plain: dict[str, Engine]
) -> None:
    """What did not come within the budget is computed."""
    with Proxy(back.endpoint) as proxy, Events() as events:
        events.on(recording.PROMISED, lambda: proxy.slow_down(256 << 10))
        wanted = _impatient(proxy.endpoint, shared_memory=False, bulk=False)
        made = _hurt(runner, tiny, "llama", wanted, events)
    assert_unharmed(made, plain)
    assert made.failed_blocks > 0


@pytest.mark.parametrize("model", MODELS)
def test_a_spoiled_block_on_disk_is_never_restored(
    runner: Runner, tiny: Models, home: Path, plain: dict[str, Engine], model: str
) -> None:
    """One bit of a file: the node drops the block, the engine computes it, and stores it again."""
    steps = (generate("stored", STORED), generate("after", AFTER))
    with Node(home / f"spoiled-{model}") as own:
        wanted = kvstore(own.endpoint)
        [saved] = runner.run(engine(model, tiny[model], wanted, *steps))
        own.stop()
        assert own.flip_bits() > 0
        own.start()
        [made] = runner.run(engine(model, tiny[model], wanted, *steps))
        refused = sum(
            count for name, count in own.counters().items() if "corrupt" in name and count
        )
        assert refused > 0, "no spoiled block was met"
        assert_sound(made, saved, plain)
        assert len(made.restored_blocks) < len(saved.first_digests("computed"))
        own.restart()
        [healed] = runner.run(engine(model, tiny[model], wanted, *steps))
    assert healed["stored"].prompt_tokens(EXTERNAL) == BLOCKS * 128
    assert healed.failed_blocks == 0
    assert_same(healed["stored"], plain[model]["warm"])


def assert_sound(made: Engine, saved: Engine, plain: dict[str, Engine]) -> None:
    """Every restored block has the bytes that were computed; the output is as without a store."""
    computed = saved.first_digests("computed")
    assert all(computed.get(name) == digest for name, digest in made.restored_blocks)
    _assert_output(made["stored"], plain[made.name], made)


# Redis.


@pytest.fixture
def redis_node(home: Path, request: pytest.FixtureRequest) -> Iterator[tuple[Any, Node]]:
    """A node that has nothing but Redis below its memory, and what is in it."""
    secret = home / "secret"
    secret.write_bytes(bytes(range(32)))
    secret.chmod(0o600)
    flags = {"disk_enabled": "false", "cluster_secret_file": str(secret)}
    folder = home / request.node.name.partition("[")[2].strip("]")
    with redis_server() as redis, Node(folder, redis_blocks_url=redis.url, **flags) as node:
        yield redis, node


@pytest.mark.parametrize("how", ["killed", "frozen-before-the-match", "frozen-before-the-load"])
def test_redis_is_gone(
    runner: Runner, tiny: Models, redis_node: tuple[Any, Node], plain: dict[str, Engine], how: str
) -> None:
    """All that the node could give lies in a Redis that does not answer."""
    redis, own = redis_node
    runner.run(engine("llama", tiny["llama"], kvstore(own.endpoint), generate("stored", STORED)))
    own.wait_for(BLOCKS, "redis")
    own.restart()
    with Events() as events:
        action = redis.kill if how == "killed" else redis.freeze
        events.on(recording.MATCHED if how.endswith("load") else "ready", action)
        made = _hurt(runner, tiny, "llama", _impatient(own.endpoint), events)
    assert_unharmed(made, plain)
    if not how.endswith("load"):
        assert made.restored_blocks == []


def test_a_spoiled_block_in_redis_is_never_restored(
    runner: Runner, tiny: Models, redis_node: tuple[Any, Node], plain: dict[str, Engine]
) -> None:
    """One bit of every value."""
    redis, own = redis_node
    steps = (generate("stored", STORED), generate("after", AFTER))
    wanted = kvstore(own.endpoint)
    [saved] = runner.run(engine("llama", tiny["llama"], wanted, *steps))
    own.wait_for(BLOCKS, "redis")
    own.stop()
    assert spoil_values(redis.url) >= BLOCKS
    own.start()
    [made] = runner.run(engine("llama", tiny["llama"], wanted, *steps))
    assert_sound(made, saved, plain)
    assert made.restored_blocks == []
