"""The backend as SGLang's factory makes it, over SGLang's own host pools and a real node."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sglang.srt import runtime_context
from sglang.srt.lora.lora_registry import LoRARef
from sglang.srt.mem_cache.hicache_storage import HiCacheStorageExtraInfo
from sglang.srt.observability.metrics_collector import StorageMetrics

from kvstore_client.sglang import KVStoreBackend
from kvstore_workers.redis_server import RedisServer
from tests_engines.sglang.rig import (
    LAYOUTS,
    REDIS,
    Node,
    attached,
    config,
    fill,
    keys_of,
    mha,
    mla,
    pages,
    wait_until,
)

POOLS = {f"mha-{name}": (mha, name) for name in LAYOUTS}
POOLS |= {f"mla-{name}": (mla, name) for name in LAYOUTS if name != "page_head"}
START = HiCacheStorageExtraInfo(prefix_keys=[])
"""Of a batch that begins a chain."""
PROMPT = list(range(64))
KEYS = keys_of(PROMPT)

StartNode = Callable[..., Node]


def store(backend: KVStoreBackend, pool: Any, keys: list[str] = KEYS) -> list[bytes]:
    """Stores new pages under these keys; their bytes."""
    indices = pool.alloc(len(keys) * pool.page_size)
    assert backend.batch_set_v1(keys, indices, START) == [True] * len(keys)
    return pages(pool, indices)


def load(backend: KVStoreBackend, pool: Any, keys: list[str] = KEYS) -> list[bytes | None]:
    """What comes back under these keys."""
    indices = pool.alloc(len(keys) * pool.page_size)
    loaded = backend.batch_get_v1(keys, indices, START)
    found = pages(pool, indices)
    pool.free(indices)
    return [page if whole else None for page, whole in zip(found, loaded, strict=True)]


def filled(kind: str = "mha-page_first", seed: int = 1) -> Any:
    """A host pool with random bytes."""
    make, layout = POOLS[kind]
    pool = make(layout)
    fill(pool, seed)
    return pool


def raw(page: torch.Tensor | None) -> bytes:
    """The bytes of a flat page; among them are many NaN."""
    return b"" if page is None else page.view(torch.uint8).numpy().tobytes()


def has_arena(backend: KVStoreBackend) -> Callable[[], bool]:
    """Whether the node's memory is mapped by now."""
    return lambda: backend._client.arena is not None


# Bit for bit.


@pytest.mark.parametrize("shared_memory", [True, False], ids=["shared", "apart"])
@pytest.mark.parametrize("kind", POOLS)
def test_pages_come_back_bit_exact(kind: str, shared_memory: bool, start_node: StartNode) -> None:
    """Each layout, through the node's own memory and over a connection; strangers are misses."""
    pool = filled(kind)
    extra = {"shared_memory": shared_memory}
    is_mla = kind.startswith("mla")
    with attached(pool, config(start_node().endpoint, extra=extra, is_mla_model=is_mla)) as backend:
        if shared_memory:
            wait_until(has_arena(backend))
        before = store(backend, pool)
        assert len(set(before)) == len(KEYS)
        assert backend.batch_exists([*KEYS, "nope"], START) == len(KEYS)
        assert load(backend, pool, [*KEYS, "nope"]) == [*before, None]
        assert (backend._client.arena is not None) == shared_memory


@pytest.mark.parametrize("layout", LAYOUTS)
def test_both_interfaces_keep_the_same_bytes(layout: str, start_node: StartNode) -> None:
    """What the copying interface stored, the zero-copy one restores, and the other way round."""
    pool = filled(f"mha-{layout}")
    with attached(pool, config(start_node().endpoint)) as backend:
        flat = [pool.get_data_page(index * 16) for index in range(4)]
        assert backend.batch_set(KEYS, flat)
        assert load(backend, pool) == pages(pool, torch.arange(64))
        others = keys_of(list(range(100, 164)))
        before = store(backend, pool, others)
        targets = [pool.get_dummy_flat_data_page() for _ in range(5)]
        got = backend.batch_get([*others, "nope"], targets)
        assert got[4] is None
        assert [raw(page) for page in got[:4]] == before
        assert backend.exists(KEYS[2])
        assert not backend.exists("nope")
        assert backend.get("nope") is None
        assert raw(backend.get(KEYS[1])) == raw(flat[1])
        assert backend.set("one more", flat[0])
        assert raw(backend.get("one more")) == raw(flat[0])


def test_pages_are_warm_from_disk_after_a_kill(start_node: StartNode) -> None:
    """A new node over the same directory finds and loads what the killed one had stored."""
    node = start_node(
        disk_enabled="true",
        disk_capacity_bytes="64MiB",
        disk_segment_bytes="4MiB",
        disk_sync_after_s="0.05",
    )
    pool = filled()
    with attached(pool, config(node.endpoint)) as backend:
        before = store(backend, pool)
    node.signal(signal.SIGTERM)
    node.start()
    node.signal(signal.SIGKILL)
    node.start()
    with attached(pool, config(node.endpoint)) as backend:
        assert backend.batch_exists(KEYS, START) == len(KEYS)
        assert load(backend, pool) == before


def test_pages_travel_between_nodes_through_redis(start_node: StartNode, tmp_path: Path) -> None:
    """What one node stored, another one on the same Redis restores; without Redis it is a miss."""
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(range(32)))
    secret.chmod(0o600)
    pool = filled()
    with RedisServer(binary=REDIS) as redis:
        flags = {"redis_blocks_url": redis.url, "cluster_secret_file": str(secret)}
        first, second, third = (start_node(**flags) for _ in range(3))
        with attached(pool, config(first.endpoint)) as backend:
            before = store(backend, pool)
        first.signal(signal.SIGTERM)  # It drains: what memory has goes below.
        with attached(pool, config(second.endpoint)) as backend:
            assert backend.batch_exists(KEYS, START) == len(KEYS)
            assert load(backend, pool) == before
        redis.kill()
        with attached(pool, config(third.endpoint)) as backend:
            assert backend.batch_exists(KEYS, START) == 0
            assert load(backend, pool) == [None] * len(KEYS)
            assert store(backend, pool)


# Who may meet.


def test_a_second_backup_moves_and_changes_nothing(start_node: StartNode) -> None:
    """The first copy of a page wins, and the second one is told that it is there."""
    pool = filled()
    with attached(pool, config(start_node().endpoint)) as backend:
        before = store(backend, pool)
        assert store(backend, pool) != before
        assert load(backend, pool) == before


def test_existence_is_counted_from_the_start_and_without_gaps(start_node: StartNode) -> None:
    """A page behind a hole does not count."""
    pool = filled()
    with attached(pool, config(start_node().endpoint)) as backend:
        store(backend, pool, KEYS[:2])
        store(backend, pool, ["behind the hole"])
        assert backend.batch_exists([*KEYS[:2], "hole", "behind the hole"], START) == 2
        assert backend.batch_exists(["hole", *KEYS[:2]], START) == 0


@pytest.mark.parametrize(("salt", "extra_key"), [("a", None), ("b", None), (None, "a"), ("a", "a")])
def test_salted_and_unsalted_prompts_never_meet(
    salt: str | None, extra_key: str | None, start_node: StartNode
) -> None:
    """The same tokens under a salt or an extra key have pages of their own."""
    pool = filled()
    with attached(pool, config(start_node().endpoint)) as backend:
        store(backend, pool)
        others = keys_of(PROMPT, salt=salt, extra_key=extra_key)
        assert backend.batch_exists(others, START) == 0
        assert load(backend, pool, others) == [None] * len(others)
        mine = store(backend, pool, others)
        assert load(backend, pool, others) == mine != load(backend, pool)


OTHERS: dict[str, dict[str, Any]] = {
    "revision": {"extra": {"model_revision": "r2"}},
    "model": {"model_name": "other"},
    "rank": {"tp_rank": 1, "tp_size": 2},
    "size": {"tp_size": 2},
    "stage": {"pp_rank": 1, "pp_size": 2},
    "context": {"attn_cp_rank": 1, "attn_cp_size": 2},
    "variant": {"extra": {"variant": "another rope"}},
    "scope": {"extra": {"scope": "team"}},
}


@pytest.mark.parametrize("what", OTHERS)
def test_pages_of_another_kind_never_meet(what: str, start_node: StartNode) -> None:
    """What SGLang's keys lack is in the space."""
    endpoint = start_node().endpoint
    pool = filled()
    with (
        attached(pool, config(endpoint)) as one,
        attached(pool, config(endpoint, **OTHERS[what])) as other,
    ):
        store(one, pool)
        assert other.batch_exists(KEYS, START) == 0
        assert load(other, pool) == [None] * len(KEYS)


def test_layouts_never_meet(start_node: StartNode) -> None:
    """Their bytes have another order, though there are as many of them."""
    endpoint = start_node().endpoint
    pool = filled()
    with attached(pool, config(endpoint)) as backend:
        store(backend, pool)
    for layout in LAYOUTS[1:]:
        with attached(filled(f"mha-{layout}"), config(endpoint)) as backend:
            assert backend.batch_exists(KEYS, START) == 0


def test_ranks_with_the_same_latent_pages_share_what_one_of_them_wrote(
    start_node: StartNode,
) -> None:
    """MLA: any rank, of any size, reads the pages of the rank that writes."""
    endpoint = start_node().endpoint
    pool = filled("mla-page_first")
    writer = config(endpoint, is_mla_model=True, tp_size=2)
    reader = config(endpoint, is_mla_model=True, tp_rank=3, tp_size=4, dp_rank=1)
    with attached(pool, writer) as one, attached(pool, reader) as other:
        before = store(one, pool)
        assert other.batch_exists(KEYS, START) == len(KEYS)
        assert load(other, pool) == before


def test_heads_cut_apart_are_shared_between_sizes(start_node: StartNode) -> None:
    """`page_head` with `tp_lcm_size`: two ranks read their heads of what one rank stored."""
    endpoint = start_node().endpoint
    whole = filled("mha-page_head")
    cut = {"tp_lcm_size": 4, "should_split_heads": True}
    indices = torch.arange(64)
    with attached(whole, config(endpoint, **cut)) as backend:
        assert all(backend.batch_set_v1(KEYS, indices, START))
    for rank in (0, 1):
        half = mha("page_head", heads=2)
        with attached(half, config(endpoint, tp_rank=rank, tp_size=2, **cut)) as backend:
            assert backend.batch_exists(KEYS, START) == len(KEYS)
            assert all(backend.batch_get_v1(KEYS, indices, START))
        heads = slice(2 * rank, 2 * rank + 2)
        assert torch.equal(
            half.kv_buffer[:, :4].view(torch.int16), whole.kv_buffer[:, :4, heads].view(torch.int16)
        )


def test_clear_forgets_the_pages_of_this_rank(start_node: StartNode) -> None:
    """And of no other; a node that is away is reported to SGLang, which logs it."""
    node = start_node()
    pool = filled()
    with (
        attached(pool, config(node.endpoint)) as one,
        attached(pool, config(node.endpoint, tp_rank=1, tp_size=2)) as other,
    ):
        store(one, pool)
        kept = store(other, pool)
        one.clear()
        assert one.batch_exists(KEYS, START) == 0
        assert load(one, pool) == [None] * len(KEYS)
        assert load(other, pool) == kept
        node.signal(signal.SIGKILL)
        with pytest.raises(Exception, match=r"refused|unavailable|connect"):
            one.clear()


# Parents.


def test_a_run_whose_parent_was_forgotten_is_stored_all_the_same(start_node: StartNode) -> None:
    """SGLang may still have the parent itself; the node takes no orphans, but a new chain."""
    pool = filled()
    with attached(pool, config(start_node().endpoint)) as backend:
        known = HiCacheStorageExtraInfo(prefix_keys=KEYS[:2])
        indices = pool.alloc(32)
        assert backend.batch_set_v1(KEYS[2:], indices, known) == [True, True]
        assert backend.counters["parents_lost"] == 1
        assert backend.batch_exists(KEYS[2:], known) == 2
        assert load(backend, pool, KEYS[2:]) == pages(pool, indices)


def test_without_prefix_keys_pages_are_stored_as_chains_of_their_own(start_node: StartNode) -> None:
    """`hicache_storage_pass_prefix_keys` is off unless the recipe sets it."""
    pool = filled()
    with attached(pool, config(start_node().endpoint)) as backend:
        assert all(backend.batch_set_v1(KEYS[2:], pool.alloc(32)))
        assert all(backend.batch_set_v1(KEYS[:2], pool.alloc(32)))
        assert backend.batch_exists(KEYS) == 4
        assert backend.counters["parents_unknown"] == 2


# What the engine says of itself.


def checkpoint(path: Path, weights: bytes) -> Path:
    """A directory with weights in it."""
    path.mkdir(exist_ok=True)
    (path / "model.safetensors").write_bytes(weights)
    return path


def test_a_checkpoint_replaced_under_its_path_is_another_space(
    start_node: StartNode, tmp_path: Path
) -> None:
    """The revision is a digest of the weights that the engine says it serves."""
    endpoint = start_node().endpoint
    pool = filled()
    served = config(endpoint, model_name="served", extra={"model_revision": ""})
    path = checkpoint(tmp_path / "model", b"one")
    with runtime_context.get_context().override_server_args(model_path=str(path)):
        with attached(pool, served) as backend:
            store(backend, pool)
        with attached(pool, served) as backend:
            assert backend.batch_exists(KEYS, START) == len(KEYS)
        checkpoint(path, b"two")
        with attached(pool, served) as backend:
            assert backend.batch_exists(KEYS, START) == 0


def test_an_adapter_replaced_under_its_path_brings_nothing_stale(
    start_node: StartNode, tmp_path: Path
) -> None:
    """SGLang's keys know an adapter of its command line by name and path alone."""
    endpoint = start_node().endpoint
    pool = filled()
    adapter = checkpoint(tmp_path / "adapter", b"one")
    name = LoRARef.deterministic_id("fine", str(adapter))
    tuned = keys_of(PROMPT, extra_key=name)
    ref = LoRARef(lora_id=name, lora_name="fine", lora_path=str(adapter))
    serving = {"enable_lora": True, "lora_paths": [ref]}
    with runtime_context.get_context().override_server_args(**serving):
        with attached(pool, config(endpoint)) as backend:
            before = store(backend, pool, tuned)
        with attached(pool, config(endpoint)) as backend:
            assert load(backend, pool, tuned) == before
        checkpoint(adapter, b"two")
        with attached(pool, config(endpoint)) as backend:
            assert backend.batch_exists(tuned, START) == 0
            assert load(backend, pool, tuned) == [None] * len(tuned)


def test_settings_that_change_kv_are_another_space(start_node: StartNode) -> None:
    """Overrides of the checkpoint's settings, and kinds of fp8 that the pool calls alike."""
    endpoint = start_node().endpoint
    pool = filled()
    context = runtime_context.get_context()
    with context.override_server_args(), attached(pool, config(endpoint)) as backend:
        store(backend, pool)
        assert backend.batch_exists(KEYS, START) == len(KEYS)
    for change in (
        {"json_model_override_args": '{"rope_theta": 1}'},
        {"kv_cache_dtype": "fp8_e5m2"},
    ):
        with context.override_server_args(**change), attached(pool, config(endpoint)) as backend:
            assert backend.batch_exists(KEYS, START) == 0


def test_the_backend_stands_down_when_weights_are_replaced(start_node: StartNode) -> None:
    """What is stored is of the old weights, and what is computed of the new ones."""
    endpoint = start_node().endpoint
    pool = filled()
    nameless = config(endpoint, extra={"model_revision": ""})
    override = runtime_context.get_context().override_server_args
    with override(), attached(pool, config(endpoint)) as backend:
        before = store(backend, pool)
        with runtime_context.get_serving().override(weight_version="later"):
            assert backend.batch_exists(KEYS, START) == 0
            assert load(backend, pool) == [None] * len(KEYS)
            assert backend.batch_set_v1(KEYS, pool.alloc(64), START) == [False] * 4
            assert backend.batch_get(KEYS)[0] is None
            assert not backend.batch_set(KEYS, [pool.get_data_page(0)] * 4)
            with pytest.raises(ValueError, match="model_revision: the weights were replaced"):
                attached(pool, nameless).__enter__()
        # For good: the pool may hold pages of the weights that were there in between.
        assert backend.batch_exists(KEYS, START) == 0
    with override(), attached(pool, config(endpoint)) as backend:
        assert load(backend, pool) == before


def test_measurements_reach_sglangs_metrics(start_node: StartNode) -> None:
    """Once each."""
    pool = filled()
    with attached(pool, config(start_node().endpoint)) as backend:
        store(backend, pool)
        load(backend, pool)
        metrics = backend.get_stats()
        assert isinstance(metrics, StorageMetrics)
        assert (metrics.backup_pgs, metrics.prefetch_pgs) == ([4], [4])
        assert all(speed > 0 for speed in metrics.backup_bandwidth + metrics.prefetch_bandwidth)
        assert backend.get_stats() == StorageMetrics()
        assert backend.counters["pages_stored"] == backend.counters["pages_loaded"] == 4


# What is refused.


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"endpoit": "x"}, r"extra-config.endpoit: no such setting; did you mean endpoint"),
        ({"lease_ms": "5"}, r"extra-config.lease_ms: a whole number is needed"),
        ({"prefill_tokens_per_s": -1.0}, r"prefill_tokens_per_s: must be 0 or more"),
        ({"model_revision": ""}, r"model 'model': neither a path nor a snapshot"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(extra: dict[str, Any], words: str) -> None:
    """SGLang shows the message and does not start."""
    with pytest.raises(ValueError, match=words):
        attached(filled(), config("127.0.0.1:1", extra=extra)).__enter__()


def test_another_version_of_sglang_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless it is asked for."""
    monkeypatch.setattr("sglang.__version__", "0.4.0")
    with pytest.raises(ValueError, match=r"tested with SGLang 0\.5\.23 and this is 0\.4\.0"):
        attached(filled(), config("127.0.0.1:1")).__enter__()
    with attached(filled(), config("127.0.0.1:1", extra={"untested_engine": True})):
        pass


def test_pools_beside_kv_are_refused() -> None:
    """A model with state beside KV would lose it silently otherwise."""
    pool = filled()
    with attached(pool, config("127.0.0.1:1")) as backend:
        backend.register_mem_host_pool_v2(pool, "kv")
        backend.on_host_pools_registered()
        with pytest.raises(ValueError, match=r"\['mamba'\] beside"):
            backend.register_mem_host_pool_v2(pool, "mamba")
