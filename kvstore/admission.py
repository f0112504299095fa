"""How much of a node calls may hold at once. What exceeds it is shed within milliseconds.

A call is charged for the most that it can hold at a time, before it holds anything, and pays
back at its end: nothing is half admitted, and no two calls wait for each other.
"""

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from kvstore.api.clock import Clock
from kvstore.api.errors import Shed

HOLD_WEIGHT = 0.1
"""Of the newest call in the moving average of how long calls last."""
LEAST_RETRY_S = 0.02


@dataclass(frozen=True, slots=True)
class Limits:
    """What all calls together, and those of one client, may hold."""

    calls: int
    waiting_calls: int
    wait_s: float
    """Who would wait longer is shed at once."""
    inflight_bytes: int
    client_bytes: int
    """A client is one connection of one tenant: that is what an engine has, and what must not
    crowd out its neighbours. Whoever opens many of them meets `inflight_bytes`."""


@dataclass(slots=True, eq=False)
class _Waiter:
    client: str
    size: int
    turn: asyncio.Future[None]


class Admission:
    """Admits calls, lets a few wait in the order of their arrival, and sheds the others.

    Invariant: what is held is the sum over admitted calls, and within the limits.
    """

    def __init__(self, limits: Limits, clock: Clock) -> None:
        self.limits = limits
        self.calls = 0
        self.inflight_bytes = 0
        self._clock = clock
        self._client_calls: Counter[str] = Counter()
        self._client_bytes: Counter[str] = Counter()
        self._waiting: deque[_Waiter] = deque()
        self._hold_s = 0.0

    @property
    def waiting_calls(self) -> int:
        """How many calls wait for their turn now."""
        return len(self._waiting)

    @asynccontextmanager
    async def admitted(self, client: str, size: int, left_s: float) -> AsyncIterator[None]:
        """Holds `size` bytes for a call of `client`, who waits `left_s` for his answer.

        Raises `Shed`. A call that is larger than its client's limit is admitted alone.
        """
        size = min(size, self.limits.client_bytes)
        queued = any(self._client_allows(w.client, w.size) for w in self._waiting)
        if not queued and self._room_for(size) and self._client_allows(client, size):
            self._take(client, size)
        else:
            await self._wait(client, size, min(self.limits.wait_s, left_s / 2))
        started_s = self._clock.monotonic_s()
        try:
            yield
        finally:
            lasted_s = self._clock.monotonic_s() - started_s
            self._hold_s += HOLD_WEIGHT * (lasted_s - self._hold_s)
            self._give_back(client, size)

    def check(self) -> None:
        """Recomputes the invariant; AssertionError tells what broke."""
        assert self.inflight_bytes == self._client_bytes.total(), "bytes lost"
        assert self.calls == self._client_calls.total(), "calls lost"
        assert self.inflight_bytes <= self.limits.inflight_bytes, "more bytes than allowed"
        assert self.calls <= self.limits.calls, "more calls than allowed"
        most = max(self._client_bytes.values(), default=0)
        assert most <= self.limits.client_bytes, "a client holds more than allowed"
        assert len(self._waiting) <= self.limits.waiting_calls, "more wait than allowed"

    async def _wait(self, client: str, size: int, patience_s: float) -> None:
        reason, message = self._obstacle(client, size)
        expected_s = self._expected_wait_s(client, reason)
        retry_s = max(expected_s, LEAST_RETRY_S)
        # Twice as long as expected is still waited: hardly anybody shall wait in vain.
        if self.waiting_calls >= self.limits.waiting_calls or expected_s > patience_s / 2:
            raise Shed(message, reason, retry_s)
        waiter = _Waiter(client, size, asyncio.get_running_loop().create_future())
        self._waiting.append(waiter)
        try:
            async with asyncio.timeout(patience_s):
                await waiter.turn
        except TimeoutError:
            self._leave(waiter)
            raise Shed(message, "late", retry_s) from None
        except BaseException:
            self._leave(waiter)
            raise

    def _leave(self, waiter: _Waiter) -> None:
        """Forgets one who gave up; his turn may have come at that very moment."""
        if waiter in self._waiting:
            self._waiting.remove(waiter)
            self._wake()
        else:
            self._give_back(waiter.client, waiter.size)

    def _expected_wait_s(self, client: str, reason: str) -> float:
        """How long it takes until as many calls have ended as stand before this one, and one."""
        own = reason == "client_bytes"
        ending = self._client_calls[client] if own else self.calls
        ahead = sum(waiter.client == client or not own for waiter in self._waiting)
        return self._hold_s * (ahead + 1) / max(ending, 1)

    def _obstacle(self, client: str, size: int) -> tuple[str, str]:
        limits = self.limits
        if self.calls >= limits.calls:
            return "calls", f"server.max_data_calls: {limits.calls} calls are being served"
        if not self._client_allows(client, size):
            limit = f"server.inflight_bytes_per_client: {limits.client_bytes}"
            return "client_bytes", f"{limit} bytes are on their way for this client"
        limit = f"server.inflight_bytes: {limits.inflight_bytes}"
        return "bytes", f"{limit} bytes are on their way for all clients"

    def _room_for(self, size: int) -> bool:
        limits = self.limits
        return self.calls < limits.calls and self.inflight_bytes + size <= limits.inflight_bytes

    def _client_allows(self, client: str, size: int) -> bool:
        return self._client_bytes[client] + size <= self.limits.client_bytes

    def _take(self, client: str, size: int) -> None:
        self.calls += 1
        self.inflight_bytes += size
        self._client_calls[client] += 1
        self._client_bytes[client] += size

    def _give_back(self, client: str, size: int) -> None:
        self.calls -= 1
        self.inflight_bytes -= size
        self._client_calls[client] -= 1
        self._client_bytes[client] -= size
        if not self._client_calls[client]:
            del self._client_calls[client], self._client_bytes[client]
        self._wake()

    def _wake(self) -> None:
        """Admits those whose turn has come; who meets his own limit holds nobody else up."""
        for waiter in list(self._waiting):
            if not self._client_allows(waiter.client, waiter.size):
                continue
            if not self._room_for(waiter.size):
                return
            self._waiting.remove(waiter)
            self._take(waiter.client, waiter.size)
            # Cancelled meanwhile: `_leave` will find it admitted, and give it back.
            if not waiter.turn.done():
                waiter.turn.set_result(None)
