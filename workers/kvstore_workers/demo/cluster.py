"""The parts of the demo as processes: Redis, a store node and two workers under Ray."""

import os
import secrets
import socket
import threading
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from kvstore.api.errors import Unavailable
from kvstore.api.v1.kvstore_pb2 import SegmentSealed
from kvstore_client import Client
from kvstore_workers.redis_server import RedisServer
from kvstore_workers.request import Completion, Request
from kvstore_workers.worker import WorkerConfig

WORKERS = ("A", "B")
READY_TIMEOUT_S = 120.0
EVENT_TIMEOUT_S = 30.0


class Cluster:
    """Everything running on this host, ended with the `with` block however that ends.

    Memory is sized in blocks of the model at hand, and deliberately small: what the conversations
    need does not fit into VRAM, nor into the memory tier.
    """

    def __init__(
        self, home: Path, worker: WorkerConfig, block_bytes: int, *, memory_blocks: int
    ) -> None:
        self._home = home
        self._worker = worker
        self._block_bytes = block_bytes
        self._memory_blocks = memory_blocks
        self._port = _free_port()
        self._endpoint = ""
        self._tokens = {tenant: secrets.token_urlsafe(32) for tenant in worker.tokens}
        self._redis = RedisServer(url=os.environ.get("KVSTORE_REDIS_URL"))
        self._sealed = threading.Event()
        self._actors: dict[str, Any] = {}
        self._store: Any = None
        self._ray: Any = None

    def __enter__(self) -> Self:
        self._redis.__enter__()
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop()

    def generate(self, worker: str, requests: Sequence[Request]) -> list[Completion]:
        """The answers of one worker."""
        answers: list[Completion] = self._ray.get(
            self._actors[worker].generate.remote(list(requests))
        )
        return answers

    def settle(self, worker: str) -> dict[bytes, bytes]:
        """Waits until a worker's blocks are stored; the SHA-256 of every block that it stored."""
        actor = self._actors[worker]
        if not self._ray.get(actor.flush_spills.remote(EVENT_TIMEOUT_S)):
            raise Unavailable(f"worker {worker} could not store its blocks in {EVENT_TIMEOUT_S} s")
        digests: dict[bytes, bytes] = self._ray.get(actor.spill_digests.remote())
        return digests

    def counters(self) -> dict[str, dict[str, float]]:
        """What the workers and the node have counted, for whoever wants to look deeper."""
        stats = {name: self._ray.get(actor.stats.remote()) for name, actor in self._actors.items()}
        with Client(self._endpoint, token=next(iter(self._tokens.values()))) as client:
            return {**stats, "node": dict(client.status().counters)}

    def crash_and_restart(self) -> None:
        """Kills the node with SIGKILL once a segment is sealed; starts it again without Redis."""
        if not self._sealed.wait(EVENT_TIMEOUT_S):
            raise Unavailable(f"no disk segment was sealed within {EVENT_TIMEOUT_S} s")
        self._ray.get(self._store.kill.remote())
        self._write_config(redis_url="")
        self._ray.get(self._store.start.remote())

    def _start(self) -> None:
        self._ray = _start_ray()
        from kvstore_workers.ray_app import StoreActor, WorkerActor

        settings = self._write_config(self._redis.url)
        self._store = StoreActor.options(num_cpus=0).remote(settings)
        self._endpoint = self._ray.get(self._store.start.remote(), timeout=READY_TIMEOUT_S)
        self._follow_events(self._endpoint)
        config = replace(self._worker, store_endpoint=self._endpoint, tokens=self._tokens)
        gpus = self._ray.cluster_resources().get("GPU", 0) / len(WORKERS)
        for name in WORKERS:
            actor = WorkerActor.options(num_cpus=1, num_gpus=min(1, gpus))
            self._actors[name] = actor.remote(config)
        ready = [actor.ready.remote() for actor in self._actors.values()]
        for connected in self._ray.get(ready, timeout=READY_TIMEOUT_S):
            if not all(connected[tenant] for tenant in self._tokens):
                raise Unavailable("a worker could not reach the store node")

    def _write_config(self, redis_url: str) -> Path:
        """The node's settings. The port stays, so that the workers find it again."""
        tokens, config = self._home / "tokens.toml", self._home / "kvstore.toml"
        tokens.write_text(
            "".join(
                f'[tenants."{tenant}"]\ntoken_sha256 = ["{sha256(token.encode()).hexdigest()}"]\n'
                for tenant, token in self._tokens.items()
            )
        )
        memory_bytes = self._memory_blocks * self._block_bytes
        segment_bytes = max(1 << 20, 24 * self._block_bytes)
        config.write_text(
            f"""[server]
listen = "127.0.0.1:{self._port}"
metrics_listen = "127.0.0.1:0"
[auth]
tokens_file = "{tokens}"
[memory]
capacity_bytes = {memory_bytes}
slab_bytes = {self._block_bytes * 8}
[redis]
blocks_url = "{redis_url}"
lookup_timeout_s = 0.5
[disk]
path = "{self._home / "store" / "blocks"}"
capacity_bytes = {segment_bytes * 64}
segment_bytes = {segment_bytes}
sync_after_s = 1
"""
        )
        return config

    def _follow_events(self, endpoint: str) -> None:
        """Sets the event once the node says that blocks are on the device."""
        client = Client(endpoint, token=next(iter(self._tokens.values())))

        def follow() -> None:
            try:
                for event in client.watch():
                    if isinstance(event, SegmentSealed) and event.blocks:
                        self._sealed.set()
            except Unavailable:
                return  # The node was killed: this stream has done its part.
            finally:
                client.close()

        threading.Thread(target=follow, name="kvstore-demo-events", daemon=True).start()

    def _stop(self) -> None:
        if self._ray is not None:
            if self._store is not None:
                self._ray.get(self._store.stop.remote())
            self._ray.shutdown()
        self._redis.stop()


def _start_ray() -> Any:
    """Ray on this host alone: no dashboard, no statistics sent, no token files written."""
    os.environ["RAY_AUTH_MODE"] = "disabled"
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    ray.init(
        address="local",
        num_cpus=len(WORKERS),
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=100 << 20,
    )
    return ray


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
