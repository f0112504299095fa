"""Other nodes of the cluster as a tier: read, never written to."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, NamedTuple
from zlib import crc32

from kvstore.api.bulk import Parcel
from kvstore.api.errors import KvstoreError, TierError
from kvstore.api.tier import Block, BlockRef, Load, Loaded, Usage
from kvstore.directory import Directory
from kvstore.metrics import Metrics
from kvstore.names import block_name, namespace_tag
from kvstore.peers.circle import Circle
from kvstore.peers.peer import Fetched, Peer
from kvstore.peers.register import Register
from kvstore.spaces import Spaces
from kvstore.tiers.guarded import CLEAR_S

_log = logging.getLogger("kvstore.peers")

MAX_NAMES = 4096
"""That one read of a peer asks for."""
ANSWER_PART = 0.9
"""Of the time that a batch has; what has come by then is delivered."""


class _Wish(NamedTuple):
    """A block that somebody waits for: its place in the batch, its name, and where it shall go."""

    place: int
    name: bytes
    parcel: Parcel


class PeerTier:
    """Blocks that other nodes hold, by what the register says, checked before they are delivered.

    What a node says not to have it takes out of the register itself: a stale entry costs one failed
    read. What comes damaged is struck. A node that cannot be reached, or is late, rests a while.
    """

    name = "peers"

    def __init__(
        self,
        directory: Directory,
        register: Register,
        circle: Circle,
        spaces: Spaces,
        metrics: Metrics,
        *,
        timeout_s: float,
    ) -> None:
        self._directory = directory
        self._register = register
        self._circle = circle
        self._spaces = spaces
        self._metrics = metrics
        self._timeout_s = timeout_s
        self._tasks: set[asyncio.Task[None]] = set()

    async def locate(self, refs: Sequence[BlockRef]) -> list[str | None]:
        rows = await self._rows([block_name(ref) for ref in refs], await self._awake())
        held = map(any, zip(*rows.values(), strict=True)) if rows else [False] * len(refs)
        return [self.name if here else None for here in held]

    async def wants(self, refs: Sequence[BlockRef]) -> list[bool]:
        return [False] * len(refs)

    async def load(self, loads: Sequence[Load]) -> list[Loaded | None]:
        answers: list[Loaded | None] = [None] * len(loads)
        end_s = asyncio.get_running_loop().time() + ANSWER_PART * self._timeout_s
        shares = await self._shared_out(self._wishes(loads))
        fetches = [self._fetch(peer, share, answers, end_s) for peer, share in shares.items()]
        # Not one of them is left behind: its thread would write to buffers of the caller's.
        for outcome in await asyncio.gather(*fetches, return_exceptions=True):
            if isinstance(outcome, BaseException):
                raise outcome
        return answers

    async def store(self, blocks: Sequence[Block]) -> list[bool]:
        return [False] * len(blocks)

    async def discard(self, refs: Sequence[BlockRef]) -> int:
        names = [block_name(ref) for ref in refs]
        timeout_s = ANSWER_PART * self._timeout_s
        return await self._everybody(lambda peer: peer.forget(names, b"", timeout_s))

    async def clear(self, namespace: bytes) -> int:
        tag = namespace_tag(namespace)
        timeout_s = ANSWER_PART * max(CLEAR_S, self._timeout_s)
        return await self._everybody(lambda peer: peer.forget([], tag, timeout_s))

    def usage(self) -> list[Usage]:
        return [Usage(self.name, 0, 0, 0)]

    async def settle(self) -> None:
        """Returns when all that came damaged is struck."""
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def close(self) -> None:
        await self.settle()
        await self._circle.close()

    async def _awake(self) -> list[Peer]:
        peers = await self._circle.of(self._directory.others)
        return [peer for peer in peers if not peer.rests]

    async def _rows(self, names: Sequence[bytes], peers: Sequence[Peer]) -> dict[Peer, list[bool]]:
        """Which of the blocks each peer holds."""
        rows = await self._register.who_holds(names, [peer.node for peer in peers])
        return dict(zip(peers, rows, strict=True))

    def _wishes(self, loads: Sequence[Load]) -> list[_Wish]:
        """Those of the loads that can be checked when they have come."""
        wishes = []
        for place, load in enumerate(loads):
            space = self._spaces.find(load.ref.namespace)
            if space is None:
                self._metrics.peer_misses.labels("unknown").inc()
            elif len(load.into):
                parcel = Parcel(space.space_id, load.ref.key, load.into)
                wishes.append(_Wish(place, block_name(load.ref), parcel))
        return wishes

    async def _shared_out(self, wishes: Sequence[_Wish]) -> dict[Peer, list[_Wish]]:
        """Whom to ask for what: of those who hold a block the one who holds the most of them.

        Of equals each node prefers another one.
        """
        rows = await self._rows([wish.name for wish in wishes], await self._awake())
        own_id = self._directory.own.node_id

        def worth(peer: Peer) -> tuple[int, int]:
            return sum(rows[peer]), crc32(f"{own_id} {peer.node.node_id}".encode())

        peers = sorted(rows, key=worth, reverse=True)
        shares: dict[Peer, list[_Wish]] = {}
        for at, wish in enumerate(wishes):
            peer = next((peer for peer in peers if rows[peer][at]), None)
            if peer is not None:
                shares.setdefault(peer, []).append(wish)
        return shares

    async def _fetch(
        self, peer: Peer, wishes: Sequence[_Wish], answers: list[Loaded | None], end_s: float
    ) -> None:
        loop = asyncio.get_running_loop()
        for start in range(0, len(wishes), MAX_NAMES):
            part = wishes[start : start + MAX_NAMES]
            fetched = await peer.fetch(
                [wish.name for wish in part], [wish.parcel for wish in part], end_s - loop.time()
            )
            for at, loaded in fetched.loaded.items():
                answers[part[at].place] = loaded._replace(tier=self.name)
            self._take_stock(peer, part, fetched)
            if fetched.answered < len(part):
                return

    def _take_stock(self, peer: Peer, wishes: Sequence[_Wish], fetched: Fetched) -> None:
        """Counts what has not come, and strikes what came damaged."""
        lacking = set(range(len(wishes))) - fetched.loaded.keys() - set(fetched.damaged)
        gone = {at for at in lacking if at < fetched.answered}
        self._metrics.peer_misses.labels("gone").inc(len(gone))
        self._metrics.peer_misses.labels(fetched.cause).inc(len(lacking - gone))
        self._metrics.peer_misses.labels("damaged").inc(len(fetched.damaged))
        self._metrics.corrupt.labels(self.name).inc(len(fetched.damaged))
        if fetched.damaged:
            _log.warning(
                "%d blocks came damaged from node %s", len(fetched.damaged), peer.node.node_id
            )
            self._keep(self._strike(peer, [wishes[at].name for at in fetched.damaged]))

    async def _strike(self, peer: Peer, names: Sequence[bytes]) -> None:
        try:
            await self._register.strike(peer.node, names)
        except TierError as error:
            _log.info("entries of damaged blocks stay in the directory: %s", error)

    async def _everybody(self, forget: Callable[[Peer], Awaitable[int]]) -> int:
        """What all other nodes forget together. Raises TierError where one of them may not have."""
        peers = await self._circle.of(await self._directory.refresh())
        outcomes = await asyncio.gather(*map(forget, peers), return_exceptions=True)
        for peer, outcome in zip(peers, outcomes, strict=True):
            if isinstance(outcome, KvstoreError):
                raise TierError(f"node {peer.node.node_id} may not have forgotten: {outcome}")
            if isinstance(outcome, BaseException):
                raise outcome
        return sum(count for count in outcomes if isinstance(count, int))

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
