"""The calls of a node, as its server makes them, and what must hold of each answer.

Everything is judged on the node's side of the network, where nothing is lost on the way.
"""

import asyncio
import random
from collections.abc import Coroutine
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from kvstore.api.errors import InvalidArgument
from kvstore.api.hint import ReuseHint
from kvstore.api.tier import BlockRef
from kvstore.matching import needed
from kvstore.node import Matched
from kvstore.reading import Delivered
from kvstore.tenants import Tenant
from kvstore.writing import Incoming
from tests.sim.world.machine import LOOKUP_S, MAX_LEASE_S, Machine, Running
from tests.sim.world.oracle import Oracle, Promise
from tests.sim.world.trace import Broken, Trace
from tests.sim.world.universe import (
    KEYS,
    SPACE_IDS,
    SPACES,
    VARIANTS,
    Name,
    content,
    digest,
    names_by_ref,
    short,
    variant_of,
)

SLACK_S = 1e-6


@dataclass(frozen=True, slots=True)
class Chain:
    """Part of a prompt, for one tenant."""

    tenant: str
    scopes: tuple[str, ...]
    space: int
    keys: tuple[bytes, ...]

    def __str__(self) -> str:
        keys = " ".join(key[:2].hex() for key in self.keys)
        return f"{self.tenant}/{'+'.join(self.scopes)}/{self.space}: {keys}"

    def names(self, at: int) -> list[Name]:
        """What the block may be: one for each scope."""
        scopes = self.scopes or ("",)
        return [Name(self.tenant, scope, self.space, self.keys[at]) for scope in scopes]


@dataclass(frozen=True, slots=True)
class Question:
    """What a match asks."""

    tenant: str
    scopes: tuple[str, ...]
    spaces: tuple[int, ...]
    keys: tuple[bytes, ...]
    lease_s: float
    request_id: bytes
    held_blocks: int
    hint: ReuseHint | None

    def __str__(self) -> str:
        keys = " ".join(key[:2].hex() for key in self.keys)
        return f"{self.tenant}/{'+'.join(self.scopes)}/{self.spaces}: {keys}, {self.lease_s} s"

    @property
    def asked(self) -> tuple[object, ...]:
        """What must be equal for the same lease to be answered."""
        return (self.spaces, self.keys, self.scopes, self.held_blocks)


class Calls:
    """Calls of one machine's node, checked."""

    def __init__(self, machine: Machine, oracle: Oracle, rng: random.Random, trace: Trace) -> None:
        self._machine = machine
        self._oracle = oracle
        self._rng = rng
        self._trace = trace
        self._loop = asyncio.get_running_loop()

    # Match, release, locate, hint.

    async def match(self, running: Running, question: Question, ends_s: float) -> Matched:
        """A match. What it says to be here was written, and is not forgotten."""
        asked, started_s = self._oracle.tick(), self._loop.time()
        matched = await running.node.match(
            Tenant(question.tenant),
            [SPACE_IDS[space] for space in question.spaces],
            question.keys,
            question.scopes,
            lease_s=question.lease_s,
            request_id=question.request_id,
            held_blocks=question.held_blocks,
            hint=question.hint,
            left_s=lambda: ends_s - self._loop.time(),
        )
        looks = len(question.spaces) * max(1, len(question.scopes))
        self._check_time("match", started_s, min(looks * LOOKUP_S, ends_s - started_s))
        repeated = self._check_repeated(running, question, matched)
        if not repeated:
            for at, space in enumerate(question.spaces):
                self._check_runs(question, space, matched, at, asked)
            self._note_lease(running, question, matched, started_s)
        self._trace.say(f"  matched {matched.blocks}: {_shown(matched)}")
        return matched

    def _check_time(self, what: str, started_s: float, limit_s: float) -> None:
        took_s = self._loop.time() - started_s
        if took_s > max(0.0, limit_s) + SLACK_S:
            raise Broken(f"{what} took {took_s:.3f} s, {limit_s:.3f} s are allowed")

    def _check_repeated(self, running: Running, question: Question, matched: Matched) -> bool:
        """Whether it was the repetition of a match whose lease holds: then it got that lease."""
        if not question.request_id:
            return False
        earlier = self._oracle.promise_of(
            running.process.name, question.tenant, question.request_id
        )
        if earlier is None:
            return False
        if earlier.expires_s <= self._loop.time() or earlier.asked != question.asked:
            self._oracle.end(earlier.lease_id)
            return False
        if matched.lease is None or matched.lease.lease_id != earlier.lease_id:
            raise Broken("a repeated match did not get its lease again")
        return True

    def _check_runs(
        self, question: Question, space: int, matched: Matched, at: int, asked: int
    ) -> None:
        places = [run for run in matched.runs[at] for _ in range(run.blocks)]
        if len(places) != matched.blocks or matched.blocks > len(question.keys):
            raise Broken(f"runs of {len(places)} blocks, {matched.blocks} matched")
        chain = Chain(question.tenant, question.scopes, space, question.keys)
        for block in needed(SPACES[space], matched.blocks):
            if block < question.held_blocks:
                continue
            if not places[block].tier:
                raise Broken(f"block {block} is needed, and lies nowhere")
            names = chain.names(block)
            if not any(self._oracle.may_serve(self._machine.name, n, asked) for n in names):
                raise Broken(f"matched {short(names[0])}, which cannot be here")

    def _note_lease(
        self, running: Running, question: Question, matched: Matched, started_s: float
    ) -> None:
        lease = matched.lease
        if lease is None:
            return
        least_s = started_s + min(question.lease_s, MAX_LEASE_S)
        if lease.expires_s < least_s - 1e-6:
            raise Broken(f"a lease until {lease.expires_s}, which should be {least_s} or later")
        promise = Promise(
            lease.lease_id, running.process.name, question.tenant, question.request_id,
            question.asked, self._oracle.tick(), lease.expires_s,
        )  # fmt: skip
        for space, runs, wants in zip(question.spaces, matched.runs, lease.wants, strict=True):
            leased = [run.leased for run in runs for _ in range(run.blocks)]
            needs = needed(SPACES[space], matched.blocks)
            # A lease names what it has room for, and that is where the needed blocks begin.
            tail = [leased[at] for at in needs if at >= question.held_blocks]
            promise.blocks |= {
                names_by_ref()[want.ref] for want, kept in zip(wants, tail, strict=False) if kept
            }
            if any(tail[len(wants) :]):
                raise Broken("leased is said to be what the lease does not name")
        self._oracle.promises.append(promise)

    async def release(self, running: Running, tenant: str, lease_id: bytes) -> None:
        """Ends a lease."""
        if any(p.lease_id == lease_id and p.tenant == tenant for p in self._oracle.promises):
            self._oracle.end(lease_id)
        running.node.release(Tenant(tenant), lease_id)

    async def locate(self, running: Running, chain: Chain) -> list[str | None]:
        """Where blocks lie, renewing nothing."""
        asked, started_s = self._oracle.tick(), self._loop.time()
        places = await running.node.tiers.locate(self._refs(running, chain))
        self._check_time("locate", started_s, LOOKUP_S)
        for at, place in enumerate(places):
            name = chain.names(at)[0]
            if place and not self._oracle.may_serve(self._machine.name, name, asked):
                raise Broken(f"located {short(name)} in {place}, which cannot be here")
        return places

    async def hint(self, running: Running, chain: Chain, hint: ReuseHint) -> None:
        """What a caller says of a chain's future."""
        space_id = SPACE_IDS[chain.space]
        running.node.hint(Tenant(chain.tenant), chain.scopes[0], space_id, chain.keys, hint)

    def _refs(self, running: Running, chain: Chain) -> list[BlockRef]:
        space_id = SPACE_IDS[chain.space]
        return running.node.refs(Tenant(chain.tenant), chain.scopes[0], space_id, chain.keys)

    # Read.

    async def read(
        self, running: Running, chain: Chain, lease_id: bytes, stop_after: int, ends_s: float
    ) -> list[bool]:
        """Reads blocks, at the pace of a slow client; which of them came."""
        asked, started_s = self._oracle.tick(), self._loop.time()
        came: list[bool] = []
        blocks = running.node.read(
            Tenant(chain.tenant), chain.scopes, SPACE_IDS[chain.space], chain.keys, lease_id,
            left_s=lambda: ends_s - self._loop.time(),
        )  # fmt: skip
        async with aclosing(blocks):
            async for block in blocks:
                if not came:
                    self._check_time("read", started_s, ends_s - started_s)
                if block.index != len(came):
                    raise Broken(f"block {block.index} came instead of {len(came)}")
                came.append(block.view is not None)
                if block.view is not None:
                    await self._take(chain, block, asked)
                elif self._loop.time() < ends_s:
                    self._check_missing(chain, block.index, lease_id)
                if len(came) == stop_after:
                    break
        if len(came) != min(len(chain.keys), stop_after):
            raise Broken(f"{len(came)} blocks came of {len(chain.keys)}")
        return came

    async def _take(self, chain: Chain, block: Delivered, asked: int) -> None:
        self._check_delivered(chain, block, asked)
        if self._rng.random() < 0.1:
            await asyncio.sleep(self._rng.random() * 0.1)
            self._check_delivered(chain, block, asked)

    def _check_delivered(self, chain: Chain, block: Delivered, asked: int) -> None:
        assert block.view is not None
        for name in chain.names(block.index):
            variant = variant_of(name, block.view)
            if variant is not None and block.digest == digest(name, variant):
                if not self._oracle.may_serve(self._machine.name, name, asked):
                    raise Broken(f"served {short(name)} from {block.tier}: it cannot be here")
                return
        raise Broken(f"wrong bytes of {short(chain.names(block.index)[0])} from {block.tier}")

    def _check_missing(self, chain: Chain, at: int, lease_id: bytes) -> None:
        for promise in self._oracle.promises:
            if promise.lease_id != lease_id or promise.expires_s <= self._loop.time():
                continue
            for name in promise.blocks.intersection(chain.names(at)):
                if self._oracle.still_promised(self._machine.name, promise, name):
                    raise Broken(f"{short(name)} is leased and was not delivered")

    # Write.

    async def write(
        self,
        running: Running,
        chain: Chain,
        parent_key: bytes = b"",
        parent_scope: str = "",
        hint: ReuseHint | None = None,
        *,
        clumsy: bool = True,
    ) -> list[int]:
        """Writes what the node wants of a run, in pieces; what it holds in the end.

        A clumsy writer makes mistakes, sends damaged blocks and dawdles.
        """
        asked = self._oracle.tick()
        offer = await running.node.offer(
            Tenant(chain.tenant),
            chain.scopes[0],
            SPACE_IDS[chain.space],
            chain.keys,
            parent_key=parent_key,
            parent_scope=parent_scope,
            hint=hint,
        )
        incoming = Incoming(offer, running.node.metrics)
        try:
            for at in incoming.held:
                name = chain.names(at)[0]
                if not self._oracle.may_serve(self._machine.name, name, asked):
                    raise Broken(
                        f"{running.process.name} said to hold {short(name)}: it cannot be here"
                    )
            for at in incoming.wanted:
                if clumsy and self._rng.random() < 0.05:
                    await self._misbehave(incoming, at)
                await self._write_block(incoming, at, chain.names(at)[0], clumsy)
            incoming.finish()
            return incoming.held
        finally:
            incoming.close()

    async def _write_block(self, incoming: Incoming, at: int, name: Name, clumsy: bool) -> None:
        variant = self._rng.randrange(VARIANTS)
        data = bytearray(content(name, variant))
        await incoming.begin_block(at, len(data), digest(name, variant))
        damaged = clumsy and self._rng.random() < 0.05
        if damaged:
            data[self._rng.randrange(len(data))] ^= 1 << self._rng.randrange(8)
        cut = self._rng.choice([0, 0, len(data) // 2, self._rng.randrange(len(data))])
        if cut and clumsy:
            incoming.add(at, bytes(data[:cut]))
            await asyncio.sleep(self._rng.random() * self._rng.choice([0.001, 0.2]))
        incoming.add(at, bytes(data[cut if clumsy else 0 :]))
        if at in incoming.held:
            if damaged:
                raise Broken(f"a damaged copy of {short(name)} was taken")
            self._oracle.committed(self._machine.name, name)
            self._trace.say(f"{self._loop.time():.6f} {self._machine.name} took {short(name)}")

    async def _misbehave(self, incoming: Incoming, at: int) -> None:
        """Sends what does not fit the offer; the node must say so, and go on."""
        try:
            await incoming.begin_block(at, 1, bytes(16))
        except InvalidArgument:
            return
        raise Broken("a block of another length was accepted")

    # Discard.

    async def discard(self, running: Running, chain: Chain) -> int:
        """Forgets blocks; once that is confirmed they stay forgotten."""
        names = [chain.names(at)[0] for at in range(len(chain.keys))]
        refs = self._refs(running, chain)
        return await self._forget(running, f"{chain}", names, running.node.tiers.discard(refs))

    async def clear(self, running: Running, chain: Chain) -> int:
        """Forgets all blocks of a tenant in a space and scope."""
        names = [Name(chain.tenant, chain.scopes[0], chain.space, key) for key in KEYS]
        clearing = running.node.clear_space(
            Tenant(chain.tenant), chain.scopes[0], SPACE_IDS[chain.space]
        )
        return await self._forget(running, f"all of {chain}", names, clearing)

    async def _forget(
        self,
        running: Running,
        what: str,
        names: list[Name],
        forgetting: Coroutine[Any, Any, int],
    ) -> int:
        name = self._machine.name
        self._trace.say(f"{self._loop.time():.6f} {name} forgets {what}")
        began = self._oracle.forgetting(name, names)
        self._machine.ledger.forgetting(names)
        try:
            count = await forgetting
        finally:
            self._oracle.forgetting_ended(name, names)
        self._oracle.forgotten(name, names, began, in_redis=running.limits.redis)
        self._machine.ledger.forgotten(names)
        return count


def _shown(matched: Matched) -> str:
    runs = [[f"{r.blocks} {r.tier}{'!' * r.leased}" for r in runs] for runs in matched.runs]
    return f"{runs}{' leased' if matched.lease else ''}"
