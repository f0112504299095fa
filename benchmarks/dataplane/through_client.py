"""Our own path from an engine to a node: `AsyncClient`, whatever carries the bytes.

Which path that is follows from the arguments of the client. A client that knows no argument for a
path cannot be asked for it, and the row says so.
"""

import hashlib
import inspect
from pathlib import Path
from typing import Any, Self

from benchmarks.dataplane.plan import MATCH
from benchmarks.dataplane.ring import Ring
from kvstore.api.space import SpaceDescriptor
from kvstore_client import AsyncClient, Budgets, Match, Space

PATIENT = Budgets(open_s=60, match_s=60, load_s=60, store_s=60, control_s=60)
"""Nothing is a miss here only because the machine is busy."""
LEASE_MS = 30_000
ARGUMENTS = {"shm": "shared_memory", "bulk": "bulk"}
"""The argument of the client that allows a path, or forbids it. gRPC is what is left."""


class NotThisWay(Exception):
    """When a path cannot be had, or the bytes went another way; the message says why."""


def arguments_for(path: str) -> dict[str, bool]:
    """What to construct a client with, so that it takes this path. Raises `NotThisWay`."""
    known = inspect.signature(AsyncClient).parameters
    own = ARGUMENTS.get(path)
    if own is not None and own not in known:
        raise NotThisWay(f"AsyncClient has no argument {own}: this version has no such path")
    return {name: name == own for name in ARGUMENTS.values() if name in known}


class ThroughClient:
    """Stores and loads the blocks of a ring, which nobody else stores, in a space of its own."""

    knob = 0

    def __init__(self, ring: Ring, client: AsyncClient, space: Space, path: str) -> None:
        self._ring = ring
        self._client = client
        self.space = self._space = space
        self._path = path
        self.keys = self._keys = [
            hashlib.sha256(space.space_id + place.to_bytes(8, "little")).digest()
            for place in range(ring.blocks)
        ]
        self._filled_for = ""
        self._lease: Match | None = None

    @classmethod
    async def connect(cls, ring: Ring, owner: int, path: str, endpoint: str) -> Self:
        """A client of its own, and a space that is open."""
        arguments: dict[str, Any] = {**arguments_for(path)}
        client = AsyncClient(endpoint, budgets=PATIENT, **arguments)
        descriptor = SpaceDescriptor(
            model="dataplane", revision="1", dtype="uint8", layout=path, block_tokens=1,
            block_bytes=ring.block_bytes, tp_rank=owner, tp_size=owner + 1,
        )  # fmt: skip
        return cls(ring, client, await client.open_space(descriptor), path)

    async def prepare(self, op: str) -> None:
        """Before a put the node has none of the blocks; before all else it has all of them."""
        if op == "put":
            await self._client.clear_space(self._space)
        elif self._filled_for != op:
            await self._client.clear_space(self._space)
            await self._fill(as_one_chain=op == MATCH)
        self._filled_for = op
        self._check_path()

    async def put(self, places: range) -> None:
        """Each call is one run, and the start of its chain."""
        blocks = self._ring.sources(places)
        held = await self._client.store(self._space, self._keys_of(places), blocks)
        if not all(held):
            raise NotThisWay(f"{held.count(False)} blocks were not taken: {self._losses()}")

    async def get(self, places: range) -> None:
        """Into the buffers of the ring."""
        buffers = self._ring.targets(places)
        loaded = await self._client.load(self._space, self._keys_of(places), buffers)
        if len(loaded) != len(places):
            raise NotThisWay(f"{len(places) - len(loaded)} blocks were missed: {self._losses()}")

    async def match(self, places: range) -> None:
        """The whole chain, under a lease."""
        keys = self._keys_of(places)
        self._lease = await self._client.match([self._space], keys, lease_ms=LEASE_MS)
        leased = all(run.leased for row in self._lease.spaces for run in row)
        if self._lease.blocks != len(places) or not leased:
            raise NotThisWay(f"{self._lease.blocks} blocks were matched: {self._losses()}")

    async def tidy(self, places: range) -> None:
        """Gives the lease of a match back."""
        if self._lease is not None:
            await self._client.release(self._lease)
            self._lease = None

    async def lend(self) -> list[memoryview]:
        """Stores all blocks anew; the slots in which they lie until they are cleared.

        Their digests are computed by then. Nothing is evicted here, so that whoever writes the
        same bytes again, or reads, needs no pin.
        """
        await self._client.clear_space(self._space)
        self._check_path()
        held, slots = [False] * self._ring.blocks, dict[int, memoryview]()
        writing = await self._client.write_in_place(self._space, self._keys, held)
        while writing is not None and (given := await writing.step()):
            for place, slot in given:
                slot[:] = self._ring.source(range(place, place + 1))
                slots[place] = slot
        await self.get(range(self._ring.blocks))
        return [slots[place] for place in range(self._ring.blocks)]

    async def close(self) -> None:
        """Leaves the node without these blocks."""
        try:
            await self._client.clear_space(self._space)
        finally:
            await self._client.close()

    async def _fill(self, *, as_one_chain: bool) -> None:
        step = self._ring.blocks if as_one_chain else 1
        for places in self._ring.calls(step):
            await self.put(places)

    def _check_path(self) -> None:
        """A client falls back by itself; then the row would speak of another path.

        The memory of a node is a memfd. Who shares it has it among his mappings.
        """
        if self._path == "shm" and "/memfd:" not in Path("/proc/self/maps").read_text():
            raise NotThisWay("the client has not attached the node's memory")
        if self._path == "bulk" and not self._client.bulk_connections:
            raise NotThisWay("the client has no bulk connection to the node")

    def _keys_of(self, places: range) -> list[bytes]:
        return self._keys[places.start : places.stop]

    def _losses(self) -> dict[str, int]:
        return dict(self._client.counters)
