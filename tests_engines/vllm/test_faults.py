"""The store is killed, frozen, slow or spoiled at every moment: the engine does not notice.

It never dies, never waits past the budget, and says what it would have said without a store.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
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
DRAIN_TIMEOUT_S = 4.0
"""The connector's own setting."""
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
SIDES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "gemma3": ("gemma3", {}),
    "llama-within": ("llama", {"load_async": False}),
}
"""Ways in which failed loads go through vLLM: block by block for one group of layers, whole
requests for two, and within the step."""


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


@dataclass(frozen=True)
class Fault:
    """What is done to the store, and at which event of the engine."""

    moment: str
    act: Callable[[Node, Proxy], object]
    over_proxy: bool = False
    """The engine reaches the node by the network path alone, through the proxy."""
    cuts: bool = False
    """The line must have been cut when it is over."""


def _kill(node: Node, _proxy: Proxy) -> None:
    node.kill()


def _freeze(node: Node, _proxy: Proxy) -> None:
    node.freeze()


def _cut(way: str) -> Callable[[Node, Proxy], None]:
    return lambda node, proxy: proxy.cut_after(way, CUT_AFTER_BYTES, node.kill)


CUT_AFTER_BYTES = 1 << 20
READY, OVER = "ready", "over"
LAST = "llama/frozen-to-the-end"
FAULTS = {
    "killed-before-the-match": Fault(READY, _kill),
    "frozen-before-the-match": Fault(READY, _freeze),
    "killed-between-match-and-load": Fault(recording.PROMISED, _kill),
    "frozen-between-match-and-load": Fault(recording.PROMISED, _freeze),
    "killed-while-loading": Fault(recording.LOADING, _kill),
    "frozen-while-loading": Fault(recording.LOADING, _freeze),
    "killed-before-a-save": Fault(recording.SAVING, _kill),
    "frozen-before-a-save": Fault(recording.SAVING, _freeze),
    "killed-after-a-save": Fault(recording.SAVED, _kill),
    "cut-in-the-middle-of-a-load": Fault(recording.PROMISED, _cut("answers"), True, True),
    "cut-in-the-middle-of-a-save": Fault(recording.SAVING, _cut("requests"), True, True),
    "slow-from-the-match-on": Fault(
        recording.PROMISED, lambda _, proxy: proxy.slow_down(256 << 10), True
    ),
    # The last one: the store hangs while the engine ends.
    "frozen-to-the-end": Fault(OVER, _freeze),
}
NOTHING_RESTORED = {name for name, fault in FAULTS.items() if fault.moment in (READY,)} | {
    "killed-between-match-and-load",
    "frozen-between-match-and-load",
}
"""Shared memory needs the node's word for each read, so nothing is read of one that is gone."""
ALL_RESTORED = {name for name in FAULTS if "save" in name or "end" in name}


@dataclass
class Course:
    """Hurts a node once an engine, engine after engine, and makes it serve again in between."""

    node: Node
    proxy: Proxy
    events: Events
    left: list[str]
    missed: set[str] = field(default_factory=set)
    """Faults whose moment never came."""

    def begin(self) -> None:
        """Prepares for the engine that comes next."""
        fault = FAULTS[self.left[0].partition("/")[2]]
        self.events.on(OVER, self._over)
        self.events.on(fault.moment, lambda: self._act(fault))

    def _act(self, fault: Fault) -> None:
        fault.act(self.node, self.proxy)
        if fault.moment == OVER:
            self.left.pop(0)

    def _over(self) -> None:
        """An engine has said all it had to say."""
        name = self.left.pop(0)
        fault = FAULTS[name.partition("/")[2]]
        waiting = [event for event in self.events.waiting if event == fault.moment]
        if waiting or (fault.cuts and not self.proxy.cuts):
            self.missed.add(name)
        self.node.kill()
        self.node.start()
        self.proxy.recover()
        self.events.forget()
        if self.left:
            self.begin()


@pytest.fixture(scope="module")
def hurt(
    runner: Runner, tiny: Models, node: Node, saved: dict[str, Engine]
) -> Iterator[tuple[dict[str, Engine], Course]]:
    """One engine a fault and model, in one process; each loads, and then computes and stores."""
    steps = (ask(READY), generate("stored", STORED), generate("after", AFTER), ask(OVER))
    names = [f"{side}/{fault}" for fault in list(FAULTS)[:-1] for side in SIDES]
    names.append(LAST)  # After it the node stays frozen.
    with Proxy(node.endpoint) as proxy, Events() as events:
        budgets = {"match_budget_s": MATCH_BUDGET_S, "load_budget_s": LOAD_BUDGET_S}
        course = Course(node, proxy, events, list(names))
        course.begin()

        def connector(fault: Fault, extra: dict[str, Any]) -> dict[str, Any]:
            if not fault.over_proxy:
                return kvstore(node.endpoint, **budgets, **extra)
            return kvstore(proxy.endpoint, shared_memory=False, bulk=False, **budgets, **extra)

        made = runner.run(
            *(
                engine(name, tiny[model], connector(FAULTS[fault], extra), *steps)
                for name in names
                for side, _, fault in [name.partition("/")]
                for model, extra in [SIDES[side]]
            ),
            events=events,
            may_fail=True,
            timeout_s=600,
        )
        yield {each.name: each for each in made}, course
    node.kill()
    node.start()


def assert_unharmed(made: Engine, oracle: Engine) -> None:
    """Both requests ended as without a store, and nobody waited longer than he may."""
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


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("fault", list(FAULTS)[:-1])
def test_the_engine_does_not_notice(
    hurt: tuple[dict[str, Engine], Course], saved: dict[str, Engine], plain: dict[str, Engine],
    fault: str, side: str,
) -> None:  # fmt: skip
    """It says what it would have said, in time, and uses no byte that is not the right one."""
    engines, course = hurt
    name, model = f"{side}/{fault}", SIDES[side][0]
    made = engines[name]
    assert made.error is None, made.error
    assert name not in course.missed, "the fault was never met"
    assert_unharmed(made, plain[model])
    computed = saved[model].first_digests("computed")
    assert all(computed.get(key) == digest for key, digest in made.restored_blocks)
    if fault in NOTHING_RESTORED:
        assert made.restored_blocks == []
    elif fault in ALL_RESTORED:
        assert made["stored"].prompt_tokens(EXTERNAL) == BLOCKS * 128
        assert made.failed_blocks == 0
    if fault.startswith(("cut-in-the-middle-of-a-load", "slow")):
        assert made.failed_blocks > 0


def test_an_engine_ends_beside_a_store_that_hangs(
    hurt: tuple[dict[str, Engine], Course], plain: dict[str, Engine]
) -> None:
    """It waits for what is still to be stored, but not for ever."""
    engines, _ = hurt
    made = engines[LAST]
    assert made.error is None, made.error
    assert_unharmed(made, plain["llama"])
    assert made.shutdown_s < DRAIN_TIMEOUT_S + 2 * SLACK_S


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
    # The block that was computed again rounds as its batch did, so it is not the old one to a bit.
    assert_restored(healed, made, saved, blocks=len(healed.restored_blocks))
    assert healed["stored"].difference(plain[model]["warm"]) < CLOSE


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
    own.restart()
    with Events() as events:
        action = redis.kill if how == "killed" else redis.freeze
        events.on(recording.MATCHED if how.endswith("load") else READY, action)
        budgets = {"match_budget_s": MATCH_BUDGET_S, "load_budget_s": LOAD_BUDGET_S}
        steps = (ask(READY), generate("stored", STORED), generate("after", AFTER))
        wanted = kvstore(own.endpoint, **budgets)
        [made] = runner.run(engine("llama", tiny["llama"], wanted, *steps), events=events)
    assert_unharmed(made, plain["llama"])
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
    own.stop()
    assert spoil_values(redis.url) >= BLOCKS
    own.start()
    [made] = runner.run(engine("llama", tiny["llama"], wanted, *steps))
    assert_sound(made, saved, plain)
    assert made.restored_blocks == []
