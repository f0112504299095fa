"""SGLang's own cache controllers with all their threads, on a CPU, with one rank."""

import contextlib
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.managers import cache_controller
from sglang.srt.managers.cache_controller import HiCacheController, PrefetchOperation
from sglang.srt.mem_cache.base_prefix_cache import CacheRequestHandle
from sglang.srt.mem_cache.hicache_storage import PoolName
from sglang.srt.mem_cache.hybrid_cache import hybrid_cache_controller
from sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller import HybridCacheController
from sglang.srt.mem_cache.pool_host.group import HostPoolGroup, PoolEntry
from sglang.srt.mem_cache.radix_cache import RadixKey

from tests_engines.sglang.rig import NAMES, PAGE_TOKENS, PATIENCE_S, PATIENT, keys_of

PLAIN, HYBRID = "plain", "hybrid"
"""The base class, and the one that a server makes for every model."""


class _Allocator:
    """The device side, of which nothing here makes use."""

    def __init__(self, pool: Any) -> None:
        self._pool = pool

    def get_kvcache(self) -> Any:
        """What the controller asks at its start."""
        return self._pool


class Engine:
    """What SGLang's radix tree does with its controller, without the tree."""

    def __init__(self, controller: HiCacheController, pool: Any) -> None:
        self.controller = controller
        self.pool = pool

    def backup(
        self,
        tokens: list[int],
        indices: torch.Tensor,
        prefix_keys: list[str] | None = None,
        salt: str | None = None,
    ) -> int:
        """How many tokens of these pages, the last ones of a prompt, were backed up."""
        keys = keys_of(tokens, salt=salt)[-len(indices) // PAGE_TOKENS :]
        self.controller.write_storage(indices, tokens, keys, prefix_keys)
        operation = self.controller.ack_backup_queue.get(timeout=PATIENCE_S)
        return int(operation.completed_tokens)

    def find(self, tokens: list[int], salt: str | None = None) -> PrefetchOperation:
        """The lookup of a prompt, answered."""
        hybrid = isinstance(self.controller, HybridCacheController)
        request = CacheRequestHandle("request", 0) if hybrid else "request"
        self.controller.prefetch(request, RadixKey(tokens, cache_salt=salt), None, [])
        return self.controller.prefetch_hit_queue.get(timeout=PATIENCE_S)

    def fetch(self, operation: PrefetchOperation) -> tuple[int, torch.Tensor]:
        """How many tokens of those found came, and where the pages are."""
        indices = self.pool.alloc(operation.storage_hit_count)
        assert indices is not None
        operation.host_indices = indices
        self.controller.prefetch_buffer.put(operation)
        completed = 0
        while True:
            ack = self.controller.ack_prefetch_queue.get(timeout=PATIENCE_S)
            completed = ack.completed_tokens if ack.completed_tokens is not None else completed
            if ack.completed_req:
                return completed, indices

    def prefetch(self, tokens: list[int], salt: str | None = None) -> tuple[int, torch.Tensor]:
        """Both; nothing is fetched where nothing was found."""
        operation = self.find(tokens, salt)
        if not operation.storage_hit_count:
            return 0, torch.empty(0, dtype=torch.int64)
        return self.fetch(operation)


@contextlib.contextmanager
def engine(
    pool: Any,
    device_pool: Any,
    endpoint: str,
    group: torch.distributed.ProcessGroup,
    monkeypatch: pytest.MonkeyPatch,
    kind: str = HYBRID,
    **extra: Any,
) -> Iterator[Engine]:
    """A controller with a storage backend, detached in the end."""
    parallel = SimpleNamespace(
        tp_rank=0, tp_size=1, pp_rank=0, pp_size=1, attn_dcp_rank=0, attn_dcp_size=1,
        attn_tp_rank=0, attn_tp_size=1, attn_dp_rank=0,
    )  # fmt: skip
    for module in (cache_controller, hybrid_cache_controller):
        monkeypatch.setattr(module, "get_parallel", lambda: parallel, raising=False)
    monkeypatch.setattr(cache_controller, "is_dp_attention_enabled", lambda: False)
    settings = NAMES | {"class_name": "KVStoreBackend", "interface_v1": 1}
    settings |= {"endpoint": endpoint, "model_revision": "r1"} | PATIENT | extra
    host: Any = pool
    if kind == HYBRID:
        entry = PoolEntry(PoolName.KV, pool, device_pool, lambda layer: layer, True)
        host = HostPoolGroup([entry])
    controller = {PLAIN: HiCacheController, HYBRID: HybridCacheController}[kind](
        _Allocator(device_pool), host, PAGE_TOKENS, group, threading.Event(),
        write_policy="write_through", io_backend="direct", storage_backend="dynamic",
        prefetch_threshold=PAGE_TOKENS, model_name="model",
        storage_backend_extra_config=settings,
    )  # fmt: skip
    try:
        yield Engine(controller, pool)
    finally:
        controller.detach_storage_backend()
