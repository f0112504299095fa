"""Lookups that the scheduler does not wait for: asked in a thread, answered when it asks again."""

import contextlib
import logging
import queue
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from typing import NamedTuple

from kvstore.api.clock import Clock
from kvstore_client.match import Match
from kvstore_client.vllm_tier.asking import Found
from kvstore_client.vllm_tier.requests import Request

Ask = Callable[[Request, Collection[bytes]], Found]
Release = Callable[[Match], None]

_log = logging.getLogger("kvstore.vllm_tier")


class _Question(NamedTuple):
    request: Request
    keys: list[bytes]
    asked_s: float


class Lookups:
    """All methods are the scheduler's, and none of them waits.

    Invariant: each key of a request that lives is asked about once until it is forgotten; each
    lease that comes is released once.
    """

    def __init__(self, ask: Ask, release: Release, clock: Clock, *, patience_s: float) -> None:
        self.counters: Counter[str] = Counter()
        """Questions: asked, late (nobody was asked: others took too long), failed."""
        self._ask = ask
        self._release = release
        self._clock = clock
        self._patience_s = patience_s
        self.open = 0
        """Questions without an answer."""
        self._waiting: dict[int, Request] = {}
        """Requests with keys to ask about at the end of the step, by identity."""
        self._questions: queue.SimpleQueue[_Question | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[tuple[_Question, Found]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="kvstore-lookups", daemon=True)
        self._thread.start()

    def place(self, request: Request, key: bytes) -> str | None:
        """In which tier of the node a chunk lies; empty: nowhere; None: ask again later."""
        self._take_answers()
        if key not in request.places:
            request.places[key] = None
            request.wanted.append(key)
            self._waiting[id(request)] = request
        return request.places[key]

    def flush(self) -> None:
        """Ends a step: what was asked for in it becomes one question for each request."""
        self._take_answers()
        now_s = self._clock.monotonic_s()
        for request in self._waiting.values():
            if request.wanted and not request.over:
                keys, request.wanted = request.wanted, []
                self._questions.put(_Question(request, keys, now_s))
                self.open += 1
        self._waiting.clear()

    def miss(self, requests: Iterable[Request], keys: Collection[bytes]) -> None:
        """Chunks that could not be loaded: whoever asks again shall compute them."""
        for request in requests:
            for key in keys:
                if key in request.places:
                    request.places[key] = ""

    def renew(self, request: Request) -> None:
        """Forgets the verdicts on a request, which will ask again: much may be stored by now."""
        request.places = {key: None for key, place in request.places.items() if place is None}

    def release(self, request: Request) -> None:
        """Ends a request's leases."""
        leases = [*request.leases.values(), *request.superseded]
        for lease in {lease.lease_id: lease for lease in leases}.values():
            self._release(lease)
        request.leases, request.superseded = {}, []

    def forget(self, request: Request) -> None:
        """The request is over; an answer that is still to come is released as it comes."""
        request.over = True
        self.release(request)

    def close(self) -> None:
        """Ends the thread, after the question under way, which its budget bounds."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._questions.get_nowait()
        self._questions.put(None)
        self._thread.join()
        self._take_answers()

    def _take_answers(self) -> None:
        while not self._answers.empty():
            question, found = self._answers.get()
            self.open -= 1
            request = question.request
            for key, place in found.places.items():
                if key in request.places:
                    request.places[key] = place
            if found.leases:
                # A load that is under way may still need the earlier ones.
                request.superseded += request.leases.values()
                request.leases = {}
                if not request.loads:
                    self.release(request)
                request.leases = found.leases
                if request.over:
                    self.release(request)

    def _work(self) -> None:
        while (question := self._questions.get()) is not None:
            nothing = Found(dict.fromkeys(question.keys, ""))
            self._answers.put((question, self._answer(question, nothing)))

    def _answer(self, question: _Question, nothing: Found) -> Found:
        if question.request.over:
            return nothing
        if self._clock.monotonic_s() - question.asked_s > self._patience_s:
            self.counters["late"] += 1
            return nothing
        self.counters["asked"] += 1
        try:
            return self._ask(question.request, question.keys)
        except Exception:  # noqa: BLE001 - the thread's edge: a lost answer is a miss
            self.counters["failed"] += 1
            _log.exception("a lookup of %d chunks is lost", len(question.keys))
            return nothing
