"""Brings blocks up from the store into VRAM, beside the decoding of other requests."""

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass

from kvstore.api.hint import ReuseHint
from kvstore_client import Match, Space
from kvstore_client.restore_gate import RestoreGate
from kvstore_workers.cut import Cut
from kvstore_workers.link import StoreLink
from kvstore_workers.transfer import Copier, Mark

_log = logging.getLogger("kvstore.worker.restore")


@dataclass(frozen=True, slots=True, eq=False)
class RestoreJob:
    """Blocks that a request would rather load than compute."""

    link: StoreLink
    keys: Sequence[bytes]
    """A chain from its start, whole chunks only: what VRAM has, then what it lacks."""
    blocks: Sequence[int]
    """Where the lacking ones shall lie in VRAM: the request's own, not published."""
    after: Mark
    """Covers the kernels that still read what these blocks held before."""
    hint: ReuseHint | None = None

    @property
    def held_blocks(self) -> int:
        """How many leading blocks VRAM has."""
        return len(self.keys) - len(self.blocks)


class Restorer:
    """A thread that asks the store for chains and fills VRAM blocks with what it delivers.

    Invariant: a restored length is a whole number of chunks, and every lease is released.
    """

    def __init__(
        self,
        copier: Copier,
        block_bytes: int,
        *,
        cut: Cut,
        staging_bytes: int,
        match_budget_s: float | None,
        budget_s: float,
        gate: RestoreGate | None = None,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self.counters: Counter[str] = Counter()
        """Blocks: asked, matched, restored, recomputed (sooner than loaded), short (not loaded)."""
        self.gate = gate
        self._copier = copier
        self._cut = cut
        self._staging = copier.staging(max(1, staging_bytes // block_bytes))
        self._match_budget_s = match_budget_s
        self._budget_s = budget_s
        self._monotonic_s = monotonic_s
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kvstore-restore")

    def start(self, job: RestoreJob) -> Future[list[str]]:
        """Will hold the tier of each restored block; they lie in the job's first blocks then.

        Never raises: a store that is gone, late or broken restores nothing.
        """
        return self._thread.submit(self._restore_quietly, job)

    def close(self) -> None:
        """Waits for the job under way and ends the thread. Idempotent."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _restore_quietly(self, job: RestoreJob) -> list[str]:
        try:
            return self._restore(job)
        except Exception:  # noqa: BLE001  the thread's edge: a lost restore is computed
            _log.exception("a restore of %d blocks is lost", len(job.keys))
            return []

    def _restore(self, job: RestoreJob) -> list[str]:
        space = job.link.space
        if space is None:
            return []
        deadline_s = self._monotonic_s() + self._budget_s
        match = job.link.client.match(
            [space],
            job.keys,
            scopes=job.link.scopes,
            held_blocks=job.held_blocks,
            hint=job.hint,
            budget_s=self._match_budget_s,
        )
        try:
            found = match.blocks - job.held_blocks
            worth = self._worth(match, job)
            wanted = self._cut.whole_chunks(worth)
            tiers = self._load(job, space, match, wanted, deadline_s)
        finally:
            job.link.client.release(match)
        restored = self._cut.whole_chunks(len(tiers))
        self.counters.update(
            asked=len(job.blocks),
            matched=found,
            restored=restored,
            recomputed=found - worth,
            short=wanted - restored,
        )
        return tiers[:restored]

    def _worth(self, match: Match, job: RestoreJob) -> int:
        """How many of the blocks that were found are loaded sooner than they are computed."""
        if self.gate is None or not match.spaces:
            return match.blocks - job.held_blocks
        return self.gate.worth(match.spaces[0], job.held_blocks)

    def _load(
        self, job: RestoreJob, space: Space, match: Match, wanted: int, deadline_s: float
    ) -> list[str]:
        """The tiers of the blocks that lie in VRAM now, staging memory by staging memory."""
        tiers: list[str] = []
        while len(tiers) < wanted:
            left_s = deadline_s - self._monotonic_s()
            if left_s <= 0:
                break
            batch = slice(len(tiers), min(len(tiers) + self._staging.blocks, wanted))
            started_s = self._monotonic_s()
            came = self._load_batch(job, space, match, batch, left_s)
            if self.gate is not None:
                self.gate.loaded(came, self._monotonic_s() - started_s)
            tiers += came
            if len(tiers) < batch.stop:
                break
        return tiers

    def _load_batch(
        self, job: RestoreJob, space: Space, match: Match, batch: slice, left_s: float
    ) -> list[str]:
        """From the node's memory, where it is mapped; what is not there by staging memory."""
        ends_s = self._monotonic_s() + left_s
        keys, blocks = job.keys[job.held_blocks :][batch], job.blocks[batch]
        tiers = self._copy_given(job, space, match, keys, blocks, left_s)
        left_s = ends_s - self._monotonic_s()
        if len(tiers) < len(keys) and left_s > 0:
            rest = slice(len(tiers), None)
            tiers += self._receive(job, space, match, keys[rest], blocks[rest], left_s)
        return tiers

    def _copy_given(
        self,
        job: RestoreJob,
        space: Space,
        match: Match,
        keys: Sequence[bytes],
        blocks: Sequence[int],
        left_s: float,
    ) -> list[str]:
        client = job.link.client
        self._copier.pin(client, client.arena)
        steps = client.read_in_place(
            space, keys, scopes=job.link.scopes, lease=match, budget_s=left_s
        )
        tiers: list[str] = []
        with closing(steps):
            for given in steps:
                arrived = blocks[len(tiers) : len(tiers) + len(given)]
                self._copier.to_device([block.view for block in given], arrived, after=job.after)
                tiers += [block.loaded.tier for block in given]
        return tiers

    def _receive(
        self,
        job: RestoreJob,
        space: Space,
        match: Match,
        keys: Sequence[bytes],
        blocks: Sequence[int],
        left_s: float,
    ) -> list[str]:
        """Blocks are copied up as they come; the client's thread receives later ones meanwhile."""
        views = self._staging.views[: len(keys)]
        arriving = job.link.client.load_stream(
            space, keys, views, scopes=job.link.scopes, lease=match, budget_s=left_s
        )
        tiers: list[str] = []
        # Whatever happens here, nothing is left that writes to the staging memory.
        with closing(arriving):
            for loaded in arriving:
                rows = slice(len(tiers), len(tiers) + len(loaded))
                self._copier.to_device(views[rows], blocks[rows], after=job.after)
                tiers += [block.tier for block in loaded]
        return tiers
