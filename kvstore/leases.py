"""Leases: bounded promises that matched blocks stay in memory. Plain bookkeeping over slots."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import repeat

from kvstore.api.tier import BlockRef
from kvstore.coming import Coming
from kvstore.tiers.memory import Slot
from kvstore.tiers.tiered import Want

MAX_LEASES = 16_384
MAX_LEASES_PER_TENANT = 4096
"""A lease lasts as long as a restore: more of them are hardly ever of use, but each takes room."""


@dataclass(slots=True)
class Share:
    """What a lease has of one space: consecutive blocks of its chain, as far as reserved."""

    size: int
    """Of one block."""
    above: BlockRef | None
    """The parent of the first of `refs`."""
    is_chain: bool
    """Whether each of `refs` is the parent of the next one."""
    beyond: tuple[int, str]
    """How many more a restore needs, and the tier in which the first of them lay."""
    refs: list[BlockRef] = field(default_factory=list)
    tiers: list[str] = field(default_factory=list)
    """Where each of `refs` lay when it was matched."""

    def wants(self, start: int = 0) -> list[Want]:
        """The blocks from one on, with their parents."""
        refs = self.refs[start:]
        if not self.is_chain:
            return [Want(ref, None, self.size) for ref in refs]
        above = self.refs[start - 1] if start else self.above
        return list(map(Want, refs, [above, *refs], repeat(self.size)))


@dataclass(slots=True, eq=False)
class Lease:
    """What one Match promised, and to whom. Expiry is on the monotonic clock.

    It keeps the names of what it could reserve, and of nothing else: so what it takes itself is
    bounded as well.
    """

    lease_id: bytes
    tenant: str
    request_id: bytes
    expires_s: float
    asked: bytes
    """What the Match asked (`question`); the same request id and question get the same answer."""
    blocks: int
    shares: list[Share] = field(default_factory=list)
    """The blocks that a restore needs, space by space, as far as reserved."""
    held: list[Slot] = field(default_factory=list)
    """What is pinned for it."""
    coming: Coming = field(default_factory=Coming)
    """What is being promoted for it."""
    reserved_bytes: int = 0
    ended: bool = False
    _named: tuple[dict[BlockRef, Want], dict[BlockRef, str]] | None = None
    """What reads ask for, made for the first of them."""

    @property
    def wants(self) -> list[list[Want]]:
        """The blocks of each share, with their parents."""
        return [share.wants() for share in self.shares]

    @property
    def known(self) -> dict[BlockRef, Want]:
        """All `wants`, by what they are called."""
        return self._names()[0]

    @property
    def tiers(self) -> dict[BlockRef, str]:
        """Where each of `wants` lay when it was matched."""
        return self._names()[1]

    def add(self, space: int, refs: Sequence[BlockRef], tiers: Sequence[str]) -> None:
        """Notes blocks of a space for which there is room, and where they lay."""
        share = self.shares[space]
        share.refs += refs
        share.tiers += tiers
        self._named = None

    def _names(self) -> tuple[dict[BlockRef, Want], dict[BlockRef, str]]:
        if self._named is None:
            known = {want.ref: want for share in self.shares for want in share.wants()}
            tiers: dict[BlockRef, str] = {}
            for share in self.shares:
                tiers.update(zip(share.refs, share.tiers, strict=True))
            self._named = known, tiers
        return self._named


def question(
    space_ids: Sequence[bytes], keys: Sequence[bytes], scopes: Sequence[str], held_blocks: int
) -> bytes:
    """What a match asks, in 32 bytes."""
    digest = hashlib.sha256(repr((list(space_ids), list(scopes), held_blocks)).encode())
    digest.update(b"".join(keys))
    return digest.digest()


class LeaseTable:
    """All leases of a node, together at most `capacity_bytes`, and so many in number.

    Invariant: `leased_bytes` is the sum over live leases, and never above the capacity. Methods
    that end leases return what they held, for the caller to release.
    """

    def __init__(
        self,
        capacity_bytes: int,
        *,
        max_leases: int = MAX_LEASES,
        max_leases_per_tenant: int = MAX_LEASES_PER_TENANT,
    ) -> None:
        self.capacity_bytes = capacity_bytes
        self.leased_bytes = 0
        self._max_leases = max_leases
        self._max_leases_per_tenant = max_leases_per_tenant
        self._of_tenant: Counter[str] = Counter()
        self._leases: dict[bytes, Lease] = {}
        self._requests: dict[tuple[str, bytes], Lease] = {}

    def __len__(self) -> int:
        return len(self._leases)

    def grant(self, lease: Lease) -> bool:
        """Makes a lease findable, unless there are too many."""
        if (
            len(self._leases) >= self._max_leases
            or self._of_tenant[lease.tenant] >= self._max_leases_per_tenant
        ):
            return False
        self._of_tenant[lease.tenant] += 1
        self._leases[lease.lease_id] = lease
        if lease.request_id:
            self._requests[lease.tenant, lease.request_id] = lease
        return True

    def reserve(self, lease: Lease, size: int, count: int) -> int:
        """Takes `size` bytes for each of `count` blocks; for how many that much was left."""
        room = (self.capacity_bytes - self.leased_bytes) // size
        count = min(count, room)
        self.leased_bytes += count * size
        lease.reserved_bytes += count * size
        return count

    def find(self, tenant: str, lease_id: bytes) -> Lease | None:
        """The live lease of this id, if it is this tenant's."""
        lease = self._leases.get(lease_id)
        return lease if lease is not None and lease.tenant == tenant else None

    def of_request(self, tenant: str, request_id: bytes) -> Lease | None:
        """The live lease that an earlier Match of the same request got."""
        return self._requests.get((tenant, request_id))

    def end(self, lease: Lease) -> list[Slot]:
        """Ends a lease; what it held."""
        if lease.ended:
            return []
        lease.ended = True
        del self._leases[lease.lease_id]
        self._of_tenant[lease.tenant] -= 1
        if not self._of_tenant[lease.tenant]:
            del self._of_tenant[lease.tenant]
        if self._requests.get((lease.tenant, lease.request_id)) is lease:
            del self._requests[lease.tenant, lease.request_id]
        self.leased_bytes -= lease.reserved_bytes
        held, lease.held = lease.held, []
        return held

    def end_expired(self, now_s: float) -> list[Slot]:
        """Ends what has run out; what those leases held."""
        expired = [lease for lease in self._leases.values() if lease.expires_s <= now_s]
        return [slot for lease in expired for slot in self.end(lease)]

    def end_all(self) -> list[Slot]:
        """Ends every lease; what they held."""
        return [slot for lease in list(self._leases.values()) for slot in self.end(lease)]

    def check(self) -> None:
        """Recomputes every invariant; AssertionError tells which one broke."""
        total = sum(lease.reserved_bytes for lease in self._leases.values())
        assert total == self.leased_bytes, f"leased {total}, counted {self.leased_bytes}"
        assert self.leased_bytes <= self.capacity_bytes, "more leased than allowed"
        assert len(self._leases) <= self._max_leases, "more leases than allowed"
        tenants = Counter(lease.tenant for lease in self._leases.values())
        assert tenants == self._of_tenant, "leases of a tenant are counted wrong"
        most = max(tenants.values(), default=0)
        assert most <= self._max_leases_per_tenant, "a tenant has more leases than allowed"
