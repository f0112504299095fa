"""The store node: what its calls do, as plain coroutines over tiers, leases and spaces.

The gRPC servicer above it is a thin shell; nothing in here knows of messages or channels.
"""

import asyncio
import logging
import secrets
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import lru_cache, partial

from kvstore.api.clock import Clock
from kvstore.api.errors import InvalidArgument, ResourceExhausted, UnknownSpace
from kvstore.api.hint import ReuseHint
from kvstore.api.space import SpaceDescriptor
from kvstore.api.tier import BlockRef
from kvstore.events import Events
from kvstore.finding import Finding, Row, refs_of, slices
from kvstore.granting import Granting, Need, Run, runs_again, runs_of
from kvstore.leases import Lease, LeaseTable, question
from kvstore.matching import longest_match
from kvstore.metrics import Metrics
from kvstore.names import namespace
from kvstore.offer import Offer
from kvstore.policy.deferred import MOST_STEPS
from kvstore.policy.policy import Use
from kvstore.reading import Delivered, Reading, always
from kvstore.spaces import NAMESPACES, Spaces
from kvstore.tenants import PRIVATE_SCOPE, Tenant, check_scope
from kvstore.tiers.disk import DiskTier, Scrubbed
from kvstore.tiers.tiered import Tiered

_log = logging.getLogger("kvstore.node")

MAX_SPACES = 4096
"""So many are open; the next one takes the place of that which was used the longest ago."""
EXPIRY_PERIOD_S = 0.5
SETTLE_PERIOD_S = 0.001
"""The policy hears of a request after so long, and then of another one."""


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
        slow_room_bytes: Callable[[], float] = lambda: 0.0,
        known: Spaces | None = None,
    ) -> None:
        self.node_id = node_id
        self.tiers = tiers
        self.leases = leases
        self._max_lease_s = max_lease_s
        self.events = events
        self.clock = clock
        self.metrics = metrics
        self._slow_is_full = slow_is_full
        self.spaces: OrderedDict[bytes, SpaceDescriptor] = OrderedDict()
        """The one that was used the longest ago first."""
        self.draining = False
        self.disk: DiskTier | None = None
        """The disk among the tiers, for what only a disk can do."""
        self._scrubbing = False
        self._settling: asyncio.TimerHandle | None = None
        # Bounded: a scope is any name that a caller thinks of.
        self._namespace = lru_cache(NAMESPACES)(partial(namespace, secret))
        self._known = known or Spaces()
        """For the codecs of the slower tiers."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._granting = Granting(tiers, leases, self._keep, slow_room_bytes)
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
        self.spaces[space_id] = descriptor
        self.spaces.move_to_end(space_id)
        if len(self.spaces) > MAX_SPACES:
            # Who still needs it is told so, and opens it again; blocks and leases are not touched.
            self.spaces.popitem(last=False)
        return space_id

    def space(self, space_id: bytes) -> SpaceDescriptor:
        """The descriptor of an open space. Raises UnknownSpace."""
        descriptor = self.spaces.get(space_id)
        if descriptor is None:
            raise UnknownSpace("space_id: not open on this node; call OpenSpace, then repeat")
        self.spaces.move_to_end(space_id)
        return descriptor

    def refs(
        self, tenant: Tenant, scope: str, space_id: bytes, keys: Sequence[bytes]
    ) -> list[BlockRef]:
        """What the blocks of a tenant are called inside this node."""
        [name] = self._names(tenant, [scope], space_id)
        return refs_of(name, keys)

    def _names(self, tenant: Tenant, scopes: Sequence[str], space_id: bytes) -> list[bytes]:
        """The namespaces of a space in these scopes, or in the private one."""
        dtype = self.space(space_id).dtype
        scopes = scopes or (PRIVATE_SCOPE,)
        names = [self._namespace(tenant.name, check_scope(scope), space_id) for scope in scopes]
        for name in names:
            self._known.learn(name, space_id, dtype)
        return names

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
        asked = question(space_ids, keys, scopes, held_blocks) if request_id else b""
        if repeated := self._repeated(tenant, request_id, asked):
            return Matched(repeated.blocks, runs_again(repeated), repeated)
        descriptors = [self.space(space_id) for space_id in space_ids]
        names = [self._names(tenant, scopes, space_id) for space_id in space_ids]
        rows = await self._find(descriptors, names, keys, held_blocks, left_s)
        for space, (descriptor, (first, *_), row) in enumerate(
            zip(descriptors, names, rows, strict=True)
        ):
            if space:
                await asyncio.sleep(0)
            chain = row.refs + refs_of(first, keys[len(row.refs) :])
            await self._tell(self._use(tenant, descriptor, chain, hint), left_s)
        # Its caller may have repeated itself while this one was looking, and got his lease.
        if repeated := self._repeated(tenant, request_id, asked):
            return Matched(repeated.blocks, runs_again(repeated), repeated)
        length = _length(descriptors, rows, held_blocks)
        # What the caller holds itself says nothing about the store.
        self.metrics.asked_blocks.inc(len(keys) - held_blocks)
        self.metrics.matched_blocks.inc(length - held_blocks)
        needs = [
            Need.of(descriptor, row, held_blocks, length)
            for descriptor, row in zip(descriptors, rows, strict=True)
        ]
        lease = Lease(
            lease_id=secrets.token_bytes(16),
            tenant=tenant.name,
            request_id=request_id,
            expires_s=self.clock.monotonic_s() + min(lease_s, self._max_lease_s),
            asked=asked,
            blocks=length,
        )
        earlier = self.leases.of_request(tenant.name, request_id) if request_id else None
        if earlier is not None:
            self._granting.release(earlier)
        granted = length > held_blocks and lease_s > 0 and await self._granting.grant(lease, needs)
        return Matched(length, runs_of(lease, needs), lease if granted else None)

    def _repeated(self, tenant: Tenant, request_id: bytes, asked: bytes) -> Lease | None:
        """The lease that this request got for the same question, as long as it holds."""
        lease = self.leases.of_request(tenant.name, request_id) if request_id else None
        holds = lease is not None and lease.expires_s > self.clock.monotonic_s()
        return lease if lease is not None and holds and lease.asked == asked else None

    def release(self, tenant: Tenant, lease_id: bytes) -> None:
        """Ends a lease; unknown ones are ignored."""
        lease = self.leases.find(tenant.name, lease_id)
        if lease is not None:
            self._granting.release(lease)

    async def _find(
        self,
        descriptors: Sequence[SpaceDescriptor],
        names: Sequence[Sequence[bytes]],
        keys: Sequence[bytes],
        held_blocks: int,
        left_s: Callable[[], float],
    ) -> list[Row]:
        """Where the blocks of a chain lie in each space, as far as a match may reach."""
        finding = Finding(self.tiers, left_s)
        rows: list[Row] = []
        for descriptor, owned in zip(descriptors, names, strict=True):
            if rows:
                await asyncio.sleep(0)
            whole = descriptor.needs_parents
            rows.append(await finding.row(owned, keys, held_blocks if whole else None))
            if whole:
                keys = keys[: rows[-1].gap(held_blocks)]
        return rows

    async def _tell(self, use: Use[BlockRef], left_s: Callable[[], float]) -> None:
        """Tells the policy of a request, of a long one in parts: it takes its time with each block.

        The tail first, as policies themselves do it, so that the head stays the longest. When
        nothing is left of the time, the head is all it hears of.
        """
        parts = list(slices(use.chain)) or [use.chain]
        for at, part in reversed(list(enumerate(parts))):
            if at and left_s() <= 0:
                continue
            self.tiers.memory.use(replace(use, chain=part))
            if at:
                await asyncio.sleep(0)
        self._settle_later()

    def _settle_later(self) -> None:
        """Has the policy hear once the answer is on its way, of a few requests at a time."""
        if self._settling is None:
            loop = asyncio.get_running_loop()
            self._settling = loop.call_later(SETTLE_PERIOD_S, self._settle)

    def _settle(self) -> None:
        self._settling = None
        if self.tiers.memory.settle():
            self._settle_later()

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
        reading = await self.reading(tenant, scopes, space_id, keys, lease_id, left_s=left_s)
        async with aclosing(reading.blocks()) as blocks:
            async for block in blocks:
                yield block

    async def reading(
        self,
        tenant: Tenant,
        scopes: Sequence[str],
        space_id: bytes,
        keys: Sequence[bytes],
        lease_id: bytes = b"",
        *,
        left_s: Callable[[], float] = always,
    ) -> Reading:
        """The sending end of a read."""
        size = self.space(space_id).block_bytes
        lease = self.leases.find(tenant.name, lease_id) if lease_id else None
        refs = await self._choose(tenant, scopes, space_id, keys, left_s)
        return Reading(self.tiers, lease, refs, size, self._slow_is_full, left_s)

    async def _choose(
        self,
        tenant: Tenant,
        scopes: Sequence[str],
        space_id: bytes,
        keys: Sequence[bytes],
        left_s: Callable[[], float],
    ) -> list[BlockRef]:
        names = self._names(tenant, scopes, space_id)
        if len(names) == 1:
            return refs_of(names[0], keys)
        return (await Finding(self.tiers, left_s).row(names, keys)).refs

    # Write and the rest.

    async def offer(
        self,
        tenant: Tenant,
        scope: str,
        space_id: bytes,
        keys: Sequence[bytes],
        *,
        parent_key: bytes = b"",
        parent_scope: str = PRIVATE_SCOPE,
        hint: ReuseHint | None = None,
    ) -> Offer:
        """One run of a chain that shall be written; it knows which blocks are wanted."""
        self._count_hint(hint)
        descriptor = self.space(space_id)
        refs = self.refs(tenant, scope, space_id, keys)
        parents: list[BlockRef | None] = [None] * len(refs)
        if descriptor.needs_parents:
            parents[1:] = refs[:-1]
            if parent_key:
                parents[:1] = self.refs(tenant, parent_scope, space_id, [parent_key])
        await self._catch_up()
        rooted, *wanted = await self._wanted(parents[0], refs)
        self.tiers.memory.expect(self._use(tenant, descriptor, refs, hint))
        self._settle_later()  # The bytes take longer to come: then nothing is left for the commit.
        return Offer(
            self.tiers, space_id, descriptor.block_bytes, refs,
            parents=parents, wanted=wanted, rooted=rooted,
            advise=lambda: self._advise(tenant, descriptor, refs, hint),
        )  # fmt: skip

    async def _catch_up(self) -> None:
        """Has the policy hear in steps of what waits now: a write would have it hear in one."""
        for _ in range(MOST_STEPS):
            if not self.tiers.memory.settle():
                break
            await asyncio.sleep(0)

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
        owned = self._namespace(tenant.name, check_scope(scope), space_id)
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
        refs = self.refs(tenant, scope, space_id, keys)
        self._advise(tenant, self.space(space_id), refs, hint)

    def _advise(
        self,
        tenant: Tenant,
        descriptor: SpaceDescriptor,
        refs: Sequence[BlockRef],
        hint: ReuseHint | None,
    ) -> None:
        if hint is not None:
            self.tiers.memory.advise(self._use(tenant, descriptor, refs, hint))

    def _use(
        self,
        tenant: Tenant,
        descriptor: SpaceDescriptor,
        refs: Sequence[BlockRef],
        hint: ReuseHint | None,
    ) -> Use[BlockRef]:
        """What the policy is told of a request."""
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
            self.tiers.memory.unpin_all(self.leases.end_expired(self.clock.monotonic_s()))

    async def close(self, flush_timeout_s: float, close_timeout_s: float) -> None:
        """Ends leases, writes what only memory has to the slower tiers, and closes them.

        What is not written within `flush_timeout_s` is lost to later runs. The tiers have
        `close_timeout_s` to close, and what the flush leaves over; one that is not closed by then
        is left as it is, as after a crash.
        """
        loop = asyncio.get_running_loop()
        end_s = loop.time() + flush_timeout_s + close_timeout_s
        if self._settling is not None:
            self._settling.cancel()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        try:
            self.tiers.memory.unpin_all(self.leases.end_all())
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


def _length(descriptors: Sequence[SpaceDescriptor], rows: Sequence[Row], held_blocks: int) -> int:
    """The longest match. Rows end where they no longer matter: the shortest one has all of it."""
    shortest = min(len(row.tiers) for row in rows)
    gap = min(row.gap(held_blocks) for row in rows)
    if gap >= shortest or all(descriptor.needs_parents for descriptor in descriptors):
        return min(gap, shortest)
    return longest_match(descriptors, [row.present(held_blocks, shortest) for row in rows])
