"""Nodes that read from each other: found in the directory, moved over the bulk path, checked."""

from pathlib import Path
from typing import Any

from kvstore.server import NodeServer
from tests.sim.blocks import keys_of
from tests.sim.nodes import Nodes, counter, descriptor_of, load, store

BLOCKS = 12


class Cluster:
    """Nodes over one directory, each with files of its own."""

    def __init__(self, nodes: Nodes, home: Path, redis_url: str) -> None:
        self.nodes = nodes
        self._home = home
        self._redis_url = redis_url

    async def node(self, name: str, **sections: dict[str, Any]) -> NodeServer:
        """A node of this name, which all others know already."""
        sections["peers"] = {"enabled": True, "timeout_s": 30, "lookup_timeout_s": 30} | (
            sections.get("peers", {})
        )
        sections["redis"] = {"directory_url": self._redis_url} | sections.get("redis", {})
        sections["cluster"] = {"node_id": name} | sections.get("cluster", {})
        sections["disk"] = {"path": self._home / name} | sections.get("disk", {})
        return await self.nodes.start(self.nodes.settings(**sections))


async def met(*servers: NodeServer) -> None:
    """Returns when all of them know each other, and what each holds."""
    for server in servers:
        assert server.peers is not None
        await server.peers.announcer.settle()
    for server in servers:
        assert server._directory is not None
        while len(await server._directory.refresh()) < len(servers) - 1:
            await server.node.clock.sleep(0.001)


async def test_a_block_of_another_node_is_matched_and_loaded(
    nodes: Nodes, tmp_path: Path, redis_url: str
) -> None:
    cluster = Cluster(nodes, tmp_path, redis_url)
    one, two = await cluster.node("one"), await cluster.node("two")
    writer, reader = nodes.connect(one), nodes.connect(two)
    space = await writer.open_space(descriptor_of())
    await reader.open_space(descriptor_of())
    keys = keys_of("chat", BLOCKS)
    assert await store(writer, space, keys) == [True] * BLOCKS
    await met(one, two)
    assert await reader.locate(space, keys) == ["peers"] * BLOCKS
    match = await reader.match([space], keys, lease_ms=30_000)
    assert match.blocks == BLOCKS
    assert await load(reader, space, keys, lease=match) == ["peers"] * BLOCKS
    assert await load(reader, space, keys) == ["memory"] * BLOCKS
    assert counter(one, "peer_lent_blocks") == BLOCKS
