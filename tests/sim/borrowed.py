"""One node's blocks as another one sees them, as a tier that can be stored to."""

from collections.abc import Sequence
from pathlib import Path
from typing import Self

from kvstore.api.tier import Block, BlockRef, Load, Loaded, Usage
from kvstore.peers.peers import Peers
from kvstore.server import NodeServer
from tests.sim.nodes import Nodes


class Borrowed:
    """Stores go to one node; all else is asked of the other's peers. A namespace is its space."""

    name = "peers"

    def __init__(self, lender: NodeServer, borrower: NodeServer) -> None:
        self._lender = lender
        self._borrower = borrower

    @classmethod
    async def from_nodes(cls, nodes: Nodes, home: Path, redis_url: str) -> Self:
        """Two nodes that know each other."""
        servers = [
            await nodes.start(
                peers={"enabled": True, "timeout_s": 30, "lookup_timeout_s": 30},
                redis={"directory_url": redis_url},
                cluster={"node_id": name},
                disk={"path": home / name},
            )
            for name in ("lender", "borrower")
        ]
        for server in servers:
            assert server._directory is not None
            await server._directory.beat()
        await _peers_of(servers[1]).tier._directory.refresh()
        return cls(*servers)

    async def locate(self, refs: Sequence[BlockRef]) -> list[str | None]:
        await self._settle()
        return await _peers_of(self._borrower).tier.locate(refs)

    async def wants(self, refs: Sequence[BlockRef]) -> list[bool]:
        return await self._lender.node.tiers.wants(refs)

    async def load(self, loads: Sequence[Load]) -> list[Loaded | None]:
        await self._settle()
        for load in loads:
            space_id = load.ref.namespace
            self._borrower.node._known.learn(space_id, space_id, "bfloat16")
        answers = await _peers_of(self._borrower).tier.load(loads)
        # The answer is here a moment before the call is over there, and its slots are let go.
        assert await self._lender.calls.finished(60.0)
        return answers

    async def store(self, blocks: Sequence[Block]) -> list[bool]:
        return await self._lender.node.tiers.store(blocks)

    async def discard(self, refs: Sequence[BlockRef]) -> int:
        return await _peers_of(self._borrower).tier.discard(refs)

    async def clear(self, namespace: bytes) -> int:
        return await _peers_of(self._borrower).tier.clear(namespace)

    def usage(self) -> list[Usage]:
        return _peers_of(self._borrower).tier.usage()

    async def close(self) -> None:
        """The nodes are stopped by who started them."""

    async def _settle(self) -> None:
        for server in (self._lender, self._borrower):
            await _peers_of(server).tier.settle()
            await _peers_of(server).announcer.settle()


def _peers_of(server: NodeServer) -> Peers:
    assert server.peers is not None
    return server.peers
