"""The seam of blocking work: files and codecs run through a `Runner`, never on the event loop."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

T = TypeVar("T")


class Runner(Protocol):
    """Runs blocking calls for coroutines."""

    async def run(self, work: Callable[[], T]) -> T:
        """What `work` returns or raises. Cancelling the caller does not stop `work`."""

    def close(self) -> None:
        """Waits for what is running and takes nothing more."""


class ThreadRunner:
    """Runs each call in one of a fixed number of threads."""

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="kvstore-io")

    async def run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def close(self) -> None:
        self._pool.shutdown(wait=True)
