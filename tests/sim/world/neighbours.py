"""Calls of clients that have mapped a node's arena, and what must hold of what they find there.

Such a client writes and reads slots himself, at his own pace, for as long as he says nothing; only
the end of his connection gives back what he holds.
"""

import asyncio
import random
from collections import deque
from contextlib import suppress
from itertools import count

from kvstore.api.hint import ReuseHint
from kvstore.attachment import Attachment
from kvstore.offer import Offer
from kvstore.placing import Placing
from kvstore.tenants import Tenant
from kvstore.tiers.memory import Slot
from kvstore.tiers.tiered import Acquired
from tests.sim.world.calls import Chain
from tests.sim.world.machine import Machine, Running
from tests.sim.world.oracle import Oracle
from tests.sim.world.trace import Broken, Trace
from tests.sim.world.universe import (
    SPACE_IDS,
    SPACES,
    VARIANTS,
    Name,
    content,
    digest,
    short,
    variant_of,
)

_numbers = count(1)


class Neighbours:
    """The attached clients of one machine's node, checked."""

    def __init__(self, machine: Machine, oracle: Oracle, rng: random.Random, trace: Trace) -> None:
        self._machine = machine
        self._oracle = oracle
        self._rng = rng
        self._trace = trace
        self._loop = asyncio.get_running_loop()

    async def write(
        self,
        running: Running,
        client: str,
        chain: Chain,
        parent_key: bytes,
        parent_scope: str,
        hint: ReuseHint | None,
    ) -> list[int]:
        """Fills slots with what the node wants of a run; what it holds in the end."""
        attachment = self._attachment(running, client)
        offer = await running.node.offer(
            Tenant(chain.tenant), chain.scopes[0], SPACE_IDS[chain.space], chain.keys,
            parent_key=parent_key, parent_scope=parent_scope, hint=hint,
        )  # fmt: skip
        self._overhear(offer, chain)
        number = next(_numbers)
        try:
            slots, held, _ = await attachment.begin_write(number, Placing(offer))
            empty, filled = deque(slots), 0
            while empty or filled:
                if empty:
                    await self._fill_next(empty, chain)
                    filled += 1
                if empty and self._rng.random() < 0.7:
                    continue
                committing = asyncio.create_task(attachment.commit(number, filled))
                filled = 0
                try:
                    if empty:  # As clients do it: the node takes the others meanwhile.
                        await self._fill_next(empty, chain)
                        filled = 1
                    slots, held, _ = await committing
                finally:
                    # As the node does it: nothing of a write goes on behind its end.
                    while not committing.done():
                        committing.cancel()
                        with suppress(asyncio.CancelledError):
                            await asyncio.wait([committing])
                empty += slots
            return held
        finally:
            attachment.done(number)

    async def _fill_next(self, empty: deque[tuple[int, Slot]], chain: Chain) -> None:
        at, slot = empty.popleft()
        await self._fill(slot, chain.names(at)[0])

    async def _fill(self, slot: Slot, name: Name) -> None:
        data = content(name, self._rng.randrange(VARIANTS))
        half = self._rng.choice([0, len(data) // 2])
        slot.view[:half] = data[:half]
        if half:
            await asyncio.sleep(self._rng.random() * self._rng.choice([0.001, 0.2]))
        slot.view[half:] = data[half:]

    def _overhear(self, offer: Offer, chain: Chain) -> None:
        """Notes what the node takes at the moment at which it does."""
        commit = offer.commit

        def noted(index: int, slot: Slot, digest: bytes) -> Slot | None:
            kept = commit(index, slot, digest)
            if kept is not None:
                name = chain.names(index)[0]
                self._oracle.committed(self._machine.name, name)
                self._trace.say(f"{self._loop.time():.6f} {self._machine.name} got {short(name)}")
            return kept

        offer.commit = noted  # type: ignore[method-assign]

    async def read(
        self, running: Running, client: str, chain: Chain, lease_id: bytes, ends_s: float
    ) -> int:
        """Reads blocks where they lie, slowly; how many came."""
        asked, number = self._oracle.tick(), next(_numbers)
        attachment = self._attachment(running, client)

        def left_s() -> float:
            return ends_s - self._loop.time()

        reading = await running.node.reading(
            Tenant(chain.tenant), chain.scopes, SPACE_IDS[chain.space], chain.keys, lease_id,
            left_s=left_s,
        )  # fmt: skip
        try:
            block_bytes = SPACES[chain.space].block_bytes
            window, last = await attachment.begin_read(number, reading, block_bytes, left_s)
            given = list(window)
            while not last:
                # As clients do it: the next window comes while this one is still being copied.
                following, last = await attachment.next_window(number, left_s)
                await self._copy(window, chain, len(given) - len(window), asked)
                window = following
                given += window
            await self._copy(window, chain, len(given) - len(window), asked)
            if len(given) != len(chain.keys):
                raise Broken(f"{len(given)} blocks were answered of {len(chain.keys)}")
            return sum(block is not None for block in given)
        finally:
            attachment.done(number)

    async def _copy(
        self, window: list[Acquired | None], chain: Chain, first: int, asked: int
    ) -> None:
        for at, block in enumerate(window, start=first):
            if block is None:
                continue
            if self._rng.random() < 0.3:
                await asyncio.sleep(self._rng.random() * self._rng.choice([0.01, 1.0]))
            self._check_given(block, chain, at, asked)

    def _check_given(self, block: Acquired, chain: Chain, at: int, asked: int) -> None:
        for name in chain.names(at):
            variant = variant_of(name, block.slot.view)
            if variant is not None and block.slot.digest == digest(name, variant):
                if not self._oracle.may_serve(self._machine.name, name, asked):
                    raise Broken(f"gave {short(name)}: it cannot be here")
                return
        raise Broken(f"wrong bytes of {short(chain.names(at)[0])} in the arena")

    async def hang_up(self, running: Running, client: str) -> None:
        """The client is gone: what he did ends, and everything comes back."""
        attachment = running.attached.pop(client, None)
        calls = running.attached_calls.pop(client, set()) - {asyncio.current_task()}
        for call in calls:
            call.cancel()
        if calls:
            await asyncio.wait(calls)
        if attachment is not None:
            attachment.end()
            if attachment.held_bytes:
                raise Broken(f"{attachment.held_bytes} bytes are held by a client who is gone")

    def _attachment(self, running: Running, client: str) -> Attachment:
        """The client's; whoever has none attaches."""
        call = asyncio.current_task()
        assert call is not None
        calls = running.attached_calls.setdefault(client, set())
        calls.add(call)
        call.add_done_callback(calls.discard)
        if client not in running.attached:
            running.attached[client] = Attachment(running.node.tiers, running.room)
        return running.attached[client]
