"""KVStoreTier below a stand-in of vLLM's manager, over nodes that really serve."""

import asyncio
import hashlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kvstore.server import NodeServer
from tests.client_rig import hanging, hanging_stream
from tests.scripted_node import NodeThread
from tests.sim.nodes import Nodes
from tests.stand_ins import vllm_offloading as vllm

ROW_BYTES = 4096
CHUNK = 16
ROWS = 32
PATIENT = {"match_budget_s": 30, "load_budget_s": 30, "store_budget_s": 30, "lease_ms": 60_000}
SOON_S = 20.0
PROMPTLY_S = 1.0


@pytest.fixture(autouse=True)
def stand_ins() -> Iterator[None]:
    """vLLM is what `tests/stand_ins` says."""
    with vllm.standing_in():
        yield


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Weights, as far as their names go."""
    return weights(tmp_path / "model", b"weights")


@pytest.fixture
def engines(checkpoint: Path) -> Iterator["Engines"]:
    """Starts engines, and shuts their tiers down."""
    engines = Engines(checkpoint)
    yield engines
    engines.close()


@pytest.fixture
def remote() -> Iterator[NodeThread]:
    """A scripted node, served in a thread of its own."""
    node = NodeThread()
    yield node
    node.stop()


@pytest.fixture
async def node(nodes: Nodes) -> AsyncIterator[NodeServer]:
    """A small node with a disk."""
    yield await nodes.start()


def weights(path: Path, content: bytes) -> Path:
    """A directory that has weights."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text("{}")
    (path / "adapter_model.safetensors").write_bytes(content)
    return path


def keys_of(prompt: str, count: int, group: int = 0) -> list[bytes]:
    """vLLM's keys of the first chunks of a prompt, in a KV group."""
    keys, parent = [], prompt.encode()
    for _ in range(count):
        parent = hashlib.sha256(parent).digest()
        keys.append(parent + group.to_bytes(4, "big"))
    return keys


def content_of(key: bytes) -> bytes:
    """The KV of a chunk."""
    return hashlib.shake_128(key).digest(ROW_BYTES)


@dataclass
class Engine:
    """One engine: a tier, and the primary tier above it."""

    tier: Any
    primary: vllm.Primary
    contexts: dict[str, vllm.ReqContext] = field(default_factory=dict)

    def request(self, name: str, *chains: Sequence[bytes]) -> vllm.ReqContext:
        """A request comes, with these keys in each group."""
        context = self.contexts[name] = vllm.ReqContext(name)
        answer = self.tier.on_new_request(context)
        assert answer.policy is vllm.OffloadPolicy.REQUEST_LEVEL
        for keys in chains:
            for at, key in enumerate(keys):
                context.set_offload_key_position(key, (at + 1) * CHUNK)
        return context

    def step(self, *preempted: str) -> None:
        """The end of a step, and what the next one begins with."""
        self.tier.on_schedule_end(vllm.ScheduleEndContext([], preempted))
        self.primary.poll(self.tier)

    def stepped(self) -> bool:
        """True, after one more step."""
        self.step()
        return True

    def lookup(self, context: vllm.ReqContext, keys: Sequence[bytes]) -> list[str]:
        """What each lookup of one step answers."""
        return [self.tier.lookup(key, context).name for key in keys]

    async def looked_up(self, context: vllm.ReqContext, keys: Sequence[bytes]) -> list[str]:
        """What lookups answer in the end, step by step."""
        while "RETRY" in (answers := self.lookup(context, keys)):
            self.step()
            await asyncio.sleep(0.001)
        return answers

    def fill(self, keys: Sequence[bytes], first_row: int = 0) -> dict[bytes, int]:
        """Rows of the primary tier that hold chunks."""
        rows = {key: first_row + at for at, key in enumerate(keys)}
        for key, row in rows.items():
            self.primary.rows[row] = np.frombuffer(content_of(key), dtype=np.int8)
        return rows

    async def store(self, context: vllm.ReqContext, keys: Sequence[bytes]) -> vllm.JobResult:
        """Stores chunks and waits for the report."""
        job = self.primary.job(context, self.fill(keys), is_promotion=False)
        self.tier.submit_store(job)
        return await self.reported(job)

    async def load(
        self, context: vllm.ReqContext, keys: Sequence[bytes], first_row: int = 0
    ) -> vllm.JobResult:
        """Loads chunks and waits for the report; every byte of what is ready is checked."""
        rows = {key: first_row + at for at, key in enumerate(keys)}
        for row in rows.values():
            self.primary.rows[row] = -1
        job = self.primary.job(context, rows, is_promotion=True)
        self.tier.submit_load(job)
        result = await self.reported(job)
        for key in set(keys) & set(self.primary.ready):
            assert self.primary.rows[rows[key]].tobytes() == content_of(key), "a wrong byte"
        return result

    async def reported(self, job: vllm.TransferJob) -> vllm.JobResult:
        """The report on a job, step by step."""
        await until(lambda: self.stepped() and job.job_id in self.primary.results)
        return self.primary.results[job.job_id]

    def finish(self, name: str) -> None:
        """A request ends."""
        self.tier.on_request_finished(self.contexts.pop(name))


@dataclass
class Engines:
    """Engines with the same model, as processes of their own would have them."""

    checkpoint: Path
    _started: list[Engine] = field(default_factory=list)

    def start(self, endpoint: str, **changes: Any) -> Engine:
        """`settings`, `windows` (a window in tokens for each group, None: all) and vLLM's own."""
        settings = PATIENT | {"endpoint": endpoint} | changes.pop("settings", {})
        windows = changes.pop("windows", [None])
        vllm_config, kv_cache_config = engine_of(self.checkpoint, windows, **changes)
        primary = vllm.Primary(np.zeros((ROWS, ROW_BYTES), dtype=np.int8))
        engine = Engine(
            build_tier(vllm_config, kv_cache_config, spec_of(windows), primary, settings), primary
        )
        self._started.append(engine)
        return engine

    def close(self) -> None:
        """Shuts all down; whatever was submitted was reported, or is now."""
        for engine in self._started:
            engine.tier.shutdown()
            engine.primary.poll(engine.tier)
            assert engine.primary.jobs == {}


def engine_of(
    checkpoint: Path, windows: Sequence[int | str | None], **changes: Any
) -> tuple[vllm.VllmConfig, vllm.KVCacheConfig]:
    """What an engine's own configuration says."""
    model = SimpleNamespace(
        architectures=["TinyForCausalLM"],
        model=str(checkpoint),
        revision=None,
        quantization=None,
        dtype="bfloat16",
        hf_config=SimpleNamespace(to_dict=lambda: {"layers": 4}),
    )
    cache = SimpleNamespace(
        prefix_caching_hash_algo=changes.pop("prefix_caching_hash_algo", "sha256_cbor"),
        calculate_kv_scales=changes.pop("calculate_kv_scales", False),
    )
    specs = [
        vllm.KVCacheSpec()
        if window is None
        else vllm.MambaSpec()
        if window == "state"
        else vllm.SlidingWindowSpec(int(window))
        for window in windows
    ]
    groups = [SimpleNamespace(kv_cache_spec=spec) for spec in specs]
    return vllm.VllmConfig(model, cache, **changes), vllm.KVCacheConfig(groups)


def spec_of(windows: Sequence[object], **changes: Any) -> Any:
    """What a tier is told."""
    values: dict[str, Any] = {
        "groups": tuple(
            vllm.OffloadingGroupConfig(CHUNK, (f"layer.{index}",), index)
            for index in range(len(windows))
        ),
        "worker_kv_bytes_per_block": ROW_BYTES,
        "enable_kv_cache_events": False,
        "extra_config": {},
        "engine_id": "engine",
        "model": vllm.OffloadingModelConfig("tiny", "bfloat16"),
        "cache": vllm.OffloadingCacheConfig(CHUNK, 1),
        "parallel": vllm.OffloadingParallelConfig(),
        "kv_cache_layout": "LBHNC",
    }
    return SimpleNamespace(config=vllm.OffloadingConfig(**(values | changes)))


def build_tier(
    vllm_config: vllm.VllmConfig,
    kv_cache_config: vllm.KVCacheConfig,
    spec: Any,
    primary: vllm.Primary,
    settings: dict[str, Any],
) -> Any:
    """Builds a tier as the scheduler's half of vLLM's connector does: from these two variables."""
    from kvstore_client.vllm_tier import KVStoreTier

    return KVStoreTier(spec, primary.view, "KVStoreTier", None, **settings)


async def until(condition: Callable[[], Any]) -> None:
    """Returns when it is so."""
    async with asyncio.timeout(SOON_S):
        while not condition():  # noqa: ASYNC110 - an engine has nothing but its steps, either
            await asyncio.sleep(0.001)


async def test_what_one_engine_stores_another_loads(engines: Engines, node: NodeServer) -> None:
    """Chunks come in no order and are found as a chain; the answer takes a step, no call waits."""
    keys = keys_of("a prompt", 6)
    first, second = engines.start(node.endpoint), engines.start(node.endpoint)
    stored = await first.store(first.request("a", keys), keys)
    assert stored.success
    context = second.request("b", keys_of("a prompt", 9))
    assert second.lookup(context, keys_of("a prompt", 9)) == ["RETRY"] * 9
    answers = await second.looked_up(context, keys_of("a prompt", 9))
    assert answers == ["HIT"] * 6 + ["MISS"] * 3
    loaded = await second.load(context, keys, first_row=5)
    assert loaded.success and set(second.primary.ready) == set(keys)


async def test_a_request_is_one_question_a_step(engines: Engines, remote: NodeThread) -> None:
    """However many chunks a step looks up, and however often, there is one match."""
    keys = keys_of("a prompt", 20)
    engine = engines.start(remote.endpoint)
    await engine.store(engine.request("a", keys), keys)
    context = engine.request("b", keys)
    assert await engine.looked_up(context, keys) == ["HIT"] * 20
    assert await engine.looked_up(context, keys) == ["HIT"] * 20
    assert remote.node.calls["Match"] == 1
    assert remote.node.calls["Locate"] == 0


async def test_a_lease_holds_from_lookup_to_load(engines: Engines, node: NodeServer) -> None:
    """It ends when the load is reported, or with the request, whichever is first."""
    keys = keys_of("a prompt", 4)
    engine = engines.start(node.endpoint)
    await engine.store(engine.request("a", keys), keys)
    context = engine.request("b", keys)
    await engine.looked_up(context, keys)
    assert len(node.node.leases) == 1
    await engine.load(context, keys)
    await until(lambda: len(node.node.leases) == 0)
    engine.request("c", keys)
    await engine.looked_up(engine.contexts["c"], keys)
    assert len(node.node.leases) == 1
    engine.finish("c")
    await until(lambda: len(node.node.leases) == 0)


async def test_an_answer_to_a_request_that_is_over_is_let_go(
    engines: Engines, node: NodeServer
) -> None:
    """Its lease comes when nobody is left to release it but the next step."""
    keys = keys_of("a prompt", 4)
    engine = engines.start(node.endpoint)
    await engine.store(engine.request("a", keys), keys)
    engine.lookup(engine.request("b", keys), keys)
    engine.tier.on_schedule_end(vllm.ScheduleEndContext([], ()))
    await until(lambda: len(node.node.leases) == 1)
    engine.finish("b")
    await until(lambda: engine.stepped() and len(node.node.leases) == 0)


async def test_the_start_that_vllm_has_itself_is_not_asked_for(
    engines: Engines, node: NodeServer
) -> None:
    """Chunks in VRAM or in the primary tier count as held, also where the node lost them."""
    keys = keys_of("a prompt", 6)
    engine = engines.start(node.endpoint)
    await engine.store(engine.request("a", keys), keys)
    context = engine.request("b", keys)
    assert await engine.looked_up(context, keys[3:]) == ["HIT"] * 3
    assert (await engine.load(context, keys[3:])).success


async def test_a_child_without_its_parents_is_not_stored(
    engines: Engines, node: NodeServer
) -> None:
    """Nobody could match it; when the whole chain is offered again, it is."""
    keys = keys_of("a prompt", 6)
    engine = engines.start(node.endpoint)
    context = engine.request("a", keys)
    assert not (await engine.store(context, keys[3:])).success
    assert (await engine.store(context, keys[:2])).success
    stored = await engine.store(context, keys)
    assert stored.success
    assert await engine.looked_up(engine.request("b", keys), keys) == ["HIT"] * 6


async def test_windows_and_states_need_no_parents(engines: Engines, node: NodeServer) -> None:
    """vLLM keeps the end of a window and a state alone; both are found where they lie."""
    whole, window, state = (keys_of("a prompt", 6, group) for group in range(3))
    windows = [None, 2 * CHUNK, "state"]
    engine = engines.start(node.endpoint, windows=windows)
    context = engine.request("a", whole, window, state)
    assert (await engine.store(context, [*whole, window[1], *window[4:], state[5]])).success
    other = engines.start(node.endpoint, windows=windows)
    context = other.request("b", whole, window, state)
    keys = [*whole, *window, *state]
    answers = await other.looked_up(context, keys)
    assert answers == ["HIT"] * 6 + ["MISS", "HIT", "MISS", "MISS", "HIT", "HIT"] + ["MISS"] * 5 + [
        "HIT"
    ]
    assert (await other.load(context, [*whole, *window[4:], state[5]])).success


async def test_a_partial_chunk_is_found_by_its_own_name(engines: Engines, node: NodeServer) -> None:
    """vLLM keeps the tail of a prompt where a recurrent state ends; it stands in no chain."""
    keys = keys_of("a prompt", 3)
    tail = keys_of("tail", 1)[0]
    engine = engines.start(node.endpoint)
    for name in "ab":
        context = engine.request(name, keys)
        context.set_offload_key_position(tail, 3 * CHUNK + 4)
        assert await engine.looked_up(context, [tail]) == ["MISS" if name == "a" else "HIT"]
        assert (await engine.store(context, [*keys, tail])).success


async def test_groups_scopes_and_hashes_never_meet(engines: Engines, node: NodeServer) -> None:
    """Another group, another salt (which is in the hash) or another scope is another chunk."""
    keys = keys_of("a prompt", 3)
    engine = engines.start(node.endpoint, windows=[None, None])
    await engine.store(engine.request("a", keys), keys)
    for chain in (keys_of("a prompt", 3, 1), keys_of("salted", 3)):
        assert await engine.looked_up(engine.request("b", chain), chain) == ["MISS"] * 3
    elsewhere = engines.start(node.endpoint, settings={"scope": "team"}, windows=[None, None])
    assert await elsewhere.looked_up(elsewhere.request("a", keys), keys) == ["MISS"] * 3


@pytest.mark.parametrize(
    "change",
    [
        {"parallel": vllm.OffloadingParallelConfig(world_size=2, tp_size=2)},
        {"kv_cache_layout": "BLHNC"},
        {"canonical_layout": True},
        {"model": vllm.OffloadingModelConfig("tiny", "fp8")},
        {"groups": (vllm.OffloadingGroupConfig(CHUNK, ("layer.9",), 0),)},
    ],
    ids=["ranks", "layout", "canonical", "dtype", "layers"],
)
async def test_what_the_bytes_depend_on_is_in_the_space(
    engines: Engines, change: dict[str, Any]
) -> None:
    """Each is a space of its own; a replica and another path of the same weights are not."""
    assert space_id(engines.checkpoint, **change) != space_id(engines.checkpoint)
    replica = vllm.OffloadingParallelConfig(data_parallel_index=1, data_parallel_size=2)
    assert space_id(engines.checkpoint, parallel=replica) == space_id(engines.checkpoint)
    moved = weights(engines.checkpoint.parent / "moved", b"weights")
    assert space_id(moved) == space_id(engines.checkpoint)
    other = weights(engines.checkpoint.parent / "other", b"others")
    assert space_id(other) != space_id(engines.checkpoint)


def space_id(checkpoint: Path, **changes: Any) -> bytes:
    """The space of an engine's only group."""
    from kvstore_client.vllm_tier.engine import Engine as Named
    from kvstore_client.vllm_tier.engine import groups_of
    from kvstore_client.vllm_tier.options import TierOptions

    engine = Named(*engine_of(checkpoint, [None]))
    config = spec_of([None], **changes).config
    [group] = groups_of(config, engine, ROW_BYTES, TierOptions())
    space: bytes = group.space.space_id
    return space


async def test_damage_is_a_miss_and_the_rest_is_kept(engines: Engines, remote: NodeThread) -> None:
    """Of a load with one damaged block the others count; the damaged one is asked for no more."""
    keys = keys_of("a prompt", 4)
    engine = engines.start(remote.endpoint)
    await engine.store(engine.request("a", keys), keys)
    [damaged] = [
        name for name, (data, _) in remote.node.blocks.items() if data == content_of(keys[2])
    ]
    data, digest = remote.node.blocks[damaged]
    remote.node.blocks[damaged] = (bytes([data[0] ^ 1]) + data[1:], digest)
    context = engine.request("b", keys)
    assert await engine.looked_up(context, keys) == ["HIT"] * 4
    loaded = await engine.load(context, keys)
    assert not loaded.success
    assert set(loaded.successful_keys or ()) == {keys[0], keys[1], keys[3]}
    assert keys[2] not in engine.primary.ready
    assert engine.lookup(context, keys) == ["HIT", "HIT", "MISS", "HIT"]


async def test_a_node_that_goes_after_the_lookup_is_a_miss(
    engines: Engines, nodes: Nodes, node: NodeServer
) -> None:
    """The load fails at once, nothing of it is ready, and nobody tries it again."""
    keys = keys_of("a prompt", 4)
    engine = engines.start(node.endpoint)
    await engine.store(engine.request("a", keys), keys)
    context = engine.request("b", keys)
    await engine.looked_up(context, keys)
    await nodes.stop(node)
    loaded = await engine.load(context, keys)
    assert not loaded.success and not loaded.successful_keys
    assert engine.primary.ready == {}
    assert engine.lookup(context, keys) == ["MISS"] * 4


async def test_no_hook_waits_for_a_node_that_hangs(engines: Engines, remote: NodeThread) -> None:
    """Each returns promptly; within the budgets lookups are misses and transfers have failed."""
    for method, script in (("OpenSpace", hanging), ("Match", hanging), ("Locate", hanging)):
        remote.node.play(method, *[script] * 9)
    remote.node.play("Write", *[hanging_stream] * 9)
    remote.node.play("Read", *[hanging_stream] * 9)
    # Who waited would wait for a whole budget; half of one is much more than a busy machine takes.
    budgets = {"match_budget_s": 2.0, "load_budget_s": 2.0, "store_budget_s": 2.0}
    engine = engines.start(remote.endpoint, settings=budgets)
    keys = keys_of("a prompt", 4)
    begun_s = time.monotonic()
    context = engine.request("a", keys)
    jobs = [
        engine.primary.job(context, engine.fill(keys), is_promotion=False),
        engine.primary.job(
            context, {key: 9 + at for at, key in enumerate(keys)}, is_promotion=True
        ),
    ]
    engine.tier.submit_store(jobs[0])
    engine.tier.submit_load(jobs[1])
    assert engine.lookup(context, keys) == ["RETRY"] * 4
    engine.step()
    assert time.monotonic() - begun_s < PROMPTLY_S
    assert await engine.looked_up(context, keys) == ["MISS"] * 4
    for job in jobs:
        assert not (await engine.reported(job)).success


async def test_who_waits_behind_a_slow_question_does_not_wait_longer(
    engines: Engines, remote: NodeThread
) -> None:
    """Requests behind one that takes its whole budget are misses; nobody is asked about them."""
    remote.node.play("Match", *[hanging] * 9)
    engine = engines.start(remote.endpoint, settings={"match_budget_s": 0.3})
    chains = [keys_of(f"prompt {number}", 2) for number in range(5)]
    contexts = [engine.request(str(number), chain) for number, chain in enumerate(chains)]
    for context, chain in zip(contexts, chains, strict=True):
        engine.lookup(context, chain)
    engine.step()
    for context, chain in zip(contexts, chains, strict=True):
        assert await engine.looked_up(context, chain) == ["MISS"] * 2
    assert remote.node.calls["Match"] <= 2


async def test_a_load_that_waits_behind_slow_ones_does_not_wait_longer(
    engines: Engines, remote: NodeThread
) -> None:
    """Its budget runs from its submission: when its turn comes too late, nobody is asked."""
    remote.node.play("Read", *[hanging_stream] * 99)
    engine = engines.start(remote.endpoint, settings={"load_budget_s": 0.5})
    keys = keys_of("a prompt", 2)
    context = engine.request("a", keys)
    jobs = [
        engine.primary.job(context, {key: at for at, key in enumerate(keys)}, is_promotion=True)
        for _ in range(40)
    ]
    for job in jobs:
        engine.tier.submit_load(job)
    for job in jobs:
        assert not (await engine.reported(job)).success
    assert remote.node.calls["Read"] <= 4


async def test_drain_leaves_nothing_at_the_primary_tier(
    engines: Engines, remote: NodeThread
) -> None:
    """What waits is refused, what is under way ends with its budget; all is reported once."""
    remote.node.play("Write", *[hanging_stream] * 9)
    remote.node.play("Read", *[hanging_stream] * 9)
    engine = engines.start(remote.endpoint, settings={"load_budget_s": 0.5, "store_budget_s": 0.5})
    keys = keys_of("a prompt", 4)
    context = engine.request("a", keys)
    jobs = [
        engine.primary.job(context, engine.fill(keys), is_promotion=number % 2 == 0)
        for number in range(12)
    ]
    for job in jobs:
        (engine.tier.submit_load if job.is_promotion else engine.tier.submit_store)(job)
    await asyncio.to_thread(engine.tier.drain_jobs)
    results = engine.primary.poll(engine.tier)
    assert sorted(result.job_id for result in results) == [job.job_id for job in jobs]
    assert engine.primary.jobs == {}


async def test_what_waits_to_be_stored_is_bounded(engines: Engines, remote: NodeThread) -> None:
    """Rows are pinned while they wait: what comes above the limit is refused at once."""
    remote.node.play("Write", *[hanging_stream] * 9)
    engine = engines.start(
        remote.endpoint, settings={"max_saving_bytes": 4 * ROW_BYTES, "store_budget_s": 1}
    )
    keys = keys_of("a prompt", 2)
    context = engine.request("a", keys)
    jobs = [engine.primary.job(context, engine.fill(keys), is_promotion=False) for _ in range(5)]
    for job in jobs:
        engine.tier.submit_store(job)
    # One may be under way, and two wait.
    assert len(engine.primary.poll(engine.tier)) >= 2
    for job in jobs:
        assert not (await engine.reported(job)).success


async def test_a_step_larger_than_the_limit_is_stored(engines: Engines, node: NodeServer) -> None:
    """vLLM offers what a step has computed as one; the limit is for what waits behind it."""
    keys = keys_of("a prompt", 8)
    engine = engines.start(node.endpoint, settings={"max_saving_bytes": 2 * ROW_BYTES})
    assert (await engine.store(engine.request("a", keys), keys)).success


async def test_shutdown_finishes_what_was_submitted(engines: Engines, node: NodeServer) -> None:
    """An engine that ends in order has stored what it has; then nothing holds its memory."""
    keys = keys_of("a prompt", 8)
    engine = engines.start(node.endpoint)
    context = engine.request("a", keys)
    for at in range(0, 8, 2):
        job = engine.primary.job(context, engine.fill(keys[at : at + 2], at), is_promotion=False)
        engine.tier.submit_store(job)
    await asyncio.to_thread(engine.tier.shutdown)
    assert all(result.success for result in engine.primary.poll(engine.tier))
    other = engines.start(node.endpoint)
    assert await other.looked_up(other.request("b", keys), keys) == ["HIT"] * 8
    before = set(threading.enumerate())
    await asyncio.to_thread(other.tier.shutdown)
    assert {thread.name for thread in before - set(threading.enumerate())} >= {
        "kvstore-lookups", "kvstore-loads-0", "kvstore-loads-1", "kvstore-stores-0",
    }  # fmt: skip


async def test_a_preempted_request_asks_anew(engines: Engines, node: NodeServer) -> None:
    """What was a miss when it came may have been stored since, by itself."""
    keys = keys_of("a prompt", 4)
    engine = engines.start(node.endpoint)
    context = engine.request("a", keys)
    assert await engine.looked_up(context, keys) == ["MISS"] * 4
    await engine.store(context, keys)
    assert engine.lookup(context, keys) == ["MISS"] * 4
    engine.step("a")
    assert await engine.looked_up(context, keys) == ["HIT"] * 4


async def test_the_source_of_a_hit_is_where_it_lay(
    engines: Engines, nodes: Nodes, node: NodeServer
) -> None:
    """After a restart of the node the disk; then memory, for it came up on its way."""
    keys = keys_of("a prompt", 4)
    engine = engines.start(node.endpoint)
    await engine.store(engine.request("a", keys), keys)
    await nodes.stop(node)
    again = await nodes.start()
    other = engines.start(again.endpoint)
    for name, source in (("b", "disk"), ("c", "host")):
        context = other.request(name, keys)
        assert await other.looked_up(context, keys) == ["HIT"] * 4
        other.lookup(context, keys[:1])
        assert other.tier.cache_hit_source.value == source
        assert (await other.load(context, keys)).success
    counted = other.tier.get_stats().counters
    assert counted["vllm:kvstore_tier_lookups", ("asked",)] == 2
    assert sum(n for (name, _), n in counted.items() if "loaded_chunks" in name) == 8
    assert {name for name, _ in counted} <= set(other.tier.build_metric_definitions({}))
    assert other.tier.get_stats() is None


async def test_adapters_are_known_by_their_weights(
    engines: Engines, node: NodeServer, tmp_path: Path
) -> None:
    """The same name and path with other weights is another chunk; no adapter is one more."""
    keys = keys_of("a prompt", 2)
    path = weights(tmp_path / "adapter", b"old")
    engine = lora_engine(engines, node)
    context = lora_request(engine, "a", keys, path)
    assert (await engine.store(context, keys)).success
    assert await engine.looked_up(lora_request(engine, "b", keys, path), keys) == ["HIT"] * 2
    assert await engine.looked_up(lora_request(engine, "c", keys, None), keys) == ["MISS"] * 2
    weights(path, b"new")
    # The engine may have either in memory: nothing is restored, and nothing stored.
    context = lora_request(engine, "d", keys, path)
    assert await engine.looked_up(context, keys) == ["MISS"] * 2
    assert not (await engine.store(context, keys)).success
    later = lora_engine(engines, node)
    assert await later.looked_up(lora_request(later, "a", keys, path), keys) == ["MISS"] * 2
    weights(path, b"old")
    last = lora_engine(engines, node)
    assert await last.looked_up(lora_request(last, "a", keys, path), keys) == ["HIT"] * 2
    # A request of which nobody said anything.
    assert await last.looked_up(last.request("b", keys), keys) == ["MISS"] * 2


def lora_engine(engines: Engines, node: NodeServer) -> Engine:
    """An engine with LoRA, below the connector that tells of adapters."""
    from kvstore_client.vllm_tier.engine import Engine as Named
    from kvstore_client.vllm_tier.engine import building_for

    named = Named(*engine_of(engines.checkpoint, [None], lora_config=object()), names_adapters=True)
    with building_for(named):
        return engines.start(node.endpoint)


def lora_request(
    engine: Engine, name: str, keys: Sequence[bytes], path: Path | None
) -> vllm.ReqContext:
    """A request through the connector."""
    from kvstore_client.vllm_tier import KVStoreOffloadingConnector

    if not hasattr(engine, "connector"):
        engine.connector = KVStoreOffloadingConnector(None, None, None)  # type: ignore[attr-defined]
    lora = path and SimpleNamespace(
        lora_name="adapter",
        lora_path=str(path),
        lora_int_id=1,
        load_inplace=False,
        is_3d_lora_weight=False,
    )
    request = SimpleNamespace(request_id=name, lora_request=lora)
    connector = engine.connector  # type: ignore[attr-defined]
    connector.on_new_request(request)
    told = connector.scheduler._req_status[name].req_context
    context = engine.request(name, keys)
    context._state.update(told._state)
    return context


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prefix_caching_hash_algo": "xxhash"}, "use sha256_cbor"),
        ({"prefix_caching_hash_algo": "xxhash_cbor"}, "use sha256_cbor"),
        ({"lora_config": object()}, "KVStoreOffloadingConnector"),
        ({"calculate_kv_scales": True}, "calculate_kv_scales"),
        ({"settings": {"endpiont": "a:1"}}, "secondary_tiers[KVStoreTier].endpiont: no such"),
        ({"settings": {"restore_gate": True}}, "KVStoreConnector"),
        ({"settings": {"locality": "NEAR"}}, "locality: LOCAL, REMOTE or empty"),
    ],
)
def test_what_could_not_be_right_is_refused_at_the_start(
    engines: Engines, changes: dict[str, Any], message: str
) -> None:
    """The engine does not start, and the message says what to write instead."""
    with pytest.raises(ValueError, match=r"\w+") as error:
        engines.start("127.0.0.1:9", **changes)
    assert message in str(error.value)


def test_another_version_of_vllm_is_refused(
    engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By name, with the version to install."""
    import kvstore_client.vllm_tier.engine as engine

    monkeypatch.setattr(engine, "__version_tuple__", (0, 33, 1))
    monkeypatch.setattr(engine, "__version__", "0.33.1")
    with pytest.raises(RuntimeError, match=r"works with vLLM 0\.32, this is 0\.33\.1"):
        engines.start("127.0.0.1:9")


def test_who_does_not_say_which_engine_it_is_is_refused(engines: Engines) -> None:
    """Without the engine's own settings nobody knows what the bytes depend on."""
    from kvstore_client.vllm_tier import KVStoreTier

    primary = vllm.Primary(np.zeros((ROWS, ROW_BYTES), dtype=np.int8))
    with pytest.raises(RuntimeError, match="KVStoreOffloadingConnector"):
        KVStoreTier(spec_of([None]), primary.view, "KVStoreTier", None)


async def test_a_bug_is_a_miss_and_a_counter(engines: Engines, monkeypatch: Any) -> None:
    """Whatever a hook raises stays in it; each job is reported all the same."""
    engine = engines.start("127.0.0.1:9")

    def broken(*_: object) -> None:
        raise RuntimeError("a bug")

    keys = keys_of("a prompt", 2)
    context = engine.request("a", keys)
    jobs = [engine.primary.job(context, engine.fill(keys), is_promotion=bool(n)) for n in range(2)]
    monkeypatch.setattr(engine.tier._lookups, "place", broken)
    assert engine.lookup(context, keys) == ["MISS"] * 2
    monkeypatch.setattr(engine.tier._stores, "submit", broken)
    monkeypatch.setattr(engine.tier._loads, "submit", broken)
    engine.tier.submit_store(jobs[0])
    engine.tier.submit_load(jobs[1])
    assert [result.success for result in engine.primary.poll(engine.tier)] == [False, False]
    assert engine.tier.errors == {"lookup": 2, "submit_store": 1, "submit_load": 1}


async def test_short_hashes_are_neither_stored_nor_found(
    engines: Engines, node: NodeServer
) -> None:
    """Should vLLM hand in hashes that are not SHA-256, they name nothing."""
    keys = [key[16:] for key in keys_of("a prompt", 2)]
    engine = engines.start(node.endpoint)
    context = engine.request("a", keys)
    assert engine.lookup(context, keys) == ["MISS"] * 2
    assert not (await engine.store(context, keys)).success
