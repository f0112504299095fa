"""Leases: bounded promises that matched blocks stay in memory. Plain bookkeeping over slots."""

from dataclasses import dataclass, field

from kvstore.api.tier import BlockRef
from kvstore.tiers.tiered import Acquired, Want


@dataclass(slots=True, eq=False)
class Lease:
    """What one Match promised, and to whom. Expiry is on the monotonic clock."""

    lease_id: bytes
    tenant: str
    request_id: bytes
    expires_s: float
    asked: tuple[object, ...]
    """What the Match asked; the same request id and question get the same answer."""
    blocks: int
    wants: list[list[Want]]
    """The blocks that a restore needs, space by space, with their parents."""
    held: list[Acquired] = field(default_factory=list)
    tiers: dict[BlockRef, str] = field(default_factory=dict)
    """Where each matched block lay when it was matched."""
    reserved_bytes: int = 0
    ended: bool = False


class LeaseTable:
    """All leases of a node, together at most `capacity_bytes`.

    Invariant: `leased_bytes` is the sum over live leases, and never above the capacity. Methods
    that end leases return what they held, for the caller to release.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.leased_bytes = 0
        self._leases: dict[bytes, Lease] = {}
        self._requests: dict[tuple[str, bytes], Lease] = {}

    def __len__(self) -> int:
        return len(self._leases)

    def grant(self, lease: Lease) -> None:
        """Makes a lease findable."""
        self._leases[lease.lease_id] = lease
        if lease.request_id:
            self._requests[lease.tenant, lease.request_id] = lease

    def reserve(self, lease: Lease, size: int) -> bool:
        """Takes `size` bytes of the capacity for a lease, if that much is left."""
        if self.leased_bytes + size > self.capacity_bytes:
            return False
        self.leased_bytes += size
        lease.reserved_bytes += size
        return True

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
