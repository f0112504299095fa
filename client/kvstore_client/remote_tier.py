"""A node as a tier: what a worker's VRAM pool sits on."""

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from kvstore.api.errors import KvstoreError, TierError
from kvstore.api.keys import KEY_BYTES
from kvstore.api.space import SpaceDescriptor
from kvstore.api.tier import Block, BlockRef, Load, Loaded, Usage
from kvstore.api.wire import MAX_KEYS
from kvstore_client.async_client import AsyncClient
from kvstore_client.budgets import Deadline
from kvstore_client.losses import describe
from kvstore_client.space import Space

Ask = Callable[[Space, Sequence[int]], Awaitable[None]]
"""What to do with the blocks of one space, given their places in the batch."""


@dataclass(slots=True)
class ChainRun:
    """Blocks of one batch that follow each other in one chain, and where they stood in it."""

    parent_key: bytes
    """Of the first block; empty: it starts the chain."""
    places: list[int] = field(default_factory=list)


class RemoteTier:
    """`kvstore.api.tier.Tier` over a client; namespaces are space ids, batches may mix spaces.

    Blocks of a space that is not among `descriptors`, and buffers of another length than the
    space's blocks, are misses. `locate`, `wants`, `load` and `store` raise nothing: for an engine
    a node out of reach is a miss. `discard` and `clear` raise `TierError`, because who asks for
    oblivion has to know. The client stays its owner's, who closes it.

    However many spaces, runs and messages a batch makes, it has the budget of one call.
    """

    def __init__(
        self, client: AsyncClient, descriptors: Sequence[SpaceDescriptor], name: str = "remote"
    ) -> None:
        self._client = client
        self._name = name
        # A node that has not opened one of them says so, and the client opens it then.
        self._spaces = {descriptor.space_id: Space.of(descriptor) for descriptor in descriptors}

    @property
    def name(self) -> str:
        """See `Tier`."""
        return self._name

    async def locate(self, refs: Sequence[BlockRef]) -> list[str | None]:
        """The tiers of the node in which the blocks lie; its private scope only."""
        answers: list[str | None] = [None] * len(refs)
        deadline = Deadline(self._client.clock, self._client.budgets.match_s)

        async def ask(space: Space, places: Sequence[int]) -> None:
            try:
                tiers = await self._client.locate(
                    space,
                    [refs[place].key for place in places],
                    budget_s=deadline.rest_s(),
                )
            except KvstoreError:
                self._client.counters["locate_failed"] += 1
                return
            for place, tier in zip(places, tiers, strict=True):
                answers[place] = tier

        await self._in_each_space(refs, ask)
        return answers

    async def wants(self, refs: Sequence[BlockRef]) -> list[bool]:
        """True for each block of a known space that is not there; False if the node is gone."""
        tiers = await self.locate(refs)
        connected = self._client.connected
        return [
            connected and tier is None and ref.namespace in self._spaces
            for ref, tier in zip(refs, tiers, strict=True)
        ]

    async def load(self, loads: Sequence[Load]) -> list[Loaded | None]:
        """See `Tier`. Each answer names the node's tier."""
        answers: list[Loaded | None] = [None] * len(loads)
        deadline = Deadline(self._client.clock, self._client.budgets.load_s)

        async def ask(space: Space, places: Sequence[int]) -> None:
            fitting = [p for p in places if loads[p].into.nbytes == space.block_bytes]
            loaded = await self._client.load_any(
                space,
                [loads[p].ref.key for p in fitting],
                [loads[p].into for p in fitting],
                budget_s=deadline.rest_s(),
            )
            for place, answer in zip(fitting, loaded, strict=True):
                answers[place] = answer

        await self._in_each_space([load.ref for load in loads], ask)
        return answers

    async def store(self, blocks: Sequence[Block]) -> list[bool]:
        """See `Tier`. Blocks that follow each other travel as one run."""
        held = [False] * len(blocks)
        deadline = Deadline(self._client.clock, self._client.budgets.store_s)

        async def ask(space: Space, places: Sequence[int]) -> None:
            fitting = [p for p in places if blocks[p].data.nbytes == space.block_bytes]
            # One after the other: a run may hang on a block of the one before it.
            for run in chain_runs(blocks, fitting):
                rest_s = deadline.rest_s()
                chosen = [blocks[place] for place in run.places]
                answers = await self._client.store(
                    space,
                    [block.ref.key for block in chosen],
                    [block.data for block in chosen],
                    parent_key=run.parent_key,
                    digests=[block.digest for block in chosen],
                    budget_s=rest_s,
                )
                for place, answer in zip(run.places, answers, strict=True):
                    held[place] = answer
                if rest_s <= 0:
                    return  # This one was counted as late, and stands for those behind it.

        await self._in_each_space([block.ref for block in blocks], ask)
        return held

    async def discard(self, refs: Sequence[BlockRef]) -> int:
        """See `Tier`. Raises `TierError` if the node cannot be asked."""
        copies = 0

        async def ask(space: Space, places: Sequence[int]) -> None:
            nonlocal copies
            try:
                copies += await self._client.discard(space, [refs[p].key for p in places])
            except KvstoreError as error:
                raise TierError(f"{self._name}: discard: {describe(error)}") from error

        await self._in_each_space(refs, ask)
        return copies

    async def clear(self, namespace: bytes) -> int:
        """See `Tier`. Raises `TierError` if the node cannot be asked."""
        space = self._spaces.get(namespace)
        if space is None:
            return 0
        try:
            return await self._client.clear_space(space)
        except KvstoreError as error:
            raise TierError(f"{self._name}: clear: {describe(error)}") from error

    def usage(self) -> list[Usage]:
        """One entry without sizes: those are the node's, see `AsyncClient.status`."""
        return [Usage(self._name, 0, 0, 0, self._client.connected)]

    async def close(self) -> None:
        """Nothing to let go of: the client stays its owner's."""

    async def _in_each_space(self, refs: Sequence[BlockRef], ask: Ask) -> None:
        places: dict[bytes, list[int]] = defaultdict(list)
        for place, ref in enumerate(refs):
            if ref.namespace in self._spaces and len(ref.key) == KEY_BYTES:
                places[ref.namespace].append(place)

        async def ask_in_order(namespace: bytes) -> None:
            of_space = places[namespace]
            for start in range(0, len(of_space), MAX_KEYS):
                await ask(self._spaces[namespace], of_space[start : start + MAX_KEYS])

        await asyncio.gather(*(ask_in_order(namespace) for namespace in places))


def chain_runs(blocks: Sequence[Block], places: Sequence[int]) -> list[ChainRun]:
    """The blocks at `places` as runs, each of which hangs on an earlier one or on none of these.

    A block extends a run if its parent is the run's last block so far; a second child of the same
    parent starts a run of its own.
    """
    runs: list[ChainRun] = []
    ends: dict[bytes, ChainRun] = {}
    for place in places:
        block = blocks[place]
        parent_key = block.parent.key if block.parent else b""
        run = ends.pop(parent_key, None) if parent_key else None
        if run is None:
            run = ChainRun(parent_key)
            runs.append(run)
        run.places.append(place)
        ends[block.ref.key] = run
    return runs
