"""Nodes that really serve, in this process, and clients that are connected to them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import grpc

from kvstore.api.clock import Clock
from kvstore.api.digest import block_digest
from kvstore.api.space import SpaceDescriptor
from kvstore.api.tier import BlockRef, Tier
from kvstore.config import Settings
from kvstore.server import NodeServer
from kvstore_client import AsyncClient, Budgets, Space
from tests.sim.blocks import data_of
from tests.sim.rig import assert_idle, leaves, quiet

BLOCK_BYTES = 6000
PATIENT = Budgets(open_s=60, match_s=60, load_s=60, store_s=60, control_s=60)
SECRET = bytes(range(32))

BASE: dict[str, dict[str, Any]] = {
    "server": {"listen": "127.0.0.1:0", "metrics_listen": "", "drain_timeout_s": 30},
    "cluster": {"node_id": "node"},
    "memory": {"capacity_bytes": 1 << 20, "slab_bytes": 1 << 16},
    "redis": {"lookup_timeout_s": 30, "timeout_s": 30, "part_bytes": 4096},
    "disk": {
        "capacity_bytes": 4 << 20,
        "segment_bytes": 1 << 18,
        "lookup_timeout_s": 30,
        "timeout_s": 30,
        "threads": 2,
    },
}
"""Small, on any free port, and with deadlines that a busy machine can keep."""


def descriptor_of(block_bytes: int = BLOCK_BYTES, **changes: Any) -> SpaceDescriptor:
    """A space of small blocks."""
    values: dict[str, Any] = {
        "model": "tiny",
        "revision": "1",
        "dtype": "bfloat16",
        "layout": "LKHD",
        "block_tokens": 1,
        "block_bytes": block_bytes,
    }
    return SpaceDescriptor(**(values | changes))


class Nodes:
    """Starts nodes and clients for one test; at the end it checks the nodes and stops both."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._servers: list[NodeServer] = []
        self._clients: list[AsyncClient] = []

    def settings(self, **sections: Mapping[str, Any]) -> Settings:
        """Settings of a small node whose files lie in the test's own directory."""
        secret = self._home / "secret"
        secret.write_bytes(SECRET)
        values = {name: dict(section) for name, section in BASE.items()}
        values["cluster"]["secret_file"] = secret
        values["disk"]["path"] = self._home / "blocks"
        for name, section in sections.items():
            values.setdefault(name, {}).update(section)
        if values["server"]["metrics_listen"] == "":
            values["server"]["metrics_listen"] = None
        return Settings.model_validate(values)

    async def start(
        self,
        settings: Settings | None = None,
        clock: Clock | None = None,
        wrap: Callable[[Tier], Tier] | None = None,
        **sections: Mapping[str, Any],
    ) -> NodeServer:
        """A node that answers; `wrap` puts something around its slower tiers."""
        settings = settings or self.settings(**sections)
        server = await NodeServer.start(settings, clock, *((wrap,) if wrap else ()))
        self._servers.append(server)
        return server

    async def stop(self, server: NodeServer) -> None:
        """Checks a node and stops it in order, memory flushed."""
        self._servers.remove(server)
        await quiet(server.node.tiers)
        check_node(server)
        await server.stop()

    def connect(self, server: NodeServer | str, token: str | None = None) -> AsyncClient:
        """A client of a node, with budgets that a busy machine can keep."""
        endpoint = server if isinstance(server, str) else server.endpoint
        client = AsyncClient(endpoint, token=token, budgets=PATIENT)
        self._clients.append(client)
        return client

    async def finish(self) -> None:
        """Checks every node, and stops everything."""
        for client in self._clients:
            await client.close()
        try:
            for server in self._servers:
                await quiet(server.node.tiers)
                check_node(server)
        finally:
            for server in self._servers:
                await server.stop()


def check_node(server: NodeServer, *, idle: bool = True) -> None:
    """Every invariant of a running node; once leases are gone, that nothing is pinned."""
    node = server.node
    node.leases.check()
    for tier in leaves(node.tiers):
        if hasattr(tier, "check"):
            tier.check()
    if idle and not len(node.leases):
        assert_idle(node.tiers.memory)


def counter(server: NodeServer, metric: str, **labels: str) -> float:
    """What a counter of a node says now."""
    registry = server.node.metrics.registry
    return registry.get_sample_value(f"kvstore_{metric}_total", labels) or 0.0


def expected(space: Space, key: bytes) -> bytes:
    """What the block of this key contains in this space."""
    return data_of(BlockRef(space.space_id, key), space.block_bytes)


def digest_of(space: Space, key: bytes, data: bytes) -> bytes:
    """The digest that a writer computes."""
    return block_digest(space.space_id, key, data)


async def store(client: AsyncClient, space: Space, keys: list[bytes], **options: Any) -> list[bool]:
    """Stores the blocks of these keys, as one run."""
    return await client.store(space, keys, [expected(space, key) for key in keys], **options)


async def load(
    client: AsyncClient, space: Space, keys: list[bytes], **options: Any
) -> list[str | None]:
    """From which tier each block came, None for a miss; every byte that came is checked."""
    buffers = [bytearray(b"\xee" * space.block_bytes) for _ in keys]
    answers = await client.load_any(space, keys, buffers, **options)
    for key, buffer, answer in zip(keys, buffers, answers, strict=True):
        assert answer is None or buffer == expected(space, key), "a wrong byte"
    return [answer.tier if answer is not None else None for answer in answers]


def call_metadata(token: str | None) -> tuple[tuple[str, str], ...]:
    """The metadata of a call by the owner of a token."""
    return () if token is None else (("authorization", f"Bearer {token}"),)


def raw_channel(server: NodeServer | str) -> grpc.aio.Channel:
    """A channel without any of the client's care, for calls that no client would make."""
    endpoint = server if isinstance(server, str) else server.endpoint
    options = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
    return grpc.aio.insecure_channel(endpoint, options=options)
