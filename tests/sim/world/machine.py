"""One host: its disk, its clocks, and the node process that runs on it, or does not."""

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, cast

from redis.asyncio import Redis

from kvstore.api.errors import KvstoreError
from kvstore.api.tier import Tier
from kvstore.attachment import Attachment, Room
from kvstore.codec import CODECS
from kvstore.events import Events, SegmentSealed
from kvstore.leases import LeaseTable
from kvstore.metrics import Metrics
from kvstore.node import Node
from kvstore.policy.policies import make_policy
from kvstore.tiers.beside import Beside
from kvstore.tiers.disk import DiskTier
from kvstore.tiers.guarded import Guarded
from kvstore.tiers.measured import Measured
from kvstore.tiers.memory import Memory
from kvstore.tiers.redis import RedisTier
from kvstore.tiers.tiered import Tiered
from tests.sim.clock import settle
from tests.sim.files import SimulatedFiles
from tests.sim.world.ledger import Ledger
from tests.sim.world.loop import Process, SimulatedClock
from tests.sim.world.redis import RedisClient, RedisServer
from tests.sim.world.runner import SeededRunner
from tests.sim.world.trace import Broken, Trace
from tests.sim.world.universe import SECRET, SPACES
from tests.sim.world.witness import Witness

LOOKUP_S = 0.05
BATCH_S = 0.4
MAX_LEASE_S = 8.0
SLAB_BYTES = 4 * 8192
STOP_ROUNDS = 200
DRAIN_S = 0.5
FLUSH_S = 1.0
CLOSE_S = 60.0


@dataclass(frozen=True, slots=True)
class Limits:
    """What an operator may set differently at each start."""

    memory_bytes: int
    disk_bytes: int
    segment_bytes: int
    sync_after_s: float
    redis: bool
    ttl_s: int
    part_bytes: int
    redis_bytes: int
    policy: str
    codec: str


@dataclass(eq=False)
class Running:
    """A node process while it runs: the parts of the composition, for whoever checks them."""

    process: Process
    node: Node
    memory: Memory
    disk: DiskTier
    guards: list[Guarded]
    runner: SeededRunner
    limits: Limits
    room: Room
    """What clients that have mapped the arena may hold of it."""
    calls: set[asyncio.Task[Any]] = field(default_factory=set)
    """The calls that it is answering."""
    attached: dict[str, Attachment] = field(default_factory=dict)
    """Those clients, by name."""
    attached_calls: dict[str, set[asyncio.Task[Any]]] = field(default_factory=dict)
    """And what it is doing for each."""

    def serving(self) -> bool:
        """Whether no breaker is open."""
        return all(guard.serving for guard in self.guards)


class Machine:
    """A host. `running` is its node, None while that is down."""

    def __init__(
        self, name: str, rng: random.Random, redis: RedisServer, trace: Trace, limits: Limits
    ) -> None:
        self.name = name
        self.limits = limits
        self.files = SimulatedFiles()
        self.clock = SimulatedClock(asyncio.get_running_loop())
        self.running: Running | None = None
        self.starts = 0
        self.failed_starts = 0
        self.ledger = Ledger(self.files)
        self.when_ended: Callable[[Running], None] = lambda running: None
        self._rng = rng
        self._redis = redis
        self._trace = trace

    async def start(self, **changes: Any) -> bool:
        """Starts the node, maybe with other limits; False if its disk does not let it."""
        assert self.running is None
        before, self.limits = self.limits, replace(self.limits, **changes)
        self.ledger.excused |= self.files.fault is not None
        self.starts += 1
        process = Process(f"{self.name}.{self.starts}")
        before_bytes = self.files.peak_bytes = self.files.total_bytes
        try:
            self.running = await process.spawn(self._build(process))
        except (KvstoreError, OSError) as error:
            self.failed_starts += 1
            self._trace.say(f"{process.name} does not start: {error}")
            await self._end(process)
            return False
        less_room = self.limits.disk_bytes < before.disk_bytes
        # With less room than before, the footers that a start adds may be too much for a moment.
        if not less_room and before_bytes <= self.limits.disk_bytes < self.files.peak_bytes:
            raise Broken(f"{process.name}: {self.files.peak_bytes} bytes on disk as it started")
        self.files.peak_bytes = self.files.total_bytes
        self._trace.say(f"{process.name} starts with {self.limits}")
        self.ledger.opened(self.running, less_room=less_room)
        return True

    async def stop(self) -> None:
        """A clean end: drained, flushed, closed."""
        running = self.running
        assert running is not None
        running.node.draining = True
        if running.calls:
            await asyncio.wait(running.calls, timeout=DRAIN_S)
        for call in list(running.calls):
            call.cancel()
        await settle()
        await running.process.spawn(
            running.node.close(flush_timeout_s=FLUSH_S, close_timeout_s=CLOSE_S)
        )
        await settle()
        self.running = None
        self.ledger.ended(running, power=False, cleanly=True)
        left = [str(task.get_coro()) for task in running.process.tasks]
        if left or self.files.open_handles:
            raise Broken(f"{self.files.open_handles} files are open and these run: {left}")
        await self._end(running.process)
        self.when_ended(running)
        self._trace.say(f"{running.process.name} stopped")

    async def kill(self) -> None:
        """SIGKILL: memory is gone, files are as they were written."""
        await self._die(power=False)

    async def cut_power(self, rng: random.Random | None) -> None:
        """The machine goes down: of what was not synced, anything may be lost."""
        await self._die(power=True)
        self.files.crash(rng)

    async def _die(self, *, power: bool) -> None:
        running, self.running = self.running, None
        assert running is not None
        self.ledger.ended(running, power=power)
        await self._end(running.process)
        await running.memory.close()
        self.when_ended(running)
        self._trace.say(f"{running.process.name} is dead")

    async def _end(self, process: Process) -> None:
        """Nothing that the process still had in hand has any effect from here on."""
        process.alive = False
        self.files.turn_off()
        for _ in range(STOP_ROUNDS):
            tasks = process.tasks
            if not tasks:
                break
            for task in tasks:
                task.cancel()
            await asyncio.sleep(0)
        else:
            raise Broken(f"tasks of {process.name} do not end: {process.tasks[:3]}")
        self.files.restart()

    async def _build(self, process: Process) -> Running:
        """The composition of `kvstore.server`, over the twins of its seams."""
        limits, metrics, events = self.limits, Metrics(), Events()
        runner = SeededRunner(self._rng, process)

        def on_sealed(*sealed: int) -> None:
            events.publish(SegmentSealed(*sealed))
            self.ledger.sealed(self.running, sealed[0])

        disk = await DiskTier.open(
            self.files, CODECS[limits.codec](), runner, self.clock, metrics,
            capacity_bytes=limits.disk_bytes, segment_bytes=limits.segment_bytes,
            sync_after_s=limits.sync_after_s, on_sealed=on_sealed,
        )  # fmt: skip
        guards = [self._guarded(Witness(disk, self.ledger.below.update), metrics)]
        slow: Tier = guards[0]
        if limits.redis:
            guards.append(self._guarded(self._redis_tier(process, runner, metrics), metrics))
            slow = Beside(guards[1], guards[0])
        policy = make_policy(limits.policy, limits.memory_bytes)
        memory = Memory(limits.memory_bytes, SLAB_BYTES, policy, self.clock)
        node = Node(
            node_id=process.name,
            secret=SECRET,
            tiers=Tiered(memory, slow, metrics, runner),
            leases=LeaseTable(limits.memory_bytes // 2),
            max_lease_s=MAX_LEASE_S,
            events=events,
            clock=self.clock,
            metrics=metrics,
            slow_is_full=lambda size: all(guard.full(size) for guard in guards),
            slow_room_bytes=lambda: min((guard.room_bytes for guard in guards), default=0.0),
        )
        node.disk = disk
        for space in SPACES:
            node.open_space(space)
        room = Room(limits.memory_bytes // 2, limits.memory_bytes // 4)
        return Running(process, node, memory, disk, guards, runner, limits, room)

    def _guarded(self, tier: Tier, metrics: Metrics) -> Guarded:
        return Guarded(
            Measured(tier, self.clock, metrics),
            lookup_timeout_s=LOOKUP_S,
            timeout_s=BATCH_S,
            clock=self.clock,
            metrics=metrics,
        )

    def _redis_tier(self, process: Process, runner: SeededRunner, metrics: Metrics) -> RedisTier:
        client = RedisClient(self._redis, process, self._rng, BATCH_S)
        limits = self.limits
        return RedisTier(
            cast("Redis", client), CODECS[limits.codec](), runner, self.clock, metrics,
            capacity_bytes=limits.redis_bytes, part_bytes=limits.part_bytes, ttl_s=limits.ttl_s,
        )  # fmt: skip
