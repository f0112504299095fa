# ruff: noqa: B027  SGLang has methods that do nothing, and need not be overridden.
"""What KVStoreBackend sees of SGLang 0.5.23: the storage interface, the engine's settings, pools.

Thin, and faithful where the backend relies on it; `tests_engines/sglang/test_stand_ins.py` compares
them with the installed SGLang.
"""

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

VERSION = "0.5.23"
_OURS = "kvstore_client.sglang"
_SRT = "sglang.srt"


@dataclass
class HiCacheStorageConfig:
    """What a backend is told of its rank."""

    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    attn_cp_rank: int
    attn_cp_size: int
    is_mla_model: bool
    enable_storage_metrics: bool
    is_page_first_layout: bool
    model_name: str | None
    tp_lcm_size: int | None = None
    should_split_heads: bool = False
    dp_rank: int = 0
    extra_config: dict[str, Any] | None = None
    dcp_size: int = 1
    dcp_rank: int = 0
    logical_page_size: int | None = None


@dataclass
class HiCacheStorageExtraInfo:
    """What comes with a batch."""

    prefix_keys: list[str] | None = None
    extra_info: dict[str, Any] | None = None


class HiCacheStorage(ABC):
    """The interface, v1."""

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        """Tells the backend where pages lie."""
        self.mem_pool_host = mem_pool_host

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        """Tells the backend of each pool, that of KV among them."""
        if not hasattr(self, "registered_pools"):
            self.registered_pools: dict[Any, Any] = {}
        self.registered_pools[host_pool_name] = host_pool

    def on_host_pools_registered(self) -> None:
        """All pools are known."""

    def batch_get_v1(self, keys: Any, host_indices: Any, extra_info: Any = None) -> Any:
        """Fills pages."""

    def batch_set_v1(self, keys: Any, host_indices: Any, extra_info: Any = None) -> Any:
        """Stores pages."""

    @abstractmethod
    def get(self, key: Any, target_location: Any = None, target_sizes: Any = None) -> Any:
        """One flat page."""

    @abstractmethod
    def batch_get(self, keys: Any, target_locations: Any = None, target_sizes: Any = None) -> Any:
        """Flat pages."""

    @abstractmethod
    def set(
        self, key: Any, value: Any = None, target_location: Any = None, target_sizes: Any = None
    ) -> Any:
        """Stores one flat page."""

    @abstractmethod
    def batch_set(
        self, keys: Any, values: Any = None, target_locations: Any = None, target_sizes: Any = None
    ) -> Any:
        """Stores flat pages."""

    @abstractmethod
    def exists(self, key: Any) -> Any:
        """Whether a page is there."""

    def batch_exists(self, keys: Any, extra_info: Any = None) -> Any:
        """How many are there from the first on."""

    def clear(self) -> None:
        """Forgets all pages."""

    def get_stats(self) -> Any:
        """Measurements for metrics."""


@dataclass
class StorageMetrics:
    """Measurements since the last time; speeds in GB/s."""

    prefetch_pgs: list[int] = field(default_factory=list)
    backup_pgs: list[int] = field(default_factory=list)
    prefetch_bandwidth: list[float] = field(default_factory=list)
    backup_bandwidth: list[float] = field(default_factory=list)


class HostPool:
    """K and V of each page in one tensor, laid out as SGLang's `MHATokenToKVPoolHost` does."""

    def __init__(
        self, layout: str, *, heads: int = 2, page_size: int = 4, pages: int = 16, layers: int = 2
    ) -> None:
        self.layout = layout
        self.page_size = page_size
        self.dtype = torch.float16
        self.head_num, self.head_dim, self.v_head_dim = heads, 8, 8
        self.layer_num = self.target_layer_num = self.end_layer = layers
        self.start_layer = 0
        self.size = pages * page_size
        row = (heads, self.head_dim)
        shapes: dict[str, tuple[int, ...]] = {
            "layer_first": (2, layers, self.size, *row),
            "page_first": (2, self.size, layers, *row),
            "page_first_direct": (2, pages, layers, page_size, *row),
            "page_head": (2, pages, heads, page_size, layers, self.head_dim),
        }
        self.kv_buffer = torch.zeros(shapes[layout], dtype=self.dtype)

    def get_page_buffer_meta(self, indices: torch.Tensor) -> tuple[list[int], list[int]]:
        """Addresses and lengths of the parts of pages."""
        row = self.head_num * self.head_dim * self.dtype.itemsize
        to_v = self.layer_num * self.size * row
        base = self.kv_buffer.data_ptr()
        first = [base + index * row for index in indices[:: self.page_size].tolist()]
        if self.layout == "layer_first":
            per_layer = self.size * row
            keys = [at + layer * per_layer for at in first for layer in range(self.layer_num)]
            length = self.page_size * row
        else:
            keys = [base + (at - base) * self.layer_num for at in first]
            length = self.page_size * self.layer_num * row
        addresses = [place for key in keys for place in (key, key + to_v)]
        return addresses, [length] * len(addresses)

    def get_split_heads_page_buffer_meta(
        self, indices: torch.Tensor, split_factor: int
    ) -> tuple[list[int], list[int]]:
        """The same, of ranges of heads."""
        addresses, lengths = self.get_page_buffer_meta(indices)
        length = lengths[0] // split_factor
        cut = [
            part + number * length
            for key, value in zip(addresses[::2], addresses[1::2], strict=True)
            for number in range(split_factor)
            for part in (key, value)
        ]
        return cut, [length] * len(cut)

    def get_data_page(self, index: int, flat: bool = True) -> torch.Tensor:
        """A copy of a page, all of K before all of V."""
        if self.layout == "layer_first":
            page = self.kv_buffer[:, :, index : index + self.page_size]
        elif self.layout == "page_first":
            page = self.kv_buffer[:, index : index + self.page_size]
        else:
            page = self.kv_buffer[:, index // self.page_size]
        return page.flatten() if flat else page

    def get_dummy_flat_data_page(self) -> torch.Tensor:
        """An empty flat page."""
        return torch.zeros_like(self.get_data_page(0))


class Engine:
    """What the running engine has published of its settings; nothing at first."""

    def __init__(self) -> None:
        self.model: Any = None
        self.lora: Any = None
        self.spec: Any = None
        self.serving: Any = None
        self.server_args: Any = None

    def publish(self, **changes: Any) -> None:
        """As a server does at its start."""
        values: dict[str, Any] = {
            "model_path": "dummy", "revision": None, "json_model_override_args": "{}",
            "quantization": None, "kv_cache_dtype": "auto", "quantization_param_path": None,
            "enable_lora": None, "lora_paths": None, "weight_version": "default",
            "load_format": "auto", "modelopt_quant": None, "rl_quant_profile": None,
            "speculative_draft_model_path": None, "speculative_draft_model_revision": None,
        }  # fmt: skip
        values |= changes
        self.model, self.lora, self.spec, self.serving = (
            SimpleNamespace(**values) for _ in range(4)
        )
        self.server_args = SimpleNamespace(**values)

    def _ask(self, name: str) -> Any:
        found = getattr(self, name)
        if found is None:
            raise ValueError(f"config namespace {name!r} not published")
        return found

    def context(self) -> dict[str, Any]:
        """The functions of `runtime_context`."""
        names = ("model", "lora", "spec", "serving", "server_args")
        return {f"get_{name}": lambda name=name: self._ask(name) for name in names}


@contextmanager
def standing_in() -> Iterator[Engine]:
    """`import sglang` finds these meanwhile, and the backend is imported anew over them."""
    engine = Engine()
    modules: dict[str, dict[str, Any]] = {
        "sglang": {"__version__": VERSION},
        _SRT: {},
        f"{_SRT}.runtime_context": engine.context(),
        f"{_SRT}.mem_cache": {},
        f"{_SRT}.mem_cache.hicache_storage": {
            "HiCacheStorage": HiCacheStorage,
            "HiCacheStorageConfig": HiCacheStorageConfig,
            "HiCacheStorageExtraInfo": HiCacheStorageExtraInfo,
        },
        f"{_SRT}.observability": {},
        f"{_SRT}.observability.metrics_collector": {"StorageMetrics": StorageMetrics},
    }

    def ours(name: str) -> bool:
        return name.partition(".")[0] == "sglang" or name == _OURS or name.startswith(_OURS + ".")

    before = {name: sys.modules.pop(name) for name in list(sys.modules) if ours(name)}
    for name, contents in modules.items():
        module = sys.modules[name] = ModuleType(name)
        module.__path__ = []
        vars(module).update(contents)
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], last, module)
    try:
        yield engine
    finally:
        for name in [name for name in sys.modules if ours(name)]:
            del sys.modules[name]
        sys.modules.update(before)
