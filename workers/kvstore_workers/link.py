"""A worker's connection to the store for one tenant: there when the store is, never in the way."""

import logging
import threading
from collections.abc import Callable, Generator, Sequence
from typing import Protocol

from kvstore.api.errors import KvstoreError
from kvstore.api.hint import ReuseHint
from kvstore.api.space import SpaceDescriptor
from kvstore.api.tier import Loaded
from kvstore_client import Match, Space
from kvstore_client.arena import ArenaMemory
from kvstore_client.in_place import EmptySlot, GivenBlock

_log = logging.getLogger("kvstore.worker.link")


class StoreClient(Protocol):
    """What a worker needs of `kvstore_client.Client`, and what a twin of it offers in tests."""

    def open_space(self, descriptor: SpaceDescriptor) -> Space:
        """Registers the space. Raises `KvstoreError`."""

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
        """The longest restorable prefix. Never raises."""

    def load_stream(
        self,
        space: Space,
        keys: Sequence[bytes],
        buffers: Sequence[memoryview],
        *,
        scopes: Sequence[str] = (),
        lease: Match | None = None,
        budget_s: float | None = None,
    ) -> Generator[list[Loaded], None, None]:
        """The leading blocks that arrive intact, as they come. Never raises."""

    def store(
        self,
        space: Space,
        keys: Sequence[bytes],
        blocks: Sequence[memoryview],
        *,
        parent_key: bytes = b"",
        scope: str = "",
        hint: ReuseHint | None = None,
        budget_s: float | None = None,
    ) -> list[bool]:
        """True for each block that the node holds afterwards. Never raises."""

    @property
    def arena(self) -> ArenaMemory | None:
        """The node's memory as it is mapped here, if it is."""

    def write_in_place(
        self,
        space: Space,
        keys: Sequence[bytes],
        held: list[bool],
        *,
        parent_key: bytes = b"",
        scope: str = "",
        hint: ReuseHint | None = None,
        budget_s: float | None = None,
        trailing: bool = False,
    ) -> Generator[list[EmptySlot], None, None]:
        """The slots of the node's memory to fill, step by step. Never raises."""

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
        """The leading blocks where they lie in the node's memory, step by step. Never raises."""

    def release(self, match: Match) -> None:
        """Ends a lease. Never raises."""

    def close(self) -> None:
        """Lets go of the connection."""


class StoreLink:
    """One tenant's client and space. The space is opened beside the worker, until it succeeds."""

    def __init__(
        self,
        connect: Callable[[], StoreClient],
        descriptor: SpaceDescriptor,
        scope: str = "",
        *,
        retry_s: float = 2.0,
    ) -> None:
        self.scope = scope
        """Where blocks are stored and looked for; empty: private to the tenant."""
        self.client = connect()
        self._descriptor = descriptor
        self._retry_s = retry_s
        self._space: Space | None = None
        self._closing = threading.Event()
        self._tried = threading.Event()
        self._opener = threading.Thread(target=self._open, name="kvstore-open", daemon=True)
        self._opener.start()

    @property
    def space(self) -> Space | None:
        """The space, once the store has opened it; until then every match is a miss."""
        return self._space

    @property
    def scopes(self) -> tuple[str, ...]:
        """The scopes to search, as the client takes them."""
        return (self.scope,) if self.scope else ()

    def wait_tried(self, timeout_s: float) -> bool:
        """True once the first attempt to open the space has ended, well or badly."""
        return self._tried.wait(timeout_s)

    def close(self) -> None:
        """Ends the attempts and the client. Idempotent."""
        self._closing.set()
        self.client.close()
        self._opener.join()

    def _open(self) -> None:
        reported = ""
        while not self._closing.is_set():
            try:
                self._space = self.client.open_space(self._descriptor)
            except KvstoreError as error:
                if str(error) != reported:
                    reported = str(error)
                    _log.warning("cannot open the space, serving without store: %s", error)
            finally:
                self._tried.set()
            if self._space is not None:
                return
            self._closing.wait(self._retry_s)
