"""What the tier tells Prometheus at vLLM's own endpoint, beside what vLLM says of any tier."""

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import (
    OffloadingConnectorStats,
)
from vllm.v1.kv_offload.base import OffloadingCounterMetadata, OffloadingMetricMetadata


class Figure(NamedTuple):
    """A counter and what its label distinguishes."""

    name: str
    label: str
    documentation: str


LOADED = Figure(
    "vllm:kvstore_tier_loaded_chunks",
    "source",
    "Chunks that were loaded and verified, by the tier of the node that had them.",
)
STORED = Figure(
    "vllm:kvstore_tier_stored_chunks",
    "outcome",
    "Chunks that were offered to the node: held, failed, or refused because too much waited.",
)
LOOKUPS = Figure(
    "vllm:kvstore_tier_lookups",
    "outcome",
    "Questions to the node: asked, late because others took too long, or failed.",
)
LOSSES = Figure(
    "vllm:kvstore_tier_losses",
    "reason",
    "What was lost without an error, by the names of the client's counters.",
)
ERRORS = Figure(
    "vllm:kvstore_tier_errors",
    "hook",
    "Exceptions that were kept from the engine: each is a bug, please report it.",
)
FIGURES = (LOADED, STORED, LOOKUPS, LOSSES, ERRORS)


def definitions() -> dict[str, OffloadingMetricMetadata]:
    """The metrics as vLLM declares them."""
    return {
        figure.name: OffloadingCounterMetadata(
            documentation=figure.documentation, labelnames=(figure.label,)
        )
        for figure in FIGURES
    }


class Figures:
    """Counters that only grow, told to vLLM as what came since it last asked."""

    def __init__(self, counters: Mapping[Figure, "Counter[str]"]) -> None:
        self._counters = counters
        self._told: dict[Figure, dict[str, int]] = {figure: {} for figure in counters}

    def take(self) -> OffloadingConnectorStats | None:
        """What came since the last time; None if nothing did."""
        stats = OffloadingConnectorStats()
        for figure, counter in self._counters.items():
            told, now = self._told[figure], dict(counter)
            for label, count in now.items():
                if count > told.get(label, 0):
                    stats.increase_counter(figure.name, count - told.get(label, 0), (label,))
            self._told[figure] = now
        return None if stats.is_empty() else stats
