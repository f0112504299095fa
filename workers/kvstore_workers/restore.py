"""Brings blocks up from the store into VRAM, beside the decoding of other requests."""

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import islice

from kvstore.api.hint import ReuseHint
from kvstore_client import Match, Space
from kvstore_client.in_place import GivenBlock
from kvstore_client.restore_gate import RestoreGate
from kvstore_workers.cut import Cut
from kvstore_workers.link import StoreLink
from kvstore_workers.transfer import Copier, Copies, Mark, one_ahead

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
        """The tiers of the blocks that lie in VRAM now.

        From the node's memory, where that is mapped; what is not there by staging memory.
        """
        keys, blocks = job.keys[job.held_blocks :][:wanted], job.blocks[:wanted]
        laps = _Laps(self.gate, self._monotonic_s)
        tiers: list[str] = []
        for way, step in ((self._copy_given, wanted), (self._receive, self._staging.blocks)):
            while len(tiers) < wanted and (left_s := deadline_s - self._monotonic_s()) > 0:
                batch = slice(len(tiers), min(len(tiers) + step, wanted))
                tiers += way(job, space, match, keys[batch], blocks[batch], left_s, laps)
                if len(tiers) < batch.stop:
                    break
        return tiers

    def _copy_given(
        self,
        job: RestoreJob,
        space: Space,
        match: Match,
        keys: Sequence[bytes],
        blocks: Sequence[int],
        left_s: float,
        laps: "_Laps",
    ) -> list[str]:
        """Straight from the node's memory, whatever of the blocks is there or comes to be."""
        client = job.link.client
        if not self._copier.pinned(client, client.arena):
            return []
        steps = client.read_in_place(
            space, keys, scopes=job.link.scopes, lease=match, budget_s=left_s, trailing=True
        )
        places = iter(blocks)

        def begin(given: Sequence[GivenBlock]) -> Copies:
            views = [block.view for block in given]
            return self._copier.begin_to_device(
                views, list(islice(places, len(given))), after=job.after
            )

        tiers: list[str] = []
        with closing(steps), closing(one_ahead(steps, begin)) as finished:
            for given in finished:
                came = [block.loaded.tier for block in given]
                laps.came(came)
                tiers += came
        return tiers

    def _receive(
        self,
        job: RestoreJob,
        space: Space,
        match: Match,
        keys: Sequence[bytes],
        blocks: Sequence[int],
        left_s: float,
        laps: "_Laps",
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
        laps.came(tiers)
        return tiers


class _Laps:
    """Tells the gate how long each part of a load took; what was tried in vain before it counts."""

    def __init__(self, gate: RestoreGate | None, monotonic_s: Callable[[], float]) -> None:
        self._gate = gate
        self._monotonic_s = monotonic_s
        self._since_s = monotonic_s()

    def came(self, tiers: Sequence[str]) -> None:
        """One part has come, by the tier of each block."""
        if tiers and self._gate is not None:
            now_s = self._monotonic_s()
            self._gate.loaded(tiers, now_s - self._since_s)
            self._since_s = now_s
