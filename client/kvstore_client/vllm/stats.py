"""What the connector counts, for vLLM's log and its Prometheus endpoint."""

import threading
from collections import Counter
from dataclasses import dataclass
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)


@dataclass(frozen=True, slots=True)
class Metric:
    """A counter; `label` tells its parts apart, empty: there are none."""

    meaning: str
    label: str = ""


METRICS: dict[str, Metric] = {
    "matches": Metric("Questions to the node before a prefill, by what came of them", "result"),
    "match_seconds": Metric("Seconds that the node's answers took"),
    "matched_tokens": Metric("Tokens found and worth a load, by where they lay", "tier"),
    "gated_tokens": Metric("Tokens found and computed all the same, because that is faster"),
    "loads": Metric("Loads of requests on each worker, by what came of them", "result"),
    "load_seconds": Metric("Seconds that loads took"),
    "loaded_blocks": Metric("Blocks restored to the KV cache, by where they lay", "tier"),
    "loaded_bytes": Metric("Bytes restored to the KV cache, by where they lay", "tier"),
    "saved_blocks": Metric("Blocks that the node held after a save"),
    "saved_bytes": Metric("Bytes of those"),
    "unsaved_blocks": Metric("Blocks that were not saved, by why", "reason"),
    "losses": Metric("What the client lost without an exception, by its own names", "reason"),
    "errors": Metric("Exceptions that were kept from the engine, by the hook", "hook"),
}
"""By name, which Prometheus shows as `vllm:kvstore_<name>_total`."""

_BETWEEN = "|"


class Tally:
    """Counts from any thread, until they are taken."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()

    def add(self, name: str, amount: float = 1, label: str = "") -> None:
        """Adds to one counter of `METRICS`. Raises KeyError for any other."""
        if bool(METRICS[name].label) != bool(label):
            raise KeyError(f"{name}: label {label!r}")
        with self._lock:
            self._counts[f"{name}{_BETWEEN}{label}"] += amount  # type: ignore[assignment]

    def take(self) -> dict[str, float]:
        """What was counted since the last time."""
        with self._lock:
            counts, self._counts = self._counts, Counter()
        return dict(counts)


class LossCount:
    """Brings what a client has lost into a tally."""

    def __init__(self, losses: Counter[str], tally: Tally) -> None:
        self._losses = losses
        self._tally = tally
        self._seen: dict[str, int] = {}

    def update(self) -> list[str]:
        """Adds what was lost since the last time; the names of that."""
        losses = dict(self._losses)
        new = [name for name, count in losses.items() if count > self._seen.get(name, 0)]
        for name in new:
            self._tally.add("losses", losses[name] - self._seen.get(name, 0), name)
        self._seen = losses
        return new


class ConnectorStats(KVConnectorStats):  # type: ignore[misc]
    """Counts of an interval: `data` maps name and label to a sum."""

    def reset(self) -> None:
        """Back to nothing."""
        self.data: dict[str, float] = {}

    def aggregate(self, other: KVConnectorStats) -> "ConnectorStats":
        """This and the other one, added up here."""
        for name, amount in other.data.items():
            self.data[name] = self.data.get(name, 0) + amount
        return self

    def reduce(self) -> dict[str, int | float]:
        """Sums by readable names, for the log."""
        return {
            name.replace(_BETWEEN, " ").strip(): round(amount, 3)
            for name, amount in sorted(self.data.items())
        }

    def is_empty(self) -> bool:
        """Whether nothing was counted."""
        return not self.data


class ConnectorMetrics(KVConnectorPromMetrics):  # type: ignore[misc]
    """The counters of `METRICS` at vLLM's own endpoint, one for each engine."""

    def __init__(self, vllm_config: Any, metric_types: Any, labelnames: Any, values: Any) -> None:
        super().__init__(vllm_config, metric_types, labelnames, values)
        self._counters = {
            name: self._counter_cls(
                name=f"vllm:kvstore_{name}",
                documentation=metric.meaning + ".",
                labelnames=[*labelnames, *([metric.label] if metric.label else [])],
            )
            for name, metric in METRICS.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Adds an interval's counts."""
        engine = self.per_engine_labelvalues[engine_idx]
        for key, amount in transfer_stats_data.items():
            name, _, label = key.partition(_BETWEEN)
            if (counter := self._counters.get(name)) is not None:
                counter.labels(*engine, *([label] if label else [])).inc(amount)
