"""The store is killed, frozen, slow or spoiled at every moment: the engine does not notice.

It never dies, never waits past the budget, and says what it would have said without a store.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests_engines.vllm import recording
from tests_engines.vllm.asking import engine, generate, kvstore
from tests_engines.vllm.hurting import (
    BLOCKS,
    BUDGETS,
    OVER,
    READY,
    SLACK_S,
    STEPS,
    STORED,
    assert_unharmed,
    oracle,
)
from tests_engines.vllm.models import Models
from tests_engines.vllm.proxy import Proxy
from tests_engines.vllm.report import EXTERNAL, Engine
from tests_engines.vllm.rig import Events, Node, Runner, until

DRAIN_TIMEOUT_S = 4.0
"""The connector's own setting."""
MODELS = ("llama", "gemma3")
SIDES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "gemma3": ("gemma3", {}),
    "llama-within": ("llama", {"load_async": False}),
}
"""Ways in which failed loads go through vLLM: block by block for one group of layers, whole
requests for two, and within the step."""


@pytest.fixture(scope="module")
def first_process(runner: Runner, tiny: Models, node: Node) -> list[Engine]:
    """Engines without a store, then those that put `STORED` on the node's disk."""
    stored, ours = generate("stored", STORED), kvstore(node.endpoint)
    made = runner.run(
        *(oracle(model, tiny[model]) for model in MODELS),
        *(engine(model, tiny[model], ours, stored) for model in MODELS),
    )
    node.restart()
    assert node.blocks("disk") >= 2 * BLOCKS
    return made


@pytest.fixture(scope="module")
def plain(first_process: list[Engine]) -> dict[str, Engine]:
    """Without a store."""
    return {each.name: each for each in first_process[: len(MODELS)]}


@pytest.fixture(scope="module")
def saved(first_process: list[Engine]) -> dict[str, Engine]:
    """Those that stored."""
    return {each.name: each for each in first_process[len(MODELS) :]}


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
        if fault.moment in self.events.waiting:
            self.missed.add(name)
        elif fault.cuts:
            # Stores run behind the engine's back, and may be under way when it has said all.
            until(lambda: self.proxy.cuts, "the line is cut")
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
    names = [f"{side}/{fault}" for fault in list(FAULTS)[:-1] for side in SIDES]
    names.append(LAST)  # After it the node stays frozen.
    with Proxy(node.endpoint) as proxy, Events() as events:
        course = Course(node, proxy, events, list(names))
        course.begin()

        def connector(fault: Fault, extra: dict[str, Any]) -> dict[str, Any]:
            if not fault.over_proxy:
                return kvstore(node.endpoint, **BUDGETS, **extra)
            return kvstore(proxy.endpoint, shared_memory=False, bulk=False, **BUDGETS, **extra)

        made = runner.run(
            *(
                engine(name, tiny[model], connector(FAULTS[fault], extra), *STEPS)
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
