"""Work that nobody waits for at the start of an engine, and that does not hold up its end."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

Answer = TypeVar("Answer")


def in_background(work: Callable[[], Answer]) -> "Future[Answer]":
    """The outcome of work in a daemon thread: an engine that ends does not wait for it."""
    outcome: Future[Answer] = Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except Exception as error:  # noqa: BLE001  it is raised where it is asked for
            outcome.set_exception(error)

    threading.Thread(target=run, name="kvstore-background", daemon=True).start()
    return outcome
