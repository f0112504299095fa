"""How a run ends: every fault is over, and so everything must be as new again.

1. Every node starts, and every call ends by its deadline.
2. Within five seconds of ordinary work all breakers are closed.
3. All leases run out; then nothing is pinned, reserved or under way.
4. A prompt that is written now is matched and read in full, by its lease.
5. It is again after a clean restart, with Redis empty: from disk, if all of memory fits there.
6. A node that was stopped leaves neither a task nor an open file.
"""

import asyncio
import math
from collections.abc import Sequence

from kvstore.files import PAGE_BYTES
from kvstore.node import EXPIRY_PERIOD_S
from tests.sim.rig import assert_idle, quiet
from tests.sim.world.calls import Calls, Chain, Question
from tests.sim.world.machine import MAX_LEASE_S, Machine, Running
from tests.sim.world.network import DEADLINE_S
from tests.sim.world.redis import RedisServer
from tests.sim.world.trace import Broken
from tests.sim.world.universe import LAST_PROMPT, TENANTS

RECOVERY_S = 5.0
BEAT_S = 0.25
LAST_BLOCKS = 3


class Epilogue:
    """The end of one run, machine by machine."""

    def __init__(
        self,
        served: Sequence[tuple[Machine, Calls]],
        redis: RedisServer,
        acting: set[asyncio.Task[None]],
    ) -> None:
        self._served = served
        self._redis = redis
        self._acting = acting

    async def run(self) -> None:
        """Raises Broken for what is not as new."""
        for machine, _ in self._served:
            if machine.running is None and not await machine.start():
                raise Broken(f"{machine.name} does not start, though nothing is wrong")
        await self._end_calls()
        await self._recover()
        await asyncio.sleep(MAX_LEASE_S + 2 * EXPIRY_PERIOD_S)
        for machine, calls in self._served:
            await self._check_idle(machine)
            await self._serve(machine, calls, restarted=False)
        for machine, calls in self._served:
            fits = _fits_on_disk(_running(machine))
            await machine.stop()
            self._redis.flush()
            if not await machine.start():
                raise Broken(f"{machine.name} does not start again")
            if fits:
                await self._serve(machine, calls, restarted=True)
            await machine.stop()

    async def _recover(self) -> None:
        """Ordinary work, until all breakers are closed again.

        Flushing makes sure that the slower tiers have something to do. No discard may be under
        way then: it is for the end of a node, and takes no lock.
        """
        for beat in range(round(RECOVERY_S / BEAT_S)):
            for machine, calls in self._served:
                running = _running(machine)
                key = LAST_PROMPT[LAST_BLOCKS + beat]
                await calls.write(running, Chain("ann", ("",), 0, (key,)), clumsy=False)
                await running.node.tiers.flush()
            await asyncio.sleep(BEAT_S)
            if all(_running(machine).serving() for machine, _ in self._served):
                return
        for machine, _ in self._served:
            if not _running(machine).serving():
                raise Broken(
                    f"{machine.name}: a breaker is open, {RECOVERY_S} s after the last fault"
                )

    async def _end_calls(self) -> None:
        if self._acting:
            await asyncio.wait(self._acting, timeout=10 * DEADLINE_S)
        if self._acting:
            raise Broken(f"{len(self._acting)} callers still wait")

    async def _check_idle(self, machine: Machine) -> None:
        running = _running(machine)
        await quiet(running.node.tiers)
        if running.calls or len(running.node.leases) or running.node.leases.leased_bytes:
            raise Broken(
                f"{machine.name}: {len(running.calls)} calls, {len(running.node.leases)} leases"
            )
        if running.room.held_bytes:
            raise Broken(f"{machine.name}: {running.room.held_bytes} bytes are held in the arena")
        assert_idle(running.memory)
        for guard in running.guards:
            for window in (guard._lookups, guard._loads, guard._stores):
                if window.used_bytes:
                    raise Broken(f"{machine.name}: {guard.name} has {window.used_bytes} under way")

    async def _serve(self, machine: Machine, calls: Calls, *, restarted: bool) -> None:
        """A prompt is written, unless it is on disk, and then matched and read."""
        running, keys = _running(machine), tuple(LAST_PROMPT[:LAST_BLOCKS])
        for tenant in TENANTS:
            chain = Chain(tenant, ("",), 0, keys)
            if not restarted:
                await calls.write(running, chain, clumsy=False)
            question = Question(tenant, ("",), (0,), keys, 1.0, b"", 0, None)
            matched = await calls.match(running, question, math.inf)
            tiers = {run.tier for run in matched.runs[0]}
            if matched.blocks != LAST_BLOCKS or (restarted and tiers != {"disk"}):
                raise Broken(f"{machine.name}: {matched.runs} of what was stored is here")
            assert matched.lease is not None
            came = await calls.read(running, chain, matched.lease.lease_id, LAST_BLOCKS, math.inf)
            if not all(came):
                raise Broken(f"{machine.name}: {came} of what was matched came")
            await calls.release(running, tenant, matched.lease.lease_id)


def _fits_on_disk(running: Running) -> bool:
    """Whether the disk takes all that memory flushes: of too much the last stays."""
    limits = running.limits
    flushed_bytes = sum(2 * PAGE_BYTES + slot.size for slot in running.memory.slots())
    return flushed_bytes <= limits.disk_bytes - 2 * limits.segment_bytes


def _running(machine: Machine) -> Running:
    if machine.running is None:
        raise Broken(f"{machine.name} is down")
    return machine.running
