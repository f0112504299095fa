"""Moves chunks between the rows of vLLM's primary tier and the node."""

import logging
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from kvstore.api.clock import Clock
from kvstore_client.client import Client
from kvstore_client.vllm_tier.groups import Group, index_of, is_sound
from kvstore_client.vllm_tier.jobs import Job
from kvstore_client.vllm_tier.options import TierOptions
from kvstore_client.vllm_tier.requests import Request

_log = logging.getLogger("kvstore.vllm_tier")


class Moving:
    """`rows` is the primary tier as flat bytes; a job's rows are its own until it is reported.

    A load may leave bytes in a row that were not verified, or only some: vLLM never reads a row
    whose chunk is not among the successful ones, it frees it.
    """

    def __init__(
        self,
        client: Client,
        groups: Sequence[Group],
        rows: memoryview,
        options: TierOptions,
        clock: Clock,
    ) -> None:
        self.loaded: Counter[str] = Counter()
        """Chunks that were loaded, by the tier of the node that had them."""
        self._client = client
        self._groups = {group.index: group for group in groups}
        self._rows = rows
        self._options = options
        self._clock = clock

    def load(self, job: Job) -> list[bytes]:
        """The chunks that are in their rows, whole and verified."""
        loaded: list[bytes] = []
        for group, keys, content in self._by_group(job):
            lease = job.request.leases.get(group.index)
            answers = self._client.load_any(
                group.space,
                [job.request.name(key, content) for key in keys],
                [self._row(group, row) for row in keys.values()],
                scopes=self._options.scopes,
                lease=lease,
                budget_s=self._left_s(job, self._options.load_budget_s),
            )
            for key, answer in zip(keys, answers, strict=True):
                if answer is not None:
                    self.loaded[answer.tier] += 1
                    loaded.append(key)
        return loaded

    def store(self, job: Job) -> list[bytes]:
        """The chunks that the node holds afterwards."""
        stored: list[bytes] = []
        for group, keys, content in self._by_group(job):
            for parent, run in runs_of(job.request, group, list(keys)):
                held = self._client.store(
                    group.space,
                    [job.request.name(key, content) for key in run],
                    [self._row(group, keys[key]) for key in run],
                    parent_key=job.request.name(parent, content) if parent else b"",
                    parent_scope=self._options.scope,
                    scope=self._options.scope,
                    budget_s=self._left_s(job, self._options.store_budget_s),
                )
                stored += [key for key, is_held in zip(run, held, strict=True) if is_held]
        return stored

    def _by_group(self, job: Job) -> Iterator[tuple[Group, dict[bytes, int], bytes]]:
        """A job's chunks by group, each with its row; and what completes their names.

        None where nobody knows that.
        """
        try:
            content = job.request.content()
        except ValueError as error:
            _log.warning("neither stored nor restored: %s", error)
            return
        by_group: dict[int, dict[bytes, int]] = defaultdict(dict)
        for key, row in zip(job.keys, job.rows, strict=True):
            if is_sound(key):
                by_group[index_of(key)][key] = row
        for index, keys in by_group.items():
            if index in self._groups:
                yield self._groups[index], keys, content

    def _row(self, group: Group, row: int) -> memoryview:
        size = group.space.block_bytes
        return self._rows[row * size : (row + 1) * size]

    def _left_s(self, job: Job, budget_s: float) -> float:
        """What a job has left; it began when it was submitted."""
        return job.submitted_s + budget_s - self._clock.monotonic_s()


def runs_of(
    request: Request, group: Group, keys: Sequence[bytes]
) -> Iterator[tuple[bytes, list[bytes]]]:
    """Chunks as runs of their chain, in order, each with the key above it; empty: none.

    vLLM hands them over in no order. What is kept without its parents is one run. A chunk whose
    parent has no known name is left out: nobody could find it.
    """
    if not group.needs_parents:
        yield b"", list(keys)
        return
    ends = request.ends(group)
    end_of = {key: end for end, key in ends.items()}
    run: list[bytes] = []
    above = b""
    for key in sorted((key for key in keys if key in end_of), key=end_of.__getitem__):
        start = (end_of[key] - 1) // group.chunk_tokens * group.chunk_tokens
        parent = ends.get(start, b"")
        if start and not parent:
            continue
        if run and parent != run[-1]:
            yield above, run
            run = []
        if not run:
            above = parent
        run.append(key)
    if run:
        yield above, run
