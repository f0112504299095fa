"""Moves computed blocks down into the store, beside the generation and never in its way.

engine ──offer──► queue (bounded in bytes) ──► copy to the node's memory ──► commit
   │                                           (or to staging ──► client.store)
   ▲                                              │
   └──────────────── take_returned ◄──────────────┘  references, once the bytes are copied
"""

import hashlib
import logging
import threading
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from kvstore.api.hint import ReuseHint
from kvstore_client.in_place import EmptySlot
from kvstore_workers.link import StoreLink
from kvstore_workers.transfer import Copier, Copies, Mark, one_ahead

MAX_HELD_KEYS = 1 << 18
"""Remembered as held by the store; past it all are forgotten, which only costs asking again."""

_log = logging.getLogger("kvstore.worker.spill")


class CacheKey(NamedTuple):
    """What VRAM calls a block: a chained key belongs to one tenant and scope."""

    tenant: str
    scope: str
    key: bytes


@dataclass(frozen=True, slots=True, eq=False)
class SpillRun:
    """Consecutive blocks of a chain on their way down."""

    link: StoreLink
    keys: Sequence[CacheKey]
    """Of the blocks to store, parents first."""
    blocks: Sequence[int]
    """Where they lie in VRAM."""
    parent_key: bytes
    """Of the first of them; empty: it starts the chain."""
    referenced: Sequence[int]
    """The whole chain down to the last of them. Its references belong to the spiller until
    `take_returned` hands them back, all at once, so that the pool sees the chain's order."""
    after: Mark
    """Covers the kernels that computed the blocks."""
    hint: ReuseHint | None = None


@dataclass(slots=True)
class _Active:
    run: SpillRun
    referenced: bool = True
    beginning: bool = False
    """Copies of it are about to be under way."""
    copies: deque[Copies] = field(default_factory=lambda: deque(maxlen=2))
    """The last ones; those before are finished."""
    abandoned: bool = False
    held: int = 0


class Spiller:
    """A thread that stores blocks.

    Invariant: the references of an accepted run are returned exactly once, as soon as its bytes
    are out of VRAM or given up; each offered block is counted once, as held, failed or dropped.
    """

    def __init__(
        self,
        copier: Copier,
        block_bytes: int,
        *,
        queue_bytes: int,
        staging_bytes: int,
        budget_s: float | None = None,
        record_digests: bool = False,
    ) -> None:
        self.counters: Counter[str] = Counter()
        """Blocks: held (the store has them afterwards), failed, dropped (never tried)."""
        self.digests: dict[bytes, bytes] | None = {} if record_digests else None
        """Key to SHA-256 of each block that was copied and the store took, if asked for."""
        self._copied: dict[bytes, bytes] = {}
        """The same of the batch under way, before the store has taken it."""
        self._copier = copier
        self._block_bytes = block_bytes
        self._queue_bytes = queue_bytes
        self._budget_s = budget_s
        self._staging = copier.staging(max(1, staging_bytes // block_bytes))
        # All below is guarded by the condition.
        self._changed = threading.Condition()
        self._queue: deque[SpillRun] = deque()
        self._queued_bytes = 0
        self._active: _Active | None = None
        self._returned: list[Sequence[int]] = []
        self._held: set[CacheKey] = set()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="kvstore-spill", daemon=True)
        self._thread.start()

    def offer(self, run: SpillRun) -> bool:
        """True if the spiller took the run's references; never blocks.

        Of a run that does not fit into the queue the leading part is taken; the rest counts as
        dropped.
        """
        with self._changed:
            room = (self._queue_bytes - self._queued_bytes) // self._block_bytes
            taken = 0 if self._closing else min(room, len(run.blocks))
            self.counters["dropped"] += len(run.blocks) - taken
            if not taken:
                return False
            self._queue.append(replace(run, keys=run.keys[:taken], blocks=run.blocks[:taken]))
            self._queued_bytes += taken * self._block_bytes
            self._changed.notify_all()
        return True

    def holds(self, keys: Iterable[CacheKey]) -> list[bool]:
        """Whether the store is believed to have each block."""
        with self._changed:
            return [key in self._held for key in keys]

    def note_held(self, keys: Iterable[CacheKey]) -> None:
        """Remembers blocks that came from the store."""
        with self._changed:
            self._note_held_locked(keys)

    def forget(self, keys: Iterable[CacheKey]) -> None:
        """Stops remembering blocks that VRAM no longer has."""
        with self._changed:
            self._held.difference_update(keys)

    def take_returned(self, wait_s: float = 0.0) -> list[Sequence[int]]:
        """The chains whose references go back to the pool; waits for one while any is held."""
        with self._changed:
            self._changed.wait_for(lambda: self._returned or not self._references(), wait_s)
            return self._take_returned_locked()

    def abandon(self) -> list[Sequence[int]]:
        """All references that are held here: generation needs the VRAM now.

        Blocks that were not copied yet are dropped. Waits for nothing but copies under way.
        """
        with self._changed:
            self._changed.wait_for(lambda: not (self._active and self._active.beginning))
            for copies in self._active.copies if self._active else ():
                copies.wait()
            for run in self._queue:
                self.counters["dropped"] += len(run.blocks)
                self._returned.append(run.referenced)
            self._queue.clear()
            self._queued_bytes = 0
            if self._active and self._active.referenced:
                self._active.abandoned = True
                self._return_active_locked(self._active)
            self._changed.notify_all()
            return self._take_returned_locked()

    def flush(self, timeout_s: float) -> bool:
        """True once everything that was offered is held, failed or dropped."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._queue and not self._active, timeout_s)

    def close(self) -> None:
        """Drops what is queued, finishes the call under way and ends the thread. Idempotent.

        References that were not taken yet are forgotten with the pool.
        """
        with self._changed:
            self._closing = True
        self.abandon()
        self._thread.join()

    def _references(self) -> bool:
        return bool(self._queue) or bool(self._active and self._active.referenced)

    def _note_held_locked(self, keys: Iterable[CacheKey]) -> None:
        if len(self._held) >= MAX_HELD_KEYS:
            self._held.clear()
        self._held.update(keys)

    def _take_returned_locked(self) -> list[Sequence[int]]:
        returned, self._returned = self._returned, []
        return returned

    def _return_active_locked(self, active: _Active) -> None:
        if active.referenced:
            active.referenced = False
            self._returned.append(active.run.referenced)

    def _work(self) -> None:
        while (active := self._next()) is not None:
            try:
                self._spill(active)
            except Exception:  # noqa: BLE001  the thread's edge: a lost run is no lost engine
                _log.exception("a run of %d blocks is lost", len(active.run.blocks))
            self._finish(active)

    def _next(self) -> _Active | None:
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closing)
            if self._closing:
                return None
            run = self._queue.popleft()
            self._queued_bytes -= len(run.blocks) * self._block_bytes
            self._active = _Active(run)
            return self._active

    def _spill(self, active: _Active) -> None:
        run, step = active.run, self._staging.blocks
        parent_key = run.parent_key
        for start in range(0, len(run.blocks), step):
            batch = slice(start, start + step)
            held = self._place(active, batch, parent_key)
            if not all(held) and not active.abandoned:
                held = self._store(active, batch, parent_key)
            self._note_stored(active, run.keys[batch], held)
            if not all(held):
                # What follows would be orphans.
                return
            parent_key = run.keys[batch][-1].key
        with self._changed:
            self._return_active_locked(active)
            self._changed.notify_all()

    def _place(self, active: _Active, batch: slice, parent_key: bytes) -> list[bool]:
        """Copies blocks to the node's memory itself, where that is mapped; which of them it has."""
        run, keys, blocks = active.run, active.run.keys[batch], active.run.blocks[batch]
        client, space = run.link.client, run.link.space
        held = [False] * len(keys)
        if space is None or not self._copier.pinned(client, client.arena):
            return held
        steps = client.write_in_place(
            space,
            [key.key for key in keys],
            held,
            parent_key=parent_key,
            scope=run.link.scope,
            hint=run.hint,
            budget_s=self._budget_s,
            trailing=True,
        )

        def begin(slots: Sequence[EmptySlot]) -> Copies | None:
            views = [slot.view for slot in slots]
            return self._begin_copy(active, [blocks[slot.place] for slot in slots], views)

        with closing(steps), closing(one_ahead(steps, begin)) as finished:
            for slots in finished:
                self._note_copied((keys[slot.place].key, slot.view) for slot in slots)
        return held

    def _store(self, active: _Active, batch: slice, parent_key: bytes) -> list[bool]:
        """Copies blocks to staging memory, from where the client sends them."""
        run, keys, blocks = active.run, active.run.keys[batch], active.run.blocks[batch]
        views = self._staging.views[: len(keys)]
        copies = self._begin_copy(active, blocks, views) if run.link.space is not None else None
        if run.link.space is None or copies is None:
            return [False] * len(keys)
        copies.wait()
        if batch.stop >= len(run.blocks):
            with self._changed:
                self._return_active_locked(active)
                self._changed.notify_all()
        self._note_copied((key.key, view) for key, view in zip(keys, views, strict=True))
        return run.link.client.store(
            run.link.space,
            [key.key for key in keys],
            views,
            parent_key=parent_key,
            scope=run.link.scope,
            hint=run.hint,
            budget_s=self._budget_s,
        )

    def _begin_copy(
        self, active: _Active, blocks: Sequence[int], views: Sequence[memoryview]
    ) -> Copies | None:
        """Begins to fill host memory; None if the blocks are no longer ours to read."""
        with self._changed:
            if not active.referenced:
                return None
            active.beginning = True
        try:
            copies = self._copier.begin_to_host(blocks, views, after=active.run.after)
            active.copies.append(copies)
            return copies
        finally:
            with self._changed:
                active.beginning = False
                self._changed.notify_all()

    def _note_copied(self, copied: Iterable[tuple[bytes, memoryview]]) -> None:
        if self.digests is not None:
            self._copied.update((key, hashlib.sha256(view).digest()) for key, view in copied)

    def _note_stored(self, active: _Active, keys: Sequence[CacheKey], held: Sequence[bool]) -> None:
        if self.digests is not None:
            stored = [key.key for key, is_held in zip(keys, held, strict=True) if is_held]
            self.digests.update((key, self._copied[key]) for key in stored if key in self._copied)
            self._copied.clear()
        with self._changed:
            active.held += sum(held)
            if all(held):
                self._note_held_locked(keys)
            elif not active.abandoned:
                # A store that refuses or lost a parent may have lost more: offer chains whole.
                owner = keys[0][:2]
                self._held = {key for key in self._held if key[:2] != owner}

    def _finish(self, active: _Active) -> None:
        lost = len(active.run.blocks) - active.held
        with self._changed:
            self.counters["held"] += active.held
            self.counters["dropped" if active.abandoned else "failed"] += lost
            self._return_active_locked(active)
            self._active = None
            self._changed.notify_all()
