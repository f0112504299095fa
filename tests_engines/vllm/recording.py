"""Any connector of vLLM, with a witness inside: what the engine's own KV pages held, and when.

`kv_connector_module_path` names this module and `kv_connector` the connector as usual: the class
that vLLM gets is the named one with `Recorded` before it. The witness knows nothing of how a
connector works. It follows vLLM's side alone: which blocks a step has computed, and which blocks
vLLM asked to be filled from elsewhere. After each it takes the SHA-256 of the pages, once a group,
key and rank. So "restored as computed" is a statement about the engine's memory.

What it sees goes as lines of JSON to the file `KVSTORE_WITNESS_RECORD`. At the moments of `ASKED`
it moreover says so on the unix socket `KVSTORE_WITNESS_EVENTS` and waits for the answer: so a test
can stop, kill or spoil something exactly then. `KVSTORE_WITNESS_PLANT=zero` zeroes one page of
each restored request, which every comparison must notice.
"""

import hashlib
import importlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
)
from vllm.v1.kv_cache_interface import MambaSpec

RECORD_VARIABLE = "KVSTORE_WITNESS_RECORD"
EVENTS_VARIABLE = "KVSTORE_WITNESS_EVENTS"
PLANT_VARIABLE = "KVSTORE_WITNESS_PLANT"

MATCHED = "matched"
PROMISED = "promised"
LOADING = "loading"
RESTORED = "restored"
SAVING = "saving"
SAVED = "saved"
ASKED = (MATCHED, PROMISED, LOADING, RESTORED, SAVING, SAVED)
"""After the answer to a lookup; after blocks were allocated for a load; after loads were begun;
after a load ended, well or not; before and after the connector takes what a step has computed."""

V1 = "vllm.distributed.kv_transfer.kv_connector.v1"
CONNECTORS = {
    "KVStoreConnector": "kvstore_client.vllm",
    "LocalPages": "tests_engines.vllm.local_pages",
    "ExampleConnector": f"{V1}.example_connector",
    "OffloadingConnector": f"{V1}.offloading_connector",
    "KVStoreOffloadingConnector": "kvstore_client.vllm_tier",
    "LMCacheConnectorV1": f"{V1}.lmcache_connector",
    "LMCacheMPConnector": f"{V1}.lmcache_mp_connector",
}
HOOKS = (
    "on_new_request",
    "get_num_new_matched_tokens",
    "update_state_after_alloc",
    "build_connector_meta",
    "update_connector_output",
    "request_finished",
    "request_finished_all_groups",
    "handle_preemptions",
    "start_load_kv",
    "wait_for_layer_load",
    "save_kv_layer",
    "wait_for_save",
    "get_transfer_results",
)
"""Their time is the engine's: the longest of each is recorded."""


@dataclass
class Pages:
    """Blocks of one request that hold what their keys name: (group, key in hex, block id).

    `asynchronous`: a load fills them while other steps run.
    """

    request: str
    blocks: list[tuple[int, str, int]]
    asynchronous: bool = False


@dataclass
class WitnessedMetadata(KVConnectorMetadata):
    """What the scheduler's witness tells the workers' beside what the connector says."""

    inner: KVConnectorMetadata
    computed: list[Pages] = field(default_factory=list)
    promised: list[Pages] = field(default_factory=list)
    """Of this step: blocks that are full after it; blocks that a load will fill."""


@dataclass
class _Witness:
    """What a `Recorded` adds; one attribute, so that nothing of the connector's is hidden."""

    record: Callable[[dict[str, Any]], None]
    ask: Callable[[str, dict[str, Any]], None]
    requests: dict[str, Any] = field(default_factory=dict)
    looked_up: dict[str, tuple[int, bool]] = field(default_factory=dict)
    """Of a request: tokens that vLLM's own cache had, and whether the load is asynchronous."""
    ends: dict[tuple[str, int], int] = field(default_factory=dict)
    """Of a request and group: as many blocks were full after the step before."""
    answered: set[str] = field(default_factory=set)
    promised: list[Pages] = field(default_factory=list)
    caches: dict[str, Any] = field(default_factory=dict)
    loading: dict[str, tuple[Pages, float]] = field(default_factory=dict)
    bad_blocks: set[int] = field(default_factory=set)
    slowest_s: dict[str, float] = field(default_factory=dict)
    asked_s: dict[str, float] = field(default_factory=dict)
    current: WitnessedMetadata | None = None
    rank: int = 0


class Recorded:
    """Stands before a connector class and sees every call that vLLM makes of it."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        self.witness = _Witness(_writer(), asker())
        super().__init__(vllm_config, role, kv_cache_config)
        self._groups = kv_cache_config.kv_cache_groups
        self._hash_tokens = kv_cache_config.hash_block_size or vllm_config.cache_config.block_size
        if role is KVConnectorRole.WORKER:
            from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

            self.witness.rank = get_tensor_model_parallel_rank()

    # What the scheduler calls.

    def on_new_request(self, request: Any) -> None:
        self.witness.requests[request.request_id] = request
        super().on_new_request(request)

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        witness, name = self.witness, request.request_id
        begun_s = witness.asked_s.setdefault(name, time.monotonic())
        answer = super().get_num_new_matched_tokens(request, num_computed_tokens)
        witness.looked_up[name] = (num_computed_tokens, answer[1])
        if answer[0] is not None and name not in witness.answered:
            witness.answered.add(name)
            seconds = time.monotonic() - begun_s
            told = {"request": name, "tokens": answer[0], "waited_s": seconds}
            witness.record({"kind": MATCHED, **told})
            witness.ask(MATCHED, told)
        return answer

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        super().update_state_after_alloc(request, blocks, num_external_tokens)
        if num_external_tokens <= 0:
            return
        # What vLLM's own cache has, stands before; only the rest is the connector's to fill.
        local_tokens, asynchronous = self.witness.looked_up[request.request_id]
        ids = blocks.get_block_ids()
        pages = Pages(request.request_id, [], asynchronous)
        for group, spec in enumerate(self._specs()):
            first = local_tokens // spec.block_size
            last = (local_tokens + num_external_tokens) // spec.block_size
            for index in range(first, min(last, len(ids[group]))):
                pages.blocks += self._named(request, group, index, ids[group][index])
        self.witness.promised.append(pages)
        told = {"request": request.request_id, "tokens": num_external_tokens}
        self.witness.record({"kind": PROMISED, **told, "blocks": len(pages.blocks)})
        self.witness.ask(PROMISED, told)

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        computed = list(self._computed(scheduler_output))
        inner = super().build_connector_meta(scheduler_output)
        promised, self.witness.promised = self.witness.promised, []
        return WitnessedMetadata(inner, computed, promised)

    def _computed(self, scheduler_output: Any) -> Iterator[Pages]:
        """The blocks that this step fills, of every request."""
        state = scheduler_output.kv_connector_block_state
        starts = {
            new.req_id: new.num_computed_tokens for new in scheduler_output.scheduled_new_reqs
        }
        running = scheduler_output.scheduled_cached_reqs
        starts |= dict(zip(running.req_ids, running.num_computed_tokens, strict=True))
        for name, tokens in scheduler_output.num_scheduled_tokens.items():
            request = self.witness.requests.get(name)
            table = state.get_block_ids(name)
            if request is None or table is None:
                continue
            drafts = len(scheduler_output.scheduled_spec_decode_tokens.get(name, ()))
            pages = Pages(name, [])
            for group, spec in enumerate(self._specs()):
                if isinstance(spec, MambaSpec):
                    continue  # A recurrent state lies where vLLM says, below.
                # Drafts that the step before verified have filled blocks without being its own.
                begin = starts[name] // spec.block_size
                begin = min(begin, self.witness.ends.get((name, group), begin))
                end = (starts[name] + tokens - drafts) // spec.block_size
                self.witness.ends[name, group] = end
                for index in range(begin, min(end, len(table[group]))):
                    pages.blocks += self._named(request, group, index, table[group][index])
            for group, block, boundary in state.boundary_state_offloads.get(name, ()):
                tokens_each = self._specs()[group].block_size
                if boundary % tokens_each == 0:
                    pages.blocks += self._named(request, group, boundary // tokens_each - 1, block)
            if pages.blocks:
                yield pages

    def _named(
        self, request: Any, group: int, index: int, block: int
    ) -> list[tuple[int, str, int]]:
        """The block with its key; nothing if it has none yet, or is the null block."""
        last = (index + 1) * self._specs()[group].block_size // self._hash_tokens - 1
        if block == 0 or last >= len(request.block_hashes):
            return []
        return [(group, bytes(request.block_hashes[last]).hex(), block)]

    def _specs(self) -> list[Any]:
        return [group.kv_cache_spec for group in self._groups]

    # What the workers call.

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self.witness.caches = kv_caches
        super().register_kv_caches(kv_caches)

    def handle_preemptions(self, kv_connector_metadata: Any) -> None:
        super().handle_preemptions(kv_connector_metadata.inner)

    def bind_connector_metadata(self, connector_metadata: Any) -> None:
        witness = self.witness
        witness.current = connector_metadata
        super().bind_connector_metadata(connector_metadata.inner)
        for pages in connector_metadata.promised:
            witness.loading[pages.request] = (pages, time.monotonic())

    def start_load_kv(self, forward_context: Any, **others: Any) -> None:
        super().start_load_kv(forward_context, **others)
        witness = self.witness
        if witness.current is not None and witness.current.promised:
            names = [pages.request for pages in witness.current.promised]
            witness.ask(LOADING, {"requests": names})

    def wait_for_save(self) -> None:
        witness, current = self.witness, self.witness.current
        full = current.computed if current is not None else []
        blocks = sum(len(pages.blocks) for pages in full)
        if blocks:
            witness.ask(SAVING, {"blocks": blocks})
        super().wait_for_save()
        for pages in full:
            self._digest("computed", pages)
        if blocks:
            witness.ask(SAVED, {"blocks": blocks})

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        results = super().get_transfer_results(finished_req_ids)
        bad = super().get_block_ids_with_load_errors()
        self.witness.bad_blocks |= bad
        for name, (pages, _) in list(self.witness.loading.items()):
            if not pages.asynchronous:
                self._ended(name, failed=False)  # It was over before the step.
        for name in results.finished_recving:
            self._ended(name, failed=name in results.failed_recving)
        return results

    def get_block_ids_with_load_errors(self) -> set[int]:
        bad, self.witness.bad_blocks = self.witness.bad_blocks, set()
        return bad | super().get_block_ids_with_load_errors()

    def _ended(self, name: str, *, failed: bool) -> None:
        """A load is over: what the pages hold now is what the engine will use."""
        entry = self.witness.loading.pop(name, None)
        if entry is None:
            return
        pages, begun_s = entry
        seconds = time.monotonic() - begun_s
        bad = self.witness.bad_blocks
        good = Pages(name, [] if failed else [page for page in pages.blocks if page[2] not in bad])
        told = {
            "request": name,
            "blocks": len(good.blocks),
            "failed": len(pages.blocks) - len(good.blocks),
            "seconds": seconds,
        }
        self.witness.record({"kind": RESTORED, **told})
        if good.blocks and os.environ.get(PLANT_VARIABLE) == "zero":
            group, _, block = good.blocks[0]
            for page in self.pages(group, block):
                page.zero_()
        self._digest("restored", good)
        self.witness.ask(RESTORED, told)

    def _digest(self, what: str, pages: Pages) -> None:
        for group, key, block in pages.blocks:
            digest = hashlib.sha256()
            for page in self.pages(group, block):
                digest.update(page.contiguous().view(torch.uint8).numpy().data)
            self.witness.record(
                {
                    "kind": what,
                    "request": pages.request,
                    "name": f"{group}/{self.witness.rank}/{key}",
                    "digest": digest.hexdigest(),
                    "bytes": sum(page.nbytes for page in self.pages(group, block)),
                }
            )

    def pages(self, group: int, block: int) -> Iterator[torch.Tensor]:
        """The pages of a block, one or more a layer."""
        for layer in self._groups[group].layer_names:
            cache = self.witness.caches.get(layer)
            if cache is None:
                continue  # Its pages are another layer's.
            for tensor in cache if isinstance(cache, (list, tuple)) else [cache]:
                yield tensor[block]


def _timed(name: str) -> Callable[..., Any]:
    """The hook of the connector class alone, timed: what the witness itself does is not counted."""

    def make(base: type) -> Callable[..., Any]:
        inner = getattr(base, name)

        @wraps(inner)
        def hook(self: Any, *arguments: Any, **named: Any) -> Any:
            begun_s = time.monotonic()
            try:
                return inner(self, *arguments, **named)
            finally:
                seconds = time.monotonic() - begun_s
                if seconds > self.witness.slowest_s.get(name, 0.0):
                    self.witness.slowest_s[name] = seconds
                    self.witness.record({"kind": "hook", "hook": name, "seconds": seconds})

        return hook

    return make


def recorded(name: str) -> type:
    """The connector class of this name, with a witness."""
    base = getattr(importlib.import_module(CONNECTORS[name]), name)
    timed = type(
        f"Timed{name}", (base,), {hook: _timed(hook)(base) for hook in HOOKS if hasattr(base, hook)}
    )
    made = type(name, (Recorded, timed), {"__module__": __name__})
    assert issubclass(made, KVConnectorBase_V1)
    return made


def __getattr__(name: str) -> type:
    if name not in CONNECTORS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = recorded(name)
    made: type = globals()[name]
    return made


def _writer() -> Callable[[dict[str, Any]], None]:
    path = Path(os.environ.get(RECORD_VARIABLE) or os.devnull)

    def write(line: dict[str, Any]) -> None:
        # One write of one line to a file opened for appending: processes do not tear each other's.
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    return write


def asker() -> Callable[[str, dict[str, Any]], None]:
    """Tells the test of an event, if one listens, and returns when it has answered."""
    path = os.environ.get(EVENTS_VARIABLE)

    def ask(event: str, told: dict[str, Any]) -> None:
        if not path:
            return
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(path)
            connection.sendall(json.dumps({"event": event, **told}).encode() + b"\n")
            connection.recv(1)

    return ask
