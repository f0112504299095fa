"""The store node: what its calls do, as plain coroutines over tiers, leases and spaces.

The gRPC servicer above it is a thin shell; nothing in here knows of messages or channels.
"""

import asyncio
import itertools
import logging
import secrets
from collections.abc import AsyncGenerator, Coroutine, Iterator, Sequence
from dataclasses import dataclass

from kvstore.api.clock import Clock
from kvstore.api.errors import InvalidArgument, ResourceExhausted, UnknownSpace
from kvstore.api.hint import ReuseHint
from kvstore.api.space import SpaceDescriptor
from kvstore.api.tier import BlockRef, Load
from kvstore.events import Events
from kvstore.leases import Lease, LeaseTable
from kvstore.matching import longest_match, needed
from kvstore.metrics import Metrics
from kvstore.names import namespace
from kvstore.tenants import PRIVATE_SCOPE, Tenant, check_scope
from kvstore.tiers.tiered import Acquired, Tiered, Want
from kvstore.writing import Incoming

_log = logging.getLogger("kvstore.node")

READ_WINDOW_BYTES = 8 << 20
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


@dataclass(frozen=True, slots=True)
class Delivered:
    """One block of a read. `view` is valid until the iterator moves on; None: missing."""

    index: int
    view: memoryview | None
    digest: bytes = b""
    tier: str = ""


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
    ) -> None:
        self.node_id = node_id
        self._secret = secret
        self.tiers = tiers
        self.leases = leases
        self._max_lease_s = max_lease_s
        self.events = events
        self.clock = clock
        self.metrics = metrics
        self.spaces: dict[bytes, SpaceDescriptor] = {}
        self.draining = False
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
    ) -> Matched:
        """The longest restorable prefix, leased as far as leases go, its promotion begun.

        The caller has the first `held_blocks` blocks itself: they count as here and are touched.
        """
        self._count_hint(hint)
        asked = (tuple(space_ids), tuple(keys), tuple(scopes), held_blocks)
        if repeated := self._repeated(tenant, request_id, asked):
            return Matched(repeated.blocks, self._runs(repeated), repeated)
        descriptors = [self.space(space_id) for space_id in space_ids]
        found = [await self._find(tenant, scopes, space_id, keys) for space_id in space_ids]
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
        for row in found:
            self.tiers.memory.touch([ref for ref, _ in row[:length]], hint)
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
        self, tenant: Tenant, scopes: Sequence[str], space_id: bytes, keys: Sequence[bytes]
    ) -> list[tuple[BlockRef, str | None]]:
        """For each key the first scope that has it, and in which tier."""
        found: list[tuple[BlockRef, str | None]] = []
        for scope in scopes or (PRIVATE_SCOPE,):
            refs = self.refs(tenant, scope, space_id, keys)
            tiers = await self.tiers.locate(refs)
            here = list(zip(refs, tiers, strict=True))
            found = [a if a[1] else b for a, b in zip(found, here, strict=True)] if found else here
        return found

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
        for window in _windows(wants):
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
    ) -> AsyncGenerator[Delivered, None]:
        """The blocks in order. With a lease, what lies below is promoted on its way."""
        size = self.space(space_id).block_bytes
        lease = self.leases.find(tenant.name, lease_id) if lease_id else None
        known = {want.ref: want for row in lease.wants for want in row} if lease else {}
        origin = lease.tiers if lease else {}
        refs = await self._choose(tenant, scopes, space_id, keys)
        done = 0
        for window in _windows([known.get(ref) or Want(ref, None, size) for ref in refs]):
            held = await self._hold(window, known)
            try:
                below = await self._load([want for want in window if want.ref not in held])
                for index, want in enumerate(window, start=done):
                    block = held.get(want.ref)
                    if block is None:
                        yield Delivered(index, *below[want.ref])
                        continue
                    tier = origin.get(want.ref, block.tier)
                    yield Delivered(index, block.slot.view, block.slot.digest, tier)
            finally:
                self.tiers.release(held.values())
            done += len(window)

    async def _hold(
        self, window: list[Want], known: dict[BlockRef, Want]
    ) -> dict[BlockRef, Acquired]:
        """The blocks of a window in memory; those of the lease's chain are promoted for it."""
        asked = {want.ref: want for want in window}  # A block may be asked for twice.
        chained = [want for ref, want in asked.items() if ref in known]
        acquired = await self.tiers.acquire(chained) if chained else []
        loose = [self.tiers.pin(want) for ref, want in asked.items() if ref not in known]
        return {block.slot.ref: block for block in [*acquired, *loose] if block is not None}

    async def _load(
        self, wants: list[Want]
    ) -> dict[BlockRef, tuple[memoryview | None, bytes, str]]:
        """The blocks in buffers of their own, where memory has no room or the chain is unknown."""
        sizes = {want.ref: want.size for want in wants}
        places = await self.tiers.locate(list(sizes)) if sizes else []
        # A buffer only for what is there: who asks for much that is nowhere must not cost much.
        here = [ref for ref, place in zip(sizes, places, strict=True) if place is not None]
        loads = [Load(ref, memoryview(bytearray(sizes[ref]))) for ref in here]
        answers = await self.tiers.load(loads) if loads else []
        missing: tuple[memoryview | None, bytes, str] = (None, b"", "")
        found = {
            load.ref: (load.into, loaded.digest, loaded.tier)
            for load, loaded in zip(loads, answers, strict=True)
            if loaded is not None
        }
        return {ref: found.get(ref, missing) for ref in sizes}

    async def _choose(
        self, tenant: Tenant, scopes: Sequence[str], space_id: bytes, keys: Sequence[bytes]
    ) -> list[BlockRef]:
        if len(scopes) < 2:
            return self.refs(tenant, scopes[0] if scopes else PRIVATE_SCOPE, space_id, keys)
        return [ref for ref, _ in await self._find(tenant, scopes, space_id, keys)]

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
        above = self.refs(tenant, parent_scope, space_id, [parent_key]) if parent_key else [None]
        wanted = await self.tiers.wants(refs)
        return Incoming(
            self.tiers, self.metrics, space_id, descriptor.block_bytes, refs,
            parents=[*above, *refs[:-1]], wanted=wanted, hint=hint,
        )  # fmt: skip

    async def clear_space(self, tenant: Tenant, scope: str, space_id: bytes) -> int:
        """Forgets every block of a tenant in one space and scope; how many copies there were.

        The space need not be open: what an earlier run stored is cleared as well.
        """
        owned = namespace(self._secret, tenant.name, check_scope(scope), space_id)
        return await self.tiers.clear(owned)

    def hint(
        self, tenant: Tenant, scope: str, space_id: bytes, keys: Sequence[bytes], hint: ReuseHint
    ) -> None:
        """Passes a hint for a chain to the policy."""
        self._count_hint(hint)
        self.tiers.memory.note(self.refs(tenant, scope, space_id, keys), hint)

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

    async def close(self, flush_timeout_s: float) -> None:
        """Ends leases, writes what only memory has to the slower tiers, and closes them.

        What is not written within `flush_timeout_s` is lost to later runs.
        """
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.tiers.release(self.leases.end_all())
        try:
            async with asyncio.timeout(flush_timeout_s):
                await self.tiers.flush()
        except TimeoutError:
            _log.warning("memory was not flushed completely within %s s", flush_timeout_s)
        await self.tiers.close()


def _wants(
    descriptor: SpaceDescriptor, row: list[tuple[BlockRef, str | None]], held: int, length: int
) -> list[Want]:
    """The blocks of one space that a restore from `held` to `length` needs, with their parents."""
    return [
        Want(row[block][0], row[block - 1][0] if block else None, descriptor.block_bytes)
        for block in needed(descriptor, length)
        if block >= held
    ]


def _windows(wants: list[Want]) -> Iterator[list[Want]]:
    """The blocks in pieces of about `READ_WINDOW_BYTES`, so that a read pins few at a time."""
    step = max(1, READ_WINDOW_BYTES // max((want.size for want in wants), default=1))
    for start in range(0, len(wants), step):
        yield wants[start : start + step]
