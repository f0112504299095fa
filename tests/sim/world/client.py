"""A client: it serves prompts as an engine does, and sometimes does anything else."""

import asyncio
import random
from collections.abc import Awaitable, Mapping, Sequence

from kvstore.api.errors import KvstoreError
from kvstore.api.hint import Reuse, ReuseHint
from kvstore.matching import needed
from kvstore.node import Matched
from tests.sim.world.calls import Calls, Chain, Question
from tests.sim.world.machine import Machine
from tests.sim.world.neighbours import Neighbours
from tests.sim.world.network import Network
from tests.sim.world.universe import PROMPTS, SCOPES, SPACES

SCOPE_LISTS: Sequence[tuple[str, ...]] = ((), ("",), ("",), ("shared",), ("", "shared"))
DEADLINES_S = (0.03, 0.2, 3.0, 3.0)
LEASES_S = (0.0, 0.05, 0.5, 2.0, 2.0, 100.0)


class Client:
    """Somebody of one tenant who calls any of the nodes."""

    def __init__(
        self,
        name: str,
        tenant: str,
        machines: Sequence[tuple[Machine, Calls]],
        neighbours: Mapping[str, Neighbours],
        network: Network,
        rng: random.Random,
    ) -> None:
        self.name = name
        self.answered = 0
        self.refused = 0
        self._tenant = tenant
        self._machines = machines
        self._neighbours = neighbours
        """By machine: whose arena it may map."""
        self._near = rng.random() < 0.5
        self._network = network
        self._rng = rng
        self._asked: list[tuple[Machine, Calls, Question]] = []
        self._actions = (
            [self.serve_prompt] * 14 + [self.read] * 3 + [self.discard] * 2
            + [self.repeat, self.locate, self.hint, self.clear, self.rewrite, self.hang_up]
        )  # fmt: skip

    async def act(self) -> None:
        """One thing of all that clients do. What the network or a node refuses is no mistake."""
        action = self._rng.choice(self._actions)
        try:
            await action()
        except KvstoreError:
            self.refused += 1
        else:
            self.answered += 1

    # What an engine does.

    async def serve_prompt(self) -> None:
        """Match, read what there is, write the rest, release: or stop anywhere between."""
        machine, calls = self._rng.choice(self._machines)
        question = self._question()
        matched = await self._match(machine, calls, question)
        if question.request_id and self._rng.random() < 0.2:
            matched = await self._match(machine, calls, question)
        lease_id = matched.lease.lease_id if matched.lease is not None else b""
        if self._rng.random() < 0.1:
            await asyncio.sleep(self._rng.random() * 2)
        if self._rng.random() < 0.7:
            await self._read_matched(machine, calls, question, matched, lease_id)
        if self._rng.random() < 0.85:
            await self._write_rest(machine, calls, question, matched.blocks)
        if lease_id and self._rng.random() < 0.6:
            await self._network.ask(
                self.name, machine, "release",
                lambda running, _: calls.release(running, self._tenant, lease_id),
            )  # fmt: skip

    async def repeat(self) -> None:
        """A match that was made before, maybe with another question."""
        if not self._asked:
            return
        machine, calls, question = self._rng.choice(self._asked)
        if self._rng.random() < 0.2:
            other = self._question()
            question = Question(
                question.tenant, other.scopes, other.spaces, other.keys, other.lease_s,
                question.request_id, other.held_blocks, None,
            )  # fmt: skip
        await self._match(machine, calls, question)

    def _question(self) -> Question:
        keys = self._prompt()
        held = self._rng.choice([0, 0, 0, 0, self._rng.randrange(len(keys))])
        request_id = self._rng.choice([b"", self._rng.randbytes(8)])
        return Question(
            self._tenant, self._rng.choice(SCOPE_LISTS), self._spaces(), keys,
            self._rng.choice(LEASES_S), request_id, held, self._hint(),
        )  # fmt: skip

    async def _match(self, machine: Machine, calls: Calls, question: Question) -> Matched:
        if question.request_id or self._rng.random() < 0.3:
            self._asked = [*self._asked[-7:], (machine, calls, question)]
        return await self._network.ask(
            self.name, machine, f"match {question}",
            lambda running, ends_s: calls.match(running, question, ends_s),
            self._rng.choice(DEADLINES_S),
        )  # fmt: skip

    async def _read_matched(
        self,
        machine: Machine,
        calls: Calls,
        question: Question,
        matched: Matched,
        lease_id: bytes,
    ) -> None:
        for space in question.spaces:
            wanted = needed(SPACES[space], matched.blocks)
            keys = tuple(question.keys[at] for at in wanted if at >= question.held_blocks)
            if keys:
                chain = Chain(self._tenant, question.scopes, space, keys)
                await self._read(machine, calls, chain, lease_id)

    async def _read(self, machine: Machine, calls: Calls, chain: Chain, lease_id: bytes) -> None:
        if self._goes_near():
            near = self._neighbours[machine.name]
            await self._maybe_cancelled(
                self._network.ask(
                    self.name, machine, f"read {chain} in place",
                    lambda running, ends_s: near.read(running, self.name, chain, lease_id, ends_s),
                    self._rng.choice(DEADLINES_S),
                )
            )  # fmt: skip
            return
        stop_after = self._rng.choice([100, 100, 100, 1, 2])
        await self._maybe_cancelled(
            self._network.ask(
                self.name, machine, f"read {chain}",
                lambda running, ends_s: calls.read(running, chain, lease_id, stop_after, ends_s),
                self._rng.choice(DEADLINES_S),
            )
        )  # fmt: skip

    async def _write_rest(
        self, machine: Machine, calls: Calls, question: Question, matched: int
    ) -> None:
        scope = question.scopes[0] if question.scopes else ""
        for space in question.spaces:
            chain = Chain(self._tenant, (scope,), space, question.keys[matched:])
            if chain.keys:
                parent = question.keys[matched - 1] if matched else b""
                await self._write(machine, calls, chain, parent, question)
            if chain.keys and self._rng.random() < 0.15:  # The same prompt comes again at once.
                await self._read(machine, calls, chain, b"")

    async def _write(
        self, machine: Machine, calls: Calls, chain: Chain, parent: bytes, question: Question
    ) -> None:
        parent_scope = self._rng.choice(question.scopes or ("",))
        if self._goes_near():
            near = self._neighbours[machine.name]
            await self._maybe_cancelled(
                self._network.ask(
                    self.name, machine, f"write {chain} in place",
                    lambda running, _: near.write(
                        running, self.name, chain, parent, parent_scope, question.hint
                    ),
                )
            )  # fmt: skip
            return
        await self._maybe_cancelled(
            self._network.ask(
                self.name, machine, f"write {chain}",
                lambda running, _: calls.write(running, chain, parent, parent_scope, question.hint),
            )
        )  # fmt: skip

    async def _maybe_cancelled(self, call: Awaitable[object]) -> None:
        """Waits for a call, or loses patience."""
        if self._rng.random() > 0.1:
            await call
            return
        try:
            async with asyncio.timeout(self._rng.random() * self._rng.choice([0.01, 0.1, 1.0])):
                await call
        except TimeoutError:
            return

    def _goes_near(self) -> bool:
        """Whether the next bytes move through the arena; clients do now this, now that."""
        return self._near and self._rng.random() < 0.7

    # What else clients do.

    async def read(self) -> None:
        """Reads blocks that nobody matched."""
        machine, calls = self._rng.choice(self._machines)
        scopes = self._rng.choice(SCOPE_LISTS)
        chain = Chain(self._tenant, scopes, self._rng.choice(self._spaces()), self._prompt())
        await self._read(machine, calls, chain, b"")

    async def rewrite(self) -> None:
        """Writes a whole prompt without asking what is there."""
        machine, calls = self._rng.choice(self._machines)
        question = self._question()
        await self._write_rest(machine, calls, question, 0)

    async def locate(self) -> None:
        """Asks where blocks lie."""
        machine, calls = self._rng.choice(self._machines)
        chain = self._chain()
        await self._network.ask(
            self.name, machine, f"locate {chain}", lambda running, _: calls.locate(running, chain)
        )  # fmt: skip

    async def hint(self) -> None:
        """Says what will become of a chain."""
        machine, calls = self._rng.choice(self._machines)
        chain, hint = self._chain(), ReuseHint(b"session", Reuse.FINAL)
        await self._network.ask(
            self.name, machine, f"hint {chain}",
            lambda running, _: calls.hint(running, chain, hint),
        )  # fmt: skip

    async def discard(self) -> None:
        """Has some blocks of a prompt forgotten."""
        machine, calls = self._rng.choice(self._machines)
        chain = self._chain()
        if self._asked and self._rng.random() < 0.8:
            machine, calls, question = self._rng.choice(self._asked)
            scopes = (self._rng.choice(question.scopes or ("",)),)
            space = self._rng.choice(question.spaces)
            chain = Chain(self._tenant, scopes, space, question.keys)
        some = tuple(key for key in chain.keys if self._rng.random() < 0.3)
        chain = Chain(chain.tenant, chain.scopes, chain.space, some)
        await self._network.ask(
            self.name, machine, f"discard {chain}",
            lambda running, _: calls.discard(running, chain),
        )  # fmt: skip

    async def clear(self) -> None:
        """Has a whole space forgotten."""
        machine, calls = self._rng.choice(self._machines)
        chain = self._chain()
        await self._network.ask(
            self.name, machine, f"clear {chain}",
            lambda running, _: calls.clear(running, chain),
        )  # fmt: skip

    async def hang_up(self) -> None:
        """Lets go of an arena, whatever is under way in it."""
        machine, _ = self._rng.choice(self._machines)
        near = self._neighbours[machine.name]
        await self._network.ask(
            self.name, machine, "hang up", lambda running, _: near.hang_up(running, self.name)
        )  # fmt: skip

    # What it draws.

    def _chain(self) -> Chain:
        scope = self._rng.choice(SCOPES)
        return Chain(self._tenant, (scope,), self._rng.randrange(len(SPACES)), self._prompt())

    def _prompt(self) -> tuple[bytes, ...]:
        prompt = self._rng.choice(PROMPTS)
        return tuple(prompt[: self._rng.randint(1, len(prompt))])

    def _spaces(self) -> tuple[int, ...]:
        return tuple(self._rng.sample(range(len(SPACES)), self._rng.choice([1, 1, 2])))

    def _hint(self) -> ReuseHint | None:
        if self._rng.random() < 0.7:
            return None
        reuse = self._rng.choice(list(Reuse))
        return ReuseHint(self._rng.randbytes(2), reuse, self._rng.randrange(10_000))
