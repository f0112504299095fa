"""The client of a store node, for programs that have an event loop."""

from collections.abc import Awaitable, Callable, Sequence

from kvstore.api.digest import DIGEST_BYTES
from kvstore.api.errors import Unavailable
from kvstore.api.hint import ReuseHint
from kvstore.api.tier import Loaded
from kvstore.api.v1 import kvstore_pb2 as pb
from kvstore.api.wire import hint_to_wire, pack_keys
from kvstore_client.arena import ArenaMemory
from kvstore_client.arguments import (
    Blocks,
    Buffers,
    block_views,
    check_keys,
    check_match,
    check_scopes,
)
from kvstore_client.arrivals import Arrivals, OnHere
from kvstore_client.budgets import Deadline
from kvstore_client.control import ControlClient
from kvstore_client.in_place import ReadInPlace, WriteInPlace
from kvstore_client.leading import Leading, OnLoaded
from kvstore_client.local_transfers import fetch, place
from kvstore_client.match import Match
from kvstore_client.pieces import Outgoing
from kvstore_client.space import Space
from kvstore_client.transfers import receive, send


class AsyncClient(ControlClient):
    """Finds, loads and stores the blocks of one node.

    `match`, `load`, `load_any`, `store`, `release` and `hint` never raise into an engine's hot
    path and never outlast their budget: they return what they have, count what went wrong in
    `counters` and log it now and then. Mistakes of the caller, such as a buffer of the wrong
    length, raise ValueError at once. The other methods raise `KvstoreError`.

    Construct and use it in one event loop.
    """

    async def match(
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
        """The longest prefix of the chain that all spaces can restore, under one lease.

        The caller has the first `held_blocks` blocks itself: they count as matched, so that
        `Match.blocks` is never less, also where the node could not be asked.

        Repeating a match with the same `request_id` returns its lease. `lease_ms` 0 asks for no
        lease.
        """
        check_match(spaces, keys, lease_ms, request_id, held_blocks)
        check_scopes(scopes)
        if not keys:
            return Match.none(held_blocks)
        deadline = self._deadline(budget_s, self.budgets.match_s)
        request = pb.MatchRequest(
            request_id=request_id,
            space_ids=[space.space_id for space in spaces],
            keys=pack_keys(keys),
            scopes=scopes,
            lease_ms=lease_ms,
            hint=hint_to_wire(hint),
            held_blocks=held_blocks,
        )

        async def attempt() -> Match:
            reply = await self._caller.unary(self._caller.stub.Match, request, deadline)
            return Match.from_wire(reply, len(spaces), len(keys), held_blocks)

        match = await self._caller.quietly("match", attempt, deadline, spaces)
        return match or Match.none(held_blocks)

    async def load(
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
        """The leading blocks that arrived whole and intact, one answer for each.

        Stops at the first block that is missing or damaged. The buffers are the caller's, one
        writable buffer of `space.block_bytes` for each key; after this returned, or was
        cancelled, nothing writes to them, and those without an answer hold undefined bytes.

        `on_loaded` hears of the same answers as they come, each once and in order: nothing writes
        to that block's buffer any more, while later ones are still on their way. It is called in
        the client's event loop and must neither wait nor raise.
        """
        told = Leading(on_loaded).here if on_loaded is not None else None
        arrivals = await self._load(space, keys, buffers, scopes, lease, budget_s, True, told)
        return arrivals.leading()

    async def load_any(
        self,
        space: Space,
        keys: Sequence[bytes],
        buffers: Buffers,
        *,
        scopes: Sequence[str] = (),
        lease: Match | None = None,
        budget_s: float | None = None,
    ) -> list[Loaded | None]:
        """Like `load`, but of any blocks in any order: None for each one that did not arrive."""
        arrivals = await self._load(space, keys, buffers, scopes, lease, budget_s, False)
        return arrivals.loaded

    async def _load(
        self,
        space: Space,
        keys: Sequence[bytes],
        buffers: Buffers,
        scopes: Sequence[str],
        lease: Match | None,
        budget_s: float | None,
        prefix_only: bool,
        on_here: OnHere | None = None,
    ) -> Arrivals:
        check_keys(keys)
        check_scopes(scopes)
        views = block_views(buffers, "buffers", len(keys), space.block_bytes, writable=True)
        arrivals = Arrivals(space.space_id, keys, views, on_here)
        if not keys:
            return arrivals
        deadline = self._deadline(budget_s, self.budgets.load_s)
        request = _read_request(space, keys, scopes, lease)

        async def attempt() -> bool:
            if any(arrivals.loaded):  # A second attempt: what is here is the caller's by now.
                await self._receive_rest(self._receive, request, arrivals, deadline, prefix_only)
            else:
                await self._receive(request, arrivals, deadline, prefix_only)
            return True

        ended = await self._caller.quietly("load", attempt, deadline, [space])
        losses = self._caller.losses
        if arrivals.corrupt_blocks:
            losses.count("load_corrupt", "digest or length is wrong", arrivals.corrupt_blocks)
        if ended and not arrivals.complete and not (prefix_only and arrivals.broken):
            losses.count("load_short", f"the answer of {self.endpoint} ended early")
        return arrivals

    async def store(
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
        """True for each block of one run of a chain that the node holds afterwards.

        Parents come first; `parent_key` is the block before the run, empty at the start of the
        chain. Only what the node lacks is sent. The blocks are read until this returns and never
        kept. `digests` saves computing them where the writer's are at hand.
        """
        check_keys(keys)
        if parent_key:
            check_keys([parent_key], "parent_key")
        views = block_views(blocks, "blocks", len(keys), space.block_bytes, writable=False)
        if digests is not None and len(digests) != len(keys):
            raise ValueError(f"digests: one for each key is needed, got {len(digests)}")
        if digests is not None and any(len(digest) != DIGEST_BYTES for digest in digests):
            raise ValueError(f"digests: {DIGEST_BYTES} bytes each are needed")
        held = [False] * len(keys)
        if not keys:
            return held
        deadline = self._deadline(budget_s, self.budgets.store_s)
        begin = _write_begin(space, keys, parent_key, parent_scope, scope, hint)
        run = Outgoing(space, keys, views, digests)
        await self._caller.quietly(
            "store", lambda: self._send(begin, run, held, deadline), deadline, [space]
        )
        return held

    async def _receive(
        self, request: pb.ReadRequest, arrivals: Arrivals, deadline: Deadline, prefix_only: bool
    ) -> None:
        """Through shared memory what lies there, and the rest from afar."""
        attached = self._neighbour.attached
        if attached is None:
            await self._receive_far(request, arrivals, deadline, prefix_only)
            return
        try:
            await fetch(attached, request, arrivals, deadline, prefix_only=prefix_only)
        except Unavailable:
            if not attached.closed:
                raise
        await self._receive_rest(self._receive_far, request, arrivals, deadline, prefix_only)

    async def _receive_far(
        self, request: pb.ReadRequest, arrivals: Arrivals, deadline: Deadline, prefix_only: bool
    ) -> None:
        """By the bulk path, and by the stream what that had to leave."""
        if not await self._bulk.fetch(request, arrivals, deadline, prefix_only=prefix_only):
            await self._receive_rest(self._receive_stream, request, arrivals, deadline, prefix_only)

    async def _receive_stream(
        self, request: pb.ReadRequest, arrivals: Arrivals, deadline: Deadline, prefix_only: bool
    ) -> None:
        await receive(self._caller, request, arrivals, deadline, prefix_only=prefix_only)

    async def _receive_rest(
        self,
        way: Callable[[pb.ReadRequest, Arrivals, Deadline, bool], Awaitable[None]],
        request: pb.ReadRequest,
        arrivals: Arrivals,
        deadline: Deadline,
        prefix_only: bool,
    ) -> None:
        """What is still missing of a read; what is here is not asked for, nor written to."""
        places, rest = arrivals.rest()
        if not places:
            arrivals.settle()
            return
        again = pb.ReadRequest()
        again.CopyFrom(request)
        again.keys = pack_keys(rest.keys)
        try:
            await way(again, rest, deadline, prefix_only)
        finally:
            arrivals.take(rest)

    async def _send(
        self, begin: pb.WriteBegin, run: Outgoing, held: list[bool], deadline: Deadline
    ) -> None:
        """Through shared memory; by the bulk path or the stream what that had no room for."""
        attached = self._neighbour.attached
        if attached is not None:
            try:
                if await place(attached, begin, run.blocks, held, deadline):
                    return
            except Unavailable:
                if not attached.closed:
                    raise
        if not await self._bulk.place(begin, run, held, deadline):
            await send(self._caller, begin, run, held, deadline)

    @property
    def arena(self) -> ArenaMemory | None:
        """The node's memory as it is mapped here; None where it is not, or not any more.

        Any thread may ask; what is not mapped is tried again by the calls that move blocks.
        """
        attached = self._neighbour.attached_now
        if attached is None:
            return None
        return ArenaMemory(attached.arena.memory, attached.slab_bytes)

    async def write_in_place(
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
    ) -> WriteInPlace | None:
        """Like `store`, by a caller who fills the node's slots himself; None without an arena.

        `held` has a place for each key, and is brought up to date with each step. `trailing`: see
        `kvstore_client.in_place`.
        """
        check_keys(keys)
        if parent_key:
            check_keys([parent_key], "parent_key")
        if len(held) != len(keys):
            raise ValueError(f"held: one for each key is needed, got {len(held)}")
        attached = self._neighbour.attached
        if attached is None or not keys:
            return None
        begin = _write_begin(space, keys, parent_key, parent_scope, scope, hint)
        deadline = self._deadline(budget_s, self.budgets.store_s)
        return WriteInPlace(attached, self._caller, begin, space, held, deadline, trailing=trailing)

    async def read_in_place(
        self,
        space: Space,
        keys: Sequence[bytes],
        *,
        scopes: Sequence[str] = (),
        lease: Match | None = None,
        budget_s: float | None = None,
        trailing: bool = False,
    ) -> ReadInPlace | None:
        """Like `load`, by a caller who copies out of the node's slots; None without an arena.

        `trailing`: see `kvstore_client.in_place`.
        """
        check_keys(keys)
        check_scopes(scopes)
        attached = self._neighbour.attached
        if attached is None or not keys:
            return None
        request = _read_request(space, keys, scopes, lease)
        deadline = self._deadline(budget_s, self.budgets.load_s)
        blocks = len(keys)
        return ReadInPlace(
            attached, self._caller, request, space, blocks, deadline, trailing=trailing
        )

    async def release(self, match: Match) -> None:
        """Ends the lease of a match before it expires."""
        if not match.lease_id:
            return
        deadline = self._deadline(None, self.budgets.control_s)
        request = pb.ReleaseRequest(lease_id=match.lease_id)
        await self._caller.quietly(
            "release",
            lambda: self._caller.unary(self._caller.stub.Release, request, deadline),
            deadline,
        )

    async def hint(
        self, space: Space, keys: Sequence[bytes], hint: ReuseHint, *, scope: str = ""
    ) -> None:
        """Tells the node what is known of a chain's future, without moving data."""
        check_keys(keys)
        deadline = self._deadline(None, self.budgets.control_s)
        request = pb.HintRequest(
            space_id=space.space_id, scope=scope, keys=pack_keys(keys), hint=hint_to_wire(hint)
        )
        await self._caller.quietly(
            "hint",
            lambda: self._caller.unary(self._caller.stub.Hint, request, deadline),
            deadline,
            [space],
        )


def _write_begin(
    space: Space,
    keys: Sequence[bytes],
    parent_key: bytes,
    parent_scope: str,
    scope: str,
    hint: ReuseHint | None,
) -> pb.WriteBegin:
    return pb.WriteBegin(
        space_id=space.space_id,
        scope=scope,
        keys=pack_keys(keys),
        parent_key=parent_key,
        parent_scope=parent_scope,
        hint=hint_to_wire(hint),
    )


def _read_request(
    space: Space, keys: Sequence[bytes], scopes: Sequence[str], lease: Match | None
) -> pb.ReadRequest:
    return pb.ReadRequest(
        space_id=space.space_id,
        scopes=scopes,
        keys=pack_keys(keys),
        lease_id=lease.lease_id if lease else b"",
    )
