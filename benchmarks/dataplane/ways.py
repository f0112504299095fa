"""What can be put on the clock: every floor and every path, by name."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from benchmarks.dataplane.plan import FLOORS
from benchmarks.dataplane.ring import Ring

KNOBS = {
    "bare_grpc": (256 << 10, 512 << 10, 1 << 20, 2 << 20, 4 << 20),
    "raw_file": (1, 2, 4, 8),
    "raw_resp": (1, 2, 4, 8),
}
"""What is tried before a floor is measured; the best counts. Bytes of a message, requests."""
SERVERS: Mapping[str, tuple[str, ...]] = {
    "memcpy": (), "raw_socket": ("floors",), "bare_grpc": ("floors",), "raw_file": (),
    "raw_resp": ("redis",), "shm": ("node",), "bulk": ("node",), "grpc": ("node",), "disk": (),
    "redis": ("redis",), "peer": ("lender", "redis"),
}  # fmt: skip
"""The processes beside the client whose time counts."""
IN_ONE_PROCESS = {"disk", "raw_file"}
"""Several clients of these are several calls at a time in one process, which owns the files."""


class Way(Protocol):
    """Moves the blocks of a ring. `put` and `get` take places; they are coroutines, or block.

    Every call moves all of its blocks or raises.
    """

    knob: int

    async def prepare(self, op: str) -> None:
        """Whatever has to be true before the next calls of `op`; it is not on the clock."""

    async def close(self) -> None:
        """Leaves nothing behind."""


async def open_way(name: str, ring: Ring, owner: int, where: Mapping[str, Any]) -> Way:
    """The way of this name. `owner` is the client's number; `where` says where servers are."""
    if name == "memcpy":
        from benchmarks.dataplane.memcpy import Memcpy
        from benchmarks.dataplane.through_client import ThroughClient

        if "endpoint" not in where:
            return Memcpy(ring)
        return Memcpy(ring, await ThroughClient.connect(ring, owner, "shm", where["endpoint"]))
    if name == "raw_socket":
        from benchmarks.dataplane.raw_socket import RawSocket

        return RawSocket(ring, where["socket_port"])
    if name == "bare_grpc":
        from benchmarks.dataplane.bare_grpc import BareGrpc

        return BareGrpc(ring, owner, where["grpc_port"])
    if name == "raw_file":
        from benchmarks.dataplane.raw_file import RawFile

        return RawFile(ring, Path(where["home"]))
    if name == "raw_resp":
        from benchmarks.dataplane.raw_resp import RawResp

        return RawResp(ring, owner, where["redis_url"])
    if name == "disk":
        from benchmarks.dataplane.through_disk import ThroughDisk

        return await ThroughDisk.open(ring, Path(where["home"]))
    if name == "redis":
        from benchmarks.dataplane.through_redis import ThroughRedis

        return ThroughRedis(ring, owner, where["redis_url"])
    if name == "peer":
        from benchmarks.dataplane.through_peers import ThroughPeers

        return await ThroughPeers.open(ring, owner, where)
    if name in FLOORS:
        from benchmarks.dataplane.through_client import ThroughClient

        return await ThroughClient.connect(ring, owner, name, where["endpoint"])
    raise ValueError(f"{name}: there is no such way")
