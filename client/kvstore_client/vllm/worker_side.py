"""The worker's side of the connector: one in each worker process, with one rank's KV cache."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults
from vllm.v1.kv_cache_interface import UniformTypeKVCacheSpecs

from kvstore.api.clock import Clock, SystemClock
from kvstore.api.space import SpaceDescriptor
from kvstore_client.engine.background import in_background
from kvstore_client.space import Space
from kvstore_client.vllm.kernels import describe_kernels
from kvstore_client.vllm.layout import Group, Layout
from kvstore_client.vllm.loads import LoadResults, Loads
from kvstore_client.vllm.metadata import Handshake, Load, StepMessage, WorkerReport
from kvstore_client.vllm.options import ConnectorOptions
from kvstore_client.vllm.pages import GroupPages, page_views
from kvstore_client.vllm.saves import Saves
from kvstore_client.vllm.spaces import of_rank
from kvstore_client.vllm.stats import ConnectorStats, LossCount, Tally

IDLE_WAIT_S = 0.001
"""In a step without tokens the engine would turn round at once; the threads here can use it."""


class WorkerSide:
    """Does what the scheduler's side decided. Called by the engine's thread alone."""

    def __init__(
        self,
        vllm_config: Any,
        kv_cache_config: Any,
        layout: Layout,
        options: ConnectorOptions,
        tally: Tally,
        clock: Clock | None = None,
    ) -> None:
        self._vllm_config = vllm_config
        self._kv_cache_config = kv_cache_config
        self._layout = layout
        self._options = options
        self._tally = tally
        self._clock = clock or SystemClock()
        parallel = vllm_config.parallel_config
        replicas = max(1, kv_cache_config.kv_tp_replicas)
        self._rank = (parallel.rank % parallel.tensor_parallel_size) // replicas
        self._writes = parallel.rank % replicas == 0
        self._client = options.connect()
        # The first load shall meet an open channel.
        in_background(self._client.health)
        self._handshake: Handshake | None = None
        self._loads: Loads | None = None
        self._saves: Saves | None = None
        self._spaces: dict[tuple[SpaceDescriptor, ...], list[Space]] = {}
        self._results = LoadResults()
        self._losses = LossCount(self._client.counters, tally)

    @property
    def handshake(self) -> Handshake | None:
        """What the scheduler's side has to know of this KV cache; None before it is allocated."""
        return self._handshake

    def register(self, kv_caches: Mapping[str, torch.Tensor]) -> None:
        """Takes the allocated KV cache. Raises ValueError if its pages cannot be copied."""
        groups = [self._group_pages(group, kv_caches) for group in self._layout.groups]
        saves = Saves(self._client, groups, self._options, self._clock, self._tally)
        self._loads = Loads(
            self._client,
            groups,
            self._options,
            self._clock,
            self._tally,
            single=self._layout.single,
            on_loaded=saves.known,
        )
        self._saves = saves
        names = [layer for group in self._layout.groups for layer in group.layers]
        self._handshake = Handshake(
            tuple(
                group.pages * pages.page_bytes
                for group, pages in zip(self._layout.groups, groups, strict=True)
            ),
            describe_kernels(self._vllm_config, names, groups[0].device),
        )

    def before_step(self) -> None:
        """Blocks may be written again from here on: the copies of the last step come first."""
        if self._saves is not None:
            self._saves.fence()

    def start_loads(self, message: StepMessage) -> None:
        """Begins this step's loads, or makes them at once."""
        for number, load in enumerate(message.loads):
            try:
                self._start_load(load, message)
            except Exception:
                for lost in message.loads[number:]:
                    self.lose(lost)
                raise

    def lose(self, load: Load) -> None:
        """Reports a load as failed that was never begun."""
        if self._loads is not None:
            self._loads.fail(load)

    def save(self, message: StepMessage) -> None:
        """Saves what this step has completed, unless another rank does."""
        if self._saves is None or not self._writes or not message.saves:
            return
        self._saves.save(message.saves, self._spaces_of(message))
        if self._vllm_config.use_v2_model_runner:
            # That runner may zero and copy pages before it announces the next step.
            self._saves.fence()

    def results(self, *, idle: bool) -> KVConnectorTransferResults:
        """Loads that have ended, each once."""
        if self._loads is not None:
            taken = self._loads.take(IDLE_WAIT_S if idle else 0.0)
            self._results.finished |= taken.finished
            self._results.failed |= taken.failed
            self._results.bad_pages |= taken.bad_pages
            self._results.times += taken.times
        finished, failed = self._results.finished, self._results.failed
        self._results.finished, self._results.failed = set(), set()
        return KVConnectorTransferResults(finished_recving=finished, failed_recving=failed)

    def bad_pages(self) -> set[int]:
        """Pages of loads that ended by now and were not loaded, each once."""
        bad, self._results.bad_pages = self._results.bad_pages, set()
        return bad

    def report(self) -> WorkerReport | None:
        """What the scheduler's side learns from this step."""
        times, self._results.times = self._results.times, []
        return WorkerReport(times) if times and self._rank == 0 and self._writes else None

    def stats(self) -> ConnectorStats | None:
        """What was counted since the last time; None if nothing was."""
        if "space_reopened" in self._losses.update() and self._saves is not None:
            self._saves.forget()  # The node has started anew.
        counts = self._tally.take()
        return ConnectorStats(data=counts) if counts else None

    def close(self) -> None:
        """Stores what is still waiting, within its budget, and ends. Idempotent."""
        if self._loads is not None:
            self._loads.close()
        if self._saves is not None:
            self._saves.close(self._options.drain_timeout_s)
        self._client.close()

    def _start_load(self, load: Load, message: StepMessage) -> None:
        if self._loads is None or not load.runs:
            self.lose(load)
            return
        spaces = self._spaces_of(message)
        if load.beside:
            self._loads.begin(load, spaces)
        else:
            self._loads.run(load, spaces)

    def _spaces_of(self, message: StepMessage) -> Sequence[Space]:
        spaces = self._spaces.get(message.spaces)
        if spaces is None:
            spaces = [Space.of(of_rank(space, self._rank)) for space in message.spaces]
            self._spaces = {message.spaces: spaces}
        return spaces

    def _group_pages(self, group: Group, kv_caches: Mapping[str, torch.Tensor]) -> GroupPages:
        spec = self._kv_cache_config.kv_cache_groups[group.group_id].kv_cache_spec
        by_layer = spec.kv_cache_specs if isinstance(spec, UniformTypeKVCacheSpecs) else {}
        count = self._kv_cache_config.num_blocks
        return GroupPages(
            [
                page_views(kv_caches[layer], count, by_layer.get(layer, spec).real_page_size_bytes)
                for layer in group.layers
            ]
        )
