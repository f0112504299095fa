"""A node as a running server: the expression of its tiers, its gRPC port, its end."""

import asyncio
import logging
import os
import resource
import secrets
import socket
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import start_http_server
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError

from kvstore.admission import Admission, Limits
from kvstore.api.clock import Clock, SystemClock
from kvstore.api.errors import ConfigError
from kvstore.api.tier import Tier
from kvstore.api.tls import Identity, Trust
from kvstore.api.v1 import kvstore_pb2
from kvstore.api.v1.kvstore_pb2 import AttachReply, ConnectReply
from kvstore.api.wire import STREAM_OPTIONS
from kvstore.attachment import Room
from kvstore.bulk_listener import BulkListener
from kvstore.calls import Calls
from kvstore.codec import NO_LOSS
from kvstore.config import (
    DATA_HOME,
    ClusterSettings,
    DiskSettings,
    MemorySettings,
    PeersSettings,
    RedisSettings,
    ServerSettings,
    Settings,
    is_wildcard,
)
from kvstore.directory import Directory, Neighbour
from kvstore.events import Draining, Events, SegmentSealed
from kvstore.files import DirectoryFiles
from kvstore.health import Health
from kvstore.leases import LeaseTable
from kvstore.local_socket import LocalSocket
from kvstore.metrics import Metrics
from kvstore.names import SECRET_BYTES
from kvstore.node import Node
from kvstore.peers.peers import Peers
from kvstore.policy.policies import make_policy
from kvstore.runner import Runner, ThreadRunner
from kvstore.servicer import Servicer, serve
from kvstore.spaces import Spaces
from kvstore.tenants import Tenants
from kvstore.tier_codec import TierCodec
from kvstore.tiers.beside import Beside
from kvstore.tiers.disk import DiskTier
from kvstore.tiers.guarded import QUEUE_BYTES, Guarded
from kvstore.tiers.measured import Measured
from kvstore.tiers.memory import Memory
from kvstore.tiers.redis import RedisTier
from kvstore.tiers.redis_wires import Wires
from kvstore.tiers.tiered import Tiered

SERVICE = kvstore_pb2.DESCRIPTOR.services_by_name["KVStore"].full_name
KEEPALIVE_MS = 10_000
KEEPALIVE_LEAST_MS = 5_000
REDIS_CONNECTIONS = 16
REDIS_WIRES = 8
"""Connections besides, each with a thread, for the bytes of blocks."""
LAST_WORDS_S = 0.2
CLOSE_S = 2.0
DIGEST_THREADS = 1
"""Of their own: behind a device that hangs no reader shall wait for a digest."""
OTHER_FILES = 1024
"""Connections, above all."""

_log = logging.getLogger("kvstore")


def _as_it_is(tier: Tier) -> Tier:
    return tier


class NodeServer:
    """A node that serves. `await NodeServer.start(settings)`, later `await server.stop()`."""

    def __init__(
        self,
        settings: Settings,
        node: Node,
        calls: Calls,
        grpc_server: grpc.aio.Server,
        health_servicer: Health,
        runner: Runner,
        let_go: list[Callable[[], None]],
        port: int,
    ) -> None:
        self._settings = settings
        self.node = node
        self.calls = calls
        self._grpc = grpc_server
        self._health = health_servicer
        self._runner = runner
        self._let_go = let_go
        """Of what the runner's threads use."""
        self._closers: list[Callable[[], Any]] = []
        self._local: LocalSocket | None = None
        self._bulk: BulkListener | None = None
        self._directory: Directory | None = None
        self.peers: Peers | None = None
        self._identity: Identity | None = None
        self.endpoint = _endpoint(settings, port)
        self.metrics_endpoint = ""
        self.hangs = False
        """After `stop`: whether threads were left behind, which would hold up the process's end."""

    @classmethod
    async def start(
        cls,
        settings: Settings,
        clock: Clock | None = None,
        wrap: Callable[[Tier], Tier] = _as_it_is,
    ) -> "NodeServer":
        """A server that answers. Raises ConfigError, naming the setting, if it cannot.

        `wrap` may put something around each slower tier, beneath its deadlines: faults, say.
        """
        clock = clock or SystemClock()
        metrics, events = Metrics(), Events()
        tenants = _tenants(settings)
        secret = _cluster_secret(settings.cluster, settings.disk)
        grpc_server = grpc.aio.server(
            options=_grpc_options(settings),
            maximum_concurrent_rpcs=settings.server.max_concurrent_calls,
        )
        identity = _identity(settings.server)
        trust = _trust(settings.peers)
        port = _listen(grpc_server, settings.server.listen, identity)
        directory = _directory(settings, port, clock)
        runner = ThreadRunner(settings.disk.threads)
        digester = ThreadRunner(DIGEST_THREADS)
        let_go: list[Callable[[], None]] = []
        guards: list[Guarded] = []
        spaces = Spaces()
        memory = _memory(settings.memory, clock)
        try:
            slow, disk = await _slow_tiers(
                settings, runner, clock, metrics, events, spaces, let_go, guards, wrap
            )
        except BaseException:
            await memory.close()
            await runner.close(CLOSE_S / 2)
            for end in let_go:
                end()
            raise
        leased_bytes = int(settings.memory.capacity_bytes * settings.leases.memory_fraction)
        peers: Peers | None = None
        beyond: Guarded | None = None
        if settings.peers.enabled:
            assert directory is not None
            peers = Peers(
                settings.peers, secret, trust, directory, memory, disk, spaces, clock, metrics
            )
            beyond = _guarded(wrap(peers.tier), settings.peers, clock, metrics)
            guards.append(beyond)
        node = Node(
            node_id=_node_id(settings, port),
            secret=secret,
            tiers=Tiered(memory, slow, metrics, digester, beyond),
            leases=LeaseTable(leased_bytes),
            max_lease_s=settings.leases.max_lease_s,
            events=events,
            clock=clock,
            metrics=metrics,
            slow_is_full=lambda size: bool(guards) and all(guard.full(size) for guard in guards),
            slow_room_bytes=lambda: min((guard.room_bytes for guard in guards), default=0.0),
            known=spaces,
        )
        node.disk = disk
        calls = _calls(settings, tenants, clock, metrics)
        health_servicer = Health(settings.server.max_watchers)
        server = cls(settings, node, calls, grpc_server, health_servicer, runner, let_go, port)
        server._identity = identity
        server._directory, server.peers = directory, peers
        server._closers.append(lambda: digester.close(CLOSE_S / 2))
        try:
            await server._serve(tenants)
        except BaseException:
            await server.stop()
            raise
        return server

    async def _serve(self, tenants: Tenants) -> None:
        settings, directory = self._settings, self._directory
        servicer = Servicer(
            self.node,
            self.calls,
            max_message_bytes=settings.server.max_message_bytes,
            scrub_bytes_per_s=settings.disk.scrub_bytes_per_s,
            directory=directory,
            attach=await self._share(tenants),
            connect=await self._offer_bulk(),
        )
        serve(servicer, self._grpc)
        if self.peers is not None:
            if self._bulk is None:
                raise ConfigError("peers.enabled: there is no port for the bulk path, see above")
            self.peers.serve(self.node, self.calls, self._bulk, self._grpc)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        if settings.server.reflection:
            names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, self._grpc)
        await self._grpc.start()
        if directory is not None:
            directory.start()
        if self.peers is not None:
            self.peers.start()
        for service in ("", SERVICE):
            await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)
        if settings.server.metrics_listen:
            self._serve_metrics(settings.server.metrics_listen)

    async def _share(self, tenants: Tenants) -> Callable[[str | None], AttachReply] | None:
        """How clients get the arena, where they may."""
        shared, memory_bytes = self._settings.shared_memory, self._settings.memory.capacity_bytes
        if not shared.enabled:
            return None
        if tenants.count > 1:
            _log.info("shared_memory: the arena holds blocks of several tenants and is not shared")
            return None
        room = Room(
            int(memory_bytes * shared.memory_fraction), int(memory_bytes * shared.client_fraction)
        )
        directory = shared.directory or _home(self._settings.disk) / "sockets"
        local = LocalSocket(directory, self.endpoint, self.node, self.calls, room)
        try:
            await local.start()
        except ConfigError as error:
            if shared.directory is not None:
                raise
            _log.warning("%s; clients on this host are served by the stream", error)
            return None
        self._local = local
        return local.ticket

    async def _offer_bulk(self) -> Callable[[str | None, str], ConnectReply] | None:
        """How clients get connections of the bulk path, where there is one."""
        bulk, host = self._settings.bulk, self._settings.server.listen.rpartition(":")[0]
        if not bulk.enabled:
            return None
        own_host = bulk.listen.rpartition(":")[0] if bulk.listen is not None else host
        listener = BulkListener(
            bulk.listen or f"{host}:0",
            "" if own_host == host or is_wildcard(own_host) else own_host.strip("[]"),
            self.node,
            self.calls,
            max_connections=bulk.max_connections,
            tls=self._identity.context if self._identity is not None else None,
        )
        try:
            await listener.start()
        except ConfigError as error:
            if bulk.listen is not None:
                raise
            _log.warning("%s; clients are served by gRPC alone", error)
            return None
        self._bulk = listener
        return listener.invite

    def _serve_metrics(self, listen: str) -> None:
        host, _, port = listen.rpartition(":")
        metrics = self.node.metrics
        try:
            http, _ = start_http_server(int(port), host.strip("[]"), metrics.registry)
        except OSError as error:
            raise ConfigError(f"server.metrics_listen: {listen}: {error.strerror}") from None
        self.metrics_endpoint = f"{host}:{http.server_port}"

        def stop() -> None:
            http.shutdown()
            http.server_close()

        self._closers.append(stop)

    async def stop(self) -> None:
        """Drains: takes nothing new, lets calls finish, flushes memory, closes everything.

        All within `server.drain_timeout_s`: calls get two fifths of it to finish, and what is left
        of them UNAVAILABLE; what the flush has not written when nine tenths are over is lost. A
        device that hangs gets `CLOSE_S` more, then its threads are left behind.
        """
        loop = asyncio.get_running_loop()
        grace_s = self._settings.server.drain_timeout_s
        end_s = loop.time() + grace_s
        # What is entered last is done first; whatever fails, all of it is done.
        async with AsyncExitStack() as stack:
            stack.push_async_callback(self._close_runner)
            for close in self._closers:
                stack.push_async_callback(_finish, close)
            if self._directory is not None:
                stack.push_async_callback(self._directory.close)
            if self.peers is not None:
                stack.push_async_callback(self.peers.close)
            stack.push_async_callback(self._close_node, end_s)
            if self._local is not None:
                stack.push_async_callback(self._local.close)
            if self._bulk is not None:
                stack.push_async_callback(self._bulk.close)
            stack.push_async_callback(self._grpc.stop, None)
            await self._drain(grace_s)

    async def _drain(self, grace_s: float) -> None:
        await self._health.enter_graceful_shutdown()
        self.node.draining = True
        self.calls.drain()
        self.node.events.publish(Draining())
        if self.peers is not None:
            await self.peers.leave()
        stopping = asyncio.create_task(self._grpc.stop(grace_s))
        if not await self.calls.finished(0.4 * grace_s):
            self.calls.end()
            await self.calls.finished(0.1 * grace_s)
        # What the last calls answered is on its way; who watches the health would stay for good.
        await asyncio.wait([stopping], timeout=min(LAST_WORDS_S, 0.1 * grace_s))
        await self._grpc.stop(None)
        await stopping

    async def _close_node(self, end_s: float) -> None:
        reserve_s = 0.1 * self._settings.server.drain_timeout_s
        left_s = end_s - reserve_s - asyncio.get_running_loop().time()
        await self.node.close(max(0.0, left_s), close_timeout_s=reserve_s + CLOSE_S / 2)

    async def _close_runner(self) -> None:
        self.hangs = not await self._runner.close(CLOSE_S / 2)
        if self.hangs:
            # What they use, above all the directory's lock, is let go of by the process's end.
            _log.warning("a device does not answer: its threads are left behind")
            return
        for let_go in self._let_go:
            let_go()


async def _finish(close: Callable[[], Any]) -> None:
    pending = close()
    if pending is not None:
        await pending


async def _slow_tiers(
    settings: Settings,
    runner: Runner,
    clock: Clock,
    metrics: Metrics,
    events: Events,
    spaces: Spaces,
    let_go: list[Callable[[], None]],
    guards: list[Guarded],
    wrap: Callable[[Tier], Tier],
) -> tuple[Tier | None, DiskTier | None]:
    """What lies below memory: Redis beside the disk, one of them, or nothing. And the disk."""
    redis: Guarded | None = None
    disk: Guarded | None = None
    tier = None
    if settings.redis.blocks_url:
        shared = _redis_tier(settings.redis, runner, clock, metrics, spaces)
        redis = _guarded(wrap(shared), settings.redis, clock, metrics)
        guards.append(redis)
    if settings.disk.enabled:
        files = DirectoryFiles(settings.disk.path, direct=settings.disk.direct_io)
        let_go.append(files.shut)
        tier = await _disk_tier(settings.disk, files, runner, clock, metrics, events, spaces)
        disk = _guarded(wrap(tier), settings.disk, clock, metrics)
        guards.append(disk)
    if redis is not None and disk is not None:
        return Beside(redis, disk), tier
    return redis or disk, tier


def _memory(settings: MemorySettings, clock: Clock) -> Memory:
    policy = make_policy(settings.policy, settings.capacity_bytes)
    return Memory(settings.capacity_bytes, settings.slab_bytes, policy, clock)


def _guarded(
    tier: Tier,
    settings: RedisSettings | DiskSettings | PeersSettings,
    clock: Clock,
    metrics: Metrics,
) -> Guarded:
    queue_bytes = settings.inflight_bytes if isinstance(settings, PeersSettings) else QUEUE_BYTES
    return Guarded(
        Measured(tier, clock, metrics),
        lookup_timeout_s=settings.lookup_timeout_s,
        timeout_s=settings.timeout_s,
        clock=clock,
        metrics=metrics,
        queue_bytes=queue_bytes,
    )


def _redis_tier(
    settings: RedisSettings, runner: Runner, clock: Clock, metrics: Metrics, spaces: Spaces
) -> Tier:
    assert settings.blocks_url
    return RedisTier(
        _redis(settings.blocks_url, settings.timeout_s),
        _codec(RedisTier.name, settings, spaces, clock, metrics),
        runner,
        clock,
        metrics,
        capacity_bytes=settings.capacity_bytes,
        part_bytes=settings.part_bytes,
        ttl_s=settings.ttl_s,
        wires=Wires.from_url(
            settings.blocks_url,
            ThreadRunner(REDIS_WIRES),
            count=REDIS_WIRES,
            timeout_s=settings.timeout_s,
        ),
    )


def _codec(
    tier: str,
    settings: RedisSettings | DiskSettings,
    spaces: Spaces,
    clock: Clock,
    metrics: Metrics,
) -> TierCodec:
    if settings.lossy != NO_LOSS:
        _log.warning(
            "%s.lossy: blocks of floating-point values come back from %s as %s, not as stored",
            tier, tier, settings.lossy,
        )  # fmt: skip
    return TierCodec(tier, settings.codec, settings.lossy, spaces, clock, metrics)


async def _disk_tier(
    settings: DiskSettings,
    files: DirectoryFiles,
    runner: Runner,
    clock: Clock,
    metrics: Metrics,
    events: Events,
    spaces: Spaces,
) -> DiskTier:
    _allow_open_files(settings)
    opening = DiskTier.open(
        files,
        _codec(DiskTier.name, settings, spaces, clock, metrics),
        runner,
        clock,
        metrics,
        capacity_bytes=settings.capacity_bytes,
        segment_bytes=settings.segment_bytes,
        sync_after_s=settings.sync_after_s,
        on_sealed=lambda *sealed: events.publish(SegmentSealed(*sealed)),
    )
    try:
        return await opening
    except OSError as error:
        raise ConfigError(
            f"disk.path: {settings.path} cannot be read: {error.strerror}; mend the device, or "
            "start with disk.enabled = false"
        ) from None


def _allow_open_files(settings: DiskSettings) -> None:
    """Raises this process's limit of open files as far as it may; a segment is one of them."""
    needed = 2 * settings.capacity_bytes // settings.segment_bytes + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and needed > hard:
        raise ConfigError(
            f"disk.segment_bytes: {settings.capacity_bytes} bytes in such segments may need "
            f"{needed} open files, and this process may have {hard}; make segments larger, or "
            "raise the limit (ulimit -n)"
        )
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _redis(url: str, timeout_s: float) -> Redis:
    try:
        # Who finds all connections busy waits for one, within his deadline: busy is not broken.
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=REDIS_CONNECTIONS,
            timeout=timeout_s,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            # Each connection that a restarted server has forgotten would fail once otherwise.
            retry=Retry(NoBackoff(), 1, supported_errors=(RedisConnectionError,)),
        )
    except ValueError as error:
        raise ConfigError(f"redis: {error}") from None
    return Redis.from_pool(pool)


def _node_id(settings: Settings, port: int) -> str:
    return settings.cluster.node_id or f"{socket.gethostname()}-{port}"


def _directory(settings: Settings, port: int, clock: Clock) -> Directory | None:
    """Where nodes find each other, if they do; not started yet."""
    if not settings.redis.directory_url:
        return None
    own = Neighbour(
        _node_id(settings, port),
        settings.cluster.advertised_endpoint or _endpoint(settings, port),
        secrets.token_hex(8) if settings.peers.enabled else "",
    )
    return Directory(_redis(settings.redis.directory_url, settings.redis.timeout_s), clock, own)


def _endpoint(settings: Settings, port: int) -> str:
    return f"{settings.server.listen.rpartition(':')[0]}:{port}"


def _tenants(settings: Settings) -> Tenants:
    path = settings.auth.tokens_file
    return Tenants.from_file(path) if path is not None else Tenants()


def _home(disk: DiskSettings) -> Path:
    """Where this node keeps what is nobody else's."""
    return disk.path.parent if disk.enabled else DATA_HOME.expanduser()


def _cluster_secret(cluster: ClusterSettings, disk: DiskSettings) -> bytes:
    """The secret of the named file, or of one that this host makes once for itself."""
    if cluster.secret_file is not None:
        return _read_secret(cluster.secret_file)
    home = _home(disk)
    path = home / "cluster.secret"
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return _read_secret(path)
    except OSError as error:
        raise ConfigError(f"cluster.secret_file: {path}: {error.strerror}") from None
    with os.fdopen(handle, "wb") as file:
        file.write(secrets.token_bytes(SECRET_BYTES))
    return _read_secret(path)


def _read_secret(path: Path) -> bytes:
    try:
        secret = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cluster.secret_file: {path}: {error.strerror}") from None
    if len(secret) != SECRET_BYTES:
        raise ConfigError(
            f"cluster.secret_file: {path}: {SECRET_BYTES} bytes are needed, got {len(secret)}; "
            f"make one with: head -c {SECRET_BYTES} /dev/urandom"
        )
    return secret


def _calls(settings: Settings, tenants: Tenants, clock: Clock, metrics: Metrics) -> Calls:
    server = settings.server
    limits = Limits(
        calls=server.max_data_calls,
        waiting_calls=server.waiting_calls,
        wait_s=server.wait_s,
        inflight_bytes=server.inflight_bytes,
        client_bytes=server.inflight_bytes_per_client,
    )
    admission = Admission(limits, clock)
    metrics.follow_admission(
        lambda: (admission.calls, admission.inflight_bytes, admission.waiting_calls)
    )
    return Calls(
        tenants,
        admission,
        max_deadline_s=server.max_deadline_s,
        max_watchers=server.max_watchers,
        clock=clock,
        metrics=metrics,
    )


def _identity(settings: ServerSettings) -> Identity | None:
    """What TLS needs, where it is on."""
    certificate_file, key_file = settings.tls_certificate_file, settings.tls_key_file
    if certificate_file is None or key_file is None:
        return None
    for name, file in (("tls_certificate_file", certificate_file), ("tls_key_file", key_file)):
        try:
            file.read_bytes()
        except OSError as error:
            raise ConfigError(f"server.{name}: {file}: {error.strerror}") from None
    try:
        return Identity.read(certificate_file, key_file)
    except OSError:
        raise ConfigError(
            f"server.tls_certificate_file: {certificate_file}: no certificate (PEM) that belongs "
            f"to the key in server.tls_key_file: {key_file}"
        ) from None


def _trust(settings: PeersSettings) -> Trust | None:
    """Whom this node believes to be its peers, where TLS is on."""
    if settings.tls_ca_file is None:
        return None
    try:
        return Trust.read(settings.tls_ca_file)
    except ValueError as error:
        raise ConfigError(f"peers.{error}") from None


def _listen(server: grpc.aio.Server, listen: str, identity: Identity | None) -> int:
    try:
        if identity is not None:
            return server.add_secure_port(listen, identity.credentials)
        return server.add_insecure_port(listen)
    except RuntimeError:
        raise ConfigError(f"server.listen: {listen} is taken or not of this host") from None


def _grpc_options(settings: Settings) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", settings.server.max_message_bytes),
        ("grpc.max_send_message_length", settings.server.max_message_bytes),
        ("grpc.so_reuseport", 0),
        ("grpc.keepalive_time_ms", KEEPALIVE_MS),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_LEAST_MS),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", KEEPALIVE_LEAST_MS),
        *STREAM_OPTIONS,
    ]
