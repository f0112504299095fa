"""One worker: a model, its VRAM, and the store below it."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from kvstore.api.errors import ConfigError
from kvstore_client import Client
from kvstore_client.restore_gate import RestoreGate
from kvstore_workers.cut import Cut
from kvstore_workers.engine import Engine, Tiers
from kvstore_workers.layout import DTYPE_BYTES, describe_space, read_layout
from kvstore_workers.link import StoreClient, StoreLink
from kvstore_workers.model import describe_numerics, load_model
from kvstore_workers.request import Completion, Request
from kvstore_workers.restore import Restorer
from kvstore_workers.spill import Spiller
from kvstore_workers.transfer import Copier
from kvstore_workers.vram import VramPool, choose_device

Connect = Callable[[str, str | None], StoreClient]
"""Makes the client for an endpoint and a bearer token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """All settings of a worker. Raises `ConfigError`, naming the field, for a bad value."""

    checkpoint: Path
    """A Hugging Face checkpoint directory with safetensors."""
    model_name: str = ""
    """As the store knows the model; empty: the directory's name."""
    dtype: str = "bfloat16"
    device: str | None = None
    """None: the first GPU, or the CPU where there is none."""
    threads: int | None = None
    """Of torch on the CPU, for the whole process; None: as it is."""

    vram_blocks: int
    block_tokens: int = 32
    chunk_tokens: int = 128
    """Tokens of a prefill chunk; a multiple of `block_tokens`."""
    max_running: int = 4
    """Requests that decode together; the width of every decode step."""

    store_endpoint: str | None = None
    """host:port of a store node; None: VRAM is the only tier."""
    token: str | None = field(default=None, repr=False)
    """Bearer token of the tenant ""."""
    tokens: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Bearer tokens of the other tenants, by the names that requests use."""
    tls_ca_file: Path | None = None
    """Certificates (PEM) that the store's is signed with; None: no TLS."""
    scope: str = ""
    """Where blocks are stored and looked for; empty: private to each tenant."""
    connect_wait_s: float = 5.0
    """How long the start waits for the store; then the worker serves without, and tries on."""
    match_budget_s: float = 0.5
    restore_budget_s: float = 2.0
    """For all loads of one request; past it the rest is computed."""
    restore_gate: bool = True
    """Blocks that were computed sooner than loaded are computed. False: whatever is found is
    loaded."""
    store_budget_s: float = 5.0
    staging_bytes: int = 32 << 20
    """Host memory for copies down, and as much for copies up; pinned on CUDA."""
    spill_queue_bytes: int = 256 << 20
    """VRAM that may wait for being spilled; what does not fit is not spilled."""
    spill_patience_s: float = 0.2
    """How long a request waits for VRAM that is being spilled, before the spill is given up."""
    record_spill_digests: bool = False
    """True: the SHA-256 of every block that the store took is kept. For proofs: it only grows."""

    def __post_init__(self) -> None:
        for name in ("vram_blocks", "block_tokens", "chunk_tokens", "max_running", "staging_bytes"):
            _check(name, getattr(self, name), getattr(self, name) >= 1, "must be 1 or more")
        for name in ("spill_queue_bytes", "connect_wait_s", "spill_patience_s"):
            _check(name, getattr(self, name), getattr(self, name) >= 0, "must be 0 or more")
        for name in ("match_budget_s", "restore_budget_s", "store_budget_s"):
            good = 0 < getattr(self, name) <= 3600
            _check(name, getattr(self, name), good, "must lie above 0 and at most 3600 s")
        whole = self.chunk_tokens % self.block_tokens == 0
        _check("chunk_tokens", self.chunk_tokens, whole, "must be a multiple of block_tokens")
        _check("dtype", self.dtype, self.dtype in DTYPE_BYTES, f"one of {', '.join(DTYPE_BYTES)}")
        _check("threads", self.threads, self.threads is None or self.threads >= 1, "1 or more")
        _check("tokens", '""', "" not in self.tokens, 'the token of tenant "" is `token`; not')

    @property
    def cut(self) -> Cut:
        """How prompts are cut."""
        return Cut(block_tokens=self.block_tokens, chunk_tokens=self.chunk_tokens)

    @property
    def all_tokens(self) -> Mapping[str, str | None]:
        """The bearer token of every tenant; "" is one of them unless only others have tokens."""
        nameless = {"": self.token} if self.token or not self.tokens else {}
        return {**nameless, **self.tokens}


class Worker:
    """Answers requests, keeps their KV in VRAM and below, and finds it again.

    A missing, slow or broken store costs time for computing, nothing else. Close it, or use it
    as a context manager.
    """

    def __init__(
        self,
        config: WorkerConfig,
        *,
        connect: Connect | None = None,
        gate: RestoreGate | None = None,
    ) -> None:
        """`connect` makes clients of another kind, `gate` decides instead of the worker's own."""
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self.config = config
        layout = read_layout(config.checkpoint, config.block_tokens, config.dtype)
        device = choose_device(config.device)
        vram = VramPool(layout, config.vram_blocks, device)
        model = load_model(config.checkpoint, vram, config.max_running)
        self._copier = Copier(vram)
        self.descriptor = describe_space(
            config.checkpoint,
            layout,
            numerics=describe_numerics(device, config.chunk_tokens),
            model=config.model_name,
        )
        """The space that this worker's blocks live in."""
        connect = connect or partial(_connect, tls_ca_file=config.tls_ca_file)
        self._tiers = self._open_tiers(connect, gate)
        self._engine = Engine(
            model,
            vram,
            self._copier,
            self._tiers,
            cut=config.cut,
            max_running=config.max_running,
            tenants=frozenset(config.all_tokens),
            scope=config.scope,
            spill_patience_s=config.spill_patience_s,
        )
        self._turn = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """The answers, in the order of the requests; they are served together.

        Raises `InvalidArgument` before anything is computed if one of them can never be served.
        One call at a time; others wait.
        """
        with self._turn:
            for request in requests:
                self._engine.validate(request)
            ids = [self._engine.submit(request) for request in requests]
            completed: dict[int, Completion] = {}
            while self._engine.busy:
                completed.update((done.request_id, done) for done in self._engine.step())
            return [completed[request_id] for request_id in ids]

    def flush_spills(self, timeout_s: float) -> bool:
        """True once every block that was to be spilled is stored, failed or dropped."""
        return self._tiers is None or self._tiers.spiller.flush(timeout_s)

    def forget_vram(self) -> None:
        """Makes VRAM find nothing any more, so that the store is asked for everything."""
        with self._turn:
            self._engine.forget_vram()

    def spill_digests(self) -> dict[bytes, bytes]:
        """Key to SHA-256 of the blocks that the store took; empty unless configured."""
        digests = self._tiers.spiller.digests if self._tiers else None
        return dict(digests or {})

    def connected(self) -> dict[str, bool]:
        """For each tenant, whether the store has opened the space for it."""
        links = self._tiers.links if self._tiers else {}
        return {tenant: link.space is not None for tenant, link in links.items()}

    def stats(self) -> dict[str, float]:
        """What was counted so far, and the state of VRAM in blocks."""
        usage = self._engine.pool.usage()
        stats: dict[str, float] = {
            f"vram_blocks_{state}": blocks for state, blocks in usage._asdict().items()
        }
        stats.update(self._engine.counters)
        if self._tiers is not None:
            stats["arenas_pinned"] = self._copier.arenas_pinned
            for side, counters in (
                ("spill", self._tiers.spiller.counters),
                ("restore", self._tiers.restorer.counters),
            ):
                # Copied at once: their threads go on counting.
                stats.update({f"{side}_{name}": count for name, count in dict(counters).items()})
        return stats

    def close(self) -> None:
        """Ends all threads and connections; what is not spilled yet is lost. Idempotent."""
        if self._tiers is not None:
            self._tiers.restorer.close()
            self._tiers.spiller.close()
            for link in self._tiers.links.values():
                link.close()
        self._copier.close()

    def _open_tiers(self, connect: Connect, gate: RestoreGate | None) -> Tiers | None:
        config = self.config
        endpoint = config.store_endpoint
        if endpoint is None:
            return None
        links = {
            tenant: StoreLink(partial(connect, endpoint, token), self.descriptor, config.scope)
            for tenant, token in config.all_tokens.items()
        }
        deadline_s = time.monotonic() + config.connect_wait_s
        for link in links.values():
            link.wait_tried(max(0.0, deadline_s - time.monotonic()))
        block_bytes = self.descriptor.block_bytes
        if gate is None and config.restore_gate:
            gate = RestoreGate(config.block_tokens, block_bytes)
        spiller = Spiller(
            self._copier,
            block_bytes,
            queue_bytes=config.spill_queue_bytes,
            staging_bytes=config.staging_bytes,
            budget_s=config.store_budget_s,
            record_digests=config.record_spill_digests,
        )
        restorer = Restorer(
            self._copier,
            block_bytes,
            cut=config.cut,
            staging_bytes=config.staging_bytes,
            match_budget_s=config.match_budget_s,
            budget_s=config.restore_budget_s,
            gate=gate,
        )
        return Tiers(links, spiller, restorer)


def _connect(endpoint: str, token: str | None, *, tls_ca_file: Path | None) -> StoreClient:
    return Client(endpoint, token=token, tls_ca_file=tls_ca_file)


def _check(field_name: str, value: object, good: bool, rule: str) -> None:
    if not good:
        raise ConfigError(f"worker.{field_name}: {rule}, got {value!r}")
