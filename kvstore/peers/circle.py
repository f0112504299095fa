"""The other nodes of the cluster, as far as they lend blocks."""

from collections.abc import Callable, Iterable

from kvstore.directory import Neighbour
from kvstore.peers.peer import Peer


class Circle:
    """Has one `Peer` for each node that it is told of, and lets go of those that have gone."""

    def __init__(self, make: Callable[[Neighbour], Peer]) -> None:
        self._make = make
        self._peers: dict[Neighbour, Peer] = {}

    async def of(self, nodes: Iterable[Neighbour]) -> list[Peer]:
        """The peers that these nodes are, in their order; all others are let go."""
        peers = {node: self._peers.get(node) or self._make(node) for node in nodes if node.lends}
        left = [peer for node, peer in self._peers.items() if node not in peers]
        self._peers = peers
        for peer in left:
            await peer.close()
        return list(peers.values())

    async def close(self) -> None:
        """Hangs up on all."""
        await self.of([])
