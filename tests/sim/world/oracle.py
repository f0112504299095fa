"""What the store may answer, derived from what was asked of it.

Time in here is a count of events. An event of the store (a block committed, a batch that Redis
carried out) gets its number at the very moment at which it takes effect.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from kvstore.tiers.redis_parts import part_key
from tests.sim.world.redis import RedisServer
from tests.sim.world.universe import Name, needs, ref_of


@dataclass(slots=True)
class Barrier:
    """A discard that was confirmed: it began, and it ended."""

    began: int
    ended: int
    in_redis: bool
    """Whether the node used Redis then; if not, what lay there lies there still."""


@dataclass(slots=True)
class Promise:
    """A lease, and the blocks that it said to keep."""

    lease_id: bytes
    process: str
    tenant: str
    request_id: bytes
    asked: tuple[object, ...]
    granted: int
    expires_s: float
    blocks: set[Name] = field(default_factory=set)
    """Those that were leased; what is only likely is not promised."""
    over: bool = False


class Oracle:
    """Knows what was written, discarded and leased, and so what can be served."""

    def __init__(self) -> None:
        self._events = 0
        self.redis: RedisServer | None = None
        self._written: set[Name] = set()
        self._committed: dict[tuple[str, Name], int] = {}
        self.barriers: dict[str, dict[Name, Barrier]] = {}
        self._forgetting: Counter[tuple[str, str, int, bytes]] = Counter()
        """How many discards of a key, in whatever scope, are under way."""
        self.discards: Counter[str] = Counter()
        """How many discards of a machine are under way."""
        self._forgot: dict[tuple[str, str, int, bytes], int] = {}
        """When the last one ended, in whichever way."""
        self.promises: list[Promise] = []

    def tick(self) -> int:
        """The number of the event that happens now."""
        self._events += 1
        return self._events

    # What happens.

    def committed(self, machine: str, name: Name) -> None:
        """A whole, undamaged block was handed to the node of a machine."""
        self._written.add(name)
        self._committed[machine, name] = self.tick()

    def forgetting(self, machine: str, names: Iterable[Name]) -> int:
        """Blocks are about to be discarded on a machine; when."""
        began = self.tick()
        self.discards[machine] += 1
        for name in names:
            self._forgetting[machine, name.tenant, name.space, name.key] += 1
        return began

    def forgetting_ended(self, machine: str, names: Iterable[Name]) -> None:
        """A discard is over: confirmed, failed or given up."""
        ended = self.tick()
        self.discards[machine] -= 1
        for name in names:
            self._forgetting[machine, name.tenant, name.space, name.key] -= 1
            self._forgot[machine, name.tenant, name.space, name.key] = ended

    def forgotten(self, machine: str, names: Iterable[Name], began: int, *, in_redis: bool) -> None:
        """The node confirmed that it discarded them."""
        ended = self.tick()
        barriers = self.barriers.setdefault(machine, {})
        for name in names:
            barriers[name] = Barrier(began, ended, in_redis)

    # What follows.

    def was_written(self, name: Name) -> bool:
        """Whether anybody ever wrote the block, to any node."""
        return name in self._written

    def may_serve(self, machine: str, name: Name, asked: int) -> bool:
        """Whether a call that began at `asked` may be told of the block, or get it."""
        if name not in self._written:
            return False
        barrier = self.barriers.get(machine, {}).get(name)
        return barrier is None or asked <= barrier.ended or self._came_back(machine, name, barrier)

    def resurrected(self, machine: str, name: Name) -> bool:
        """Whether the block, which lies in memory or on disk now, must not be there.

        A barrier that no longer holds is taken away.
        """
        barrier = self.barriers.get(machine, {}).get(name)
        if barrier is None:
            return False
        if self._came_back(machine, name, barrier):
            del self.barriers[machine][name]
            return False
        return True

    def _came_back(self, machine: str, name: Name, barrier: Barrier) -> bool:
        """Whether it was stored again: by a client here, or in Redis by anybody.

        What this machine itself sent to Redis before the discard ended may arrive after it.
        """
        if self._committed.get((machine, name), 0) > barrier.began:
            return True
        assert self.redis is not None
        sets = self.redis.sets.get(part_key(ref_of(name), 0), {})
        if not barrier.in_redis:
            return bool(sets)
        return any(
            done > barrier.began and (not sender.startswith(machine) or sent < barrier.ended)
            for sender, (sent, done) in sets.items()
        )

    def went_to_redis(self, name: Name) -> bool:
        """Whether anybody ever stored the block there."""
        assert self.redis is not None
        return part_key(ref_of(name), 0) in self.redis.sets

    def was_forgotten(self, machine: str, name: Name) -> bool:
        """Whether anybody ever asked a machine to discard the block."""
        key = (machine, name.tenant, name.space, name.key)
        return bool(self._forgetting[key] or key in self._forgot)

    def still_promised(self, machine: str, promise: Promise, name: Name) -> bool:
        """Whether no block that it needs is being discarded, or was since the grant."""
        keys = [(machine, name.tenant, name.space, key) for key in needs(name.space, name.key)]
        return not any(
            self._forgetting[key] or self._forgot.get(key, 0) > promise.granted for key in keys
        )

    def promise_of(self, process: str, tenant: str, request_id: bytes) -> Promise | None:
        """What an earlier match of a request was granted, as far as it is not over."""
        for promise in self.promises:
            if (promise.process, promise.tenant, promise.request_id) == (
                process, tenant, request_id,
            ):  # fmt: skip
                return promise
        return None

    def end(self, lease_id: bytes) -> None:
        """A lease was released, replaced, or its process is gone."""
        for promise in self.promises:
            promise.over |= promise.lease_id == lease_id
        self.promises = [promise for promise in self.promises if not promise.over]

    def end_process(self, process: str) -> None:
        """All leases of a process are over."""
        self.promises = [promise for promise in self.promises if promise.process != process]
