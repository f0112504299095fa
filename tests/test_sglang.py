"""The backend for SGLang over stand-ins of its interface, a real node and a scripted one."""

import asyncio
import contextlib
import dataclasses
import importlib
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from kvstore.server import NodeServer
from kvstore_client import Client, Match, Run, Space
from kvstore_client.losses import MEANINGS as LOSSES
from tests.client_rig import descriptor
from tests.scripted_node import NodeThread
from tests.sim.clock import ManualClock
from tests.sim.nodes import Nodes
from tests.stand_ins import sglang_storage
from tests.stand_ins.sglang_storage import (
    Engine,
    HiCacheStorageConfig,
    HiCacheStorageExtraInfo,
    HostPool,
)

LAYOUTS = ("page_first", "page_first_direct", "page_head", "layer_first")
KEYS = [f"{number:064x}" for number in range(4)]
START = HiCacheStorageExtraInfo(prefix_keys=[])
STORED = torch.arange(16)
LOADED = torch.arange(16, 32)
BUDGETS = {"match_budget_s": 30.0, "load_budget_s": 30.0, "store_budget_s": 30.0}
SHORT_S = 0.2


@pytest.fixture
def engine() -> Iterator[Engine]:
    """SGLang is what `tests/stand_ins` says."""
    with sglang_storage.standing_in() as engine:
        yield engine


def module(name: str) -> Any:
    """A module of the backend, over the stand-ins of this test."""
    return importlib.import_module(f"kvstore_client.sglang.{name}")


def filled(layout: str = "page_first", **shape: int) -> HostPool:
    """A pool with random bytes."""
    pool = HostPool(layout, **shape)
    pool.kv_buffer.view(torch.uint8).random_(0, 256, generator=torch.Generator().manual_seed(7))
    return pool


def pages(pool: HostPool, indices: torch.Tensor) -> list[bytes]:
    """The bytes of the pages at these indices."""
    flat = [pool.get_data_page(index) for index in indices[:: pool.page_size].tolist()]
    return [page.view(torch.uint8).numpy().tobytes() for page in flat]


def config(endpoint: str, **changes: Any) -> HiCacheStorageConfig:
    """Of one rank; `extra` adds settings."""
    extra = {"backend_name": "kvstore", "module_path": "m", "class_name": "c", "interface_v1": 1}
    extra |= {"endpoint": endpoint, "model_revision": "r1"} | BUDGETS | changes.pop("extra", {})
    values: dict[str, Any] = {
        "tp_rank": 0, "tp_size": 1, "pp_rank": 0, "pp_size": 1, "attn_cp_rank": 0,
        "attn_cp_size": 1, "is_mla_model": False, "enable_storage_metrics": True,
        "is_page_first_layout": True, "model_name": "model",
    }  # fmt: skip
    return HiCacheStorageConfig(**values | changes, extra_config=extra)


@contextlib.contextmanager
def attached(pool: HostPool, settings: HiCacheStorageConfig) -> Iterator[Any]:
    """A backend, as the controller makes it, whose counters hold only documented names."""
    backend = importlib.import_module("kvstore_client.sglang").KVStoreBackend(settings, {})
    try:
        backend.register_mem_pool_host(pool)
        backend.register_mem_host_pool_v2(pool, "kv")
        backend.on_host_pools_registered()
        yield backend
        assert set(backend.counters) <= {*module("figures").MEANINGS, *LOSSES}
    finally:
        backend.close()


@pytest.fixture
async def node(nodes: Nodes, engine: Engine) -> AsyncIterator[NodeServer]:
    """A small node."""
    yield await nodes.start()


async def run(work: Callable[[], None]) -> None:
    """Blocking work of a test, beside its node."""
    await asyncio.to_thread(work)


def until(happened: Callable[[], bool]) -> None:
    """Waits for what another thread brings about."""
    end_s = time.monotonic() + 30
    while not happened():
        assert time.monotonic() < end_s
        time.sleep(0.005)


# Pages and their bytes.


@pytest.mark.parametrize("shared_memory", [True, False], ids=["shared", "apart"])
@pytest.mark.parametrize("layout", LAYOUTS)
async def test_pages_come_back_bit_exact(
    layout: str, shared_memory: bool, node: NodeServer
) -> None:
    """Each layout, in place and over a connection; what is not there is said not to be."""

    def work() -> None:
        pool = filled(layout)
        before = pages(pool, STORED)
        extra = {"shared_memory": shared_memory}
        with attached(pool, config(node.endpoint, extra=extra)) as backend:
            if shared_memory:
                until(lambda: backend._client.arena is not None)
            assert backend.batch_set_v1(KEYS, STORED, START) == [True] * 4
            assert backend.batch_exists([*KEYS, "nope"], START) == 4
            missing = torch.arange(16, 36)
            assert backend.batch_get_v1([*KEYS, "nope"], missing, START) == [True] * 4 + [False]
            assert pages(pool, LOADED) == before == pages(pool, STORED)

    await run(work)


@pytest.mark.parametrize("layout", LAYOUTS)
async def test_both_interfaces_keep_the_same_bytes(layout: str, node: NodeServer) -> None:
    """Flat pages and pages in the pool are one block each, and the same one."""

    def work() -> None:
        pool = filled(layout)
        with attached(pool, config(node.endpoint)) as backend:
            assert backend.batch_set(KEYS[:1], [pool.get_data_page(0)])
            assert backend.batch_get_v1(KEYS[:1], LOADED[:4], START) == [True]
            assert pages(pool, LOADED[:4]) == pages(pool, STORED[:4])
            assert backend.batch_set_v1(KEYS[1:2], STORED[4:8], START) == [True]
            found, lost = backend.batch_get([KEYS[1], "nope"])
            assert found.view(torch.uint8).numpy().tobytes() == pages(pool, STORED[4:8])[0]
            assert lost is None
            assert (backend.exists(KEYS[0]), backend.exists("nope")) == (True, False)
            assert not backend.set("short", torch.zeros(3))

    await run(work)


async def test_a_rank_reads_its_heads_of_pages_that_one_rank_wrote_whole(node: NodeServer) -> None:
    """`page_head` and `tp_lcm_size`: a block for each range of heads."""

    def work() -> None:
        cut = {"tp_lcm_size": 2, "should_split_heads": True}
        whole, half = filled("page_head", heads=4), HostPool("page_head", heads=2)
        with attached(whole, config(node.endpoint, **cut)) as backend:
            assert all(backend.batch_set_v1(KEYS, STORED, START))
            assert backend.batch_get_v1(["nope"], LOADED[:4], START) == [False]
            assert not backend.batch_set(["flat"], [whole.get_data_page(0)])
        with attached(half, config(node.endpoint, tp_rank=1, tp_size=2, **cut)) as backend:
            assert backend.batch_exists(KEYS, START) == 4
            assert all(backend.batch_get_v1(KEYS, STORED, START))
        upper = whole.kv_buffer[:, :4, 2:].contiguous()
        assert torch.equal(half.kv_buffer[:, :4].view(torch.int16), upper.view(torch.int16))

    await run(work)


async def test_scratch_is_bounded_and_batches_follow_each_other(
    node: NodeServer, engine: Engine
) -> None:
    """With room for one page and a half, pages of two parts go one by one, as one chain."""

    def work() -> None:
        pool = filled()
        kept = module("pages").HostPages(pool)
        space = Space.of(descriptor(kept.block_bytes))
        keys = [bytes([number]) * 32 for number in range(4)]
        [stored], [loaded] = kept.blocks(STORED), kept.blocks(LOADED)
        before = pages(pool, STORED)
        deadline = module("transfers").Deadline(ManualClock(), 30)
        with Client(node.endpoint, shared_memory=False) as client:
            moving = module("transfers").PageTransfers(client, "", kept.block_bytes * 3 // 2)
            assert moving.store(space, keys, stored, b"", deadline) == [True] * 4
            assert moving.load(space, keys, loaded, None, deadline) == ["memory"] * 4
            assert moving._own.scratch.nbytes == kept.block_bytes * 3 // 2
        assert pages(pool, LOADED) == before

    await run(work)


@pytest.mark.parametrize("shared_memory", [True, False], ids=["shared", "apart"])
async def test_a_flipped_bit_in_memory_ends_the_pages_before_it(
    shared_memory: bool, node: NodeServer
) -> None:
    """Bytes are digested where they arrived, also those that came from memory that is shared."""

    def work() -> None:
        pool = filled()
        extra = {"shared_memory": shared_memory}
        near, other = config(node.endpoint), config(node.endpoint, extra=extra)
        with attached(pool, near) as writer, attached(pool, other) as reader:
            until(lambda: writer._client.arena is not None)
            assert all(writer.batch_set_v1(KEYS, STORED, START))
            assert all(writer.batch_get_v1(KEYS, LOADED, START))
            arena = writer._client.arena.memory
            arena[bytes(arena).index(pages(pool, STORED)[2])] ^= 1
            if shared_memory:
                until(lambda: reader._client.arena is not None)
            assert reader.batch_get_v1(KEYS, LOADED, START) == [True, True, False, False]
            assert reader.counters["load_corrupt"] == 1
            if not shared_memory:
                return  # The client found it, and the node has still to be told.
            forgetter = module("transfers").FORGETTER
            until(lambda: all(each.name != forgetter for each in threading.enumerate()))
            assert not writer.exists(KEYS[2])
            assert all(writer.batch_set_v1(KEYS, STORED, START))
            assert all(reader.batch_get_v1(KEYS, LOADED, START))
            assert pages(pool, LOADED) == pages(pool, STORED)

    await run(work)


# Lookups, leases, parents.


async def test_only_pages_without_a_gap_are_found(node: NodeServer) -> None:
    """The count ends at the first hole, and with prefix keys it begins after them."""

    def work() -> None:
        pool = filled()
        with attached(pool, config(node.endpoint)) as backend:
            assert all(backend.batch_set_v1(KEYS[:2], STORED[:8], START))
            assert all(backend.batch_set_v1(["island"], STORED[8:12], START))
            assert backend.batch_exists([*KEYS[:2], "hole", "island"], START) == 2
            later = HiCacheStorageExtraInfo(prefix_keys=KEYS[:1])
            assert backend.batch_exists([KEYS[1], "hole"], later) == 1
            assert backend.batch_exists(["hole"], later) == 0
            assert backend.counters["pages_found"] == 3
            assert backend.batch_exists([], START) == 0
            assert backend.batch_get_v1([], STORED[:0], START) == []
            assert backend.batch_set_v1(KEYS, STORED[:4], START) == [False] * 4

    await run(work)


async def test_a_run_is_stored_below_its_parent_and_without_one_that_is_lost(
    node: NodeServer,
) -> None:
    """The node takes no orphans; what SGLang alone knows the parent of is a chain of its own."""

    def work() -> None:
        pool = filled()
        with attached(pool, config(node.endpoint)) as backend:
            below = HiCacheStorageExtraInfo(prefix_keys=KEYS[:1])
            assert backend.batch_set_v1(KEYS[1:2], STORED[:4], below) == [True]
            assert backend.counters["parents_lost"] == 1
            assert backend.batch_set_v1(KEYS[:1], STORED[:4], START) == [True]
            assert backend.batch_set_v1(KEYS[2:3], STORED[:4], below) == [True]
            assert backend.counters["parents_lost"] == 1
            assert backend.batch_set_v1(KEYS[3:], STORED[:4]) == [True]
            assert backend.counters["parents_unknown"] == 1

    await run(work)


async def test_pages_that_are_slower_to_load_than_to_compute_are_not_found(
    node: NodeServer,
) -> None:
    """With a prefill speed that no store can reach, all but an occasional trial is computed."""

    def work() -> None:
        pool = filled()
        fast = config(node.endpoint, extra={"prefill_tokens_per_s": 1e12})
        with attached(pool, fast) as backend:
            assert all(backend.batch_set_v1(KEYS, STORED, START))
            assert backend.batch_exists(KEYS, START) == 4
            assert all(backend.batch_get_v1(KEYS, LOADED, START))
            assert backend.batch_exists(KEYS, START) == 0
            assert backend.counters["pages_not_worth"] == 4
            assert not backend._promises._open

    await run(work)


class Lessor:
    """Remembers what was released."""

    def __init__(self) -> None:
        self.released: list[bytes] = []

    def __call__(self, match: Match) -> None:
        self.released.append(match.lease_id)


def lease(name: bytes, blocks: int, lease_ms: int = 1000) -> Match:
    """A match under a lease of this name."""
    return Match(blocks, ((Run(blocks, "memory", True),),), name, lease_ms)


def test_a_lease_is_found_until_its_last_page_is_read(engine: Engine) -> None:
    """And is released then, or as soon as a page of it could not be read."""
    lessor, clock = Lessor(), ManualClock()
    promises = module("promises").Promises(clock, lessor)
    keys = [b"a", b"b", b"c"]
    promises.give(lease(b"1", 3), keys)
    assert promises.lease(b"b").lease_id == b"1"
    promises.was_read(keys[:2], 2)
    assert promises.lease(b"c") is not None
    promises.was_read(keys[2:], 1)
    assert (lessor.released, promises.lease(b"a")) == ([b"1"], None)
    promises.give(lease(b"2", 3), keys)
    promises.was_read(keys, 1)
    assert lessor.released == [b"1", b"2"]
    promises.was_read(keys, 0)
    promises.was_read([b"x"], 1)
    assert lessor.released == [b"1", b"2"]


async def test_leases_expire_and_the_oldest_gives_way(engine: Engine) -> None:
    """Two requests for the same pages have a lease each, and neither is forgotten."""
    lessor, clock = Lessor(), ManualClock()
    promises = module("promises").Promises(clock, lessor)
    promises.give(lease(b"old", 1), [b"a"])
    promises.give(lease(b"new", 1), [b"a"])
    assert promises.lease(b"a").lease_id == b"new"
    await clock.advance(2)
    assert promises.lease(b"a") is None
    for number in range(module("promises").MAX_PROMISES + 1):
        promises.give(lease(b"%d" % number, 1), [b"%d" % number])
    assert lessor.released == [b"0"]
    assert len(promises._open) == module("promises").MAX_PROMISES


# Nodes that are away.


@pytest.fixture
def remote(engine: Engine) -> Iterator[NodeThread]:
    """A scripted node."""
    node = NodeThread()
    yield node
    node.stop()


HASTY = dict.fromkeys(BUDGETS, SHORT_S)


def test_no_node_is_a_miss_within_the_budget(engine: Engine) -> None:
    """A backend attaches, and answers, without one."""
    with attached(filled(), config("127.0.0.1:1", extra=HASTY)) as backend:
        begun_s = time.monotonic()
        assert backend.batch_exists(KEYS, START) == 0
        assert backend.batch_get_v1(KEYS, LOADED, START) == [False] * 4
        assert backend.batch_set_v1(KEYS, STORED, START) == [False] * 4
        assert backend.batch_set_v1(KEYS, STORED, HiCacheStorageExtraInfo(["p"])) == [False] * 4
        assert time.monotonic() - begun_s < 20 * SHORT_S
        assert backend.counters["pages_lost"] == 4
        assert backend.counters["pages_not_stored"] == 8
    assert backend.batch_exists(KEYS, START) == 0
    assert backend.batch_get_v1(KEYS, LOADED, START) == [False] * 4


# What names a space.


def spaces(engine: Engine, pool: HostPool, **changes: Any) -> set[bytes]:
    """The ids of the spaces of one rank."""
    settings = config("127.0.0.1:1", **changes)
    options = module("options").SGLangOptions.of_extra_config(settings.extra_config)
    kept = module("pages").HostPages(pool, 2 if settings.should_split_heads else 1)
    serving = module("serving").Serving.now()
    named = module("identity").descriptors(settings, kept, options, serving)
    return {each.space_id for each in named}


CHANGES: dict[str, dict[str, Any]] = {
    "revision": {"extra": {"model_revision": "r2"}},
    "model": {"model_name": "other"},
    "rank": {"tp_rank": 1, "tp_size": 2},
    "size": {"tp_size": 2},
    "stage": {"pp_rank": 1, "pp_size": 2},
    "context": {"attn_cp_rank": 1, "attn_cp_size": 2},
    "decode context": {"dcp_rank": 1, "dcp_size": 2},
    "variant": {"extra": {"variant": "another"}},
    "latent": {"is_mla_model": True, "model_name": "latent"},
}


def test_each_thing_that_decides_the_bytes_names_another_space(engine: Engine) -> None:
    """And nothing else does: replicas of data parallelism share pages."""
    pool = HostPool("page_first")
    seen = spaces(engine, pool)
    assert spaces(engine, pool, dp_rank=3, enable_storage_metrics=False) == seen
    others = [spaces(engine, pool, **change) for change in CHANGES.values()]
    others += [spaces(engine, HostPool(layout)) for layout in LAYOUTS[1:]]
    others += [
        spaces(engine, HostPool("page_first", **shape))
        for shape in ({"heads": 4}, {"page_size": 8}, {"layers": 3})
    ]
    wide = HostPool("page_first")
    wide.dtype = torch.bfloat16
    drafted = HostPool("page_first")
    drafted.end_layer = 1
    others += [spaces(engine, wide), spaces(engine, drafted)]
    for change in (
        {"json_model_override_args": "{'rope': 1}"},
        {"kv_cache_dtype": "fp8_e5m2"},
        {"quantization": "awq"},
    ):
        engine.publish(**change)
        others.append(spaces(engine, pool))
    for other in others:
        assert not other & seen
        seen |= other


def test_ranks_that_hold_the_same_bytes_have_one_space(engine: Engine) -> None:
    """MLA: whoever writes, all read."""
    pool = HostPool("page_first")
    rank = spaces(engine, pool, is_mla_model=True, tp_rank=3, tp_size=4)
    assert rank == spaces(engine, pool, is_mla_model=True)


def test_long_settings_are_named_by_their_digest(engine: Engine) -> None:
    """A descriptor has room for 256 characters of each."""
    long = {"json_model_override_args": "x" * 5000}
    engine.publish(**long)
    one = spaces(engine, HostPool("page_first"), model_name="m" * 300)
    engine.publish(json_model_override_args="x" * 4999 + "y")
    assert not one & spaces(engine, HostPool("page_first"), model_name="m" * 300)


def weights(path: Path, content: bytes) -> str:
    """A checkpoint with this content."""
    path.mkdir(exist_ok=True)
    (path / "model.safetensors").write_bytes(content)
    return str(path)


def test_weights_are_named_by_what_the_engine_loaded(engine: Engine, tmp_path: Path) -> None:
    """The path comes from the engine, and the revision from the files."""
    nameless = {"extra": {"model_revision": ""}}
    pool = HostPool("page_first")
    engine.publish(model_path=weights(tmp_path / "a", b"one"))
    one = spaces(engine, pool, **nameless)
    engine.publish(model_path=weights(tmp_path / "b", b"one"))
    assert spaces(engine, pool, **nameless) == one
    weights(tmp_path / "b", b"two")
    assert not spaces(engine, pool, **nameless) & one
    drafted = HostPool("page_first")
    drafted.target_layer_num = 1
    engine.publish(speculative_draft_model_path=weights(tmp_path / "draft", b"one"))
    one = spaces(engine, drafted)
    weights(tmp_path / "draft", b"two")
    assert not spaces(engine, drafted) & one


def test_keys_are_completed_by_the_weights_of_adapters(engine: Engine, tmp_path: Path) -> None:
    """SGLang's keys know one of the command line by name and path; none changes nothing."""

    def content(**settings: str) -> bytes:
        options = module("options").SGLangOptions(**settings)
        found: bytes = module("identity").adapters_content(options, module("serving").Serving.now())
        return found

    assert content() == b""
    adapter = SimpleNamespace(lora_name="a", lora_path=weights(tmp_path / "a", b"one"))
    engine.publish(enable_lora=False, lora_paths=[adapter])
    assert content() == b""
    engine.publish(enable_lora=True, lora_paths=[adapter])
    one = content()
    weights(tmp_path / "a", b"two")
    assert one != content() != b""
    assert content(adapters_revision="mine") == b"mine"
    engine.publish(
        enable_lora=True, lora_paths=[SimpleNamespace(lora_name="far", lora_path="org/far")]
    )
    with pytest.raises(ValueError, match=r"adapter 'far': .*set adapters_revision"):
        content()


async def test_nothing_is_stored_or_restored_once_weights_were_replaced(
    node: NodeServer, engine: Engine
) -> None:
    """The engine says so by another `weight_version`; a new attachment needs their name."""

    def work() -> None:
        pool = filled()
        engine.publish()
        with attached(pool, config(node.endpoint)) as backend:
            assert all(backend.batch_set_v1(KEYS, STORED, START))
            engine.serving.weight_version = "later"
            assert backend.batch_exists(KEYS, START) == 0
            assert not any(backend.batch_get_v1(KEYS, LOADED, START))
            assert not any(backend.batch_set_v1(["more"], STORED[:4], START))
            assert backend.counters["stood_down"] == 3
            with pytest.raises(ValueError, match="model_revision: the weights were replaced"):
                attached(pool, config(node.endpoint, extra={"model_revision": ""})).__enter__()
            engine.serving.weight_version = "default"
            assert backend.batch_exists(KEYS, START) == 0  # The pool may hold the others' pages.

    await run(work)


async def test_an_update_of_weights_without_a_name_is_noticed(
    node: NodeServer, engine: Engine
) -> None:
    """SGLang then goes on calling them what it called the old ones."""

    class SchedulerWeightUpdaterManager:
        heard: ClassVar[list[str | None]] = []

        def record_weight_version_after_update(self, weight_version: str | None) -> None:
            self.heard.append(weight_version)

    module = ModuleType("sglang.srt.managers.scheduler_components.weight_updater")
    sys.modules[module.__name__] = module

    def work() -> None:
        pool = filled()
        engine.publish()
        with pytest.raises(ValueError, match="updates of this engine's weights would go unseen"):
            attached(pool, config(node.endpoint)).__enter__()
        vars(module)["SchedulerWeightUpdaterManager"] = SchedulerWeightUpdaterManager
        with (
            attached(pool, config(node.endpoint)),
            attached(pool, config(node.endpoint)) as backend,
        ):
            assert all(backend.batch_set_v1(KEYS, STORED, START))
            assert backend.batch_exists(KEYS, START) == 4
            SchedulerWeightUpdaterManager().record_weight_version_after_update(None)
            assert SchedulerWeightUpdaterManager.heard == [None]
            assert backend.batch_exists(KEYS, START) == 0
            assert not any(backend.batch_get_v1(KEYS, LOADED, START))
            assert not any(backend.batch_set_v1(["more"], STORED[:4], START))
        with pytest.raises(ValueError, match="model_revision: the weights were replaced"):
            attached(pool, config(node.endpoint, extra={"model_revision": ""})).__enter__()

    await run(work)


async def test_weights_that_are_not_those_of_the_path_need_a_name(
    node: NodeServer, engine: Engine
) -> None:
    """An engine that starts with random weights must not be taken for the checkpoint."""
    engine.publish(load_format="dummy")
    with pytest.raises(ValueError, match="model_revision: with load_format dummy"):
        attached(filled(), config(node.endpoint, extra={"model_revision": ""})).__enter__()
    with attached(filled(), config(node.endpoint)):
        pass


async def test_closing_waits_for_copies_under_way(node: NodeServer, engine: Engine) -> None:
    """They go to memory that the node gives to others when the client hangs up."""

    def work() -> None:
        with attached(filled(), config(node.endpoint)) as backend:
            closer = threading.Thread(target=backend.close)
            with backend._transfers._entered() as may_copy:
                assert may_copy
                closer.start()
                while not backend._transfers._closing:
                    time.sleep(0)  # Offers the interpreter's lock.
                assert not backend._client.closed
                assert not any(backend.batch_set_v1(KEYS, STORED, START))
            closer.join()
            assert backend._client.closed

    await run(work)


# What is refused at the start.


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"endpoit": "x"}, "extra-config.endpoit: no such setting; did you mean endpoint"),
        ({"match_budget_s": 0.0}, "extra-config.match_budget_s: must lie above 0"),
        ({"prefill_tokens_per_s": -1.0}, "extra-config.prefill_tokens_per_s: must be 0 or more"),
        ({"model_revision": ""}, "model 'model': neither a path nor a snapshot"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(
    extra: dict[str, Any], words: str, engine: Engine
) -> None:
    """With the name of SGLang's flag before them."""
    with pytest.raises(ValueError, match=words):
        attached(filled(), config("127.0.0.1:1", extra=extra)).__enter__()


def test_another_version_is_refused_unless_it_is_asked_for(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message names both."""
    monkeypatch.setattr("sglang.__version__", "0.6.0")
    with pytest.raises(ValueError, match=r"SGLang 0\.5\.23 and this is 0\.6\.0"):
        attached(filled(), config("127.0.0.1:1")).__enter__()
    with attached(filled(), config("127.0.0.1:1", extra={"untested_engine": True})):
        pass


def test_pools_that_cannot_be_kept_are_refused(engine: Engine) -> None:
    """Those beside KV, whenever they come, and those without pages that are bytes."""
    with attached(filled(), config("127.0.0.1:1")) as backend:
        backend._attached = False
        backend.register_mem_host_pool_v2(filled(), "mamba")
        with pytest.raises(ValueError, match=r"\['mamba'\] beside"):
            backend.on_host_pools_registered()
    with attached(filled(), config("127.0.0.1:1")) as backend:
        backend.register_mem_host_pool_v2(filled(), "kv")
        with pytest.raises(ValueError, match=r"\['draft'\] beside"):
            backend.register_mem_host_pool_v2(filled(), "draft")

    class Scaled(HostPool):
        def get_page_buffer_meta(self, indices: torch.Tensor) -> tuple[list[int], list[int]]:
            raise NotImplementedError("its scales lie outside")

    with pytest.raises(ValueError, match=r"Scaled page_first: .*its scales lie outside"):
        attached(Scaled("page_first"), config("127.0.0.1:1")).__enter__()


def test_every_setting_is_documented(engine: Engine) -> None:
    """docs/sglang.md names each, and those that SGLang takes."""
    text = (Path(__file__).parents[1] / "docs" / "sglang.md").read_text()
    names = {each.name for each in dataclasses.fields(module("options").SGLangOptions)}
    assert {name for name in names if f"`{name}`" not in text} == set()
