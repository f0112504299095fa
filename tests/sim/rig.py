"""Builds tiers over simulated seams; at the end it checks every one of them and closes it."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar

from redis.asyncio import Redis

from kvstore.api.tier import Tier
from kvstore.codec import CODECS, Codec
from kvstore.files import DirectoryFiles, Files
from kvstore.metrics import Metrics
from kvstore.policy.policies import make_policy
from kvstore.runner import Runner, ThreadRunner
from kvstore.tiers.disk import DiskTier
from kvstore.tiers.guarded import Guarded
from kvstore.tiers.measured import Measured
from kvstore.tiers.memory import Memory
from kvstore.tiers.redis import RedisTier
from kvstore.tiers.redis_wires import Wires
from kvstore.tiers.slabs import PAGE_BYTES
from kvstore.tiers.tiered import Tiered
from tests.sim.clock import ManualClock, settle
from tests.sim.files import SimulatedFiles
from tests.sim.runner import InlineRunner

SEGMENT_BYTES = 1 << 18
SYNC_AFTER_S = 30.0
RUNNER_CLOSE_S = 30.0
WIRES = 4


class Checked(Protocol):
    """What can recompute its own invariants."""

    def check(self) -> None:
        """AssertionError tells which one broke."""


C = TypeVar("C", bound=Checked)


class Rig:
    """Tiers for one test, over one clock, one runner and one set of metrics."""

    def __init__(self, runner: Runner | None = None) -> None:
        self.clock = ManualClock()
        self.runner: Runner = runner or InlineRunner()
        self.metrics = Metrics()
        self.sealed: list[tuple[int, int, int]] = []
        """What the disk tiers said to be on the device: segment, blocks, bytes."""
        self.when_sealed: Callable[[], None] = lambda: None
        self.checked: list[Checked] = []
        self._open: list[Tier] = []
        self._memories: list[Memory] = []
        self._closers: list[Callable[[], None]] = []
        self._runners: list[ThreadRunner] = []

    def memory(
        self, slots: int = 64, *, slot_bytes: int = 2 * PAGE_BYTES, policy_name: str = "lru"
    ) -> Memory:
        """Room for so many blocks of at most `slot_bytes`, in slabs of four."""
        slab_bytes = 4 * slot_bytes
        capacity_bytes = max(slots * slot_bytes, slab_bytes)
        policy = make_policy(policy_name, capacity_bytes)
        memory = Memory(capacity_bytes, slab_bytes, policy, self.clock)
        self._memories.append(memory)
        self._open.append(memory)
        return self.check(memory)

    async def disk(
        self,
        files: Files | None = None,
        *,
        codec: str | Codec = "raw",
        capacity_bytes: int = 16 * SEGMENT_BYTES,
        segment_bytes: int = SEGMENT_BYTES,
        sync_after_s: float = SYNC_AFTER_S,
        runner: Runner | None = None,
    ) -> DiskTier:
        """A disk tier, over simulated files unless others are given."""
        tier = await DiskTier.open(
            files if files is not None else SimulatedFiles(),
            CODECS[codec]() if isinstance(codec, str) else codec,
            runner or self.runner,
            self.clock,
            self.metrics,
            capacity_bytes=capacity_bytes,
            segment_bytes=segment_bytes,
            sync_after_s=sync_after_s,
            on_sealed=self._sealed,
        )
        self._open.append(tier)
        return self.check(tier)

    def redis(
        self,
        url: str,
        *,
        codec: str | Codec = "raw",
        capacity_bytes: int = 0,
        part_bytes: int = PAGE_BYTES,
        ttl_s: int = 600,
        timeout_s: float = 30.0,
        wired: bool = True,
        wires: Wires | None = None,
    ) -> RedisTier:
        """A tier over a real Redis: its bytes on wires, or through redis-py's pipelines."""
        if wired and wires is None:
            runner = ThreadRunner(WIRES)
            wires = Wires.from_url(url, runner, count=WIRES, timeout_s=timeout_s)
        tier = RedisTier(
            Redis.from_url(url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s),
            CODECS[codec]() if isinstance(codec, str) else codec,
            self.runner,
            self.clock,
            self.metrics,
            capacity_bytes=capacity_bytes,
            part_bytes=part_bytes,
            ttl_s=ttl_s,
            wires=wires,
        )
        self._open.append(tier)
        return tier

    def real_files(self, path: Path) -> DirectoryFiles:
        """A real directory, let go of at the end."""
        files = DirectoryFiles(path)
        self._closers.append(files.shut)
        return files

    def threads(self) -> ThreadRunner:
        """Real threads, ended at the end."""
        runner = ThreadRunner(2)
        self._runners.append(runner)
        return runner

    def guarded(self, inner: Tier, *, timeout_s: float = 30.0) -> Guarded:
        """As the server wraps its slower tiers, with deadlines that a busy machine can keep."""
        return Guarded(
            Measured(inner, self.clock, self.metrics),
            lookup_timeout_s=timeout_s,
            timeout_s=timeout_s,
            clock=self.clock,
            metrics=self.metrics,
        )

    def _sealed(self, segment_id: int, blocks: int, size_bytes: int) -> None:
        self.sealed.append((segment_id, blocks, size_bytes))
        self.when_sealed()

    def check(self, thing: C) -> C:
        """The thing itself, to be checked at the end."""
        self.checked.append(thing)
        return thing

    def gone(self, tier: Tier) -> None:
        """This tier was closed, or its process killed, by the test itself."""
        self._open = [each for each in self._open if each is not tier]
        self.checked = [each for each in self.checked if id(each) != id(tier)]
        self._memories = [each for each in self._memories if each is not tier]

    def counted(self, metric: str, **labels: str) -> float:
        """What a counter says now."""
        return self.metrics.registry.get_sample_value(f"kvstore_{metric}_total", labels) or 0.0

    def check_all(self) -> None:
        """Every invariant of every tier, and that nothing is pinned or reserved."""
        for thing in self.checked:
            thing.check()
        for memory in self._memories:
            assert_idle(memory)

    async def finish(self) -> None:
        """Checks everything and closes it."""
        try:
            self.check_all()
        finally:
            for tier in reversed(self._open):
                await tier.close()
            for runner in self._runners:
                await runner.close(RUNNER_CLOSE_S)
            for close in reversed(self._closers):
                close()


def assert_idle(memory: Memory) -> None:
    """Nobody holds a pin or a reserved slot of this memory."""
    pinned = [slot.ref for slot in memory.slots() if slot.pins]
    assert not pinned, f"{len(pinned)} slots are still pinned"
    taken = sum(-(-len(slot.view) // PAGE_BYTES) * PAGE_BYTES for slot in memory.slots())
    used = memory.usage()[0].used_bytes
    assert taken == used, f"{used - taken} bytes are reserved by nobody that is left"


async def quiet(tiered: Tiered) -> None:
    """Returns when the promotions that matches began are over, and all digests known."""
    await settle()
    await tiered.digests.close()
    while promoting := set(tiered._promoting.values()):
        await asyncio.wait(promoting)
        await settle()
    await settle()  # One may have ended just now: who gave up on it unpins after its end.


def leaves(tier: Any) -> Iterator[Any]:
    """The tiers at the ends of a composition, such as those of a running node."""
    if isinstance(tier, Memory | DiskTier | RedisTier):
        yield tier
        return
    for name in ("memory", "_slow", "_first", "_second", "_inner"):
        if getattr(tier, name, None) is not None:
            yield from leaves(getattr(tier, name))


def leaf(tier: Any, kind: type[C]) -> C:
    """The one leaf of a kind."""
    found = [each for each in leaves(tier) if isinstance(each, kind)]
    assert len(found) == 1
    return found[0]
