"""What KVStoreTier sees of vLLM 0.32: the types that cross its interface, and who calls it.

Thin, and faithful where the tier relies on it; `tests_engines/vllm/test_tier_contract.py` compares
the signatures and fields with those of the installed vLLM.
"""

import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum, StrEnum, auto
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple

import numpy as np

from tests.stand_ins.modules import imported_over

VERSION = "0.32.0"


class Medium(Enum):
    """Where a tier keeps things, as vLLM says it."""

    CPU = "CPU"
    STORAGE = "STORAGE"


class Locality(Enum):
    """How far away that is."""

    LOCAL = "LOCAL"
    REMOTE = "REMOTE"


class CacheHitSource(StrEnum):
    """Labels of vLLM's own metrics."""

    DEVICE = "device"
    HOST = "host"
    P2P = "p2p"
    DISK = "disk"
    EXTERNAL_UNSPECIFIED = "external_unspecified"


class LookupResult(Enum):
    """What a lookup answers."""

    MISS = auto()
    HIT = auto()
    HIT_PENDING = auto()
    RETRY = auto()


class OffloadPolicy(Enum):
    """Which chunks of a request are offered."""

    CHUNK_LEVEL = "chunk_level"
    REQUEST_LEVEL = "request_level"


@dataclass
class RequestOffloadingContext:
    """What a tier wants of a request."""

    policy: OffloadPolicy = OffloadPolicy.CHUNK_LEVEL


class ScheduleEndContext(NamedTuple):
    """What happened in a step."""

    new_req_ids: Collection[str]
    preempted_req_ids: Collection[str]


@dataclass
class ReqContext:
    """A request as tiers see it."""

    req_id: str
    kv_transfer_params: dict[str, Any] | None = None
    kv_hints: Any = None
    load_tier_filter: Any = None
    _state: dict[type, Any] = field(default_factory=dict, repr=False, init=False)
    _offload_key_positions: dict[bytes, int] = field(default_factory=dict, repr=False, init=False)

    def set_state(self, val: Any) -> None:
        """Keeps one value of its type."""
        self._state[type(val)] = val

    def get_state(self, cls: type) -> Any:
        """The value of a type."""
        return self._state.get(cls)

    def set_offload_key_position(self, key: bytes, end_token: int) -> None:
        """The scheduler names a chunk and where it ends."""
        self._offload_key_positions[key] = end_token

    def get_offload_key_position(self, key: bytes) -> int | None:
        """Where a chunk ends."""
        return self._offload_key_positions.get(key)


@dataclass(frozen=True)
class OffloadingMetricMetadata:
    """A metric as it is declared."""

    documentation: str
    labelnames: tuple[str, ...] = ()


@dataclass(frozen=True)
class OffloadingCounterMetadata(OffloadingMetricMetadata):
    """A counter."""


class OffloadingConnectorStats:
    """Counters on their way to Prometheus."""

    def __init__(self) -> None:
        self.counters: dict[tuple[str, tuple[str, ...]], float] = {}

    def is_empty(self) -> bool:
        """Whether nothing was counted."""
        return not self.counters

    def increase_counter(
        self,
        counter_name: str,
        counter_increase_value: float = 1,
        labelvalues: tuple[str, ...] = (),
    ) -> None:
        """Adds."""
        key = counter_name, labelvalues
        self.counters[key] = self.counters.get(key, 0) + counter_increase_value


@dataclass
class TransferJob:
    """What a tier shall move."""

    job_id: int
    keys: Collection[bytes]
    chunk_ids: np.ndarray[Any, Any]
    is_promotion: bool
    req_context: ReqContext
    submit_time: float = field(default_factory=time.monotonic)


@dataclass
class JobResult:
    """What became of it."""

    job_id: int
    success: bool
    successful_keys: Collection[bytes] | None = None
    transfer_time: float | None = None
    transfer_bytes: int | None = None


class BackpressureDetector:
    """Drops stores before a tier hears of them."""


class SecondaryTierManager:
    """The base of tiers, as far as they use it."""

    medium: ClassVar[Medium | None] = None
    cache_hit_source: ClassVar[CacheHitSource] = CacheHitSource.EXTERNAL_UNSPECIFIED

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "cache_hit_source" not in cls.__dict__ and cls.medium is not None:
            cls.cache_hit_source = CacheHitSource.DISK

    def __init__(
        self,
        offloading_spec: Any,
        primary_kv_view: memoryview,
        tier_type: str,
        backpressure_detector: BackpressureDetector | None = None,
    ) -> None:
        assert primary_kv_view.strides is not None
        self._offloading_spec = offloading_spec
        self._primary_kv_view = primary_kv_view
        self._block_size_bytes = primary_kv_view.strides[0]
        self.tier_type = tier_type
        self.locality: Locality | None = None
        self._bp_detector = backpressure_detector

    @property
    def block_size_bytes(self) -> int:
        """Bytes of a row."""
        return self._block_size_bytes


@dataclass(frozen=True)
class OffloadingGroupConfig:
    """One KV group."""

    tokens_per_block: int
    layer_names: tuple[str, ...]
    group_id: int


@dataclass(frozen=True)
class OffloadingModelConfig:
    """The model as offloading knows it."""

    name: str
    dtype: str


@dataclass(frozen=True)
class OffloadingCacheConfig:
    """What a chunk is."""

    tokens_per_hash: int
    blocks_per_chunk: int


@dataclass(frozen=True)
class OffloadingParallelConfig:
    """Over how many workers a chunk is spread."""

    rank: int = 0
    world_size: int = 1
    tp_size: int = 1
    pp_size: int = 1
    pcp_size: int = 1
    dcp_size: int = 1
    data_parallel_index: int = 0
    data_parallel_size: int = 1
    data_parallel_rank_local: int | None = None
    is_parallelism_agnostic: bool = False


@dataclass(frozen=True)
class OffloadingConfig:
    """What a tier is told of the engine."""

    groups: tuple[OffloadingGroupConfig, ...]
    worker_kv_bytes_per_block: int
    enable_kv_cache_events: bool
    extra_config: dict[str, Any]
    engine_id: str
    model: OffloadingModelConfig
    cache: OffloadingCacheConfig
    parallel: OffloadingParallelConfig
    replicated_layout: bool = False
    canonical_layout: bool = False
    kv_cache_layout: str | None = None


class KVCacheSpec:
    """Full attention."""


class MambaSpec(KVCacheSpec):
    """A recurrent state."""


@dataclass
class SlidingWindowSpec(KVCacheSpec):
    """A window of so many tokens."""

    sliding_window: int


def get_sliding_window_size_in_chunks(
    kv_cache_spec: KVCacheSpec, tokens_per_chunk: int
) -> int | None:
    """How many chunks before the end of a hit a group needs; None: all."""
    if isinstance(kv_cache_spec, SlidingWindowSpec):
        return -(-kv_cache_spec.sliding_window // tokens_per_chunk)
    return 1 if isinstance(kv_cache_spec, MambaSpec) else None


@dataclass
class KVCacheConfig:
    """The groups with what kind of layers they have."""

    kv_cache_groups: list[Any]


@dataclass
class VllmConfig:
    """The engine's settings, as far as a tier looks at them."""

    model_config: Any
    cache_config: Any
    lora_config: Any = None
    speculative_config: Any = None
    attention_config: Any = field(default_factory=lambda: SimpleNamespace(backend=None))


class OffloadingConnector:
    """The connector, as far as a subclass of it adds to it."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        self.scheduler = SimpleNamespace(_req_status={})

    def on_new_request(self, request: Any) -> None:
        """A request came: its context is made."""
        context = ReqContext(request.request_id)
        self.scheduler._req_status[request.request_id] = SimpleNamespace(req_context=context)


MODULES: dict[str, dict[str, Any]] = {
    "vllm": {},
    "vllm.version": {"__version__": VERSION, "__version_tuple__": (0, 32, 0)},
    "vllm.config": {"VllmConfig": VllmConfig},
    "vllm.platforms": {"current_platform": SimpleNamespace(device_type="cuda")},
    "vllm.v1.request": {"Request": object},
    "vllm.v1.kv_cache_interface": {
        "KVCacheConfig": KVCacheConfig,
        "KVCacheSpec": KVCacheSpec,
        "MambaSpec": MambaSpec,
    },
    "vllm.v1.kv_offload.config": {"OffloadingConfig": OffloadingConfig},
    "vllm.v1.kv_offload.base": {
        "Locality": Locality,
        "LookupResult": LookupResult,
        "Medium": Medium,
        "OffloadingCounterMetadata": OffloadingCounterMetadata,
        "OffloadingMetricMetadata": OffloadingMetricMetadata,
        "OffloadingSpec": object,
        "OffloadPolicy": OffloadPolicy,
        "ReqContext": ReqContext,
        "RequestOffloadingContext": RequestOffloadingContext,
        "ScheduleEndContext": ScheduleEndContext,
    },
    "vllm.v1.kv_offload.tiering.base": {
        "BackpressureDetector": BackpressureDetector,
        "JobResult": JobResult,
        "SecondaryTierManager": SecondaryTierManager,
        "TransferJob": TransferJob,
    },
    "vllm.v1.metrics.cache_hit_source": {"CacheHitSource": CacheHitSource},
    "vllm.distributed.kv_transfer.kv_connector.v1": {"KVConnectorRole": object},
    "vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector": {
        "OffloadingConnector": OffloadingConnector
    },
    "vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler": {
        "get_sliding_window_size_in_chunks": get_sliding_window_size_in_chunks
    },
    "vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics": {
        "OffloadingConnectorStats": OffloadingConnectorStats
    },
}
_OURS = "kvstore_client.vllm_tier"


@contextmanager
def standing_in() -> Iterator[None]:
    """`import vllm` finds these meanwhile, and the tier is imported anew over them."""
    with imported_over(MODULES, "vllm", _OURS):
        yield


@dataclass
class Primary:
    """The primary tier and its manager, as far as a secondary tier feels them.

    A row that a load fills is not ready, and nobody reads it, until the load was reported; after a
    failure it is freed. Each job has to be reported once.
    """

    rows: np.ndarray[Any, Any]
    jobs: dict[int, TransferJob] = field(default_factory=dict)
    results: dict[int, JobResult] = field(default_factory=dict)
    ready: dict[bytes, int] = field(default_factory=dict)
    numbers: Iterator[int] = field(default_factory=lambda: iter(range(1 << 30)))

    @property
    def view(self) -> memoryview:
        """As a tier is given it: two dimensions, signed bytes."""
        return memoryview(self.rows)  # type: ignore[arg-type]

    def job(
        self, context: ReqContext, rows: dict[bytes, int], *, is_promotion: bool
    ) -> TransferJob:
        """A job that the manager knows of."""
        chunk_ids = np.array(list(rows.values()), dtype=np.int32)
        job = TransferJob(next(self.numbers), set(rows), chunk_ids, is_promotion, context)
        # The rows stand in the order in which the keys are iterated over.
        job.chunk_ids = np.array([rows[key] for key in job.keys], dtype=np.int32)
        self.jobs[job.job_id] = job
        return job

    def poll(self, tier: Any) -> list[JobResult]:
        """What the manager does with finished jobs."""
        results: Iterable[JobResult] = tier.get_finished_jobs()
        taken = []
        for result in results:
            job = self.jobs.pop(result.job_id)  # Unknown, or twice: KeyError.
            keys = job.keys if result.success else result.successful_keys or ()
            assert set(job.keys) >= set(keys)
            if job.is_promotion:
                row_of = dict(zip(job.keys, job.chunk_ids, strict=True))
                self.ready.update((key, int(row_of[key])) for key in keys)
            self.results[result.job_id] = result
            taken.append(result)
        return taken
