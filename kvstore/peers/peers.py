"""All that a node has to do with its peers: it lends to them, and has a tier of what they lend."""

import asyncio
from collections.abc import Sequence
from contextlib import suppress

import grpc

from kvstore.api.clock import Clock
from kvstore.api.tier import BlockRef
from kvstore.api.tls import Trust
from kvstore.api.v1 import kvstore_pb2_grpc
from kvstore.bulk_line import Line
from kvstore.bulk_listener import BulkListener
from kvstore.calls import Calls
from kvstore.config import PeersSettings
from kvstore.directory import Directory, Neighbour
from kvstore.metrics import Metrics
from kvstore.names import block_name, namespace_tag
from kvstore.node import Node
from kvstore.peers.announcer import Announcer
from kvstore.peers.calls import PeerCalls
from kvstore.peers.circle import Circle
from kvstore.peers.credentials import Credentials
from kvstore.peers.found import Finder
from kvstore.peers.holdings import Holdings
from kvstore.peers.peer import Peer
from kvstore.peers.register import Register
from kvstore.peers.servicer import PeerServicer
from kvstore.peers.tier import PeerTier
from kvstore.runner import ThreadRunner
from kvstore.spaces import Spaces
from kvstore.staging import Staging
from kvstore.tickets import Ticket
from kvstore.tiers.disk import DiskTier
from kvstore.tiers.memory import Memory

WIRES = 8
"""Connections to other nodes that are in use at a time; each takes a thread."""
STAGING_BYTES = 32 << 20
"""Of memory for blocks on their way from disk to a peer, kept to be used again."""
PASS_ON_S = 0.5
"""So long it is waited for the directory to hear of something; it may be down."""
CLOSE_S = 1.0


class Peers:
    """The lending of a node and what it borrows. `tier` is for its expression of tiers; then
    `serve` and `start`, at the end `leave` and, when no call runs any more, `close`."""

    def __init__(
        self,
        settings: PeersSettings,
        secret: bytes,
        trust: Trust | None,
        directory: Directory,
        memory: Memory,
        disk: DiskTier | None,
        spaces: Spaces,
        clock: Clock,
        metrics: Metrics,
    ) -> None:
        own = directory.own
        self._clock = clock
        self._metrics = metrics
        self._memory = memory
        self._disk = disk
        self._trust = trust
        self._credentials = Credentials(secret, own.node_id, own.endpoint)
        self._runner = ThreadRunner(WIRES)
        self._room = asyncio.Semaphore(WIRES)
        self._staging = Staging(STAGING_BYTES)
        self.holdings = Holdings(memory, disk.index if disk is not None else None)
        register = Register(directory.redis, own)
        self.announcer = Announcer(
            self.holdings, register, clock, metrics, most_blocks=settings.announced_blocks
        )
        self.tier = PeerTier(
            directory,
            register,
            Circle(self._peer),
            spaces,
            metrics,
            timeout_s=settings.timeout_s,
        )
        self._node: Node | None = None

    def serve(
        self, node: Node, calls: Calls, listener: BulkListener, server: grpc.aio.Server
    ) -> None:
        """From now on peers are answered, over gRPC and at the port of the bulk path."""
        self._node = node
        finder = Finder(node.tiers, self._disk, self.holdings, self._staging)

        def calls_of(line: Line, ticket: Ticket) -> PeerCalls:
            return PeerCalls(node, calls, line, ticket, self._credentials, finder)

        listener.peer_calls = calls_of
        servicer = PeerServicer(calls, self._credentials, listener.invite_peer, self.forget)
        kvstore_pb2_grpc.add_PeerServicer_to_server(servicer, server)

    def start(self) -> None:
        """Announces what is here, and from now on what changes."""
        self.announcer.start()

    async def leave(self) -> None:
        """Nobody shall be sent here any more."""
        with suppress(TimeoutError):
            async with asyncio.timeout(PASS_ON_S):
                await self.announcer.leave()

    async def close(self) -> None:
        """Lets go of threads; the tier is closed by who uses it."""
        await self.leave()
        await self._runner.close(CLOSE_S)

    async def forget(self, names: Sequence[bytes], tag: bytes) -> int:
        """Forgets the blocks of some names, and all under a tag, on this node; how many copies."""
        assert self._node is not None
        asked = set(names)
        # Where changes are not looked at yet, some of the blocks have no name.
        await self.holdings.survey()

        def concerns(ref: BlockRef) -> bool:
            return block_name(ref) in asked or (bool(tag) and namespace_tag(ref.namespace) == tag)

        def find() -> list[BlockRef]:
            known = [*self._memory.refs(), *self._memory.awaited()]
            namespaces = {ref.namespace for ref in known} if tag else set()
            tagged = {each for each in namespaces if namespace_tag(each) == tag}
            waiting = [ref for ref in self._memory.awaited() if block_name(ref) in asked]
            named = self.holdings.refs(asked)
            return [*named, *waiting, *(ref for ref in known if ref.namespace in tagged)]

        async def below() -> int:
            return await self._disk.forget_named(names, tag) if self._disk is not None else 0

        copies = await self._node.tiers.forget_here(find, below, concerns)
        with suppress(TimeoutError):  # Nobody shall look for them here.
            async with asyncio.timeout(PASS_ON_S):
                await self.announcer.settle()
        return copies

    def _peer(self, node: Neighbour) -> Peer:
        return Peer(node, self._credentials, self._trust, self._clock, self._runner, self._room)
