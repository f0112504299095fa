"""Serves several requests at once: prefill in fixed chunks, decoding in one batch of fixed width.

A block's bytes depend on the cut: which tokens were computed together. So only blocks of full
chunks are published and spilled, and a restored prefix ends where a chunk ends: what follows is
computed under the very cut that a run without cache uses, and the logits are equal bit for bit.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from kvstore.api.errors import InvalidArgument
from kvstore.api.keys import chain_keys, root_key
from kvstore_workers.cut import Cut
from kvstore_workers.generation import Generation
from kvstore_workers.link import StoreLink
from kvstore_workers.model import DecodeRow, PagedModel
from kvstore_workers.pool import BlockPool
from kvstore_workers.request import Completion, Request, RestoredBlock
from kvstore_workers.restore import RestoreJob, Restorer
from kvstore_workers.sampler import Sampler
from kvstore_workers.spill import CacheKey, Spiller, SpillRun
from kvstore_workers.transfer import Copier
from kvstore_workers.vram import VramPool


@dataclass(frozen=True, slots=True)
class Tiers:
    """What lies below VRAM. Without links there is nothing."""

    links: Mapping[str, StoreLink]
    """The store as each tenant sees it."""
    spiller: Spiller
    restorer: Restorer


class Engine:
    """Runs requests over one VRAM pool. Not thread-safe: one thread submits and steps.

    Invariant: a block in use belongs to a request in flight or to the spiller; what the pool
    finds under a key was computed or restored whole, and is never written again.
    """

    def __init__(
        self,
        model: PagedModel,
        vram: VramPool,
        copier: Copier,
        tiers: Tiers | None = None,
        *,
        cut: Cut,
        max_running: int,
        tenants: frozenset[str] = frozenset({""}),
        scope: str = "",
        spill_patience_s: float = 0.2,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self.counters: Counter[str] = Counter()
        """Requests, and tokens of prompts by where their keys and values came from."""
        self.pool: BlockPool[CacheKey] = BlockPool(vram.blocks)
        self._model = model
        self._vram = vram
        self._copier = copier
        self._tiers = tiers
        self._cut = cut
        self._max_running = max_running
        self._tenants = tenants
        self._scope = scope
        self._spill_patience_s = spill_patience_s
        self._monotonic_s = monotonic_s
        self._next_id = 0
        self._waiting: deque[Generation] = deque()
        self._filling: Generation | None = None
        self._running: list[Generation] = []

    @property
    def busy(self) -> bool:
        """True while a request is in flight."""
        return bool(self._waiting or self._filling or self._running)

    def validate(self, request: Request) -> None:
        """Raises `InvalidArgument`, naming the field, for a request that can never be served."""
        length = len(request.prompt) + request.max_new_tokens
        if length > self._model.max_tokens:
            raise InvalidArgument(
                f"request.prompt: with max_new_tokens {length} tokens, the model takes "
                f"{self._model.max_tokens}"
            )
        if self._blocks_needed(request) > self.pool.blocks:
            raise InvalidArgument(
                f"request.prompt: needs {self._blocks_needed(request)} blocks of VRAM, "
                f"there are {self.pool.blocks}"
            )
        if not 0 <= min(request.prompt) <= max(request.prompt) < self._model.vocabulary:
            raise InvalidArgument(
                f"request.prompt: tokens must lie in 0 … {self._model.vocabulary - 1}"
            )
        if request.tenant not in self._tenants:
            raise InvalidArgument(f"request.tenant: unknown: {request.tenant!r}")

    def submit(self, request: Request) -> int:
        """The id under which `step` will answer. Raises `InvalidArgument`."""
        self.validate(request)
        request_id, self._next_id = self._next_id, self._next_id + 1
        self._waiting.append(
            Generation(request_id, request, self._canonical_keys(request), Sampler(request))
        )
        self.counters["requests"] += 1
        return request_id

    def step(self) -> list[Completion]:
        """What was completed by one prefill chunk and one decode step of all running requests."""
        self._take_back(wait_s=0.0)
        self._admit()
        if self._filling is not None:
            self._fill(self._filling)
        completed = self._retire()
        if self._running:
            if self._tiers is not None:
                self._admit()  # What they have of the next one comes beside the decode step.
            self._decode()
            completed += self._retire()
        return completed

    def forget_vram(self) -> None:
        """Makes VRAM find nothing any more; requests in flight go on."""
        forgotten = self.pool.forget_all()
        if self._tiers is not None:
            self._tiers.spiller.forget(forgotten)

    # Admission: VRAM for the whole context, and what is already there.

    def _admit(self) -> None:
        is_full = self._filling is not None or len(self._running) >= self._max_running
        if is_full or not self._waiting:
            return
        generation = self._waiting[0]
        generation.started_s = self._monotonic_s()
        if not self._reserve(generation):
            self._make_way(generation)
            return
        self._filling = self._waiting.popleft()
        self._start_restore(generation)

    def _reserve(self, generation: Generation) -> bool:
        """True if the request got all blocks that it can ever need; found ones come first."""
        found = self.pool.match(
            generation.keys[: self._cut.restorable_blocks(len(generation.request.prompt))]
        )
        whole = self._cut.whole_chunks(len(found))
        self.pool.release(found[whole:])
        found = found[:whole]
        allocation = self.pool.allocate(self._blocks_needed(generation.request) - whole)
        if allocation is None:
            self.pool.release(found)
            return False
        if self._tiers is not None:
            self._tiers.spiller.forget(allocation.evicted)
        generation.blocks = found + allocation.blocks
        generation.table = torch.tensor(generation.blocks, device=self._vram.device)
        generation.tiers = ["vram"] * whole
        generation.computed_tokens = whole * self._cut.block_tokens
        return True

    def _make_way(self, generation: Generation) -> None:
        # Running requests will end by themselves; the spiller may hang on a slow store.
        if self._tiers is None:
            return
        now_s = self._monotonic_s()
        if generation.patience_end_s is None:
            generation.patience_end_s = now_s + self._spill_patience_s
        left_s = generation.patience_end_s - now_s
        if left_s <= 0:
            generation.patience_end_s = None
            for chain in self._tiers.spiller.abandon():
                self.pool.release(chain)
        elif not self._running:
            self._take_back(left_s)

    def _take_back(self, wait_s: float) -> None:
        if self._tiers is not None:
            for chain in self._tiers.spiller.take_returned(wait_s):
                self.pool.release(chain)

    # Between VRAM and the store.

    def _start_restore(self, generation: Generation) -> None:
        link = self._link(generation)
        first = len(generation.tiers)
        last = self._cut.restorable_blocks(len(generation.request.prompt))
        keys = [key.key for key in generation.keys[:last]]
        if self._tiers is None or link is None or len(keys) == first:
            return
        generation.restoring = self._tiers.restorer.start(
            RestoreJob(
                link,
                keys,
                generation.blocks[first:last],
                after=self._copier.mark(),
                hint=generation.request.hint,
            )
        )

    def _finish_restore(self, generation: Generation, tiers: list[str]) -> None:
        first = len(generation.tiers)
        generation.tiers += tiers
        generation.computed_tokens = len(generation.tiers) * self._cut.block_tokens
        self._publish(generation, first, len(generation.tiers))
        if self._tiers is not None:
            self._tiers.spiller.note_held(generation.keys[first : len(generation.tiers)])

    def _offer(self, generation: Generation) -> None:
        """Hands the request's canonical blocks to the spiller, from the first that the store lacks.

        Blocks that were found in VRAM are included: an earlier spill of them may have been dropped.
        """
        link = self._link(generation)
        if self._tiers is None or link is None:
            return
        held = self._tiers.spiller.holds(generation.keys)
        if all(held):
            return
        first = held.index(False)
        chain = generation.blocks[: len(generation.keys)]
        run = SpillRun(
            link,
            generation.keys[first:],
            chain[first:],
            parent_key=generation.keys[first - 1].key if first else b"",
            referenced=chain,
            after=self._copier.mark(),
            hint=generation.request.hint,
        )
        self.pool.hold(chain)
        if not self._tiers.spiller.offer(run):
            self.pool.release(chain)

    def _link(self, generation: Generation) -> StoreLink | None:
        link = self._tiers.links.get(generation.request.tenant) if self._tiers else None
        return link if link is not None and link.space is not None else None

    def _publish(self, generation: Generation, first: int, last: int) -> None:
        for block, key in zip(
            generation.blocks[first:last], generation.keys[first:last], strict=True
        ):
            self.pool.publish(block, key)

    # Computing.

    def _fill(self, generation: Generation) -> None:
        """One chunk of the prompt; with the last one the first token."""
        if generation.restoring is not None:
            if self._running and not generation.restoring.done():
                return
            self._finish_restore(generation, generation.restoring.result())
            generation.restoring = None
        prompt, start = generation.request.prompt, generation.computed_tokens
        if generation.filling_s is None:
            generation.filling_s, generation.filled_from = self._monotonic_s(), start
        end = min(start + self._cut.chunk_tokens, len(prompt))
        is_last = end == len(prompt)
        logits = self._model.prefill(
            prompt[start:end], start, generation.table, want_logits=is_last
        )
        generation.computed_tokens = end
        canonical = range(len(generation.keys))[start // self._cut.block_tokens :]
        canonical = canonical[: self._cut.chunk_blocks]
        self._publish(generation, canonical.start, canonical.stop)
        if logits is None:
            return
        self._choose([generation], logits[None])
        generation.first_token_s = self._monotonic_s()
        self._tell_gate(generation)
        self._filling = None
        self._running.append(generation)
        self._offer(generation)

    def _tell_gate(self, generation: Generation) -> None:
        """How long the prompt took, what else was done between its chunks included."""
        gate = self._tiers.restorer.gate if self._tiers is not None else None
        if gate is not None and generation.filling_s is not None:
            tokens = len(generation.request.prompt) - generation.filled_from
            gate.computed(tokens, generation.first_token_s - generation.filling_s)

    def _decode(self) -> None:
        rows = [
            DecodeRow(generation.tokens[-1], generation.length - 1, generation.table)
            for generation in self._running
        ]
        self._choose(self._running, self._model.decode(rows))

    def _choose(self, generations: Sequence[Generation], logits: torch.Tensor) -> None:
        likeliest = logits.argmax(-1).tolist()
        for index, generation in enumerate(generations):
            host = None
            if generation.wants_logits or not generation.sampler.greedy:
                host = logits[index].float().cpu()
            token = likeliest[index]
            if host is not None and not generation.sampler.greedy:
                token = generation.sampler.choose(host)
            generation.add(token, host)

    def _retire(self) -> list[Completion]:
        eos_tokens = self._model.eos_tokens
        ended = [one for one in self._running if one.ended(eos_tokens)]
        self._running = [one for one in self._running if not one.ended(eos_tokens)]
        return [self._complete(generation) for generation in ended]

    def _complete(self, generation: Generation) -> Completion:
        ended_s = self._monotonic_s()
        digests: tuple[RestoredBlock, ...] = ()
        if generation.request.record_digests:
            restored = zip(generation.keys, generation.blocks, generation.tiers, strict=False)
            digests = tuple(
                RestoredBlock(key.key, self._vram.sha256(block), tier)
                for key, block, tier in restored
            )
        self.pool.release(generation.blocks)
        completion = generation.complete(ended_s, self._cut.block_tokens, digests)
        self.counters["tokens_generated"] += len(completion.tokens)
        self.counters["prompt_tokens_computed"] += completion.computed_tokens
        for tier, tokens in completion.restored_tokens.items():
            self.counters[f"prompt_tokens_{tier}"] += tokens
        return completion

    def _canonical_keys(self, request: Request) -> list[CacheKey]:
        if not request.use_cache:
            return []
        canonical = request.prompt[: self._cut.canonical_tokens(len(request.prompt))]
        keys = chain_keys(root_key(request.salt), canonical, self._cut.block_tokens)
        return [CacheKey(request.tenant, self._scope, key) for key in keys]

    def _blocks_needed(self, request: Request) -> int:
        # The last new token is never read, so its keys and values are never computed.
        return self._cut.blocks(len(request.prompt) + request.max_new_tokens - 1)
