"""The client of a store node, for programs that have threads and no event loop."""

import concurrent.futures
import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Coroutine, Generator, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, overload

import grpc

from kvstore.api.channel import open_channel
from kvstore.api.clock import Clock
from kvstore.api.errors import Unavailable
from kvstore.api.hint import ReuseHint
from kvstore.api.space import SpaceDescriptor
from kvstore.api.tier import Loaded
from kvstore.api.tls import Trust
from kvstore.api.v1 import kvstore_pb2 as pb
from kvstore_client.arena import ArenaMemory
from kvstore_client.arguments import Blocks, Buffers
from kvstore_client.async_client import AsyncClient
from kvstore_client.budgets import Budgets
from kvstore_client.in_place import EmptySlot, GivenBlock, ReadInPlace, WriteInPlace
from kvstore_client.leading import OnLoaded
from kvstore_client.loop_thread import LoopThread
from kvstore_client.match import Match
from kvstore_client.space import Space
from kvstore_client.watch import Event, Watch

MAX_SENT = 1024
"""Releases and hints under way at once; past it a lease is left to expire, a hint is not given."""

Answer = TypeVar("Answer")


class Client:
    """`AsyncClient` for threads: the same methods and promises, safe to share between threads.

    Its calls run in one daemon thread with an event loop; a call that is interrupted (Ctrl-C)
    raises only after nothing can write to the caller's buffers any more. `connect` makes another
    channel than the usual one, in that thread. Close it, or use it as a context manager.
    """

    def __init__(
        self,
        endpoint: str,
        *,
        token: str | None = None,
        budgets: Budgets | None = None,
        clock: Clock | None = None,
        connect: Callable[[str], grpc.aio.Channel] | None = None,
        shared_memory: bool = True,
        bulk: bool = True,
        tls_ca_file: Path | None = None,
    ) -> None:
        async def build() -> tuple[grpc.aio.Channel, AsyncClient]:
            trust = Trust.read(tls_ca_file) if tls_ca_file is not None else None
            channel = connect(endpoint) if connect is not None else open_channel(endpoint, trust)
            try:
                client = AsyncClient(
                    endpoint,
                    token=token,
                    budgets=budgets,
                    clock=clock,
                    channel=channel,
                    shared_memory=shared_memory,
                    bulk=bulk,
                    tls_ca_file=tls_ca_file,
                )
            except BaseException:
                await channel.close()
                raise
            return channel, client

        self._sent = threading.BoundedSemaphore(MAX_SENT)
        self._thread = LoopThread("kvstore-client")
        try:
            self._channel, self._client = self._thread.run(build())
        except BaseException:
            self._thread.stop()
            raise

    def __repr__(self) -> str:
        return repr(self._client).removeprefix("Async")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def endpoint(self) -> str:
        """Where the node is, as it was given."""
        return self._client.endpoint

    @property
    def budgets(self) -> Budgets:
        """How long the calls may take."""
        return self._client.budgets

    @property
    def counters(self) -> Counter[str]:
        """What was lost without an exception, by the names of `losses.MEANINGS`."""
        return self._client.counters

    @property
    def bulk_connections(self) -> int:
        """How many connections of the bulk path there are now."""
        return self._client.bulk_connections

    def open_space(self, descriptor: SpaceDescriptor) -> Space:
        """See `AsyncClient.open_space`."""
        return self._thread.run(self._client.open_space(descriptor))

    def match(
        self,
        spaces: Sequence[Space],
        keys: Sequence[bytes],
        *,
        scopes: Sequence[str] = (),
        lease_ms: int = 5000,
        hint: ReuseHint | None = None,
        request_id: bytes = b"",
        held_blocks: int = 0,
        budget_s: float | None = None,
    ) -> Match:
        """See `AsyncClient.match`."""
        matching = self._client.match(
            spaces,
            keys,
            scopes=scopes,
            lease_ms=lease_ms,
            hint=hint,
            request_id=request_id,
            held_blocks=held_blocks,
            budget_s=budget_s,
        )
        return self._quietly("match", matching, Match.none(held_blocks))

    def match_soon(
        self,
        spaces: Sequence[Space],
        keys: Sequence[bytes],
        *,
        scopes: Sequence[str] = (),
        lease_ms: int = 5000,
        hint: ReuseHint | None = None,
        request_id: bytes = b"",
        held_blocks: int = 0,
        budget_s: float | None = None,
    ) -> "concurrent.futures.Future[Match]":
        """`match` for a caller who looks in again later: does not wait, whatever happens.

        The future holds the answer within the budget; it raises only for a caller's mistake.
        """
        matching = self._client.match(
            spaces,
            keys,
            scopes=scopes,
            lease_ms=lease_ms,
            hint=hint,
            request_id=request_id,
            held_blocks=held_blocks,
            budget_s=budget_s,
        )
        try:
            return self._thread.submit(matching)
        except Unavailable:
            self.counters["match_failed"] += 1
            nothing: concurrent.futures.Future[Match] = concurrent.futures.Future()
            nothing.set_result(Match.none(held_blocks))
            return nothing

    def load(
        self,
        space: Space,
        keys: Sequence[bytes],
        buffers: Buffers,
        *,
        scopes: Sequence[str] = (),
        lease: Match | None = None,
        on_loaded: OnLoaded | None = None,
        budget_s: float | None = None,
    ) -> list[Loaded]:
        """See `AsyncClient.load`. `on_loaded` is called in the client's thread."""
        loading = self._client.load(
            space,
            keys,
            buffers,
            scopes=scopes,
            lease=lease,
            on_loaded=on_loaded,
            budget_s=budget_s,
        )
        nothing: list[Loaded] = []
        return self._quietly("load", loading, nothing)

    def load_stream(
        self,
        space: Space,
        keys: Sequence[bytes],
        buffers: Buffers,
        *,
        scopes: Sequence[str] = (),
        lease: Match | None = None,
        budget_s: float | None = None,
    ) -> Generator[list[Loaded], None, None]:
        """`load` in steps: each yields the next leading blocks, while later ones are on their way.

        Nothing writes to the buffers of blocks that were yielded; to the others nothing writes
        once the iterator has ended or was closed. Begins with the first step; close it unless it
        is read to its end.
        """

        def begin(on_loaded: OnLoaded) -> Coroutine[Any, Any, list[Loaded]]:
            return self._client.load(
                space,
                keys,
                buffers,
                scopes=scopes,
                lease=lease,
                on_loaded=on_loaded,
                budget_s=budget_s,
            )

        try:
            yield from self._thread.stream(begin)
        except Unavailable:
            self.counters["load_failed"] += 1

    def load_any(
        self,
        space: Space,
        keys: Sequence[bytes],
        buffers: Buffers,
        *,
        scopes: Sequence[str] = (),
        lease: Match | None = None,
        budget_s: float | None = None,
    ) -> list[Loaded | None]:
        """See `AsyncClient.load_any`."""
        loading = self._client.load_any(
            space, keys, buffers, scopes=scopes, lease=lease, budget_s=budget_s
        )
        nothing: list[Loaded | None] = [None] * len(keys)
        return self._quietly("load", loading, nothing)

    def store(
        self,
        space: Space,
        keys: Sequence[bytes],
        blocks: Blocks,
        *,
        parent_key: bytes = b"",
        parent_scope: str = "",
        scope: str = "",
        hint: ReuseHint | None = None,
        digests: Sequence[bytes] | None = None,
        budget_s: float | None = None,
    ) -> list[bool]:
        """See `AsyncClient.store`."""
        storing = self._client.store(
            space,
            keys,
            blocks,
            parent_key=parent_key,
            parent_scope=parent_scope,
            scope=scope,
            hint=hint,
            digests=digests,
            budget_s=budget_s,
        )
        return self._quietly("store", storing, [False] * len(keys))

    @property
    def arena(self) -> ArenaMemory | None:
        """See `AsyncClient.arena`."""
        return self._client.arena

    def write_in_place(
        self,
        space: Space,
        keys: Sequence[bytes],
        held: list[bool],
        *,
        parent_key: bytes = b"",
        parent_scope: str = "",
        scope: str = "",
        hint: ReuseHint | None = None,
        budget_s: float | None = None,
        trailing: bool = False,
    ) -> Generator[list[EmptySlot], None, None]:
        """The steps of `AsyncClient.write_in_place`; none without an arena.

        Close the iterator unless it is read to its end: that gives back what was not committed.
        """
        begin = partial(
            self._client.write_in_place,
            space,
            keys,
            held,
            parent_key=parent_key,
            parent_scope=parent_scope,
            scope=scope,
            hint=hint,
            budget_s=budget_s,
            trailing=trailing,
        )
        return self._steps("store", begin)

    def read_in_place(
        self,
        space: Space,
        keys: Sequence[bytes],
        *,
        scopes: Sequence[str] = (),
        lease: Match | None = None,
        budget_s: float | None = None,
        trailing: bool = False,
    ) -> Generator[list[GivenBlock], None, None]:
        """The steps of `AsyncClient.read_in_place`; none without an arena.

        Close the iterator unless it is read to its end: that gives everything back.
        """
        begin = partial(
            self._client.read_in_place,
            space,
            keys,
            scopes=scopes,
            lease=lease,
            budget_s=budget_s,
            trailing=trailing,
        )
        return self._steps("load", begin)

    def release(self, match: Match) -> None:
        """Sends `AsyncClient.release` on its way and does not wait for it."""
        if match.lease_id:
            self._send("release", self._client.release(match))

    def hint(
        self, space: Space, keys: Sequence[bytes], hint: ReuseHint, *, scope: str = ""
    ) -> None:
        """See `AsyncClient.hint`."""
        self._quietly("hint", self._client.hint(space, keys, hint, scope=scope), None)

    def hint_soon(
        self, space: Space, keys: Sequence[bytes], hint: ReuseHint, *, scope: str = ""
    ) -> None:
        """Sends `AsyncClient.hint` on its way and does not wait for it."""
        self._send("hint", self._client.hint(space, keys, hint, scope=scope))

    def locate(
        self,
        space: Space,
        keys: Sequence[bytes],
        *,
        scope: str = "",
        budget_s: float | None = None,
    ) -> list[str | None]:
        """See `AsyncClient.locate`."""
        return self._thread.run(self._client.locate(space, keys, scope=scope, budget_s=budget_s))

    def discard(self, space: Space, keys: Sequence[bytes], *, scope: str = "") -> int:
        """See `AsyncClient.discard`."""
        return self._thread.run(self._client.discard(space, keys, scope=scope))

    def clear_space(self, space: Space | bytes, scope: str = "") -> int:
        """See `AsyncClient.clear_space`."""
        return self._thread.run(self._client.clear_space(space, scope))

    def status(self) -> pb.StatusReply:
        """See `AsyncClient.status`."""
        return self._thread.run(self._client.status())

    def watch(self) -> Iterator[Event]:
        """See `AsyncClient.watch`; each step waits for an event. Ends when this is closed."""
        return self._follow(self._thread.run(self._client.watch()))

    def _follow(self, events: Watch) -> Iterator[Event]:
        async def following() -> Event | None:
            return await anext(events, None)

        try:
            while (event := self._thread.run(following())) is not None:
                yield event
        except Unavailable:
            if not self.closed:
                raise
        finally:
            with contextlib.suppress(Unavailable):
                self._thread.run(events.aclose())

    def health(self) -> bool:
        """See `AsyncClient.health`."""
        try:
            return self._thread.run(self._client.health())
        except Unavailable:
            return False

    @property
    def closed(self) -> bool:
        """True from the moment that `close` was called."""
        return self._client.closed

    def close(self) -> None:
        """Ends the calls under way, which answer what they have, and the thread. Idempotent."""

        async def hang_up() -> None:
            await self._client.close()
            await self._channel.close()

        with contextlib.suppress(Unavailable):
            self._thread.run(hang_up())
        self._thread.stop()

    @overload
    def _steps(
        self, operation: str, begin: Callable[[], Coroutine[Any, Any, WriteInPlace | None]]
    ) -> Generator[list[EmptySlot], None, None]: ...

    @overload
    def _steps(
        self, operation: str, begin: Callable[[], Coroutine[Any, Any, ReadInPlace | None]]
    ) -> Generator[list[GivenBlock], None, None]: ...

    def _steps(
        self,
        operation: str,
        begin: Callable[[], Coroutine[Any, Any, WriteInPlace | ReadInPlace | None]],
    ) -> Generator[Any, None, None]:
        moving: WriteInPlace | ReadInPlace | None = None

        async def first() -> Sequence[Any] | None:
            nonlocal moving
            moving = await begin()
            return await moving.step() if moving is not None else None

        # To wake the thread takes as long as to copy a block to a GPU: not without need.
        try:
            given = self._quietly(operation, first(), None)
            while moving is not None and given is not None:
                yield given
                if moving.pause():
                    given = []
                elif moving.complete and not moving.copying:
                    given = None
                else:
                    try:
                        given = self._quietly(operation, moving.step(), None)
                    except BaseException:  # Interrupted: what still runs is waited for.
                        if moving.copying:
                            yield []
                        raise
        finally:
            if moving is not None and not moving.ended:
                with contextlib.suppress(Unavailable):
                    self._thread.submit(moving.end())

    def _send(self, operation: str, call: Coroutine[Any, Any, None]) -> None:
        """Starts a call that nobody waits for, unless too many of them are under way."""
        if not self._sent.acquire(blocking=False):
            call.close()
            self.counters[f"{operation}_dropped"] += 1
            return
        try:
            outcome = self._thread.submit(call)
        except Unavailable:
            # Closed: a lease runs until it expires.
            self._sent.release()
            return
        outcome.add_done_callback(lambda _: self._sent.release())

    def _quietly(
        self, operation: str, call: Coroutine[Any, Any, Answer], nothing: Answer
    ) -> Answer:
        try:
            return self._thread.run(call)
        except Unavailable:
            # The loop has ended; while it runs, the call itself raises no such thing.
            self.counters[f"{operation}_failed"] += 1
            return nothing
