"""The processes that one block size needs: clients, a node, a Redis, the floors' other end."""

import contextlib
import json
import secrets
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.dataplane.child import Child, cpu_s
from benchmarks.dataplane.sampler import Sample
from benchmarks.dataplane.ways import IN_ONE_PROCESS, SERVERS
from kvstore.names import SECRET_BYTES
from kvstore_workers.redis_server import RedisServer

START_S = 60.0
ANSWER_S = 120.0
SLAB_BYTES = 64 << 20
SETTLE_S = 0.3
POLL_S = 0.01
STILL_S = 0.001
"""A server that took less of a CPU than this between two looks has come to rest."""
NODE_FLAGS = {
    "--server-listen": "127.0.0.1:0",
    "--server-metrics-listen": "",
    "--server-drain-timeout-s": "1",
    "--disk-enabled": "false",
    "--leases-memory-fraction": "0.9",
    "--log-level": "warning",
}


NO_FLAGS: Mapping[str, str] = {}
PEER_FLAGS = {
    "--peers-enabled": "true",
    "--peers-lookup-timeout-s": "60",
    "--peers-timeout-s": "60",
}


class Refused(Exception):
    """When a client could not do what it was told; the message says why."""


class Stage:
    """Servers and clients for blocks of one size. Enter it; nothing outlives it.

    Clients are processes that each go round in `ring_blocks` blocks. Servers that no path needs
    are not started. Files lie in a new directory in `home`.
    """

    def __init__(
        self, home: Path, block_bytes: int, ring_blocks: int, clients: int, servers: set[str]
    ) -> None:
        self._home = home
        self._block_bytes = block_bytes
        self._ring_blocks = ring_blocks
        self._clients = clients
        self._wanted = servers
        self._exits = contextlib.ExitStack()
        self._pids: dict[str, int] = {}
        self._movers: list[Child] = []

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self._exits.__exit__(*sys.exc_info())
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._exits.__exit__(kind, error, traceback)

    def prepare(self, way: str, op: str, clients: int, knob: int = 0) -> None:
        """Whatever has to be true before calls of `op`, in each of the clients."""
        self._ask(self._movers_for(way, clients), do="prepare", way=way, op=op, knob=knob)

    def sample(self, way: str, op: str, batch: int, clients: int, most_s: float) -> Sample:
        """One sample of so many clients at once, with the time of the servers."""
        movers = self._movers_for(way, clients)
        tasks = clients if way in IN_ONE_PROCESS else 1
        servers = [self._pids[name] for name in SERVERS[way]]
        before_s = cpu_s(servers)
        answers = self._ask(
            movers, do="sample", way=way, op=op, batch=batch, tasks=tasks, most_s=most_s
        )
        return Sample.together([Sample(**a) for a in answers], settled_cpu_s(servers) - before_s)

    def check(self, way: str, batch: int, clients: int) -> None:
        """Raises `Refused` if bytes come back that were not put."""
        answers = self._ask(self._movers_for(way, clients), do="check", way=way, batch=batch)
        wrong = sum(answer["wrong_blocks"] for answer in answers)
        if wrong:
            raise Refused(f"{wrong} blocks came back with other bytes")

    def close_way(self, way: str) -> None:
        """Lets go of what a path keeps in memory and files."""
        self._ask(self._movers, do="close", way=way)

    def _movers_for(self, way: str, clients: int) -> list[Child]:
        return self._movers[: 1 if way in IN_ONE_PROCESS else clients]

    def _ask(self, movers: list[Child], **words: Any) -> list[dict[str, Any]]:
        for mover in movers:
            mover.tell(words)
        answers = [mover.hear(ANSWER_S) for mover in movers]
        for answer in answers:
            if "error" in answer:
                raise Refused(answer["error"])
        return answers

    def _start(self) -> None:
        files = self._exits.enter_context(tempfile.TemporaryDirectory(dir=self._home))
        where: dict[str, Any] = {"home": files}
        if "floors" in self._wanted:
            floors = self._child("floors", "benchmarks.dataplane.floor_server")
            where |= floors.hear(START_S)
        if "redis" in self._wanted:
            redis = self._exits.enter_context(RedisServer(policy="noeviction", tcp=True))
            self._pids["redis"] = redis.pid
            where["redis_url"] = redis.url
        if "node" in self._wanted:
            where["endpoint"] = self._node("node", Path(files)).hear(START_S)["endpoint"]
        if "lender" in self._wanted:
            secret_file = Path(files) / "secret"
            secret_file.write_bytes(secrets.token_bytes(SECRET_BYTES))
            where["secret_file"] = str(secret_file)
            flags = PEER_FLAGS | {
                "--redis-directory-url": where["redis_url"],
                "--cluster-secret-file": where["secret_file"],
            }
            where["lender"] = self._node("lender", Path(files), flags).hear(START_S)["endpoint"]
        for owner in range(self._clients):
            arguments = [owner, self._block_bytes, self._ring_blocks, json.dumps(where)]
            mover = Child("benchmarks.dataplane.mover", *map(str, arguments))
            self._movers.append(self._exits.enter_context(mover))

    def _node(self, name: str, files: Path, more: Mapping[str, str] = NO_FLAGS) -> Child:
        """A node that keeps all blocks of all clients in memory, and nothing elsewhere."""
        ring_bytes = self._ring_blocks * self._block_bytes
        # A quarter more than the blocks: slabs are cut into whole slots.
        slabs = -(-self._clients * ring_bytes * 5 // (4 * SLAB_BYTES)) + 2
        flags = NODE_FLAGS | {
            "--disk-path": str(files / name),
            "--memory-capacity-bytes": str(slabs * SLAB_BYTES),
            "--memory-slab-bytes": str(SLAB_BYTES),
            **more,
        }
        words = [word for flag in flags.items() for word in flag]
        return self._child(name, "kvstore", "serve", "--supervised", *words)

    def _child(self, name: str, module: str, *arguments: str) -> Child:
        child = self._exits.enter_context(Child(module, *arguments))
        self._pids[name] = child.pid
        return child


def settled_cpu_s(pids: list[int]) -> float:
    """CPU seconds of processes once they have come to rest: what a call leaves behind counts."""
    end_s = time.monotonic() + SETTLE_S
    now_s = cpu_s(pids)
    while pids and time.monotonic() < end_s:
        time.sleep(POLL_S)
        before_s, now_s = now_s, cpu_s(pids)
        if now_s - before_s < STILL_S:
            break
    return now_s
