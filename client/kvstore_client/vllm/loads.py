"""Loads: from the node through host memory into the pages, beside the engine's steps."""

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from kvstore.api.clock import Clock
from kvstore_client.client import Client
from kvstore_client.match import Match
from kvstore_client.space import Space
from kvstore_client.vllm.device import Side, engine_mark
from kvstore_client.vllm.metadata import Load, LoadTime, Run
from kvstore_client.vllm.options import ConnectorOptions
from kvstore_client.vllm.pages import GroupPages
from kvstore_client.vllm.staging import Staging, as_memory
from kvstore_client.vllm.stats import Tally

_log = logging.getLogger("kvstore.vllm.loads")


@dataclass(slots=True)
class LoadResults:
    """What has ended since the last time it was asked for."""

    finished: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)
    """Of those finished: requests whose pages hold nothing that could be used."""
    bad_pages: set[int] = field(default_factory=set)
    """Of others that finished: pages that were not loaded."""
    times: list[LoadTime] = field(default_factory=list)


@dataclass(slots=True)
class _Job:
    load: Load
    spaces: Sequence[Space]
    begun_s: float
    until_s: float
    allocated: Any
    """After this event the pages are the request's alone."""
    tiers: list[str] = field(default_factory=list)


class Loads:
    """Invariant: each load that begins ends once, within its budget and what one copy takes, and
    nothing writes to its pages once it has ended.
    """

    def __init__(
        self,
        client: Client,
        groups: Sequence[GroupPages],
        options: ConnectorOptions,
        clock: Clock,
        tally: Tally,
        *,
        single: bool,
        on_loaded: Callable[[bytes, Sequence[bytes]], None],
    ) -> None:
        self._client = client
        self._groups = groups
        self._options = options
        self._clock = clock
        self._tally = tally
        self._single = single
        self._on_loaded = on_loaded
        self._device = groups[0].device
        self._staging = Staging(
            options.max_loading_bytes, clock, pinned=self._device.type == "cuda"
        )
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._results = LoadResults()
        self._pending = 0
        self._threads = [
            threading.Thread(target=self._work, name=f"kvstore-load-{number}", daemon=True)
            for number in range(options.load_threads)
        ]
        for thread in self._threads:
            thread.start()

    def begin(self, load: Load, spaces: Sequence[Space]) -> None:
        """Starts a load; its end is among the results of a later step."""
        job = self._job(load, spaces)
        with self._changed:
            self._pending += 1
        self._jobs.put(job)

    def run(self, load: Load, spaces: Sequence[Space]) -> None:
        """Loads while the engine waits. Pages that fail are among the results of this step."""
        job = self._job(load, spaces)
        results = LoadResults()
        self._end(job, self._counts(job, Side(self._device)), results)
        with self._changed:
            self._results.bad_pages |= results.bad_pages
            self._results.times += results.times

    def fail(self, load: Load) -> None:
        """Ends a load that could not begin."""
        with self._changed:
            if load.beside:
                self._results.finished.add(load.request_id)
                self._results.failed.add(load.request_id)
            else:
                self._results.bad_pages.update(load.lost_pages)
                for run in load.runs:
                    self._results.bad_pages.update(pages_of(run))
        self._tally.add("loads", label="failed")

    def take(self, wait_s: float = 0.0) -> LoadResults:
        """What has ended since the last time; waits a little for something to end."""
        with self._changed:
            if wait_s and self._pending and not self._results.finished:
                self._changed.wait(wait_s)
            results, self._results = self._results, LoadResults()
        return results

    def close(self) -> None:
        """Ends the threads; what they have begun ends by itself, within its budget."""
        self._staging.close()
        for _ in self._threads:
            self._jobs.put(None)

    def _job(self, load: Load, spaces: Sequence[Space]) -> _Job:
        now_s = self._clock.monotonic_s()
        until_s = now_s + self._options.load_budget_s
        return _Job(load, spaces, now_s, until_s, engine_mark(self._device))

    def _work(self) -> None:
        side = Side(self._device)
        while (job := self._jobs.get()) is not None:
            counts = self._counts(job, side)
            with self._changed:
                self._end(job, counts, self._results)
                self._results.finished.add(job.load.request_id)
                self._pending -= 1
                self._changed.notify_all()

    def _counts(self, job: _Job, side: Side) -> list[int]:
        """How many blocks of each run were loaded, up to the first that was not whole."""
        counts = [0] * len(job.load.runs)
        try:
            with side.entered():
                side.after(job.allocated)
                for number, run in enumerate(job.load.runs):
                    counts[number] = self._load_run(job, run, side)
                    if counts[number] < len(run.keys):
                        break
        except Exception:  # noqa: BLE001  the thread's edge: a lost load is computed
            # Whatever it was: the request computes what it lacks.
            _log.exception("a load of %d runs failed", len(job.load.runs))
            self._tally.add("errors", label="load")
        return counts

    def _load_run(self, job: _Job, run: Run, side: Side) -> int:
        space = job.spaces[run.group]
        loaded = 0
        while loaded < len(run.keys) and self._left_s(job) > 0:
            buffers = self._staging.take(space.block_bytes, len(run.keys) - loaded, job.until_s)
            if not buffers:
                break
            try:
                arrived = self._load_window(job, run, loaded, buffers)
            finally:
                side.finish()
                self._staging.give(buffers)
            loaded += arrived
            if arrived < len(buffers):
                break
        return loaded

    def _load_window(self, job: _Job, run: Run, first: int, buffers: list[Any]) -> int:
        """Loads as many blocks as there are buffers; how many came, all of them in the pages."""
        pages = self._groups[run.group]
        space = job.spaces[run.group]
        steps = self._client.load_stream(
            space,
            run.keys[first : first + len(buffers)],
            [as_memory(buffer) for buffer in buffers],
            scopes=self._options.scopes,
            lease=Match(0, lease_id=job.load.lease_id),
            budget_s=max(self._left_s(job), 0.001),
        )
        arrived = 0
        with closing(steps):
            for step in steps:
                end = arrived + len(step)
                pages.scatter(buffers[arrived:end], run.pages[first + arrived : first + end])
                for loaded in step:
                    job.tiers.append(loaded.tier)
                    self._tally.add("loaded_blocks", label=loaded.tier)
                    self._tally.add("loaded_bytes", space.block_bytes, loaded.tier)
                self._on_loaded(space.space_id, run.keys[first + arrived : first + end])
                arrived = end
        return arrived

    def _end(self, job: _Job, counts: Sequence[int], results: LoadResults) -> None:
        seconds = self._clock.monotonic_s() - job.begun_s
        self._tally.add("load_seconds", seconds)
        runs = job.load.runs
        whole = all(count == len(run.keys) for count, run in zip(counts, runs, strict=True))
        if whole:
            results.times.append(LoadTime(tuple(job.tiers), seconds))
        elif self._single:
            for count, run in zip(counts, runs, strict=True):
                results.bad_pages.update(pages_of(run, count))
        else:
            results.failed.add(job.load.request_id)
        self._tally.add("loads", label="whole" if whole else "part" if any(counts) else "failed")

    def _left_s(self, job: _Job) -> float:
        return job.until_s - self._clock.monotonic_s()


def pages_of(run: Run, first: int = 0) -> set[int]:
    """The pages of a run's blocks from one of them on."""
    return {page for pages in run.pages[first:] for page in pages if page}
