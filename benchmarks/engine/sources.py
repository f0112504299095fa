"""Where a worker's blocks come from, changed from one request to the next."""

import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from kvstore.api.space import SpaceDescriptor
from kvstore.api.tier import Loaded
from kvstore_client import Client, Match, Run, Space
from kvstore_client.arena import ArenaMemory
from kvstore_client.in_place import EmptySlot, GivenBlock
from kvstore_client.restore_gate import RestoreGate


class Source:
    """A client that a worker keeps while the one behind it changes.

    It stores only while it is told to: what is stored beside a measurement disturbs the next.
    """

    def __init__(self, client: Client) -> None:
        self.client = client
        """Whom the worker asks now. Its owner closes it."""
        self.stores = True
        self.delay_s = 0.0
        """How long each load waits before it begins: a tier that is slow to answer, simulated."""

    def open_space(self, descriptor: SpaceDescriptor) -> Space:
        return self.client.open_space(descriptor)

    def match(self, spaces: Sequence[Space], keys: Sequence[bytes], **options: Any) -> Match:
        return self.client.match(spaces, keys, **options)

    def load_stream(
        self, space: Space, keys: Sequence[bytes], buffers: Sequence[memoryview], **options: Any
    ) -> Generator[list[Loaded], None, None]:
        time.sleep(self.delay_s)
        yield from self.client.load_stream(space, keys, buffers, **options)

    def store(
        self, space: Space, keys: Sequence[bytes], blocks: Sequence[memoryview], **options: Any
    ) -> list[bool]:
        if not self.stores:
            return [False] * len(keys)
        return self.client.store(space, keys, blocks, **options)

    @property
    def arena(self) -> ArenaMemory | None:
        return self.client.arena

    def write_in_place(
        self, space: Space, keys: Sequence[bytes], held: list[bool], **options: Any
    ) -> Generator[list[EmptySlot], None, None]:
        if self.stores:
            yield from self.client.write_in_place(space, keys, held, **options)

    def read_in_place(
        self, space: Space, keys: Sequence[bytes], **options: Any
    ) -> Generator[list[GivenBlock], None, None]:
        time.sleep(self.delay_s)
        yield from self.client.read_in_place(space, keys, **options)

    def release(self, match: Match) -> None:
        self.client.release(match)

    def close(self) -> None:
        return


class Gates(RestoreGate):
    """A gate for each source, as a worker that has only that one would have it.

    Each learns from all that happens; whether it is asked, is decided here.
    """

    def __init__(self, names: Sequence[str], block_tokens: int, block_bytes: int) -> None:
        super().__init__(block_tokens, block_bytes)
        self._gates = {name: RestoreGate(block_tokens, block_bytes) for name in names}
        self._now = self._gates[names[0]]
        self._asked = False

    @contextmanager
    def decided_by(self, name: str, *, asked: bool) -> Iterator[None]:
        """Blocks come from this source now; all of them, unless its gate is asked."""
        self._now, self._asked = self._gates[name], asked
        try:
            yield
        finally:
            self._asked = False

    def computed(self, tokens: int, seconds: float) -> None:
        for gate in self._gates.values():
            gate.computed(tokens, seconds)

    def loaded(self, tiers: Sequence[str], seconds: float) -> None:
        self._now.loaded(tiers, seconds)

    def worth(self, runs: Sequence[Run], held_blocks: int = 0) -> int:
        if self._asked:
            return self._now.worth(runs, held_blocks)
        return sum(run.blocks for run in runs) - held_blocks
