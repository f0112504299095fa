"""Every setting of a node, declared once: type, unit, default, meaning.

A value comes from a flag, else from the environment (`KVSTORE_MEMORY__CAPACITY_BYTES`), else from
the file, else from here. Unknown and bad values refuse to start, and name the field. The sample
file (`kvstore config`) and the flags of `kvstore serve` are made from this tree.
"""

import ipaddress
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ByteSize,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo

from kvstore.api.errors import ConfigError
from kvstore.api.wire import MESSAGE_BYTES
from kvstore.codec import AUTO, LOSSLESS, LOSSY, NO_LOSS
from kvstore.policy.policies import DEFAULT, POLICIES
from kvstore.tiers.segment_log import LEAST_SEGMENTS

_MIB = 1 << 20
_GIB = 1 << 30

CODEC_NAMES = (AUTO, *LOSSLESS)
LOSSY_NAMES = (NO_LOSS, *LOSSY)
_CODEC = (
    f"lossless: one of {', '.join(CODEC_NAMES)}; auto measures them on each space's own blocks and "
    "takes the one that stores and loads soonest"
)
_LOSSY = (
    f"one of {', '.join(LOSSY_NAMES)}; the others are for spaces of bf16, fp16 and fp32: what "
    "comes back differs from what was stored, by a known bound (docs/format.md)"
)


def _codec_name(name: str) -> str:
    if name not in CODEC_NAMES:
        raise ValueError(f"must be one of {', '.join(CODEC_NAMES)}")
    return name


def _lossy_name(name: str) -> str:
    if name not in LOSSY_NAMES:
        raise ValueError(f"must be one of {', '.join(LOSSY_NAMES)}")
    return name


def _host_and_port(value: str) -> str:
    host, _, port = value.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise ValueError("must be HOST:PORT, with port 0 for any free one")
    return value


def _reachable(value: str) -> str:
    if _host_and_port(value).endswith(":0"):
        raise ValueError("must be HOST:PORT, and nobody can reach port 0")
    return value


def _policy_name(name: str) -> str:
    if name not in POLICIES:
        raise ValueError(f"must be one of {', '.join(POLICIES)}")
    return name


Codec = Annotated[str, AfterValidator(_codec_name)]
Lossy = Annotated[str, AfterValidator(_lossy_name)]
PolicyName = Annotated[str, AfterValidator(_policy_name)]
Listen = Annotated[str, AfterValidator(_host_and_port)]
Endpoint = Annotated[str, AfterValidator(_reachable)]
HomePath = Annotated[Path, AfterValidator(Path.expanduser)]

DATA_HOME = Path("~/.local/share/kvstore")
"""Where a node keeps its files unless it is told otherwise."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class ServerSettings(_Section):
    """The gRPC port."""

    listen: Listen = Field("127.0.0.1:7070", description="HOST:PORT of gRPC; port 0: any free one")
    metrics_listen: Listen | None = Field(
        "127.0.0.1:9464", description="HOST:PORT of /metrics; empty: none"
    )
    max_message_bytes: ByteSize = Field(
        ByteSize(MESSAGE_BYTES), ge=2 * _MIB, le=64 * _MIB, description="larger ones are refused"
    )
    max_concurrent_calls: int = Field(
        2048, ge=2, le=65536, description="calls of every kind; gRPC refuses those beyond it"
    )
    max_data_calls: int = Field(
        1024,
        ge=1,
        le=65535,
        description="of them those that concern blocks; leaves room for the rest",
    )
    max_watchers: int = Field(
        256, ge=1, le=65535, description="that go on for ever; as many more may watch the health"
    )
    inflight_bytes: ByteSize = Field(
        ByteSize(256 * _MIB), ge=4 * _MIB, description="held for reads and writes on their way"
    )
    inflight_bytes_per_client: ByteSize = Field(
        ByteSize(64 * _MIB), ge=4 * _MIB, description="of them for one connection"
    )
    waiting_calls: int = Field(
        128, ge=0, le=65536, description="may wait for room; others are refused at once"
    )
    wait_s: float = Field(
        0.2, ge=0, le=60, description="at most so long; who would wait longer is refused at once"
    )
    max_deadline_s: float = Field(
        60.0, gt=0, le=3600, description="calls without a deadline, or with a later one, end then"
    )
    drain_timeout_s: float = Field(
        10.0, ge=0, le=600, description="how long calls may finish and memory be flushed at a stop"
    )
    reflection: bool = Field(False, description="gRPC reflection, for exploring with grpcurl")
    tls_certificate_file: HomePath | None = Field(
        None,
        description="certificate chain (PEM) of gRPC and the bulk path; empty: both without TLS",
    )
    tls_key_file: HomePath | None = Field(
        None, description="private key (PEM) of tls_certificate_file"
    )

    @model_validator(mode="after")
    def _fits(self) -> "ServerSettings":
        if self.max_data_calls >= self.max_concurrent_calls:
            raise ValueError("max_data_calls: must be less than max_concurrent_calls")
        if 2 * self.max_watchers + self.max_data_calls > self.max_concurrent_calls:
            raise ValueError(
                "max_watchers: twice as many must fit beside max_data_calls in max_concurrent_calls"
            )
        if self.inflight_bytes_per_client > self.inflight_bytes:
            raise ValueError("inflight_bytes_per_client: must not exceed inflight_bytes")
        if (self.tls_certificate_file is None) != (self.tls_key_file is None):
            lacking = "tls_key_file" if self.tls_key_file is None else "tls_certificate_file"
            raise ValueError(f"{lacking}: is needed as well, for TLS")
        return self


class AuthSettings(_Section):
    """Who may call."""

    tokens_file: HomePath | None = Field(
        None,
        description="hashes of bearer tokens (kvstore token); empty: one local tenant, "
        "and only on loopback",
    )


class ClusterSettings(_Section):
    """What this node is among others."""

    node_id: str | None = Field(
        None, max_length=63, pattern=r"^[A-Za-z0-9._-]*$", description="empty: host name and port"
    )
    advertised_endpoint: Endpoint | None = Field(
        None,
        description="HOST:PORT at which other nodes reach server.listen; empty: as it is written "
        "there",
    )
    secret_file: HomePath | None = Field(
        None,
        description="32 secret bytes from which stored names derive, the same on all nodes that "
        "share Redis; empty: made once, beside disk.path",
    )


class PeersSettings(_Section):
    """Blocks of the other nodes of the cluster."""

    enabled: bool = Field(
        False,
        description="read blocks from other nodes, and lend them this node's; needs "
        "redis.directory_url, cluster.secret_file and bulk.enabled",
    )
    lookup_timeout_s: float = Field(
        0.025, gt=0, le=60, description="for the directory; later answers are misses"
    )
    timeout_s: float = Field(1.0, gt=0, le=60, description="for a batch of blocks")
    inflight_bytes: ByteSize = Field(
        ByteSize(256 * _MIB), ge=4 * _MIB, description="on their way from other nodes, at most"
    )
    announced_blocks: int = Field(
        262_144,
        ge=1,
        le=16_777_216,
        description="that others are told of, at most; each takes about 100 bytes of the directory",
    )
    tls_ca_file: HomePath | None = Field(
        None,
        description="certificates (PEM) that the other nodes' are to be trusted by; needed where "
        "nodes have TLS",
    )


class MemorySettings(_Section):
    """The memory tier."""

    capacity_bytes: ByteSize = Field(
        ByteSize(_GIB), ge=64 * 1024, description="taken from the system at start"
    )
    slab_bytes: ByteSize = Field(
        ByteSize(64 * _MIB), ge=4096, description="granule of the arena and largest block"
    )
    policy: PolicyName = Field(
        DEFAULT, description=f"what is evicted first: one of {', '.join(POLICIES)}"
    )

    @model_validator(mode="after")
    def _fits(self) -> "MemorySettings":
        if self.slab_bytes > self.capacity_bytes:
            raise ValueError("slab_bytes: must not exceed capacity_bytes")
        return self


class RedisSettings(_Section):
    """The Redis tier and the directory of the cluster."""

    blocks_url: str | None = Field(
        None,
        pattern=r"^$|^(redis|rediss|unix)://",
        description="redis://, rediss:// or unix:// URL of the server that keeps blocks; "
        "empty: no Redis tier",
    )
    directory_url: str | None = Field(
        None,
        pattern=r"^$|^(redis|rediss|unix)://",
        description="the server in which nodes find each other; empty: none",
    )
    capacity_bytes: ByteSize = Field(
        ByteSize(0), ge=0, description="stop adding once the server holds this; 0: its own limit"
    )
    part_bytes: ByteSize = Field(
        ByteSize(2 * _MIB), ge=4096, le=64 * _MIB, description="values are split into such parts"
    )
    ttl_s: int = Field(86400, ge=1, description="a block expires so long after its last store")
    lookup_timeout_s: float = Field(0.05, gt=0, le=60, description="later answers are misses")
    timeout_s: float = Field(1.0, gt=0, le=60, description="for a batch of blocks")
    codec: Codec = Field(AUTO, description=_CODEC)
    lossy: Lossy = Field(NO_LOSS, description=_LOSSY)


class DiskSettings(_Section):
    """The disk tier."""

    enabled: bool = Field(True, description="false: no disk tier, and nothing survives a restart")
    path: HomePath = Field(DATA_HOME / "blocks", description="directory; made if missing")
    capacity_bytes: ByteSize = Field(ByteSize(10 * _GIB), ge=4 * 65536, description="hard limit")
    segment_bytes: ByteSize = Field(
        ByteSize(256 * _MIB), ge=65536, description="size of one file; room comes file by file"
    )
    sync_after_s: float = Field(
        30.0, gt=0, le=86400, description="what was written is on the device after this at latest"
    )
    lookup_timeout_s: float = Field(0.05, gt=0, le=60, description="later answers are misses")
    timeout_s: float = Field(5.0, gt=0, le=60, description="for a batch of blocks")
    threads: int = Field(8, ge=1, le=64, description="for files and codecs, each one request")
    scrub_bytes_per_s: ByteSize = Field(
        ByteSize(64 * _MIB), ge=65536, description="a scrub of the running node reads no faster"
    )
    direct_io: bool = Field(True, description="past the page cache, where the file system can")
    codec: Codec = Field(AUTO, description=_CODEC)
    lossy: Lossy = Field(NO_LOSS, description=_LOSSY)

    @model_validator(mode="after")
    def _fits(self) -> "DiskSettings":
        if self.segment_bytes * LEAST_SEGMENTS > self.capacity_bytes:
            raise ValueError(f"segment_bytes: {LEAST_SEGMENTS} of them must fit capacity_bytes")
        return self


class SharedMemorySettings(_Section):
    """The arena in the hands of clients on this host."""

    enabled: bool = Field(
        True,
        description="hand the arena to clients of this host and user, where the node has but one "
        "tenant: who maps it can read all that is in it",
    )
    directory: HomePath | None = Field(
        None,
        description="for the unix socket at which clients get the arena; empty: sockets, beside "
        "disk.path",
    )
    memory_fraction: float = Field(
        0.5, gt=0, le=0.9, description="of memory.capacity_bytes that all of them may hold at once"
    )
    client_fraction: float = Field(
        0.25, gt=0, le=0.9, description="of memory.capacity_bytes that one of them may hold"
    )


class BulkSettings(_Section):
    """The bulk path: the bytes of blocks over connections of their own."""

    enabled: bool = Field(
        True,
        description="offer it to clients that do not share the node's memory; without it, or where "
        "they cannot reach it, they use gRPC",
    )
    listen: Listen | None = Field(
        None,
        description="HOST:PORT of it, as clients reach it; empty: the host of server.listen, any "
        "free port",
    )
    max_connections: int = Field(
        256, ge=1, le=4096, description="of all clients; each that is in use takes a thread"
    )


class LeaseSettings(_Section):
    """What Match may promise."""

    memory_fraction: float = Field(
        0.5,
        ge=0,
        le=0.9,
        description="of memory.capacity_bytes that leases may keep; 0: no leases, no promotion",
    )
    max_lease_s: float = Field(60.0, gt=0, le=3600, description="longer wishes are shortened")


class Settings(_Section):
    """All settings of a node."""

    server: ServerSettings = Field(default_factory=ServerSettings)
    auth: AuthSettings = Field(default_factory=AuthSettings)
    cluster: ClusterSettings = Field(default_factory=ClusterSettings)
    memory: MemorySettings = Field(default_factory=MemorySettings)
    redis: RedisSettings = Field(default_factory=RedisSettings)
    disk: DiskSettings = Field(default_factory=DiskSettings)
    leases: LeaseSettings = Field(default_factory=LeaseSettings)
    shared_memory: SharedMemorySettings = Field(default_factory=SharedMemorySettings)
    bulk: BulkSettings = Field(default_factory=BulkSettings)
    peers: PeersSettings = Field(default_factory=PeersSettings)

    @model_validator(mode="after")
    def _guarded(self) -> "Settings":
        if self.auth.tokens_file is None and not _is_loopback(self.server.listen):
            raise ValueError(
                f"server.listen: {self.server.listen} is reachable from other hosts: set "
                "auth.tokens_file, or listen on 127.0.0.1"
            )
        if self.auth.tokens_file is None and not _is_loopback(self.bulk.listen or "127.0.0.1:0"):
            raise ValueError(
                f"bulk.listen: {self.bulk.listen} is reachable from other hosts: set "
                "auth.tokens_file, or listen on 127.0.0.1"
            )
        announced = self.cluster.advertised_endpoint or self.server.listen
        if self.redis.directory_url and is_wildcard(announced.rpartition(":")[0]):
            raise ValueError(
                f"server.listen: other nodes cannot reach {announced}: with redis.directory_url it "
                "must name this host's own address, or cluster.advertised_endpoint another one"
            )
        return self

    @model_validator(mode="after")
    def _among_peers(self) -> "Settings":
        if not self.peers.enabled:
            return self
        for name, has in (
            ("redis.directory_url", self.redis.directory_url),
            ("cluster.secret_file", self.cluster.secret_file),
            ("bulk.enabled", self.bulk.enabled),
        ):
            if not has:
                raise ValueError(f"peers.enabled: {name} is needed as well")
        if (self.server.tls_certificate_file is None) != (self.peers.tls_ca_file is None):
            raise ValueError(
                "peers.tls_ca_file: goes with server.tls_certificate_file: all nodes of a cluster "
                "have TLS, or none"
            )
        return self


def is_wildcard(host: str) -> bool:
    """Whether who listens there listens at every address of this machine."""
    return host.strip("[]") in ("0.0.0.0", "::")  # noqa: S104  Compared, not bound.


def _is_loopback(listen: str) -> bool:
    host = listen.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def fields() -> Iterator[tuple[str, str, FieldInfo]]:
    """Section, name and declaration of every setting."""
    for section, info in Settings.model_fields.items():
        assert isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel)
        for name, field in info.annotation.model_fields.items():
            yield section, name, field


def load_settings(
    file: Path | None, environ: Mapping[str, str], flags: Mapping[tuple[str, str], str]
) -> Settings:
    """The settings from flags over environment over file. Raises ConfigError, naming each field."""
    values: dict[str, dict[str, Any]] = {}
    sources = [_from_file(file) if file else {}, _from_environment(environ), flags]
    for source in sources:
        for (section, name), value in source.items():
            values.setdefault(section, {})[name] = None if value == "" else value
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(problem) for problem in error.errors())) from None


def _from_file(path: Path) -> dict[tuple[str, str], Any]:
    try:
        content = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from None
    settings: dict[tuple[str, str], Any] = {}
    for section, table in content.items():
        if not isinstance(table, dict):
            raise ConfigError(f"{path}: {section}: settings stand in tables, such as [memory]")
        settings |= {(section, name): value for name, value in table.items()}
    return settings


def _from_environment(environ: Mapping[str, str]) -> dict[tuple[str, str], str]:
    settings: dict[tuple[str, str], str] = {}
    for variable, value in environ.items():
        section, separator, name = variable.removeprefix("KVSTORE_").lower().partition("__")
        if variable.startswith("KVSTORE_") and separator:
            settings[section, name] = value
    return settings


def _explain(problem: Any) -> str:
    field = ".".join(str(part) for part in problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        message = "there is no such setting; `kvstore config` lists all"
    else:
        message = f"{message}, got {problem['input']!r}" if not _is_tree(problem) else message
    return f"{field}: {message}" if field else message


def _is_tree(problem: Any) -> bool:
    return isinstance(problem["input"], dict | BaseModel)
