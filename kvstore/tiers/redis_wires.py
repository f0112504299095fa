"""Connections of redis-py, lent to threads that speak RESP on their sockets (`redis_wire`)."""

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from redis import BlockingConnectionPool, ConnectionPool
from redis.backoff import NoBackoff
from redis.connection import parse_url
from redis.exceptions import RedisError
from redis.retry import Retry

from kvstore.api.errors import TierError
from kvstore.runner import Runner
from kvstore.tiers.redis_wire import Wire

T = TypeVar("T")

CLOSE_S = 2.0


class NoSocket(Exception):
    """When redis-py's connections do not let their socket be used: its pipelines have to do."""


class Wires:
    """As many wires at work at a time as `pool` has connections and `runner` has threads.

    `pool` is any of redis-py's synchronous ones, Sentinel's too; it does discovery,
    authentication and TLS. `runner` is closed with the wires.
    """

    def __init__(self, pool: ConnectionPool, runner: Runner) -> None:
        self._pool = pool
        self._runner = runner
        self._is_closed = False

    @classmethod
    def from_url(cls, url: str, runner: Runner, *, count: int, timeout_s: float) -> "Wires":
        """Up to `count` connections to the server of a URL. Raises ValueError if it is none."""
        settings: dict[str, Any] = {
            "socket_timeout": timeout_s,
            "socket_connect_timeout": timeout_s,
            "timeout": timeout_s,
            "retry": Retry(NoBackoff(), 0),
        }
        settings |= parse_url(url)  # type: ignore[no-untyped-call]
        # RESP3 may push what was not asked for between two answers.
        settings |= {"max_connections": count, "protocol": 2}
        return cls(BlockingConnectionPool(**settings), runner)  # type: ignore[no-untyped-call]

    async def run(self, work: Callable[[Wire], T]) -> T:
        """What `work` returns of a wire of its own, in a thread; its errors, and TierError.

        When this has returned or raised, also when it was cancelled, `work` does not run: what it
        reads and writes is the caller's again. A wire that is given up is shut first, so that
        this does not take longer than the next step of `work`.
        """
        if self._is_closed:
            raise TierError("redis: closed")
        hold = _Hold()
        running = asyncio.ensure_future(self._runner.run(partial(self._serve, hold, work)))
        # Where nobody waits any more, nobody asks for the error either.
        running.add_done_callback(lambda done: done.cancelled() or done.exception())
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            if hold.give_up():
                await _outlasting_cancels(running)
            raise
        except (RedisError, OSError) as error:
            raise TierError(f"redis: {error}") from error

    async def close(self) -> None:
        """Hangs up, and ends the threads. Whoever is at work meets an error, later callers too."""
        self._is_closed = True
        self._pool.disconnect()
        await self._runner.close(CLOSE_S)

    def _serve(self, hold: "_Hold", work: Callable[[Wire], T]) -> T:
        hold.check()
        connection = self._pool.get_connection()
        is_fit = False
        try:
            wire = Wire(_socket_of(connection))
            hold.take(wire)
            try:
                return work(wire)
            finally:
                is_fit = hold.let_go() and wire.is_idle
        finally:
            if not is_fit:
                # Nobody else may get what is still to come on it.
                connection.disconnect()  # type: ignore[no-untyped-call]
            self._pool.release(connection)


class _Hold:
    """Whether a thread may be at the caller's memory; and the caller's way to end that."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wire: Wire | None = None
        self._is_given_up = False

    def check(self) -> None:
        if self._is_given_up:
            raise TierError("redis: given up by its caller")

    def take(self, wire: Wire) -> None:
        with self._lock:
            self.check()
            self._wire = wire

    def let_go(self) -> bool:
        """False if the wire was shut."""
        with self._lock:
            self._wire = None
            return not self._is_given_up

    def give_up(self) -> bool:
        """True if a thread has a wire, and may not be at its end yet."""
        with self._lock:
            self._is_given_up = True
            if self._wire is None:
                return False
            with contextlib.suppress(OSError):  # The other end was faster.
                self._wire.shut()
            return True


async def _outlasting_cancels(running: "asyncio.Future[Any]") -> None:
    while not running.done():
        try:
            await asyncio.wait([running])
        except asyncio.CancelledError:
            continue


def _socket_of(connection: Any) -> socket.socket:
    # Not part of what redis-py promises: without it, blocks go through its pipelines.
    found = getattr(connection, "_sock", None)
    if not isinstance(found, socket.socket):
        raise NoSocket(type(connection).__name__)
    return found
