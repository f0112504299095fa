"""A small engine around the connector: vLLM's order of hooks, and a KV cache that can be checked.

What a real model computes, this one derives: each token's bytes in each layer come from all tokens
before it, so a page that was restored wrongly, too late or for another prefix is seen at once.
"""

import hashlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from tests.stand_ins.vllm_connector import (
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpecKind,
    KVConnectorRole,
    Spec,
)

TOKEN_BYTES = 8
STATE_BYTES = 96
JUNK = 0xEE


def full(block_size: int = 4) -> Spec:
    """Full attention."""
    return Spec(
        kind=KVCacheSpecKind.FULL_ATTENTION,
        block_size=block_size,
        real_page_size_bytes=block_size * TOKEN_BYTES,
    )


def window(tokens: int, block_size: int = 4) -> Spec:
    """Attention to the last tokens."""
    return Spec(
        kind=KVCacheSpecKind.SLIDING_WINDOW,
        block_size=block_size,
        real_page_size_bytes=block_size * TOKEN_BYTES,
        sliding_window=tokens,
    )


def state(block_size: int = 4) -> Spec:
    """A recurrent state, kept where a block ends."""
    return Spec(
        kind=KVCacheSpecKind.MAMBA,
        block_size=block_size,
        real_page_size_bytes=STATE_BYTES,
        mamba_cache_mode="align",
    )


@dataclass
class Lora:
    """An adapter, as a request names it."""

    lora_name: str
    lora_int_id: int
    lora_path: str
    load_inplace: bool = False


class Request:
    """A request, as the hooks see it."""

    def __init__(
        self,
        request_id: str,
        prompt: Sequence[int],
        outputs: int,
        hash_tokens: int,
        *,
        salt: str = "",
        lora: Lora | None = None,
        params: dict[str, Any] | None = None,
        **more: Any,
    ) -> None:
        self.request_id = request_id
        self.tokens = list(prompt)
        self.outputs = outputs
        self.num_prompt_tokens = len(prompt)
        self.num_computed_tokens = 0
        self.num_in_flight_tokens = 0
        self.num_preemptions = 0
        self.lora_request = lora
        self.kv_transfer_params = params
        self.session_id: str | None = None
        self.pooling_params: Any = None
        self.resumable = False
        self.skip_reading_prefix_cache = False
        self.block_hashes: list[bytes] = []
        self._hash_tokens = hash_tokens
        self._root = f"{salt} {lora.lora_name if lora else ''}".encode()
        self.loading = False
        self.failed = False
        self.tables: list[list[int]] = []
        self.restored = 0
        self.reason: str | None = None
        self.ends = "length"
        vars(self).update(more)
        self.hash()

    @property
    def num_tokens(self) -> int:
        """With those that were generated."""
        return len(self.tokens)

    @property
    def content(self) -> bytes:
        """What the KV depends on beside tokens: salts do not matter, weights do."""
        if self.lora_request is None:
            return b""
        return (Path(self.lora_request.lora_path) / "adapter_model.safetensors").read_bytes()

    def hash(self) -> None:
        """A hash for each full block."""
        step = self._hash_tokens
        for index in range(len(self.block_hashes), self.num_tokens // step):
            parent = self.block_hashes[index - 1] if index else self._root
            block = repr(self.tokens[index * step : (index + 1) * step]).encode()
            self.block_hashes.append(hashlib.sha256(parent + block).digest())

    def get_finished_reason(self) -> str | None:
        """Why it ended."""
        return self.reason


@dataclass
class Blocks:
    """Pages of a request, as `update_state_after_alloc` is given them."""

    tables: list[list[int]]

    def get_block_ids(self) -> tuple[list[int], ...]:
        """One table for each group."""
        return tuple(list(table) for table in self.tables)


@dataclass
class Rank:
    """One worker: its part of the KV cache."""

    number: int
    connector: Any
    caches: dict[str, torch.Tensor]
    adapters: dict[int, bytes] = field(default_factory=dict)


class MiniEngine:
    """One engine. `connector_class` is imported while vLLM is stood in for.

    Raises AssertionError when a token would be computed over wrong KV.
    """

    def __init__(
        self,
        connector_class: Any,
        model: Path,
        groups: Sequence[Spec] = (full(),),
        *,
        ranks: int = 1,
        replicas: int = 1,
        pages: int = 200,
        chunk: int = 16,
        layers: int = 2,
        settings: dict[str, Any] | None = None,
        role: str = "kv_both",
        caching: bool = True,
        device: str = "cpu",
        **changes: Any,
    ) -> None:
        self.groups = list(groups)
        self.unit, self.hash_tokens = _sizes(self.groups)
        self.chunk = chunk
        self.config = vllm_config(model, settings or {}, ranks=ranks, role=role, caching=caching)
        self.device = device
        self.config.device_config.device_type = device
        for name, value in changes.items():
            section, _, attribute = name.partition("__")
            setattr(getattr(self.config, section), attribute, value)
        specs = [
            KVCacheGroupSpec([f"g{number}.l{layer}" for layer in range(layers)], spec)
            for number, spec in enumerate(self.groups)
        ]
        self.kv_cache_config = KVCacheConfig(pages, specs, replicas)
        self.replicas = replicas
        self.ranks: list[Rank] = []
        self.scheduler: Any = None
        try:
            self._start(connector_class, ranks)
        except ValueError:
            self.close()
            raise
        self.free = list(range(1, pages))
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.requests: dict[str, Request] = {}
        self.finished: set[str] = set()
        self.computed_tokens = 0
        self.steps = 0
        self.on_step: Callable[[], None] = lambda: None
        self._names = itertools.count()
        self._received: dict[str, int] = {}

    def _start(self, connector_class: Any, ranks: int) -> None:
        for number in range(ranks):
            self.ranks.append(self._rank(connector_class, number))
        self.scheduler = connector_class(
            self.config, KVConnectorRole.SCHEDULER, self.kv_cache_config
        )
        self.scheduler.set_xfer_handshake_metadata(
            {rank.number: rank.connector.get_handshake_metadata() for rank in self.ranks}
        )

    def add(self, prompt: Sequence[int], outputs: int = 1, **more: Any) -> Request:
        """A request has come."""
        name = f"request-{next(self._names)}"
        request = Request(name, prompt, outputs, self.hash_tokens, **more)
        self.requests[name] = request
        self.waiting.append(request)
        self.scheduler.on_new_request(request)
        return request

    def run(self, most_steps: int = 20_000) -> None:
        """Steps until every request has ended."""
        for _ in range(most_steps):
            if not self.waiting and not self.running:
                return
            self.step()
        raise AssertionError("the engine came to no end")

    def answer(self, prompt: Sequence[int], outputs: int = 1, **more: Any) -> Request:
        """One request, to its end."""
        request = self.add(prompt, outputs, **more)
        self.run()
        return request

    def step(self) -> None:
        """Schedules, computes, and takes in what has ended."""
        self.steps += 1
        self.on_step()
        offers: dict[str, list[tuple[int, int, int]]] = {}
        scheduled: dict[str, int] = {}
        touched: list[int] = []
        sync = False
        for request in list(self.running):
            scheduled[request.request_id] = self._extend(request, offers, touched)
        for request in list(self.waiting):
            if request.loading:
                continue
            state = self._admit(request)
            if state == "later":
                continue
            sync |= state == "sync"
            self.waiting.remove(request)
            self.running.append(request)
            scheduled[request.request_id] = self._extend(request, offers, touched)
        output = SimpleNamespace(
            num_scheduled_tokens=scheduled,
            total_num_scheduled_tokens=sum(scheduled.values()),
            finished_req_ids=set(self.finished),
            kv_connector_block_state=SimpleNamespace(
                boundary_state_offloads=offers,
                get_block_ids=lambda name: tuple(list(t) for t in self.requests[name].tables),
            ),
        )
        self.finished.clear()
        message = self.scheduler.build_connector_meta(output)
        outcome = self._work(message, scheduled, touched, sync=sync)
        self._take(outcome, scheduled)

    def preempt(self, request: Request) -> None:
        """Takes a running request's pages away."""
        self.running.remove(request)
        self.waiting.insert(0, request)
        self._release(request)
        request.num_computed_tokens = 0
        request.num_preemptions += 1

    def abort(self, request: Request) -> None:
        """The user has gone."""
        request.reason = "abort"
        (self.running if request in self.running else self.waiting).remove(request)
        self.scheduler.request_finished_all_groups(request, tuple(request.tables))
        self.finished.add(request.request_id)
        if not request.loading:
            self._release(request)

    def stats(self) -> dict[str, float]:
        """All that was counted since the last time."""
        total: dict[str, float] = {}
        for connector in (self.scheduler, *(rank.connector for rank in self.ranks)):
            stats = connector.get_kv_connector_stats()
            for name, amount in (stats.data if stats is not None else {}).items():
                total[name] = total.get(name, 0) + amount
        return total

    def saved(self, timeout_s: float = 30.0) -> None:
        """Waits until all that was to be stored is stored, or has failed."""
        for rank in self.ranks:
            assert rank.connector._worker._saves.drain(timeout_s)

    def close(self) -> None:
        """The engine ends."""
        for connector in (*(rank.connector for rank in self.ranks), self.scheduler):
            if connector is not None:
                connector.shutdown()

    # The scheduler.

    def _admit(self, request: Request) -> str:
        """now, sync (after a load within this step) or later."""
        if request.num_computed_tokens:  # Its load has ended.
            self.scheduler.update_state_after_alloc(request, Blocks(request.tables), 0)
            return "now"
        tokens, beside = self.scheduler.get_num_new_matched_tokens(request, 0)
        if tokens is None:
            return "later"
        assert tokens % self.unit == 0 and tokens < request.num_tokens
        assert not beside or tokens
        request.tables = [[] for _ in self.groups]
        if tokens:
            for number, spec in enumerate(self.groups):
                first = _first_page(spec, tokens)
                count = -(-tokens // spec.block_size)
                request.tables[number] = [0] * first + [self._page() for _ in range(count - first)]
        self.scheduler.update_state_after_alloc(request, Blocks(request.tables), tokens)
        sources = self.scheduler.get_external_cache_hit_sources(request, tokens)
        assert sum(sources.values()) == tokens
        request.restored = tokens
        request.num_computed_tokens = tokens
        if beside:
            request.loading = True
            return "later"
        return "sync" if tokens else "now"

    def _extend(
        self, request: Request, offers: dict[str, list[tuple[int, int, int]]], touched: list[int]
    ) -> int:
        """Pages for the next tokens of a request; how many tokens that are."""
        start = request.num_computed_tokens
        count = min(self.chunk, request.num_tokens - start)
        end = start + count
        states = [spec for spec in self.groups if spec.kind is KVCacheSpecKind.MAMBA]
        if states and end < request.num_tokens - 1 and end % self.unit:
            end = max(end - end % self.unit, min(end, start // self.unit * self.unit + self.unit))
            count = end - start
        if not request.tables:
            request.tables = [[] for _ in self.groups]
        for number, spec in enumerate(self.groups):
            table = request.tables[number]
            for index in range(min(_first_page(spec, start), len(table))):
                if table[index]:
                    self.free.append(table[index])
                    table[index] = 0
            if spec.kind is KVCacheSpecKind.MAMBA:
                last = -(-end // spec.block_size)
                table += [0] * (last - 1 - len(table))
            while len(table) < -(-end // spec.block_size):
                table.append(self._page())
                touched.append(table[-1])
            if spec.kind is KVCacheSpecKind.MAMBA and not end % spec.block_size:
                offers.setdefault(request.request_id, []).append((number, table[-1], end))
        return count

    def _page(self) -> int:
        assert self.free, "the pool is empty"
        return self.free.pop()

    def _release(self, request: Request) -> None:
        for table in request.tables:
            self.free += [page for page in table if page]
        request.tables = []

    def _take(self, outcome: SimpleNamespace, scheduled: dict[str, int]) -> None:
        lost: set[str] = set()
        for name in outcome.failed_recving:
            self.requests[name].num_computed_tokens = 0
            self.requests[name].failed = True
        if outcome.invalid_block_ids:
            assert len(self.groups) == 1, "no page can be named with several groups"
            for request in (*self.waiting, *self.running):
                lost |= self._cut(request, outcome.invalid_block_ids, scheduled)
        for name, count in scheduled.items():
            request = self.requests[name]
            if name in lost or request.reason:
                continue
            request.num_computed_tokens += count
            self.computed_tokens += count
            if request.num_computed_tokens == request.num_tokens:
                self._sample(request)
        self.scheduler.update_connector_output(outcome)
        for name in outcome.finished_recving:
            request = self.requests[name]
            assert request.loading, "reported twice, or never loading"
            request.loading = False
            if request.reason or (request.failed and not request.num_computed_tokens):
                self._release(request)
            request.failed = False

    def _cut(self, request: Request, bad: set[int], scheduled: dict[str, int]) -> set[str]:
        spec = self.groups[0]
        covered = -(-request.num_computed_tokens // spec.block_size)
        pages = request.tables[0][:covered] if request.tables else []
        first = next((index for index, page in enumerate(pages) if page in bad), None)
        if first is None:
            return set()
        request.num_computed_tokens = first * spec.block_size
        request.restored = min(request.restored, request.num_computed_tokens)
        request.failed = not first
        return {request.request_id} if request.request_id in scheduled else set()

    def _sample(self, request: Request) -> None:
        request.outputs -= 1
        digest = hashlib.sha256(repr(request.tokens).encode()).digest()
        request.tokens.append(digest[0])
        request.hash()
        if request.outputs <= 0:
            request.reason = request.ends
            self.running.remove(request)
            self.scheduler.request_finished_all_groups(request, tuple(request.tables))
            self.finished.add(request.request_id)
            self._release(request)

    # The workers.

    def _work(
        self, message: Any, scheduled: dict[str, int], touched: Sequence[int], *, sync: bool
    ) -> SimpleNamespace:
        outcome = SimpleNamespace(
            finished_recving=set(),
            failed_recving=set(),
            invalid_block_ids=set(),
            kv_connector_worker_meta=None,
        )
        for rank in self.ranks:
            connector = rank.connector
            connector.handle_preemptions(message)
            for cache in rank.caches.values():
                cache[list(touched)] = JUNK
            connector.bind_connector_metadata(message)
            bad: set[int] = set()
            if sync:
                connector.start_load_kv(None)
                bad = set(connector._worker._loads._results.bad_pages)
            for name, count in scheduled.items():
                self._compute(rank, self.requests[name], count, bad)
            if not sync:
                connector.start_load_kv(None)
            connector.wait_for_save()
            results = connector.get_transfer_results(set())
            outcome.invalid_block_ids |= connector.get_block_ids_with_load_errors()
            self._count(results, outcome)
            meta = connector.build_connector_worker_meta()
            if meta is not None:
                outcome.kv_connector_worker_meta = meta
            connector.clear_connector_metadata()
        return outcome

    def _count(self, results: Any, outcome: SimpleNamespace) -> None:
        """A load has ended when every rank has said so; it has failed if one has."""
        for name in results.failed_recving:
            self.requests[name].failed = True
        for name in results.finished_recving:
            self._received[name] = self._received.get(name, 0) + 1
            if self._received[name] == len(self.ranks):
                del self._received[name]
                outcome.finished_recving.add(name)
                if self.requests[name].failed:
                    outcome.failed_recving.add(name)

    def _compute(self, rank: Rank, request: Request, count: int, bad: set[int]) -> None:
        """Checks all KV that the next tokens look at, and writes theirs."""
        start, content = request.num_computed_tokens, self._content(rank, request)
        for number, spec in enumerate(self.groups):
            table = request.tables[number]
            for layer in self.kv_cache_config.kv_cache_groups[number].layer_names:
                cache, name = rank.caches[layer], f"{layer} {rank.number // self.replicas}"
                if not bad & set(table):
                    _check(cache, name, spec, table, request.tokens, start, content)
                _write(cache, name, spec, table, request.tokens, start, start + count, content)

    def _content(self, rank: Rank, request: Request) -> bytes:
        """The weights as this worker has them: read once."""
        lora = request.lora_request
        if lora is None:
            return b""
        return rank.adapters.setdefault(lora.lora_int_id, request.content)

    def _rank(self, connector_class: Any, number: int) -> Rank:
        self.config.parallel_config.rank = number
        connector = connector_class(self.config, KVConnectorRole.WORKER, self.kv_cache_config)
        caches = {
            layer: torch.full(
                (self.kv_cache_config.num_blocks, group.kv_cache_spec.real_page_size_bytes),
                JUNK,
                dtype=torch.uint8,
                device=self.device,
            )
            for group in self.kv_cache_config.kv_cache_groups
            for layer in group.layer_names
        }
        connector.register_kv_caches(caches)
        return Rank(number, connector, caches)


def vllm_config(
    model: Path, settings: dict[str, Any], *, ranks: int = 1, role: str = "kv_both", caching: bool
) -> Any:
    """An engine's configuration, as far as the connector reads it."""
    return SimpleNamespace(
        kv_transfer_config=SimpleNamespace(
            kv_connector_extra_config=settings,
            kv_load_failure_policy="fail",
            engine_id="engine",
            is_kv_consumer=role != "kv_producer",
            is_kv_producer=role != "kv_consumer",
        ),
        model_config=SimpleNamespace(
            model=str(model),
            revision=None,
            dtype=torch.float32,
            quantization=None,
            quantization_config=None,
            multimodal_config=None,
            is_diffusion=False,
            max_model_len=4096,
            hf_text_config=SimpleNamespace(to_dict=lambda: {"rope_theta": 10000.0, "layers": 2}),
        ),
        cache_config=SimpleNamespace(
            cache_dtype="auto",
            kv_cache_dtype_skip_layers=[],
            prefix_caching_hash_algo="sha256",
            kv_cache_layout="LBHNC",
            enable_prefix_caching=caching,
        ),
        parallel_config=SimpleNamespace(
            rank=0,
            tensor_parallel_size=ranks,
            pipeline_parallel_size=1,
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
        ),
        device_config=SimpleNamespace(device_type="cpu"),
        load_config=SimpleNamespace(load_format="auto"),
        speculative_config=None,
        max_concurrent_batches=1,
        use_v2_model_runner=False,
    )


def _sizes(groups: Sequence[Spec]) -> tuple[int, int]:
    from tests.stand_ins.vllm_connector import resolve_kv_cache_block_sizes

    config = KVCacheConfig(0, [KVCacheGroupSpec([], spec) for spec in groups])
    return resolve_kv_cache_block_sizes(config, None)


def _first_page(spec: Spec, computed: int) -> int:
    """The first page that tokens from there on look at."""
    if spec.kind is KVCacheSpecKind.SLIDING_WINDOW:
        return max(0, computed - spec.sliding_window + 1) // spec.block_size
    if spec.kind is KVCacheSpecKind.MAMBA:
        return max(0, computed - 1) // spec.block_size
    return 0


def _token(name: str, tokens: Sequence[int], content: bytes) -> bytes:
    """What a layer keeps of the last of these tokens."""
    return hashlib.shake_128(f"{name} {list(tokens)}".encode() + content).digest(TOKEN_BYTES)


def _state(name: str, tokens: Sequence[int], content: bytes) -> bytes:
    return hashlib.shake_128(f"state {name} {list(tokens)}".encode() + content).digest(STATE_BYTES)


def _slot(cache: torch.Tensor, spec: Spec, table: Sequence[int], position: int) -> torch.Tensor:
    page = table[position // spec.block_size]
    assert page, f"token {position} has no page"
    at = position % spec.block_size * TOKEN_BYTES
    return cache[page, at : at + TOKEN_BYTES]


def _check(
    cache: torch.Tensor,
    name: str,
    spec: Spec,
    table: Sequence[int],
    tokens: Sequence[int],
    start: int,
    content: bytes,
) -> None:
    if spec.kind is KVCacheSpecKind.MAMBA:
        if start:
            page = table[(start - 1) // spec.block_size]
            wanted = _state(name, tokens[:start], content)
            assert page and bytes(cache[page].cpu().numpy()) == wanted, f"{name}: a wrong state"
        return
    first = max(0, start - spec.sliding_window + 1) if spec.sliding_window else 0
    for position in range(first, start):
        wanted = _token(name, tokens[: position + 1], content)
        found = bytes(_slot(cache, spec, table, position).cpu().numpy())
        assert found == wanted, f"{name}: a wrong byte at token {position}"


def _write(
    cache: torch.Tensor,
    name: str,
    spec: Spec,
    table: Sequence[int],
    tokens: Sequence[int],
    start: int,
    end: int,
    content: bytes,
) -> None:
    if spec.kind is KVCacheSpecKind.MAMBA:
        data = _state(name, tokens[:end], content)
        cache[table[(end - 1) // spec.block_size]] = torch.frombuffer(
            bytearray(data), dtype=torch.uint8
        )
        return
    for position in range(start, end):
        data = _token(name, tokens[: position + 1], content)
        slot = _slot(cache, spec, table, position)
        slot.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
