"""Work that nobody waits for, in daemon threads, so that an engine that ends is not held up."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Generic, TypeVar

Answer = TypeVar("Answer")


def in_background(work: Callable[[], Answer]) -> "Future[Answer]":
    """The outcome of work in a thread of its own."""
    outcome: Future[Answer] = Future()
    _start(lambda: _do(work, outcome))
    return outcome


class InOrder(Generic[Answer]):
    """One piece of work after the other, in one thread."""

    def __init__(self) -> None:
        self._waiting: SimpleQueue[tuple[Callable[[], Answer], Future[Answer]] | None]
        self._waiting = SimpleQueue()
        _start(self._run)

    def submit(self, work: Callable[[], Answer]) -> "Future[Answer]":
        """The outcome of work, once what was submitted before is done."""
        outcome: Future[Answer] = Future()
        self._waiting.put((work, outcome))
        return outcome

    def close(self) -> None:
        """Ends the thread behind what was submitted. Does not wait."""
        self._waiting.put(None)

    def _run(self) -> None:
        while (piece := self._waiting.get()) is not None:
            _do(*piece)


def _do(work: Callable[[], Answer], outcome: "Future[Answer]") -> None:
    try:
        outcome.set_result(work())
    except Exception as error:  # noqa: BLE001  it is raised where it is asked for
        outcome.set_exception(error)


def _start(run: Callable[[], None]) -> None:
    threading.Thread(target=run, name="kvstore-background", daemon=True).start()
