"""`KVStoreConnector`: the hooks that vLLM calls, each kept from raising into the engine.

vLLM makes one for its scheduler and one for each worker; each has the side of its role.
"""

import atexit
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import vllm
from vllm.distributed.kv_transfer.kv_connector.v1 import (
    KVConnectorBase_V1,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from kvstore_client.vllm.guard import guarded, tell
from kvstore_client.vllm.layout import layout_of
from kvstore_client.vllm.metadata import Handshake, StepMessage, WorkerReport
from kvstore_client.vllm.options import ConnectorOptions
from kvstore_client.vllm.requirements import check_engine
from kvstore_client.vllm.scheduler_side import SchedulerSide
from kvstore_client.vllm.stats import ConnectorMetrics, ConnectorStats, Tally
from kvstore_client.vllm.worker_side import WorkerSide

WHERE = "kv_connector_extra_config"
BLOCK_CONTIGUOUS = "BLHNC"
"""The layout in which a block of all layers is one run of memory, so one copy on a GPU."""


class KVStoreConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """Keeps the KV cache of prefixes in kvstore and restores it.

    Raises ValueError, saying what to write, for a configuration that cannot be served; once it
    is made it raises no more.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self.tally = Tally()
        check_engine(vllm.__version__, vllm_config, kv_cache_config)
        values = vllm_config.kv_transfer_config.kv_connector_extra_config
        options = ConnectorOptions.read(values, WHERE)
        layout = layout_of(vllm_config, kv_cache_config)
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        self._message = StepMessage()
        if role is KVConnectorRole.SCHEDULER:
            self._scheduler = SchedulerSide(
                vllm_config, kv_cache_config, layout, options, self.tally
            )
        else:
            self._worker = WorkerSide(vllm_config, kv_cache_config, layout, options, self.tally)
        atexit.register(self.shutdown)

    @property
    def requires_kv_delivery(self) -> bool:
        """A cache may forget."""
        return False

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: Any) -> str | None:
        """One run of memory for each block, where there is a GPU to profit."""
        return BLOCK_CONTIGUOUS if vllm_config.device_config.device_type == "cuda" else None

    # In the scheduler's process.

    def set_xfer_handshake_metadata(self, metadata: Mapping[int, Handshake]) -> None:
        """Takes what the workers know of their KV caches. Raises ValueError, as the engine
        starts, if they differ or the weights have no name."""
        if self._scheduler is not None:
            self._scheduler.shake_hands(metadata)

    @guarded()
    def on_new_request(self, request: Any) -> None:
        """A request has come."""
        if self._scheduler is not None:
            self._scheduler.new_request(request)

    @guarded(lambda: (0, False))
    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """How much can be loaded beyond what is computed; None: ask again in the next step."""
        if self._scheduler is None:
            return 0, False
        return self._scheduler.matched(request, num_computed_tokens)

    @guarded()
    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """The request has pages."""
        if self._scheduler is not None:
            tables = blocks.get_block_ids() if num_external_tokens else ()
            self._scheduler.allocated(request, tables, num_external_tokens)

    @guarded(dict)
    def get_external_cache_hit_sources(
        self, request: Any, num_external_tokens: int
    ) -> dict[CacheHitSource, int]:
        """Where the tokens lay that are being loaded."""
        if self._scheduler is None:
            return {}
        return self._scheduler.sources(request, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> StepMessage:
        """What the workers do with this step."""
        if self._scheduler is None:
            return StepMessage()
        message = self._scheduler.loads_of_step()
        try:
            self._scheduler.fill(message, scheduler_output)
        except Exception:  # noqa: BLE001
            # The loads go out whatever becomes of the saves: the engine waits for them.
            message.saves.clear()
            tell(self.tally, "build_connector_meta")
        return message

    @guarded()
    def update_connector_output(self, connector_output: Any) -> None:
        """What has ended with a step."""
        if self._scheduler is None:
            return
        spoiled = self._scheduler.step_ended(connector_output)
        if spoiled and self._kv_cache_manager is not None:
            # vLLM leaves them there, for the request that computes them again in its own time.
            self._kv_cache_manager.evict_blocks(spoiled)

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """A request has ended; its pages are the engine's at once, for all is copied out."""
        self._finished(request)
        return False, None

    def request_finished(
        self, request: Any, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """The same, where the engine has one group."""
        self._finished(request)
        return False, None

    @guarded()
    def _finished(self, request: Any) -> None:
        if self._scheduler is not None:
            self._scheduler.finished(request)

    # In the workers' processes.

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Takes the allocated KV cache. Raises ValueError if its pages cannot be copied."""
        if self._worker is not None:
            self._worker.register(kv_caches)

    def get_handshake_metadata(self) -> Handshake | None:
        """What the scheduler's side has to know of this KV cache."""
        return self._worker.handshake if self._worker is not None else None

    @guarded()
    def handle_preemptions(self, kv_connector_metadata: StepMessage) -> None:
        """A step begins: from here on pages are written again."""
        if self._worker is not None:
            self._worker.before_step()

    def bind_connector_metadata(self, connector_metadata: StepMessage) -> None:
        """The message of this step."""
        super().bind_connector_metadata(connector_metadata)
        self._message = connector_metadata

    @guarded()
    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Begins this step's loads."""
        if self._worker is not None:
            self._worker.start_loads(self._message)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads are whole before their request is scheduled, or before the step."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """All layers are saved at once, when the step has run."""

    @guarded()
    def wait_for_save(self) -> None:
        """Copies out what this step has completed."""
        if self._worker is not None:
            self._worker.save(self._message)

    @guarded(KVConnectorTransferResults)
    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """Loads that have ended, each once."""
        if self._worker is None:
            return KVConnectorTransferResults()
        return self._worker.results(idle=self._message.idle)

    @guarded(set)
    def get_block_ids_with_load_errors(self) -> set[int]:
        """Pages that were not loaded; only where there is one group to name them in."""
        return self._worker.bad_pages() if self._worker is not None else set()

    @guarded()
    def build_connector_worker_meta(self) -> WorkerReport | None:
        """What the scheduler's side learns from this step."""
        return self._worker.report() if self._worker is not None else None

    # In both.

    @guarded()
    def get_kv_connector_stats(self) -> ConnectorStats | None:
        """What was counted since the last time."""
        side = self._worker or self._scheduler
        return side.stats() if side is not None else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> ConnectorStats:
        """Counts that have travelled as plain data."""
        return ConnectorStats(data=dict(data or {}))

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> ConnectorMetrics:
        """The counters at vLLM's Prometheus endpoint."""
        return ConnectorMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    @guarded(lambda: False)
    def reset_cache(self) -> bool:
        """Nothing that was stored before is loaded from now on."""
        if self._scheduler is not None:
            self._scheduler.reset()
        return True

    def take_events(self) -> Iterable[Any]:
        """None: vLLM's own events tell of the blocks that come to lie in its cache."""
        return ()

    @guarded()
    def shutdown(self) -> None:
        """Stores what is still waiting, within its budget, and ends. Idempotent."""
        atexit.unregister(self.shutdown)
        for side in (self._worker, self._scheduler):
            if side is not None:
                side.close()
