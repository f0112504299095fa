"""What the scheduler's side tells the workers' with each step, and hears from them."""

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from kvstore.api.hint import ReuseHint
from kvstore.api.space import SpaceDescriptor

Pages = tuple[int, ...]
"""The pages of one block in its group's KV cache, in order; 0: there is none, nor need for it."""


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive blocks of a chain in the KV cache of one group."""

    group: int
    """Its place in `Layout.groups`."""
    keys: tuple[bytes, ...]
    pages: tuple[Pages, ...]
    parent_key: bytes = b""


@dataclass(frozen=True, slots=True)
class Load:
    """Blocks that a request waits for. Every worker reports it exactly once."""

    request_id: str
    runs: tuple[Run, ...]
    """None: this load has failed before it began."""
    lease_id: bytes = b""
    beside: bool = True
    """Whether the engine goes on meanwhile."""
    lost_pages: tuple[int, ...] = ()
    """Of a load without runs, within a step: what the request takes for loaded."""


@dataclass(frozen=True, slots=True)
class Save:
    """Blocks that are complete when this step has run."""

    runs: tuple[Run, ...]
    hint: ReuseHint | None = None


@dataclass(slots=True)
class StepMessage(KVConnectorMetadata):  # type: ignore[misc]
    """From the scheduler's side to each worker, with one step."""

    spaces: tuple[SpaceDescriptor, ...] = ()
    """One for each group, of the first rank; sent with every message that names blocks."""
    loads: list[Load] = field(default_factory=list)
    saves: list[Save] = field(default_factory=list)
    idle: bool = False
    """No tokens are computed in this step."""


@dataclass(frozen=True, slots=True)
class LoadTime:
    """One load that brought all its blocks: their tiers and the seconds it took."""

    tiers: tuple[str, ...]
    seconds: float


@dataclass(slots=True)
class WorkerReport(KVConnectorWorkerMetadata):  # type: ignore[misc]
    """From the workers to the scheduler's side, after one step."""

    load_times: list[LoadTime] = field(default_factory=list)

    def aggregate(self, other: "WorkerReport") -> "WorkerReport":
        """What both workers report."""
        self.load_times.extend(other.load_times)
        return self


@dataclass(frozen=True, slots=True)
class Handshake(KVConnectorHandshakeMetadata):  # type: ignore[misc]
    """What a worker knows of its KV cache once it is allocated, told to the scheduler's side."""

    block_bytes: tuple[int, ...]
    """Of one block in each group of `Layout.groups`."""
    layout: str
    """Order of the axes, platform and kernels that decide what bytes of a page mean."""
