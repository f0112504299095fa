"""The store node: what its calls do, as plain coroutines over tiers, leases and spaces.

The gRPC servicer above it is a thin shell; nothing in here knows of messages or channels.
"""

import asyncio
import itertools
import logging
import secrets
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from kvstore.api.clock import Clock
from kvstore.api.errors import InvalidArgument, ResourceExhausted, UnknownSpace
from kvstore.api.hint import ReuseHint
from kvstore.api.space import SpaceDescriptor
from kvstore.api.tier import BlockRef
from kvstore.events import Events
from kvstore.leases import Lease, LeaseTable
from kvstore.matching import longest_match, needed
from kvstore.metrics import Metrics
from kvstore.names import namespace
from kvstore.policy.policy import Use
from kvstore.reading import Delivered, Reading, always, windows, within
from kvstore.tenants import PRIVATE_SCOPE, Tenant, check_scope
from kvstore.tiers.disk import DiskTier, Scrubbed
from kvstore.tiers.tiered import Tiered, Want
from kvstore.writing import Incoming

_log = logging.getLogger("kvstore.node")

MAX_SPACES = 4096
EXPIRY_PERIOD_S = 0.5


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive matched blocks that lay in one tier; `leased`: they stay until read."""

    blocks: int
    tier: str
    leased: bool


@dataclass(frozen=True, slots=True)
class Matched:
    """How much of a chain can be restored, where it lies in each space, and the lease on it."""

    blocks: int
    runs: list[list[Run]]
    lease: Lease | None


class Node:
    """One store process."""

    def __init__(
        self,
        *,
        node_id: str,
        secret: bytes,
        tiers: Tiered,
        leases: LeaseTable,
        max_lease_s: float,
        events: Events,
        clock: Clock,
        metrics: Metrics,
        slow_is_full: Callable[[int], bool] = lambda size: False,
    ) -> None:
        self.node_id = node_id
        self._secret = secret
        self.tiers = tiers
        self.leases = leases
        self._max_lease_s = max_lease_s
        self.events = events
        self.clock = clock
        self.metrics = metrics
        self._slow_is_full = slow_is_full
        self.spaces: dict[bytes, SpaceDescriptor] = {}
        self.draining = False
        self.disk: DiskTier | None = None
        """The disk among the tiers, for what only a disk can do."""
        self._scrubbing = False
        self._namespaces: dict[tuple[str, str, bytes], bytes] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        metrics.follow(tiers.usage, lambda: (len(leases), leases.leased_bytes))
        self._keep(self._expire_leases())

    # Spaces and names.

    def open_space(self, descriptor: SpaceDescriptor) -> bytes:
        """Registers a space and returns its id. Raises InvalidArgument if its blocks do not fit."""
        limit = self.tiers.memory.largest_block_bytes
        if descriptor.block_bytes > limit:
            raise InvalidArgument(
                f"descriptor.block_bytes: this node takes at most {limit} (memory.slab_bytes), "
                f"got {descriptor.block_bytes}"
            )
        space_id = descriptor.space_id
        if space_id not in self.spaces and len(self.spaces) >= MAX_SPACES:
            raise ResourceExhausted(f"this node has {MAX_SPACES} spaces open already")
        self.spaces[space_id] = descriptor
        return space_id

    def space(self, space_id: bytes) -> SpaceDescriptor:
        """The descriptor of an open space. Raises UnknownSpace."""
        descriptor = self.spaces.get(space_id)
        if descriptor is None:
            raise UnknownSpace("space_id: not open on this node; call OpenSpace, then repeat")
        return descriptor

    def refs(
        self, tenant: Tenant, scope: str, space_id: bytes, keys: Sequence[bytes]
    ) -> list[BlockRef]:
        """What the blocks of a tenant are called inside this node."""
        self.space(space_id)
        owner = (tenant.name, check_scope(scope), space_id)
        name = self._namespaces.get(owner)
        if name is None:
            name = self._namespaces[owner] = namespace(self._secret, *owner)
        return [BlockRef(name, key) for key in keys]

    # Match and Release.

    async def match(
        self,
        tenant: Tenant,
        space_ids: Sequence[bytes],
        keys: Sequence[bytes],
        scopes: Sequence[str],
        *,
        lease_s: float = 0.0,
        request_id: bytes = b"",
        held_blocks: int = 0,
        hint: ReuseHint | None = None,
        left_s: Callable[[], float] = always,
    ) -> Matched:
        """The longest restorable prefix, leased as far as leases go, its promotion begun.

        When nothing is left of `left_s`, what memory has is the answer. The caller has the first
        `held_blocks` blocks itself: they count as here and are touched.
        """
        self._count_hint(hint)
        asked = (tuple(space_ids), tuple(keys), tuple(scopes), held_blocks)
        if repeated := self._repeated(tenant, request_id, asked):
            return Matched(repeated.blocks, self._runs(repeated), repeated)
        descriptors = [self.space(space_id) for space_id in space_ids]
        found = [await self._find(tenant, scopes, space_id, keys, left_s) for space_id in space_ids]
        # Its caller may have repeated itself while this one was looking, and got his lease.
        if repeated := self._repeated(tenant, request_id, asked):
            return Matched(repeated.blocks, self._runs(repeated), repeated)
        present = [
            [at < held_blocks or tier is not None for at, (_, tier) in enumerate(row)]
            for row in found
        ]
        length = longest_match(descriptors, present)
        self.metrics.asked_blocks.inc(len(keys))
        self.metrics.matched_blocks.inc(length)
        lease = Lease(
            lease_id=secrets.token_bytes(16),
            tenant=tenant.name,
            request_id=request_id,
            expires_s=self.clock.monotonic_s() + min(lease_s, self._max_lease_s),
            asked=asked,
            blocks=length,
            wants=[
                _wants(d, row, held_blocks, length)
                for d, row in zip(descriptors, found, strict=True)
            ],
            tiers={ref: tier for row in found for ref, tier in row[:length] if tier is not None},
        )
        for space_id, row in zip(space_ids, found, strict=True):
            chain = [ref for ref, _ in row]
            self.tiers.memory.use(self._use(tenant, space_id, chain, hint))
        earlier = self.leases.of_request(tenant.name, request_id) if request_id else None
        if earlier is not None:
            self._release(earlier)
        if length <= held_blocks or lease_s <= 0:
            return Matched(length, self._runs(lease), None)
        self._grant(lease)
        return Matched(length, self._runs(lease), lease)

    def _repeated(
        self, tenant: Tenant, request_id: bytes, asked: tuple[object, ...]
    ) -> Lease | None:
        """The lease that this request got for the same question, as long as it holds."""
        lease = self.leases.of_request(tenant.name, request_id) if request_id else None
        holds = lease is not None and lease.expires_s > self.clock.monotonic_s()
        return lease if lease is not None and holds and lease.asked == asked else None

    def release(self, tenant: Tenant, lease_id: bytes) -> None:
        """Ends a lease; unknown ones are ignored."""
        lease = self.leases.find(tenant.name, lease_id)
        if lease is not None:
            self._release(lease)

    async def _find(
        self,
        tenant: Tenant,
        scopes: Sequence[str],
        space_id: bytes,
        keys: Sequence[bytes],
        left_s: Callable[[], float],
    ) -> list[tuple[BlockRef, str | None]]:
        """For each key the first scope that has it, and in which tier."""
        found: list[tuple[BlockRef, str | None]] = []
        for scope in scopes or (PRIVATE_SCOPE,):
            refs = self.refs(tenant, scope, space_id, keys)
            tiers = await self._locate(refs, left_s())
            here = list(zip(refs, tiers, strict=True))
            # What no scope has is called as in the first one, where its owner would write it.
            pairs = zip(found or here, here, strict=True)
            found = [b if b[1] and not a[1] else a for a, b in pairs]
        return found

    async def _locate(self, refs: Sequence[BlockRef], left_s: float) -> list[str | None]:
        """Where blocks lie, as far as that can be said in the time that is left."""
        try:
            async with within(left_s):
                return await self.tiers.locate(refs)
        except TimeoutError:
            return await self.tiers.memory.locate(refs)  # Which does not wait.

    def _grant(self, lease: Lease) -> None:
        """Pins what is in memory and begins to promote the rest, both up to the leases' limit."""
        self.leases.grant(lease)
        below: list[Want] = []
        for want in itertools.chain.from_iterable(lease.wants):
            if not self.leases.reserve(lease, want.size):
                break
            acquired = self.tiers.pin(want)
            if acquired is not None:
                lease.held.append(acquired)
            else:
                below.append(want)
        if below:
            self._keep(self._promote(lease, below))

    def _runs(self, lease: Lease) -> list[list[Run]]:
        """Where the matched blocks lie, space by space; blocks that no rule needs lie nowhere."""
        held = {acquired.slot.ref for acquired in lease.held}
        runs: list[list[Run]] = []
        for wants in lease.wants:
            places = [("", False)] * (lease.blocks - len(wants))
            places += [(lease.tiers[want.ref], want.ref in held) for want in wants]
            groups = itertools.groupby(places)
            runs.append([Run(len(list(group)), *place) for place, group in groups])
        return runs

    async def _promote(self, lease: Lease, wants: list[Want]) -> None:
        """Fetches in windows what a lease waits for, as long as it lives."""
        for window in windows(wants):
            if lease.ended:
                return
            acquired = [block for block in await self.tiers.acquire(window) if block]
            if lease.ended:
                self.tiers.release(acquired)
            else:
                lease.held += acquired

    def _release(self, lease: Lease) -> None:
        self.tiers.release(self.leases.end(lease))

    # Read.

    async def read(
        self,
        tenant: Tenant,
        scopes: Sequence[str],
        space_id: bytes,
        keys: Sequence[bytes],
        lease_id: bytes = b"",
        *,
        left_s: Callable[[], float] = always,
    ) -> AsyncGenerator[Delivered, None]:
        """The blocks in order. With a lease, what lies below is promoted on its way.

        When nothing is left of `left_s`, the rest is answered as missing. Raises Shed, ahead of
        the first block, where that could only come from tiers that have too much to do.
        """
        size = self.space(space_id).block_bytes
        lease = self.leases.find(tenant.name, lease_id) if lease_id else None
        refs = await self._choose(tenant, scopes, space_id, keys, left_s)
        reading = Reading(self.tiers, lease, self._slow_is_full, left_s)
        async with aclosing(reading.blocks(refs, size)) as blocks:
            async for block in blocks:
                yield block

    async def _choose(
        self,
        tenant: Tenant,
        scopes: Sequence[str],
        space_id: bytes,
        keys: Sequence[bytes],
        left_s: Callable[[], float],
    ) -> list[BlockRef]:
        if len(scopes) < 2:
            return self.refs(tenant, scopes[0] if scopes else PRIVATE_SCOPE, space_id, keys)
        return [ref for ref, _ in await self._find(tenant, scopes, space_id, keys, left_s)]

    # Write and the rest.

    async def write(
        self,
        tenant: Tenant,
        scope: str,
        space_id: bytes,
        keys: Sequence[bytes],
        *,
        parent_key: bytes = b"",
        parent_scope: str = PRIVATE_SCOPE,
        hint: ReuseHint | None = None,
    ) -> Incoming:
        """The receiving end of one run of a chain; it knows which blocks are wanted."""
        self._count_hint(hint)
        descriptor = self.space(space_id)
        refs = self.refs(tenant, scope, space_id, keys)
        parents: list[BlockRef | None] = [None] * len(refs)
        if descriptor.needs_parents:
            parents[1:] = refs[:-1]
            if parent_key:
                parents[:1] = self.refs(tenant, parent_scope, space_id, [parent_key])
        rooted, *wanted = await self._wanted(parents[0], refs)
        self.tiers.memory.expect(self._use(tenant, space_id, refs, hint))
        return Incoming(
            self.tiers, self.metrics, space_id, descriptor.block_bytes, refs,
            parents=parents, wanted=wanted, rooted=rooted,
            advise=lambda: self._advise(tenant, space_id, refs, hint),
        )  # fmt: skip

    async def _wanted(self, above: BlockRef | None, refs: list[BlockRef]) -> list[bool]:
        """Whether the parent of a run is here, and which blocks of the run are not."""
        if above is None:
            return [True, *await self.tiers.wants(refs)]
        absent, *wanted = await self.tiers.wants([above, *refs])
        return [not absent, *wanted]

    async def clear_space(self, tenant: Tenant, scope: str, space_id: bytes) -> int:
        """Forgets every block of a tenant in one space and scope; how many copies there were.

        The space need not be open: what an earlier run stored is cleared as well.
        """
        owned = namespace(self._secret, tenant.name, check_scope(scope), space_id)
        return await self.tiers.clear(owned)

    async def scrub(self, bytes_per_s: float) -> AsyncGenerator[Scrubbed, None]:
        """Checks everything on the disk, one scrub at a time."""
        if self.disk is None:
            raise InvalidArgument("this node has no disk to check: disk.enabled is false")
        if self._scrubbing:
            raise ResourceExhausted("a scrub is under way already")
        self._scrubbing = True
        try:
            async with aclosing(self.disk.scrub(bytes_per_s)) as reports:
                async for report in reports:
                    yield report
        finally:
            self._scrubbing = False

    def hint(
        self, tenant: Tenant, scope: str, space_id: bytes, keys: Sequence[bytes], hint: ReuseHint
    ) -> None:
        """Passes a hint for a chain to the policy."""
        self._count_hint(hint)
        self._advise(tenant, space_id, self.refs(tenant, scope, space_id, keys), hint)

    def _advise(
        self, tenant: Tenant, space_id: bytes, refs: Sequence[BlockRef], hint: ReuseHint | None
    ) -> None:
        if hint is not None:
            self.tiers.memory.advise(self._use(tenant, space_id, refs, hint))

    def _use(
        self, tenant: Tenant, space_id: bytes, refs: Sequence[BlockRef], hint: ReuseHint | None
    ) -> Use[BlockRef]:
        """What the policy is told of a request."""
        descriptor = self.space(space_id)
        return Use(
            refs,
            self.clock.monotonic_s(),
            block_bytes=descriptor.block_bytes,
            block_tokens=descriptor.block_tokens,
            hint=hint,
            session=hash((tenant.name, hint.session_id)) if hint and hint.session_id else None,
        )

    def _count_hint(self, hint: ReuseHint | None) -> None:
        if hint is not None:
            self.metrics.hints.labels(hint.reuse.name.lower()).inc()

    # Life.

    def _keep(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _expire_leases(self) -> None:
        while True:
            await self.clock.sleep(EXPIRY_PERIOD_S)
            self.tiers.release(self.leases.end_expired(self.clock.monotonic_s()))

    async def close(self, flush_timeout_s: float, close_timeout_s: float) -> None:
        """Ends leases, writes what only memory has to the slower tiers, and closes them.

        What is not written within `flush_timeout_s` is lost to later runs. The tiers have
        `close_timeout_s` to close, and what the flush leaves over; one that is not closed by then
        is left as it is, as after a crash.
        """
        loop = asyncio.get_running_loop()
        end_s = loop.time() + flush_timeout_s + close_timeout_s
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        try:
            self.tiers.release(self.leases.end_all())
            await self._flush(flush_timeout_s)
        finally:
            await self._close_tiers(end_s - loop.time())

    async def _flush(self, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                await self.tiers.flush()
        except TimeoutError:
            _log.warning("memory was not flushed completely within %.1f s", timeout_s)

    async def _close_tiers(self, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                await self.tiers.close()
        except TimeoutError:
            _log.warning("the tiers were not closed within %.1f s", timeout_s)


def _wants(
    descriptor: SpaceDescriptor, row: list[tuple[BlockRef, str | None]], held: int, length: int
) -> list[Want]:
    """The blocks of one space that a restore from `held` to `length` needs, with their parents."""
    return [
        Want(
            row[block][0],
            row[block - 1][0] if block and descriptor.needs_parents else None,
            descriptor.block_bytes,
        )
        for block in needed(descriptor, length)
        if block >= held
    ]
