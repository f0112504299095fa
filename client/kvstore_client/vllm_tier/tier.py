"""KVStoreTier: a node of kvstore below vLLM's primary tier."""

import logging
import queue
import time
from collections import Counter
from collections.abc import Iterable
from typing import Any, ClassVar

from vllm.v1.kv_offload.base import (
    Locality,
    LookupResult,
    Medium,
    OffloadingMetricMetadata,
    OffloadingSpec,
    OffloadPolicy,
    ReqContext,
    RequestOffloadingContext,
    ScheduleEndContext,
)
from vllm.v1.kv_offload.tiering.base import (
    BackpressureDetector,
    JobResult,
    SecondaryTierManager,
    TransferJob,
)
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from kvstore.api.clock import SystemClock
from kvstore_client.vllm_tier import figures
from kvstore_client.vllm_tier.adapters import Adapter
from kvstore_client.vllm_tier.asking import Asking
from kvstore_client.vllm_tier.engine import (
    check_engine,
    check_version,
    engine_of_callers,
    groups_of,
)
from kvstore_client.vllm_tier.groups import is_sound
from kvstore_client.vllm_tier.guard import harmless, tell
from kvstore_client.vllm_tier.jobs import Job, Lane, Outcome
from kvstore_client.vllm_tier.lookups import Lookups
from kvstore_client.vllm_tier.moving import Moving
from kvstore_client.vllm_tier.options import TierOptions
from kvstore_client.vllm_tier.requests import Request

LOADERS = 2
STORERS = 1
"""Parents are stored before their children."""
YIELD_S = 0.0002
"""So long other threads have the interpreter after a step for whose requests they work."""
SOURCES = {"memory": CacheHitSource.HOST, "disk": CacheHitSource.DISK}
"""What vLLM calls a tier of the node; any other is `EXTERNAL_UNSPECIFIED`."""

_log = logging.getLogger("kvstore.vllm_tier")


class KVStoreTier(SecondaryTierManager):
    """What vLLM's offloading keeps in host memory, in a store that is shared, bounded, checked
    and durable.

    All methods run in the scheduler's thread: they take and hand over, and other threads do what
    takes time. Only `drain_jobs` and `shutdown` wait, for as long as one call may take.
    """

    medium: ClassVar[Medium] = Medium.STORAGE

    def __init__(
        self,
        offloading_spec: OffloadingSpec,
        primary_kv_view: memoryview,
        tier_type: str,
        backpressure_detector: BackpressureDetector | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        check_version()
        options = TierOptions.read(settings, f"secondary_tiers[{tier_type}]")
        engine = engine_of_callers()
        check_engine(engine)
        self._needs_adapters = engine.settings.lora_config is not None
        self.locality = Locality(options.locality) if options.locality else None
        self._groups = groups_of(offloading_spec.config, engine, self.block_size_bytes, options)
        self._clock = SystemClock()
        self._rows = primary_kv_view.cast("B")
        self._client = options.connect()
        moving = Moving(self._client, self._groups, self._rows, options, self._clock)
        asking = Asking(self._client, self._groups, options)
        self._lookups = Lookups(
            asking.ask, self._client.release, self._clock, patience_s=options.match_budget_s
        )
        self._outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        self._loads = Lane(
            "kvstore-loads", moving.load, self._outcomes, self._clock,
            threads=LOADERS, max_waiting_chunks=len(primary_kv_view),
        )  # fmt: skip
        self._stores = Lane(
            "kvstore-stores", moving.store, self._outcomes, self._clock,
            threads=STORERS, max_waiting_chunks=options.max_saving_bytes // self.block_size_bytes,
        )  # fmt: skip
        self._requests: dict[str, Request] = {}
        self.errors: Counter[str] = Counter()
        """What hooks kept from the engine."""
        self._stored: Counter[str] = Counter()
        self._figures = figures.Figures(
            {
                figures.LOADED: moving.loaded,
                figures.STORED: self._stored,
                figures.LOOKUPS: self._lookups.counters,
                figures.LOSSES: self._client.counters,
                figures.ERRORS: self.errors,
            }
        )
        self._last_place = ""

    @property
    def cache_hit_source(self) -> CacheHitSource:
        """Where the chunk lay that `lookup` found last: vLLM asks right after it.

        One tier of vLLM, but several of the node.
        """
        return SOURCES.get(self._last_place, CacheHitSource.EXTERNAL_UNSPECIFIED)

    # Requests.

    @harmless(RequestOffloadingContext)
    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        """All chunks of a request are offered, also those that others offered before it.

        Without its parents a chunk is useless, and the node may have lost some since then. It is
        sent only what it lacks.
        """
        self._request(req_context)
        return RequestOffloadingContext(policy=OffloadPolicy.REQUEST_LEVEL)

    @harmless(lambda: None)
    def on_request_finished(self, req_context: ReqContext) -> None:
        """Lets go of what the request had leased."""
        request = self._requests.pop(req_context.req_id, None)
        if request is not None:
            self._lookups.forget(request)

    def _request(self, req_context: ReqContext) -> Request:
        request = self._requests.get(req_context.req_id)
        if request is None:
            request = self._requests[req_context.req_id] = Request(
                req_context._offload_key_positions, lambda: self._content(req_context)
            )
        return request

    def _content(self, req_context: ReqContext) -> bytes:
        if not self._needs_adapters:
            return b""
        adapter: Adapter | None = req_context.get_state(Adapter)
        if adapter is None:
            raise ValueError("a request of which nobody said whether it has an adapter")
        return adapter.content()

    # Lookups.

    @harmless(lambda: LookupResult.MISS)
    def lookup(self, key: bytes, req_context: ReqContext) -> LookupResult:
        """HIT, MISS, or RETRY as long as the node was not heard."""
        if not is_sound(key):
            return LookupResult.MISS
        place = self._lookups.place(self._request(req_context), key)
        if place is None:
            return LookupResult.RETRY
        self._last_place = place
        return LookupResult.HIT if place else LookupResult.MISS

    @harmless(lambda: None)
    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        """Puts the step's questions to the node."""
        for req_id in context.preempted_req_ids:
            if req_id in self._requests:
                self._lookups.renew(self._requests[req_id])
        self._lookups.flush()
        if self._lookups.open or any(request.loads for request in self._requests.values()):
            # A step without work spins, and keeps the interpreter from the threads it waits for.
            time.sleep(YIELD_S)

    # Transfers.

    def submit_store(self, job_metadata: TransferJob) -> None:
        """Offers chunks to the node, which says what it lacks."""
        self._submit(self._stores, job_metadata, is_load=False)

    def submit_load(self, job_metadata: TransferJob) -> None:
        """Fetches chunks into rows of the primary tier."""
        self._submit(self._loads, job_metadata, is_load=True)

    def _submit(self, lane: Lane, job: TransferJob, *, is_load: bool) -> None:
        request, keys = Request(job.req_context._offload_key_positions), list(job.keys)
        try:
            request = self._request(job.req_context)
            rows = [int(row) for row in job.chunk_ids]
            taken = Job(job.job_id, request, keys, rows, is_load, self._clock.monotonic_s())
            request.loads += is_load
            lane.submit(taken)
        except Exception:  # noqa: BLE001 - vLLM waits for a report on every job
            tell(self, "submit_load" if is_load else "submit_store")
            lost = Job(job.job_id, request, keys, [], is_load, self._clock.monotonic_s())
            self._outcomes.put(Outcome(lost, frozenset(), refused=True))

    def get_finished_jobs(self) -> Iterable[JobResult]:
        """What ended since the last time; what could not be loaded is a miss from now on."""
        results = []
        while not self._outcomes.empty():
            outcome = self._outcomes.get()
            if outcome.job.is_load:
                self._loaded(outcome)
            else:
                self._count_stored(outcome)
            results.append(
                JobResult(
                    job_id=outcome.job.number,
                    success=outcome.succeeded,
                    successful_keys=tuple(outcome.moved) or None,
                    transfer_time=outcome.seconds,
                    transfer_bytes=len(outcome.moved) * self.block_size_bytes,
                )
            )
        return results

    def _loaded(self, outcome: Outcome) -> None:
        request = outcome.job.request
        request.loads -= 1
        if not request.loads:
            self._lookups.release(request)
        failed = [key for key in outcome.job.keys if key not in outcome.moved]
        if failed:
            # Otherwise vLLM would try the same load for ever.
            self._lookups.miss([request, *self._requests.values()], failed)

    def _count_stored(self, outcome: Outcome) -> None:
        lost = len(outcome.job.keys) - len(outcome.moved)
        self._stored["held"] += len(outcome.moved)
        self._stored["refused" if outcome.refused else "failed"] += lost

    def drain_jobs(self) -> None:
        """Returns when nothing touches the primary tier; what had not begun has failed."""
        self._stores.drain()
        self._loads.drain()

    # The rest.

    @classmethod
    def build_metric_definitions(
        cls, extra_config: dict[str, Any]
    ) -> dict[str, OffloadingMetricMetadata]:
        """The tier's own metrics."""
        return figures.definitions()

    def get_stats(self) -> Any:
        """What was counted since the last time."""
        return self._figures.take()

    def shutdown(self) -> None:
        """Ends the threads, after what is under way, and lets go of the primary tier."""
        self._stores.close()
        self._loads.close()
        self._lookups.close()
        for request in self._requests.values():
            self._lookups.forget(request)
        self._requests.clear()
        self._client.close()
        self._rows.release()
