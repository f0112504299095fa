# ruff: noqa: B027  vLLM has hooks that do nothing, and need not be overridden.
"""What KVStoreConnector sees of vLLM 0.32: the types that cross its interface.

Thin, and faithful where the connector relies on it; `tests_engines/vllm/test_signatures.py`
compares them with the installed vLLM. `vllm_mini_engine` has who calls the hooks.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from types import SimpleNamespace
from typing import Any

import torch

from tests.stand_ins.modules import imported_over

VERSION = "0.32.0"
_OURS = "kvstore_client.vllm"


class CacheHitSource(StrEnum):
    """Labels of vLLM's own metrics."""

    DEVICE = "device"
    HOST = "host"
    P2P = "p2p"
    DISK = "disk"
    EXTERNAL_UNSPECIFIED = "external_unspecified"


class KVConnectorRole(Enum):
    """Which process a connector is made for."""

    SCHEDULER = 0
    WORKER = 1


@dataclass
class KVConnectorTransferResults:
    """What has ended, from one worker, after one step."""

    finished_sending: set[str] = field(default_factory=set)
    finished_recving: set[str] = field(default_factory=set)
    failed_recving: set[str] = field(default_factory=set)


class KVConnectorMetadata(ABC):  # noqa: B024
    """From the scheduler to the workers."""


class KVConnectorHandshakeMetadata(ABC):  # noqa: B024
    """From a worker to the scheduler, once."""


class KVConnectorWorkerMetadata(ABC):
    """From the workers to the scheduler, each step."""

    @abstractmethod
    def aggregate(self, other: "KVConnectorWorkerMetadata") -> "KVConnectorWorkerMetadata":
        """Both."""


class SupportsHMA(ABC):
    """Knows more than one KV cache group."""

    @abstractmethod
    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """A request has ended."""


class KVConnectorBase_V1(ABC):  # noqa: N801
    """The hooks, as far as the connector overrides or leaves them."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        if vllm_config.kv_transfer_config is None:
            raise ValueError("kv_transfer_config must be set for KVConnectorBase_V1")
        self._connector_metadata: KVConnectorMetadata | None = None
        self._kv_cache_manager: Any = None

    @property
    def requires_kv_delivery(self) -> bool:
        """Whether what a request leaves must arrive."""
        return True

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """A step begins."""
        self._connector_metadata = connector_metadata

    def clear_connector_metadata(self) -> None:
        """A step has ended."""
        self._connector_metadata = None

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """The KV cache is allocated."""

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        """Before pages are overwritten."""

    @abstractmethod
    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Begin loads."""

    @abstractmethod
    def wait_for_layer_load(self, layer_name: str) -> None:
        """Before a layer."""

    @abstractmethod
    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """After a layer."""

    @abstractmethod
    def wait_for_save(self) -> None:
        """After the step."""

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """What has ended."""
        return KVConnectorTransferResults()

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Pages that were not loaded."""
        return set()

    def get_kv_connector_stats(self) -> "KVConnectorStats | None":
        """Counts."""

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        """For the scheduler's side."""

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        """For the scheduler's side, each step."""

    def shutdown(self) -> None:
        """The engine ends."""

    def on_new_request(self, request: Any) -> None:
        """A request has come."""

    @abstractmethod
    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """What can be loaded."""

    def get_external_cache_hit_sources(
        self, request: Any, num_external_tokens: int
    ) -> dict[CacheHitSource, int]:
        """From where."""
        return {}

    @abstractmethod
    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Pages are allocated."""

    @abstractmethod
    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        """A step is scheduled."""

    def update_connector_output(self, connector_output: Any) -> None:
        """A step has run."""

    def request_finished(
        self, request: Any, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """A request has ended."""
        return False, None

    def take_events(self) -> Iterable[Any]:
        """Events of KV caches."""
        return ()

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: Any) -> str | None:
        """The order of axes that it wants."""

    @classmethod
    def build_kv_connector_stats(
        cls, data: dict[str, Any] | None = None
    ) -> "KVConnectorStats | None":
        """Counts that have travelled."""

    def set_xfer_handshake_metadata(
        self, metadata: dict[int, KVConnectorHandshakeMetadata]
    ) -> None:
        """From the workers, by rank."""

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> "KVConnectorPromMetrics | None":
        """For Prometheus."""

    def reset_cache(self) -> bool | None:
        """Forget what was stored."""


@dataclass
class KVConnectorStats:
    """Counts of an interval."""

    data: dict[str, Any] = field(default_factory=dict)


class KVConnectorPromMetrics:
    """Counters of Prometheus for the counts."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        import prometheus_client

        self._counter_cls = metric_types[prometheus_client.Counter]
        self.per_engine_labelvalues = per_engine_labelvalues


class KVConnectorFactory:
    """Connectors by name."""

    _registry: dict[str, tuple[str, str]] = {}  # noqa: RUF012

    @classmethod
    def register_connector(cls, name: str, module_path: str, class_name: str) -> None:
        """Raises ValueError for a name that is taken."""
        if name in cls._registry:
            raise ValueError(f"Connector '{name}' is already registered.")
        cls._registry[name] = (module_path, class_name)


class KVCacheSpecKind(StrEnum):
    """What a group's layers keep."""

    FULL_ATTENTION = "full_attention"
    MLA_ATTENTION = "mla_attention"
    SLIDING_WINDOW = "sliding_window"
    SLIDING_WINDOW_MLA = "sliding_window_mla"
    CHUNKED_LOCAL_ATTENTION = "chunked_local_attention"
    MAMBA = "mamba"
    ENCODER_ONLY_ATTENTION = "encoder_only_attention"
    CROSS_ATTENTION = "cross_attention"
    SINK_FULL_ATTENTION = "sink_full_attention"
    UNKNOWN = "unknown"


@dataclass(frozen=True, kw_only=True)
class Spec:
    """Of one layer: tokens and bytes of a page, and what its kind has besides."""

    kind: KVCacheSpecKind
    block_size: int
    real_page_size_bytes: int
    sliding_window: int = 0
    extra_retained_tokens: int = 0
    attention_chunk_size: int = 0
    mamba_cache_mode: str = "none"


@dataclass(frozen=True)
class UniformTypeKVCacheSpecs:
    """Of a group whose layers' pages differ in size."""

    block_size: int
    kv_cache_specs: dict[str, Spec]


@dataclass
class KVCacheGroupSpec:
    """Layers with one block table."""

    layer_names: list[str]
    kv_cache_spec: Any


@dataclass
class KVCacheConfig:
    """The KV cache of an engine."""

    num_blocks: int
    kv_cache_groups: list[KVCacheGroupSpec]
    kv_tp_replicas: int = 1
    hisparse_host_num_blocks: int | None = None

    @property
    def prefix_cacheable_group_ids(self) -> tuple[int, ...]:
        """Of those that may be stored."""
        return tuple(range(len(self.kv_cache_groups)))


def iter_layer_specs(kv_cache_spec: Any) -> Iterable[Any]:
    """The specs of a group's layers."""
    if isinstance(kv_cache_spec, UniformTypeKVCacheSpecs):
        return kv_cache_spec.kv_cache_specs.values()
    return (kv_cache_spec,)


def get_kv_cache_spec_kind(kv_cache_spec: Any) -> KVCacheSpecKind:
    """The kind of a group."""
    kinds = {spec.kind for spec in iter_layer_specs(kv_cache_spec)}
    return next(iter(kinds)) if len(kinds) == 1 else KVCacheSpecKind.UNKNOWN


def resolve_kv_cache_block_sizes(
    kv_cache_config: KVCacheConfig, vllm_config: Any
) -> tuple[int, int]:
    """Tokens that fit into pages of all groups, and tokens of a hash."""
    sizes = [group.kv_cache_spec.block_size for group in kv_cache_config.kv_cache_groups]
    return math.lcm(*sizes), math.gcd(*sizes)


def get_current_attn_backends(
    vllm_config: Any, layer_names: list[str] | None = None
) -> list[type[Any]]:
    """The kernels of some layers."""
    return [object]


_V1 = "vllm.distributed.kv_transfer.kv_connector.v1"
_MODULES: dict[str, dict[str, Any]] = {
    "vllm": {"__version__": VERSION},
    "vllm.distributed.kv_transfer.kv_connector.factory": {"KVConnectorFactory": KVConnectorFactory},
    "vllm.distributed.kv_transfer.kv_connector.utils": {
        "get_current_attn_backends": get_current_attn_backends
    },
    _V1: {
        "KVConnectorBase_V1": KVConnectorBase_V1,
        "KVConnectorRole": KVConnectorRole,
        "SupportsHMA": SupportsHMA,
    },
    f"{_V1}.base": {
        "KVConnectorHandshakeMetadata": KVConnectorHandshakeMetadata,
        "KVConnectorMetadata": KVConnectorMetadata,
        "KVConnectorTransferResults": KVConnectorTransferResults,
        "KVConnectorWorkerMetadata": KVConnectorWorkerMetadata,
    },
    f"{_V1}.metrics": {
        "KVConnectorPromMetrics": KVConnectorPromMetrics,
        "KVConnectorStats": KVConnectorStats,
    },
    "vllm.platforms": {
        "current_platform": SimpleNamespace(
            device_name="cpu", get_cpu_architecture=lambda: SimpleNamespace(name="X86")
        )
    },
    "vllm.v1.core.kv_cache_utils": {"resolve_kv_cache_block_sizes": resolve_kv_cache_block_sizes},
    "vllm.v1.kv_cache_interface": {
        "KVCacheSpecKind": KVCacheSpecKind,
        "UniformTypeKVCacheSpecs": UniformTypeKVCacheSpecs,
        "get_kv_cache_spec_kind": get_kv_cache_spec_kind,
        "iter_layer_specs": iter_layer_specs,
    },
    "vllm.v1.metrics.cache_hit_source": {"CacheHitSource": CacheHitSource},
}
"""All that the connector imports of vLLM."""

MODULES = _MODULES


@contextmanager
def standing_in() -> Iterator[None]:
    """`import vllm` finds these meanwhile, and the connector is imported anew over them."""
    with imported_over(_MODULES, "vllm", _OURS):
        yield


Hook = Callable[..., Any]
