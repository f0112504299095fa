"""The seam of blocking work: files and codecs run through a `Runner`, never on the event loop."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

T = TypeVar("T")


class Runner(Protocol):
    """Runs blocking calls for coroutines."""

    async def run(self, work: Callable[[], T]) -> T:
        """What `work` returns or raises. Cancelling the caller does not stop `work`."""

    async def close(self, timeout_s: float) -> bool:
        """Takes nothing more. True once nothing runs, False if that takes longer."""


class ThreadRunner:
    """Runs each call in one of a fixed number of threads."""

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="kvstore-io")

    async def run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    async def close(self, timeout_s: float) -> bool:
        # A thread at a device that hangs cannot be ended, and must not hold up who waits for it.
        ending = threading.Thread(target=self._pool.shutdown, daemon=True)
        ending.start()
        await asyncio.to_thread(ending.join, timeout_s)
        return not ending.is_alive()
