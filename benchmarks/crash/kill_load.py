"""Clients that write, read, discard and clear until their node is killed under them."""

import asyncio
import random
from collections import Counter, defaultdict
from collections.abc import Mapping

from benchmarks.crash.expected_state import ExpectedState
from benchmarks.tally import Tally
from kvstore.api.errors import KvstoreError
from kvstore.api.tier import BlockRef
from kvstore.api.v1 import kvstore_pb2 as pb
from kvstore_client import AsyncClient, Space
from kvstore_client.watch import Watch
from tests.sim.blocks import data_of, keys_of

WRITERS = 3
CHAINS = 12
MOST_BLOCKS = 40
MOST_AT_ONCE = 8
BEYOND = 2
"""So many keys behind the end of a chain are asked for, too: nobody ever stored them."""
SCRATCH = "scratch"
"""Chains of this name lie in a space of their own, which is cleared now and then."""


class KillLoad:
    """The load on one directory, over many lives of its node."""

    def __init__(self, expected: ExpectedState, spaces: Mapping[bool, Space], tally: Tally) -> None:
        self._expected = expected
        self._spaces = spaces
        self._tally = tally
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._variants: Counter[str] = Counter()
        self.announced: Counter[int] = Counter()
        """Of each segment, how many blocks this life of the node said to be on the device."""

    def space_of(self, chain: str) -> Space:
        """Where a chain lies."""
        return self._spaces[chain.startswith(SCRATCH)]

    async def until_killed(self, client: AsyncClient, rng: random.Random, surface: str) -> None:
        """Loads the node until this is cancelled. Raises KvstoreError if it is gone at once."""
        self.announced.clear()
        sources = [random.Random(rng.random()) for _ in range(WRITERS + 2)]
        events = await client.watch()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._listen(events))
            for writer in range(WRITERS):
                group.create_task(self._write(client, sources[writer], writer))
            group.create_task(self._read(client, sources[-2], surface))
            group.create_task(self._forget(client, sources[-1]))

    async def _listen(self, events: Watch) -> None:
        try:
            async for event in events:
                if isinstance(event, pb.SegmentSealed):
                    self.announced[event.segment_id] += event.blocks
        except KvstoreError:
            return  # The node is gone.

    async def _write(self, client: AsyncClient, rng: random.Random, writer: int) -> None:
        while True:
            number = rng.randrange(writer, CHAINS, WRITERS)
            chain = f"{SCRATCH} {number}" if number < WRITERS else f"chain {number}"
            async with self._locks[chain]:
                await self._extend(client, rng, chain)

    async def _extend(self, client: AsyncClient, rng: random.Random, chain: str) -> None:
        """Writes a run of a chain: what follows its end, or a piece of it again."""
        length = self._expected.length(chain)
        first = length if length < MOST_BLOCKS and rng.random() < 0.7 else rng.randrange(length + 1)
        last = min(first + rng.randrange(1, MOST_AT_ONCE + 1), MOST_BLOCKS)
        if first >= last:
            first = 0
        space, variant, keys = self.space_of(chain), self._variants[chain], keys_of(chain, last)
        self._expected.offered(chain, first, last, variant)
        held = await client.store(
            space,
            keys[first:],
            [content(space, key, variant) for key in keys[first:]],
            parent_key=keys[first - 1] if first else b"",
        )
        self._tally.note("blocks acknowledged", sum(held))
        if not any(held):
            await asyncio.sleep(0.001)  # The node may be gone: do not spin.

    async def _read(self, client: AsyncClient, rng: random.Random, surface: str) -> None:
        while True:
            await asyncio.sleep(0.005)
            if chains := self._expected.chains:
                chain = rng.choice(chains)
                async with self._locks[chain]:
                    await self.check(client, chain, surface)

    async def _forget(self, client: AsyncClient, rng: random.Random) -> None:
        while True:
            await asyncio.sleep(rng.uniform(0.05, 0.4))
            chains = self._expected.chains
            try:
                if rng.random() < 0.15:
                    await self._clear(client)
                elif chains:
                    await self._discard(client, rng, rng.choice(chains))
            except KvstoreError:
                continue  # Not acknowledged: either is right.

    async def _discard(self, client: AsyncClient, rng: random.Random, chain: str) -> None:
        async with self._locks[chain]:
            length = self._expected.length(chain)
            first = rng.randrange(length)
            self._variants[chain] += 1
            await client.discard(self.space_of(chain), keys_of(chain, length)[first:])
            self._expected.forgotten(chain, first, length)
            self._tally.note("blocks discarded", length - first)

    async def _clear(self, client: AsyncClient) -> None:
        chains = sorted(chain for chain in self._expected.chains if chain.startswith(SCRATCH))
        for chain in chains:
            await self._locks[chain].acquire()
        try:
            for chain in chains:
                self._variants[chain] += 1
            await client.clear_space(self._spaces[True])
            for chain in chains:
                self._expected.forgotten(chain, 0, self._expected.length(chain))
            self._tally.note("spaces cleared")
        finally:
            for chain in chains:
                self._locks[chain].release()

    async def check(self, client: AsyncClient, chain: str, surface: str) -> int:
        """How many blocks of a chain Match finds; all that can be read is judged."""
        space = self.space_of(chain)
        keys = keys_of(chain, self._expected.length(chain) + BEYOND)
        matched = (await client.match([space], keys, lease_ms=0)).blocks
        buffers = [bytearray(space.block_bytes) for _ in keys]
        answers = await client.load_any(space, keys, buffers)
        example = f"{chain}, see {self._expected.path}"
        for place, (key, answer) in enumerate(zip(keys, answers, strict=True)):
            if answer is None:
                continue
            self._tally.note(f"blocks read back {surface}")
            allowed = self._expected.may_hold(chain, place)
            known = range(self._variants[chain] + 1)
            variant = next((v for v in known if content(space, key, v) == buffers[place]), None)
            if variant is None:
                self._tally.failed(surface, "wrong bytes", f"{example}, block {place}")
            elif variant not in allowed:
                self._tally.failed(surface, "phantom", f"{example}, block {place}")
        return matched


def content(space: Space, key: bytes, variant: int) -> bytes:
    """What a block of the load contains."""
    return data_of(BlockRef(space.space_id, key), space.block_bytes, variant)
