"""KVStoreTier in the real vLLM: what one process offloads, another finds below its primary tier.

On a CPU the copies between KV cache and primary tier are ours (`cpu_spec.py`); the connector, the
scheduler, the primary tier and its manager are vLLM's own.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from tests_engines.vllm import recording
from tests_engines.vllm.asking import (
    ask,
    engine,
    full_blocks,
    generate,
    offloading,
    prompt,
    tier,
    tiered,
)
from tests_engines.vllm.models import Models, make_adapter
from tests_engines.vllm.proxy import Proxy
from tests_engines.vllm.report import (
    COMPUTED,
    EXTERNAL,
    LOCAL,
    Engine,
    assert_nothing_restored,
    assert_restored,
    assert_same,
)
from tests_engines.vllm.rig import Events, Node, Runner, flip_bits, redis_server, until

PROMPTS = (prompt(1, 1400), prompt(2, 2000))
ALL_TOKENS = 3400
CLOSE = 1e-4
"""Between log probabilities of float32 that were summed in batches of other shapes."""
LOADED = "vllm:kvstore_tier_loaded_chunks"
STORED = "vllm:kvstore_tier_stored_chunks"
CACHED = "vllm:prompt_tokens_cached_by_source{source=%s}"


# Each kind of model.


@dataclass(frozen=True)
class Kind:
    """A model, and what a load of the two prompts consists of."""

    model: str
    blocks: int
    tokens: int
    llm: dict[str, Any] = field(default_factory=dict)


KINDS = (
    Kind("llama", 10 + 15, 25 * 128),
    # Of the layers with a window what it sees at the end.
    Kind("gemma3", 10 + 15 + 2 * 2, 25 * 128),
    # Blocks are large here, and a recurrent state is one, at the end of what is restored.
    Kind("qwen3-next", 2 + 3 + 2 * 1, 25 * 128, {"dtype": "bfloat16"}),
    # The kernel without AMX has blocks of 16 tokens; vLLM restores the last one whole.
    Kind("deepseek-v2", 87 + 125, 212 * 16),
)
NAMES = [kind.model for kind in KINDS]


def _engines(tiny: Models, wanted: dict[str, Any] | None) -> list[Any]:
    steps = (generate("first", *PROMPTS), generate("again", *PROMPTS))
    return [engine(kind.model, tiny[kind.model], wanted, *steps, **kind.llm) for kind in KINDS]


def _by_name(engines: list[Engine]) -> dict[str, Engine]:
    return {each.name: each for each in engines}


@pytest.fixture(scope="module")
def plain(runner: Runner, tiny: Models) -> dict[str, Engine]:
    """Without offloading: computed, and then from vLLM's own cache in the KV cache's memory."""
    return _by_name(runner.run(*_engines(tiny, None)))


@pytest.fixture(scope="module")
def saved(runner: Runner, tiny: Models, node: Node) -> dict[str, Engine]:
    """All of them over one node, each in spaces of its own."""
    return _by_name(runner.run(*_engines(tiny, tiered(node.endpoint))))


@pytest.fixture(scope="module")
def loaded(runner: Runner, tiny: Models, node: Node, saved: dict[str, Engine]) -> dict[str, Engine]:
    """The same in another process, from the node's memory."""
    return _by_name(runner.run(*_engines(tiny, tiered(node.endpoint))))


@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
def test_another_process_restores_it(
    saved: dict[str, Engine], loaded: dict[str, Engine], plain: dict[str, Engine], kind: Kind
) -> None:
    """The digests of all restored blocks are those stored; tokens and probabilities are equal."""
    mine, stored = loaded[kind.model], saved[kind.model]
    assert len(mine.of("restored")) > 0
    first = mine["first"]
    assert_restored(_only_first(mine, kind), stored, blocks=kind.blocks)
    assert first.prompt_tokens(EXTERNAL) == kind.tokens
    assert first.prompt_tokens(COMPUTED) == ALL_TOKENS - kind.tokens
    assert first.counters[f"{LOADED}{{source=memory}}"] == kind.blocks
    # Of latent attention without AMX vLLM itself keeps no prefixes but in its primary tier.
    oracle = plain[kind.model] if plain[kind.model]["again"].prompt_tokens(LOCAL) else stored
    assert_same(first, oracle["again"])
    assert_same(stored["first"], plain[kind.model]["first"])


def _only_first(made: Engine, kind: Kind) -> Engine:
    """Where vLLM keeps no prefixes itself, the second time comes from its primary tier."""
    again = made["again"].prompt_tokens(EXTERNAL)
    if not again:
        return made
    assert again == kind.tokens
    digests = [line for line in made.lines if line["kind"] == "restored" and "digest" in line]
    assert len(digests) == 2 * kind.blocks
    return replace(made, lines=digests[: kind.blocks])


def test_the_node_is_sent_only_what_it_lacks(loaded: dict[str, Engine], node: Node) -> None:
    """Every request offers its whole chain; the loading engines stored nothing that was there."""
    assert loaded["llama"]["first"].counters[f"{STORED}{{outcome=held}}"] == 25
    assert node.blocks("memory") == sum(kind.blocks for kind in KINDS)


def test_a_node_that_was_restarted_serves_it_from_disk(
    runner: Runner, tiny: Models, node: Node, loaded: dict[str, Engine],
    saved: dict[str, Engine], plain: dict[str, Engine],
) -> None:  # fmt: skip
    """Its memory is empty; vLLM's own metrics say that the source was the disk."""
    node.restart()
    assert node.blocks("memory") == 0
    steps = generate("first", *PROMPTS)
    made = runner.run(
        *(engine(name, tiny[name], tiered(node.endpoint), steps) for name in ("llama", "gemma3"))
    )
    for each, kind in zip(made, KINDS, strict=False):
        assert_restored(each, saved[each.name], blocks=kind.blocks)
        assert each["first"].counters[CACHED % "disk"] == kind.tokens
        assert_same(each["first"], plain[each.name]["again"])


def test_redis_gives_it_back_when_the_node_has_lost_all(
    runner: Runner, tiny: Models, home: Path, plain: dict[str, Engine]
) -> None:
    """A node without a disk, whose memory is empty: all comes from Redis."""
    secret = home / "secret"
    secret.write_bytes(bytes(range(32)))
    secret.chmod(0o600)
    flags = {"disk_enabled": "false", "cluster_secret_file": str(secret)}
    with redis_server() as redis, Node(
        home / "redis", redis_blocks_url=redis.url, **flags
    ) as own:  # fmt: skip
        steps = generate("first", *PROMPTS)
        [stored] = runner.run(engine("storing", tiny["llama"], tiered(own.endpoint), steps))
        own.restart()
        [made] = runner.run(engine("loading", tiny["llama"], tiered(own.endpoint), steps))
    assert_restored(made, stored, blocks=25)
    assert made["first"].counters[f"{LOADED}{{source=redis}}"] == 25
    assert_same(made["first"], plain["llama"]["again"])


# Beside restoring.

CROWD = tuple(prompt(10 + each, 700 + 20 * each) for each in range(4))


def test_preempted_requests_come_back(runner: Runner, tiny: Models, node: Node) -> None:
    """Few blocks in VRAM and few rows in the primary tier: vLLM preempts, evicts and promotes."""
    steps = generate("first", *CROWD, together=True, max_tokens=300)
    few: dict[str, Any] = {"num_gpu_blocks_override": 25, "max_num_seqs": 4}
    patient = tier(node.endpoint, model_revision="crowd")
    llama = tiny["llama"]
    plain, small, again = runner.run(
        engine("plain", llama, None, steps, **few),
        engine("small", llama, offloading(patient, primary_bytes=6 << 20), steps, **few),
        engine("again", llama, offloading(patient, primary_bytes=6 << 20), steps, **few),
    )
    for made in (small, again):
        assert made["first"].counters["vllm:num_preemptions"] > 0
        assert [output["finish_reason"] for output in made["first"].outputs] == ["length"] * 4
        assert made["first"].difference(plain["first"]) < CLOSE
        computed = small.first_digests("computed")
        assert all(computed[key] == digest for key, digest in made.restored_blocks)
    assert again["first"].counters[f"{LOADED}{{source=memory}}"] > 0


def test_salts_never_share(runner: Runner, tiny: Models, node: Node) -> None:
    """Two salts and none: each finds its own, a third nothing."""
    llama, wanted = tiny["llama"], tiered(node.endpoint, model_revision="salts")
    tokens = prompt(30, 700)
    blocks = full_blocks(tokens)
    salted = {name: tokens | {"salt": name} for name in ("one", "two")} | {"none": tokens}
    steps = [generate(name, each) for name, each in salted.items()]
    warm = [generate(f"{name} warm", each) for name, each in salted.items()]
    [stored] = runner.run(engine("saving", llama, wanted, *steps, *warm))
    assert all(stored[name].prompt_tokens(COMPUTED) == 700 for name in salted)
    strange = generate("strange", tokens | {"salt": "three"})
    [made] = runner.run(engine("loading", llama, wanted, *steps, strange))
    assert_restored(made, stored, blocks=3 * blocks)
    assert [made[name].prompt_tokens(EXTERNAL) for name in salted] == [blocks * 128] * 3
    assert made["strange"].prompt_tokens(EXTERNAL) == 0
    for name in salted:
        assert_same(made[name], stored[f"{name} warm"])


LORA: dict[str, Any] = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8}


def test_adapters_are_known_by_their_weights(
    runner: Runner, tiny: Models, node: Node, home: Path
) -> None:
    """Through our connector each restores its own; one replaced under its old path nothing."""
    llama = tiny["llama"]
    paths = {name: make_adapter(home / name, seed, base=llama) for seed, name in enumerate("ab", 7)}
    below = tier(node.endpoint, model_revision="adapters")
    wanted = offloading(below, name="KVStoreOffloadingConnector")
    tokens = prompt(20, 700)
    a, b = (
        tokens | {"adapter": {"name": name, "id": number, "path": str(paths[name])}}
        for number, name in enumerate("ab", 1)
    )
    steps = [generate(name, each) for name, each in {"a": a, "b": b, "none": tokens}.items()]
    warm = [generate("b warm", b), generate("none warm", tokens)]
    [stored] = runner.run(engine("saving", llama, wanted, *steps, *warm, **LORA))
    make_adapter(paths["a"], 9, base=llama)
    own, replaced, plain = runner.run(
        engine("own", llama, wanted, generate("b", b), generate("none", tokens), **LORA),
        engine("replaced", llama, wanted, generate("a", a), **LORA),
        engine("plain", llama, None, generate("a", a), **LORA),
    )
    assert_restored(own, stored, blocks=2 * full_blocks(tokens))
    assert_same(own["b"], stored["b warm"])
    assert_same(own["none"], stored["none warm"])
    assert_nothing_restored(replaced)
    assert_same(replaced["a"], plain["a"])
    assert replaced["a"].tokens != stored["a"].tokens


def test_an_engine_that_cannot_be_served_rightly_does_not_start(
    runner: Runner, tiny: Models, node: Node
) -> None:
    """Weak hashes, and adapters that nobody tells the tier of; the message says what to write."""
    wanted = tiered(node.endpoint)
    weak, lora = runner.run(
        engine("weak", tiny["llama"], wanted, prefix_caching_hash_algo="xxhash"),
        engine("lora", tiny["llama"], wanted, **LORA),
        may_fail=True,
    )
    assert weak.error is not None and "use sha256_cbor" in weak.error
    assert lora.error is not None and "KVStoreOffloadingConnector" in lora.error


# Faults.

STORED_PROMPT = prompt(1, 1400)
AFTER = prompt(3, 600)
MATCH_BUDGET_S = 0.5
LOAD_BUDGET_S = 1.5
STORE_BUDGET_S = 2.0
SLACK_S = 3.0
"""For threads to be woken on a busy machine. A frozen store answers after minutes: never, here."""
CUT_AFTER_BYTES = 1 << 20
READY, OVER = "ready", "over"


@dataclass(frozen=True)
class Fault:
    """What is done to the store, and at which event of the engine."""

    moment: str
    act: Callable[[Node, Proxy], object]
    over_proxy: bool = False
    """The engine reaches the node by the network alone, through the proxy."""
    loads_all: bool = False
    """It comes when all is loaded, for which there is time."""
    store_budget_s: float = STORE_BUDGET_S

    @property
    def budgets(self) -> dict[str, float]:
        """Short for what the fault delays."""
        loads = {"match_budget_s": MATCH_BUDGET_S, "load_budget_s": LOAD_BUDGET_S}
        return {"store_budget_s": self.store_budget_s} | ({} if self.loads_all else loads)


def _cut(way: str) -> Callable[[Node, Proxy], None]:
    return lambda node, proxy: proxy.cut_after(way, CUT_AFTER_BYTES, node.kill)


FAULTS = {
    "killed-before-the-lookup": Fault(READY, lambda node, _: node.kill()),
    "frozen-before-the-lookup": Fault(READY, lambda node, _: node.freeze()),
    "cut-in-the-middle-of-a-load": Fault(READY, _cut("answers"), True),
    "slow": Fault(READY, lambda _, proxy: proxy.slow_down(256 << 10), True),
    "killed-after-a-load": Fault(recording.MATCHED, lambda node, _: node.kill(), loads_all=True),
    "frozen-before-a-save": Fault(recording.SAVING, lambda node, _: node.freeze(), loads_all=True),
    "cut-in-the-middle-of-a-save": Fault(
        recording.SAVING, _cut("requests"), True, loads_all=True, store_budget_s=60
    ),
}


@dataclass
class Course:
    """Hurts a node once an engine, engine after engine, and makes it serve again in between."""

    node: Node
    proxy: Proxy
    events: Events
    left: list[str]
    missed: set[str] = field(default_factory=set)
    """Faults whose moment never came, or that did nothing."""

    def begin(self) -> None:
        """Prepares for the engine that comes next."""
        fault = FAULTS[self.left[0]]
        self.events.on(OVER, self._over)
        self.events.on(fault.moment, lambda: fault.act(self.node, self.proxy))

    def _over(self) -> None:
        name = self.left.pop(0)
        if FAULTS[name].moment in self.events.waiting:
            self.missed.add(name)
        elif "cut" in name:
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
    runner: Runner, tiny: Models, home: Path
) -> Iterator[tuple[dict[str, Engine], dict[str, Engine], Course]]:
    """Engines without offloading, and one for each fault; each loads, then computes and stores."""
    llama = tiny["llama"]
    calm = (generate("stored", STORED_PROMPT), generate("warm", STORED_PROMPT))
    steps = (ask(READY), generate("stored", STORED_PROMPT), generate("after", AFTER), ask(OVER))
    with Node(home / "hurt") as own, Proxy(own.endpoint) as proxy, Events() as events:
        oracles = runner.run(
            engine("plain", llama, None, *calm, generate("after", AFTER)),
            engine("saved", llama, tiered(own.endpoint), *calm),
        )
        own.restart()
        course = Course(own, proxy, events, list(FAULTS))
        course.begin()
        wanted = {
            name: tiered(proxy.endpoint, shared_memory=False, bulk=False, **fault.budgets)
            if fault.over_proxy
            else tiered(own.endpoint, **fault.budgets)
            for name, fault in FAULTS.items()
        }
        made = runner.run(
            *(engine(name, llama, each, *steps) for name, each in wanted.items()),
            events=events,
            may_fail=True,
        )
        yield _by_name(made), _by_name(oracles), course


@pytest.mark.parametrize("fault", FAULTS)
def test_the_engine_does_not_notice(
    hurt: tuple[dict[str, Engine], dict[str, Engine], Course], fault: str
) -> None:
    """It says what it would have said, in time, and uses no byte that is not the right one."""
    engines, oracles, course = hurt
    made, plain, stored = engines[fault], oracles["plain"], oracles["saved"]
    assert made.error is None, made.error
    assert fault not in course.missed, "the fault was never met"
    for step in made.steps.values():
        assert [output["finish_reason"] for output in step.outputs] == ["length"]
    assert_same(made["after"], plain["after"])
    computed = stored.first_digests("computed")
    assert all(computed[key] == digest for key, digest in made.restored_blocks)
    restored = made["stored"].prompt_tokens(EXTERNAL)
    assert (restored == 10 * 128) == FAULTS[fault].loads_all
    if restored == 10 * 128:
        assert_same(made["stored"], plain["warm"])
    elif restored:
        assert made["stored"].difference(plain["stored"]) < CLOSE
    else:
        assert_same(made["stored"], plain["stored"])
    if not FAULTS[fault].loads_all:
        assert made.longest_match_s < MATCH_BUDGET_S + LOAD_BUDGET_S + SLACK_S
    seconds, hook = made.longest_hook_s
    assert seconds < SLACK_S, hook
    assert made.shutdown_s < STORE_BUDGET_S + 2 * SLACK_S


def test_a_flipped_bit_on_disk_is_found_here_and_not_in_the_native_tier(
    runner: Runner, tiny: Models, home: Path
) -> None:
    """The same prompt over both: ours computes what is damaged, `fs` answers from wrong bytes."""
    llama, steps = tiny["llama"], generate("first", STORED_PROMPT)
    files = home / "fs"
    native = offloading({"type": "fs", "root_dir": str(files)})
    with Node(home / "flipped") as own:
        plain, mine, theirs = runner.run(
            engine("plain", llama, None, steps),
            engine("ours", llama, tiered(own.endpoint), steps),
            engine("fs", llama, native, steps),
        )
        own.stop()
        assert own.flip_bits() > 0
        assert flip_bits(files, "*.bin") == 10  # One file a chunk.
        own.start()
        found, wrong = runner.run(
            engine("ours", llama, tiered(own.endpoint), steps), engine("fs", llama, native, steps)
        )
        refused = sum(n for name, n in own.counters().items() if "corrupt" in name)
        own.restart()
        [healed] = runner.run(engine("ours", llama, tiered(own.endpoint), steps))
    assert refused > 0, "no spoiled block was met"
    computed = mine.first_digests("computed")
    assert all(computed[key] == digest for key, digest in found.restored_blocks)
    assert len(found.restored_blocks) < 10
    assert found["first"].difference(plain["first"]) < CLOSE
    # What was computed anew was stored anew, and may differ in the last bits.
    anew = found.first_digests("computed")
    assert len(healed.restored_blocks) == 10
    assert all(d in (computed[key], anew.get(key)) for key, d in healed.restored_blocks)
    # vLLM's own tier restores all of it, damage and all.
    honest = theirs.first_digests("computed")
    assert len(wrong.restored_blocks) == 10
    assert all(honest[key] != digest for key, digest in wrong.restored_blocks)
