"""Moves pages between SGLang's host pool and the node.

node on this host    its memory ◄─ one copy ─► pool
node elsewhere       connection ◄─► scratch ◄─ one copy ─► pool
page of one part     connection ◄─► pool
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress

import numpy as np

from kvstore.api.digest import BlockDigest
from kvstore.api.errors import KvstoreError
from kvstore.api.tier import Loaded
from kvstore_client.budgets import Deadline
from kvstore_client.client import Client
from kvstore_client.match import Match
from kvstore_client.sglang.pages import Bytes, Parts, gather, scatter
from kvstore_client.space import Space

FORGETTER = "kvstore-forget"
"""The name of the thread that tells the node of a damaged page."""
SCRATCH_BYTES = 32 << 20
"""Of each thread of SGLang's that moves pages, unless one block is larger."""


class _Corrupt(Exception):
    """A page is not what its writer stored."""


class PageTransfers:
    """Any thread may call, and copies in its own time. Nothing here raises or outlasts its budget
    by more than one copy; after a call returned nothing touches the pages it was given."""

    def __init__(self, client: Client, scope: str, scratch_bytes: int = SCRATCH_BYTES) -> None:
        self._client = client
        self._scratch_bytes = scratch_bytes
        self._scope = scope
        self._own = threading.local()
        self._under_way = 0
        self._closing = False
        self._changed = threading.Condition()
        """Guards both."""

    def store(
        self,
        space: Space,
        keys: Sequence[bytes],
        pages: Sequence[Parts],
        parent_key: bytes,
        deadline: Deadline,
    ) -> list[bool]:
        """True for each page of one run of a chain that the node holds afterwards."""
        with self._entered() as may_copy:
            if not may_copy:
                return [False] * len(keys)
            return self._store(space, keys, pages, parent_key, deadline)

    def _store(
        self,
        space: Space,
        keys: Sequence[bytes],
        pages: Sequence[Parts],
        parent_key: bytes,
        deadline: Deadline,
    ) -> list[bool]:
        held = self._write_in_place(space, keys, pages, parent_key, deadline)
        step = self._batch(space, pages)
        for at in range(0, len(keys), step):
            batch = slice(at, at + step)
            if all(held[batch]):
                parent_key = keys[batch][-1]
                continue
            if deadline.rest_s() <= 0:
                break
            held[batch] = self._client.store(
                space,
                keys[batch],
                [block.data for block in self._gathered(pages[batch], space)],
                parent_key=parent_key,
                parent_scope=self._scope,
                scope=self._scope,
                budget_s=deadline.rest_s(),
            )
            if not all(held[batch]):
                break  # What follows would be orphans.
            parent_key = keys[batch][-1]
        return held

    def load(
        self,
        space: Space,
        keys: Sequence[bytes],
        pages: Sequence[Parts],
        lease: Match | None,
        deadline: Deadline,
    ) -> list[str]:
        """The tier of each leading page that arrived whole and intact.

        The others hold undefined bytes.
        """
        tiers: list[str] = []
        with self._entered() as may_copy, suppress(_Corrupt):
            if not may_copy:
                return tiers
            self._read_in_place(space, keys, pages, lease, deadline, tiers)
            step = self._batch(space, pages)
            while len(tiers) < len(keys) and deadline.rest_s() > 0:
                batch = slice(len(tiers), len(tiers) + step)
                self._receive(space, keys[batch], pages[batch], lease, deadline, tiers)
                if len(tiers) < min(batch.stop, len(keys)):
                    break
        return tiers

    def close(self) -> None:
        """Begins nothing more and waits for what is under way: its copies go to memory that the
        node takes back when the client hangs up. Idempotent."""
        with self._changed:
            self._closing = True
            self._changed.wait_for(lambda: not self._under_way)

    @contextmanager
    def _entered(self) -> Iterator[bool]:
        """Whether the client stays open as long as this is not left."""
        with self._changed:
            may_copy = not self._closing
            self._under_way += may_copy
        try:
            yield may_copy
        finally:
            with self._changed:
                self._under_way -= may_copy
                self._changed.notify_all()

    def _write_in_place(
        self,
        space: Space,
        keys: Sequence[bytes],
        pages: Sequence[Parts],
        parent_key: bytes,
        deadline: Deadline,
    ) -> list[bool]:
        held = [False] * len(keys)
        steps = self._client.write_in_place(
            space,
            keys,
            held,
            parent_key=parent_key,
            parent_scope=self._scope,
            scope=self._scope,
            budget_s=deadline.rest_s(),
        )
        with closing(steps):
            for slots in steps:
                for slot in slots:
                    gather(pages[slot.place], np.frombuffer(slot.view, np.uint8))
                if deadline.rest_s() <= 0:
                    break
        return held

    def _read_in_place(
        self,
        space: Space,
        keys: Sequence[bytes],
        pages: Sequence[Parts],
        lease: Match | None,
        deadline: Deadline,
        tiers: list[str],
    ) -> None:
        steps = self._client.read_in_place(
            space, keys, scopes=(self._scope,), lease=lease, budget_s=deadline.rest_s()
        )
        with closing(steps):
            for given in steps:
                for block in given:
                    place = len(tiers)
                    scatter(np.frombuffer(block.view, np.uint8), pages[place])
                    self._check(space, keys[place], pages[place], block.loaded)
                    tiers.append(block.loaded.tier)
                if deadline.rest_s() <= 0:
                    break

    def _receive(
        self,
        space: Space,
        keys: Sequence[bytes],
        pages: Sequence[Parts],
        lease: Match | None,
        deadline: Deadline,
        tiers: list[str],
    ) -> None:
        """Pages are filled as their blocks come, while later ones are still on their way."""
        direct = len(pages[0]) == 1
        blocks = [parts[0] for parts in pages] if direct else self._scratch(len(keys), space)
        steps = self._client.load_stream(
            space,
            keys,
            [block.data for block in blocks],
            scopes=(self._scope,),
            lease=lease,
            budget_s=deadline.rest_s(),
        )
        arrived = zip(keys, blocks, pages, strict=True)
        with closing(steps):
            for step in steps:
                for loaded in step:
                    key, block, parts = next(arrived)
                    if not direct:
                        scatter(block, parts)
                    self._check(space, key, parts, loaded)
                    tiers.append(loaded.tier)

    def _check(self, space: Space, key: bytes, parts: Parts, loaded: Loaded) -> None:
        """Digests the bytes where they have arrived. Raises `_Corrupt`.

        What lies in the node's memory is trusted until here; and should the node have taken that
        back while it was copied, because this connection broke, say, it shows.
        """
        digest = BlockDigest(space.space_id, key, space.block_bytes)
        for part in parts:
            digest.update(part.data)
        if digest.digest() != loaded.digest:
            self._client.counters["load_corrupt"] += 1
            # Else the node would say "present" to whoever stores it again. That takes its time.
            threading.Thread(
                target=self._forget, args=(space, key), name=FORGETTER, daemon=True
            ).start()
            raise _Corrupt

    def _forget(self, space: Space, key: bytes) -> None:
        with suppress(KvstoreError):
            self._client.discard(space, [key], scope=self._scope)

    def _batch(self, space: Space, pages: Sequence[Parts]) -> int:
        """How many pages go at once where the bytes do not move in place."""
        if len(pages[0]) == 1:
            return len(pages)
        return max(1, self._scratch_bytes // space.block_bytes)

    def _gathered(self, pages: Sequence[Parts], space: Space) -> list[Bytes]:
        if len(pages[0]) == 1:
            return [parts[0] for parts in pages]
        blocks = self._scratch(len(pages), space)
        for parts, block in zip(pages, blocks, strict=True):
            gather(parts, block)
        return blocks

    def _scratch(self, blocks: int, space: Space) -> list[Bytes]:
        """Memory of this thread's; fresh pages would cost more than the copies that they take."""
        size = blocks * space.block_bytes
        kept: Bytes | None = getattr(self._own, "scratch", None)
        if kept is None or kept.nbytes < size:
            kept = self._own.scratch = np.empty(max(size, self._scratch_bytes), np.uint8)
        return list(kept[:size].reshape(blocks, space.block_bytes))
