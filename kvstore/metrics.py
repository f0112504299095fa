"""Every metric of a node, declared once. Labels come from closed sets, never from tenants."""

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric
from prometheus_client.registry import Collector

from kvstore.api.tier import Usage

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)

_SHED_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1)


class Metrics:
    """The metrics of one node, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_Refresher(self))  # First, so that gauges are fresh when collected.
        self.requests = self._counter(
            "requests", "Calls answered, by operation and gRPC status.", "op", "status"
        )
        self.request_seconds = Histogram(
            "kvstore_request_seconds",
            "Time from a call's arrival to its last byte.",
            ["op"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.shed_calls = self._counter(
            "shed_calls", "Calls refused because the node had too much to do, by limit.", "reason"
        )
        self.shed_seconds = Histogram(
            "kvstore_shed_seconds",
            "Time from the arrival of a call that was shed to its refusal.",
            buckets=_SHED_SECONDS,
            registry=self.registry,
        )
        self.tier_operations = self._counter(
            "tier_operations",
            "Blocks asked of a tier, by result: hit or miss, held or refused.",
            "tier", "op", "result",
        )  # fmt: skip
        self.tier_seconds = Histogram(
            "kvstore_tier_seconds",
            "Time that one batch took in a tier.",
            ["tier", "op"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.tier_bytes = self._counter(
            "tier_bytes", "Bytes of blocks that a tier delivered or took.", "tier", "op"
        )
        self.tier_errors = self._counter(
            "tier_errors",
            "Batches that became misses: error, late, open or full.",
            "tier",
            "cause",
        )
        self.corrupt = self._counter(
            "corrupt", "Blocks dropped because their bytes were not as written.", "tier"
        )
        self.evicted_blocks = self._counter(
            "evicted_blocks", "Blocks that left memory: demoted, or dropped for good.", "fate"
        )
        self.promoted_blocks = self._counter(
            "promoted_blocks", "Blocks copied from a slower tier into memory.", "tier"
        )
        self.shared_blocks = self._counter(
            "shared_blocks", "Blocks of slower tiers served by a read that another had caused."
        )
        self.disk_orphans = self._counter(
            "disk_orphans", "Blocks that the disk refused because their parent is not on it."
        )
        self.disk_segments_dropped = self._counter(
            "disk_segments_dropped", "Segments deleted to make room."
        )
        self.disk_forwarded_bytes = self._counter(
            "disk_forwarded_bytes", "Bytes written again so that hot blocks outlive their segment."
        )
        self.codec_blocks = self._counter(
            "codec_blocks",
            "Blocks encoded for a tier, by the codec that was used.",
            "tier",
            "codec",
        )
        self.codec_in_bytes = self._counter(
            "codec_in_bytes", "Bytes of those blocks before.", "tier", "codec"
        )
        self.codec_out_bytes = self._counter(
            "codec_out_bytes", "Bytes of those blocks as stored.", "tier", "codec"
        )
        self.codec_kept_exact = self._counter(
            "codec_kept_exact", "Blocks stored without loss: they would miss the bound.", "tier"
        )
        self.codec_trials = self._counter(
            "codec_trials", "Blocks on which all lossless codecs were measured.", "tier"
        )
        self.codec_changes = self._counter(
            "codec_changes", "Spaces that went over to a codec.", "tier", "codec"
        )
        self.link_bytes_per_s = self._gauge(
            "link_bytes_per_second", "Speed of a tier's link as stored bytes moved lately.",
            "tier", "direction",
        )  # fmt: skip
        self.peer_misses = self._counter(
            "peer_misses",
            "Blocks that the directory named at another node and that have not come from there: "
            "gone, damaged, late, unreachable, busy, refused, or of an unknown space.",
            "cause",
        )
        self.peer_lent_blocks = self._counter("peer_lent_blocks", "Blocks sent to other nodes.")
        self.peer_announced_blocks = self._counter(
            "peer_announced_blocks", "Blocks that the directory was told of, for other nodes."
        )
        self.peer_withdrawn_blocks = self._counter(
            "peer_withdrawn_blocks", "Blocks that the directory was told have left."
        )
        self.peer_announce_dropped = self._counter(
            "peer_announce_dropped", "Blocks that the directory was not told of: too many, or down."
        )
        self.matched_blocks = self._counter("matched_blocks", "Blocks that Match found.")
        self.asked_blocks = self._counter("asked_blocks", "Blocks that Match was asked for.")
        self.hints = self._counter("hints", "Reuse hints received.", "reuse")
        self._usage: Callable[[], list[Usage]] = list
        self._lease_totals: Callable[[], tuple[int, int]] = lambda: (0, 0)
        self.tier_used_bytes = self._gauge("tier_used_bytes", "Bytes in use.", "tier")
        self.tier_capacity_bytes = self._gauge(
            "tier_capacity_bytes", "The limit; 0: not known here.", "tier"
        )
        self.tier_blocks = self._gauge("tier_blocks", "Blocks in the tier.", "tier")
        self.leases = self._gauge("leases", "Leases that hold now.")
        self.leased_bytes = self._gauge("leased_bytes", "Bytes of memory that leases keep.")
        self._pressure: Callable[[], tuple[int, int, int]] = lambda: (0, 0, 0)
        self.inflight_calls = self._gauge("inflight_calls", "Calls that were admitted and last.")
        self.inflight_bytes = self._gauge("inflight_bytes", "Bytes that those calls may hold.")
        self.waiting_calls = self._gauge("waiting_calls", "Calls that wait to be admitted.")

    def follow(
        self, usage: Callable[[], list[Usage]], lease_totals: Callable[[], tuple[int, int]]
    ) -> None:
        """From now on the gauges say what these say: tiers, and count and bytes of leases."""
        self._usage = usage
        self._lease_totals = lease_totals

    def follow_admission(self, pressure: Callable[[], tuple[int, int, int]]) -> None:
        """Likewise of calls: admitted ones, their bytes, and those that wait."""
        self._pressure = pressure

    def refresh(self) -> None:
        """Brings the gauges up to date."""
        for tier in self._usage():
            self.tier_used_bytes.labels(tier.tier).set(tier.used_bytes)
            self.tier_capacity_bytes.labels(tier.tier).set(tier.capacity_bytes)
            self.tier_blocks.labels(tier.tier).set(tier.blocks)
        leases, leased_bytes = self._lease_totals()
        self.leases.set(leases)
        self.leased_bytes.set(leased_bytes)
        calls, inflight_bytes, waiting = self._pressure()
        self.inflight_calls.set(calls)
        self.inflight_bytes.set(inflight_bytes)
        self.waiting_calls.set(waiting)

    def samples(self) -> dict[str, float]:
        """All counters and gauges by their exposed name and labels."""
        samples: dict[str, float] = {}
        for family in self.registry.collect():
            if family.type in ("counter", "gauge"):
                for sample in family.samples:
                    if not sample.name.endswith("_created"):
                        labels = ",".join(f'{k}="{v}"' for k, v in sample.labels.items())
                        name = f"{sample.name}{{{labels}}}" if labels else sample.name
                        samples[name] = sample.value
        return samples

    def _counter(self, name: str, meaning: str, *labels: str) -> Counter:
        return Counter(f"kvstore_{name}", meaning, labels, registry=self.registry)

    def _gauge(self, name: str, meaning: str, *labels: str) -> Gauge:
        return Gauge(f"kvstore_{name}", meaning, labels, registry=self.registry)


class _Refresher(Collector):
    """Brings gauges up to date whenever metrics are read."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterable[Metric]:
        self._metrics.refresh()
        return []
