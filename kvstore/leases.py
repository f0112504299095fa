"""Leases: bounded promises that matched blocks stay in memory. Plain bookkeeping over slots."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from kvstore.api.tier import BlockRef
from kvstore.tiers.tiered import Acquired, Want

MAX_LEASES = 16_384
MAX_LEASES_PER_TENANT = 4096
"""A lease lasts as long as a restore: more of them are hardly ever of use, but each takes room."""


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
    wants: list[list[Want]] = field(default_factory=list)
    """The blocks that a restore needs, space by space, with their parents, as far as reserved."""
    beyond: list[tuple[int, str]] = field(default_factory=list)
    """For each space how many more a restore needs, and the tier in which the first of them lay."""
    held: list[Acquired] = field(default_factory=list)
    tiers: dict[BlockRef, str] = field(default_factory=dict)
    """Where each of `wants` lay when it was matched."""
    reserved_bytes: int = 0
    ended: bool = False

    def add(self, space: int, wants: Sequence[Want], tiers: Sequence[str]) -> None:
        """Notes blocks of a space for which there is room, and where they lay."""
        self.wants[space] += wants
        self.tiers.update((want.ref, tier) for want, tier in zip(wants, tiers, strict=True))


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

    def end(self, lease: Lease) -> list[Acquired]:
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

    def end_expired(self, now_s: float) -> list[Acquired]:
        """Ends what has run out; what those leases held."""
        expired = [lease for lease in self._leases.values() if lease.expires_s <= now_s]
        return [block for lease in expired for block in self.end(lease)]

    def end_all(self) -> list[Acquired]:
        """Ends every lease; what they held."""
        return [block for lease in list(self._leases.values()) for block in self.end(lease)]

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
