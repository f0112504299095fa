"""The scheduler's side of the connector: what to load, what to save, and what to say of it."""

import hashlib
import logging
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, wait
from typing import Any

from vllm.v1.metrics.cache_hit_source import CacheHitSource

from kvstore.api.clock import Clock, SystemClock
from kvstore.api.wire import MAX_KEYS
from kvstore_client.client import Client
from kvstore_client.restore_gate import RestoreGate
from kvstore_client.vllm.adapters import Adapters
from kvstore_client.vllm.asked import Asked, Loading
from kvstore_client.vllm.hints import hint_at_end, hint_of
from kvstore_client.vllm.home import Home
from kvstore_client.vllm.keys import Chain
from kvstore_client.vllm.layout import Layout
from kvstore_client.vllm.metadata import Handshake, Load, Run, Save, StepMessage, WorkerReport
from kvstore_client.vllm.options import ConnectorOptions
from kvstore_client.vllm.plan import (
    Offer,
    Tables,
    runs_offered,
    runs_to_load,
    runs_to_save,
    tiers_of,
)
from kvstore_client.vllm.questions import Question, State, ask
from kvstore_client.vllm.spaces import has_draft_model
from kvstore_client.vllm.stats import ConnectorStats, LossCount, Tally
from kvstore_client.vllm.steps import StepTimes

IDLE_WAIT_S = 0.001
"""In a step without tokens the engine would turn round at once; the client's thread can use it."""
MAX_QUESTIONS = 3
"""Of one request; then an old answer is used, whose load may bring less than it said."""
MAX_HINTED_SPACES = 16
"""An engine of more spaces than this says nothing at a request's end."""

_SOURCES = {
    "memory": CacheHitSource.HOST,
    "disk": CacheHitSource.DISK,
    "peer": CacheHitSource.P2P,
}
_log = logging.getLogger("kvstore.vllm")


class SchedulerSide:
    """Decides for one engine. Called by the scheduler's thread alone, which it never holds up."""

    def __init__(
        self,
        vllm_config: Any,
        kv_cache_config: Any,
        layout: Layout,
        options: ConnectorOptions,
        tally: Tally,
        *,
        clock: Clock | None = None,
        client: Client | None = None,
    ) -> None:
        self._vllm_config = vllm_config
        self._layout = layout
        self._options = options
        self._tally = tally
        self._clock = clock or SystemClock()
        transfer = vllm_config.kv_transfer_config
        self._may_load = bool(transfer.is_kv_consumer)
        self._may_save = bool(transfer.is_kv_producer)
        self._engine_id = str(transfer.engine_id)
        # Within a step only where its outcome is known before the next one is scheduled.
        self._beside = (
            options.load_async or not layout.single or vllm_config.max_concurrent_batches > 1
        )
        self._caches = bool(vllm_config.cache_config.enable_prefix_caching)
        drafts = has_draft_model(vllm_config)
        # A draft model's part of a block may still change while the request decodes, and the
        # blocks of a diffusion model's answer see those behind them.
        certain = layout.outputs and not drafts and not vllm_config.model_config.is_diffusion
        self._saves_output = options.save_output and certain
        self._client = client or options.connect()
        self._losses = LossCount(self._client.counters, tally)
        self._adapters = Adapters()
        revision = options.model_revision
        self._home = Home(vllm_config, kv_cache_config, layout, self._client, revision)
        self._gate: RestoreGate | None = None
        self._steps = StepTimes(self._clock, layout.unit_tokens)
        self._asked: dict[str, Asked] = {}
        self._loads: list[Load] = []
        """Of this step, for the workers."""
        self._loading: dict[str, Asked] = {}
        """The requests that wait for a load."""
        self._coming: dict[bytes, Loading] = {}
        """The loads under way by the keys that they bring."""
        self._spoiled: dict[str, frozenset[int]] = {}
        """Pages of loads that failed within a step, by the request that computes them again."""

    def shake_hands(self, handshakes: Mapping[int, Handshake]) -> None:
        """Takes what the workers know of their KV caches. Raises ValueError if they differ, or if
        the weights have no name."""
        self._home.shake_hands(handshakes)
        self._ready()

    def new_request(self, request: Any) -> None:
        """A request has come."""
        lora = request.lora_request
        use = self._adapters.use(lora) if lora is not None else None
        now_s = self._clock.monotonic_s()
        self._asked[request.request_id] = Asked(request, hint_of(request), use, came_s=now_s)

    def matched(self, request: Any, held_tokens: int) -> tuple[int | None, bool]:
        """How many tokens beyond those held can be loaded, and whether the engine goes on
        meanwhile; None: it is not known yet."""
        asked = self._asked.get(request.request_id)
        if asked is None or not self._loadable(asked):
            return 0, False
        if asked.use is not None and not asked.use.known:
            late_s = asked.came_s + self._options.match_budget_s
            return (None if self._clock.monotonic_s() < late_s else 0), False
        asked.notice_preemption()
        unit = self._layout.unit_tokens
        held = held_tokens // unit
        # One token at least is left to compute: its logits are wanted.
        limit = min((request.num_tokens - 1) // unit, len(self._chain(asked).keys), MAX_KEYS)
        if held_tokens % unit or held >= limit:
            asked.drop_question()
            return 0, False
        blocks = self._answer(asked, held, limit)
        if blocks is None:
            return None, False
        asked.held = held
        tokens = max(0, blocks - held) * unit
        return tokens, tokens > 0 and self._beside

    def allocated(self, request: Any, tables: Tables, tokens: int) -> None:
        """The request has pages now, and `tokens` of what was matched are to be loaded."""
        asked = self._asked.get(request.request_id)
        if not tokens:
            if asked is not None and asked.loading is None:
                asked.drop_question()
            return
        try:
            self._plan_load(asked, tables, tokens)
        except Exception:
            # The engine takes these tokens for loaded from now on, so it must hear that they are
            # not, and nothing be saved before it has.
            lost = tuple(page for table in tables for page in table if page)
            if asked is not None:
                asked.loading = Loading((), frozenset(lost), self._beside, failed=True)
                self._loading[request.request_id] = asked
            self._loads.append(Load(request.request_id, (), beside=self._beside, lost_pages=lost))
            raise

    def sources(self, request: Any, tokens: int) -> dict[CacheHitSource, int]:
        """Where the tokens lay that are being loaded."""
        asked = self._asked.get(request.request_id)
        unit = self._layout.unit_tokens
        if asked is None or len(asked.tiers) * unit != tokens:
            return {CacheHitSource.EXTERNAL_UNSPECIFIED: tokens} if tokens else {}
        unspecified = CacheHitSource.EXTERNAL_UNSPECIFIED
        blocks = Counter(_SOURCES.get(tier, unspecified) for tier in asked.tiers)
        return {source: count * unit for source, count in blocks.items()}

    def loads_of_step(self) -> StepMessage:
        """The message of this step, with the loads that begin in it."""
        loads, self._loads = self._loads, []
        return StepMessage(self._home.descriptors, loads)

    def fill(self, message: StepMessage, output: Any) -> None:
        """Adds to the message what this step completes."""
        scheduled: Mapping[str, int] = output.num_scheduled_tokens
        message.idle = not output.total_num_scheduled_tokens
        self._steps.begins(scheduled, self._gate)
        if self._may_save and self._ready():
            message.spaces = self._home.descriptors
            message.saves += self._saves(scheduled, output.kv_connector_block_state)
        if message.idle:
            self._let_others_run()

    def step_ended(self, output: Any) -> set[int]:
        """The workers have reported what ended with a step. Answers the pages that the engine's
        own prefix cache must not give to anybody."""
        spoiled: set[int] = set()
        failed, bad = output.failed_recving or (), output.invalid_block_ids or ()
        ended = output.finished_recving or ()
        for request_id, asked in list(self._loading.items()):
            loading = asked.loading
            assert loading is not None
            if request_id in failed or not loading.pages.isdisjoint(bad):
                loading.failed = True
            if request_id in ended or not loading.beside:
                self._load_ended(request_id, asked, loading)
                if loading.failed and not loading.beside:
                    spoiled |= loading.pages
        report = output.kv_connector_worker_meta
        if isinstance(report, WorkerReport) and self._gate is not None:
            for time in report.load_times:
                self._gate.loaded(time.tiers, time.seconds)
        return spoiled

    def finished(self, request: Any) -> None:
        """A request has ended, well or not."""
        asked = self._asked.get(request.request_id)
        if asked is None:
            return
        asked.finished = True
        self._spoiled.pop(request.request_id, None)
        self._hint_end(asked)
        if asked.loading is None:
            asked.drop_question()
            del self._asked[request.request_id]

    def reset(self) -> None:
        """Nothing that was stored before is loaded from now on: the weights may be others.

        What is stored from now on is this engine's alone, for its weights have no name any more.
        """
        for asked in self._asked.values():
            asked.named = False
            self._give_up(asked)
        self._home.move()

    def stats(self) -> ConnectorStats | None:
        """What was counted since the last time; None if nothing was."""
        self._losses.update()
        counts = self._tally.take()
        return ConnectorStats(data=counts) if counts else None

    def close(self) -> None:
        """Gives back what is leased and ends. Idempotent."""
        for asked in self._asked.values():
            asked.drop_question()
        self._asked.clear()
        self._adapters.close()
        self._client.close()

    def _ready(self) -> bool:
        """Whether there is anywhere to look. Raises ValueError if the weights have no name."""
        if not self._home.ready():
            return False
        if self._gate is None and self._options.restore_gate:
            self._gate = RestoreGate(self._layout.unit_tokens, self._home.block_bytes)
        return True

    def _loadable(self, asked: Asked) -> bool:
        if not self._may_load or asked.gave_up or asked.request.skip_reading_prefix_cache:
            return False
        if asked.use is not None and asked.use.known and not asked.use.certain:
            return False
        return self._ready()

    def _chain(self, asked: Asked) -> Chain:
        if asked.chain is None:
            content = asked.use.content if asked.use is not None else b""
            asked.chain = Chain(self._layout.hashes_per_unit, content)
        asked.saved = min(asked.saved, asked.chain.follow(asked.request.block_hashes))
        return asked.chain

    def _answer(self, asked: Asked, held: int, limit: int) -> int | None:
        """How many blocks of the chain can be had; None: it is not known yet."""
        question = asked.question
        if question is not None and held < question.held_blocks:
            asked.drop_question()  # What it had itself then, it has no more.
            question = None
        if question is None:
            asked.question = self._ask(asked, held, limit)
            return None
        state = question.state()
        if state is State.STALE and asked.attempt < MAX_QUESTIONS:
            asked.drop_question()
            return None
        if state is State.WAITING:
            return None
        if state is State.LATE:
            self._tally.add("matches", label="late")
            self._give_up(asked)
            return held
        if question.blocks is None:
            question.blocks = self._judge(question, held)
        blocks = min(question.blocks, limit)
        if blocks <= held:
            question.drop()
            return held
        if question.dropped:
            asked.drop_question()  # It had all of it itself then, so the lease is gone.
            return None
        return self._after_others(asked, held, blocks)

    def _ask(self, asked: Asked, held: int, limit: int) -> Question:
        asked.attempt += 1
        name = f"{self._engine_id} {asked.request.request_id} {asked.attempt}"
        return ask(
            self._client,
            self._clock,
            self._home.spaces,
            self._chain(asked).keys[:limit],
            self._options,
            request_id=hashlib.sha256(name.encode()).digest(),
            held_blocks=held,
            hint=asked.hint,
        )

    def _judge(self, question: Question, held: int) -> int:
        """How many blocks of an answer are loaded rather than computed."""
        match = question.match
        self._tally.add("match_seconds", question.waited_s)
        self._tally.add("matches", label="hit" if match.blocks > held else "miss")
        if self._gate is None or not match.spaces or match.blocks <= held:
            return match.blocks
        worth = held + self._gate.worth(match.spaces[0], held)
        if worth < match.blocks:
            if not self._layout.divisible:
                worth = held
            tokens = (match.blocks - worth) * self._layout.unit_tokens
            self._tally.add("gated_tokens", tokens)
        return worth

    def _after_others(self, asked: Asked, held: int, blocks: int) -> int | None:
        """None as long as another request loads some of these blocks to where this one has them."""
        if not self._caches:
            return blocks
        other = asked.waiting_for
        if other is not None and not other.ended:
            return None
        if other is not None and other.failed:
            # One load that fails is enough: each that waits in a row would wait as long again.
            self._give_up(asked)
            return held
        keys = self._chain(asked).keys[held:blocks]
        asked.waiting_for = next((self._coming[key] for key in keys if key in self._coming), None)
        return blocks if asked.waiting_for is None else None

    def _give_up(self, asked: Asked) -> None:
        asked.drop_question()
        asked.gave_up = True

    def _plan_load(self, asked: Asked | None, tables: Tables, tokens: int) -> None:
        assert asked is not None and asked.question is not None
        question, chain = asked.question, self._chain(asked)
        total = asked.held + tokens // self._layout.unit_tokens
        runs = runs_to_load(self._layout, chain, tables, asked.held, total)
        asked.tiers = tiers_of(question.match, asked.held, total)
        for tier in filter(None, asked.tiers):
            self._tally.add("matched_tokens", self._layout.unit_tokens, tier)
        pages = frozenset(page for run in runs for block in run.pages for page in block if page)
        keys = tuple(chain.keys[asked.held : total])
        asked.loading = Loading(keys, pages, self._beside)
        self._loading[asked.request.request_id] = asked
        for key in keys:
            self._coming.setdefault(key, asked.loading)
        lease_id = question.match.lease_id
        self._loads.append(Load(asked.request.request_id, runs, lease_id, self._beside))

    def _load_ended(self, request_id: str, asked: Asked, loading: Loading) -> None:
        loading.ended = True
        for key in loading.keys:
            if self._coming.get(key) is loading:
                del self._coming[key]
        asked.loading = None
        del self._loading[request_id]
        asked.drop_question()
        if loading.failed:
            asked.gave_up = True
            asked.saved = 0
            if not loading.beside:
                self._spoiled[request_id] = loading.pages
        if asked.finished:
            del self._asked[request_id]

    def _saves(self, scheduled: Mapping[str, int], state: Any) -> list[Save]:
        saves: list[Save] = []
        if any(not asked.loading.beside for asked in self._loading.values() if asked.loading):
            # It is not known yet whether pages that are loaded within this step hold what they
            # should, and other requests may have them at once.
            return saves
        offers: Mapping[str, list[Offer]] = state.boundary_state_offloads
        for request_id in {**scheduled, **offers}:
            asked = self._asked.get(request_id)
            if asked is None or not self._savable(asked):
                continue
            runs: list[Run] = []
            first, end = self._completed(asked, scheduled.get(request_id, 0))
            # The engine copies the whole table for whoever asks, so few do.
            if end > first and (tables := state.get_block_ids(request_id)) is not None:
                if self._is_spoiled(request_id, tables):
                    asked.named = False
                    continue
                asked.saved = end
                runs += runs_to_save(self._layout, self._chain(asked), tables, first, end)
            runs += runs_offered(self._layout, self._chain(asked), offers.get(request_id, ()))
            if runs:
                saves.append(Save(tuple(runs), asked.hint))
        return saves

    def _is_spoiled(self, request_id: str, tables: Tables) -> bool:
        """Whether it has pages, as hits of the engine's cache, that another one must compute."""
        return any(
            not pages.isdisjoint(table)
            for owner, pages in self._spoiled.items()
            if owner != request_id
            for table in tables
        )

    def _savable(self, asked: Asked) -> bool:
        """Whether what this step computes of a request is right, and has a name."""
        asked.notice_preemption()
        if asked.loading is not None or not asked.named:
            return False
        if asked.use is None:
            return True
        request = asked.request
        if asked.began_at is None:
            asked.began_at = request.num_computed_tokens
        if request.num_computed_tokens - request.num_in_flight_tokens > asked.began_at:
            asked.use.ran()
        return asked.use.savable

    def _completed(self, asked: Asked, tokens: int) -> tuple[int, int]:
        """From and up to which block the chain is whole after so many more tokens, and new.

        Drafted tokens that may yet be rejected have no hash, so no block with one has a key.
        """
        request, unit = asked.request, self._layout.unit_tokens
        end = (request.num_computed_tokens + tokens) // unit
        if not self._saves_output:
            end = min(end, request.num_prompt_tokens // unit)
        end = min(end, len(self._chain(asked).keys))
        return asked.saved, end

    def _hint_end(self, asked: Asked) -> None:
        """Tells the node what the end of a request says of its chain's future."""
        reason = str(asked.request.get_finished_reason())
        hint = hint_at_end(asked.hint, reason)
        if hint is None or not self._options.finish_hints or asked.chain is None:
            return
        keys = asked.chain.keys[:MAX_KEYS]
        if keys and self._may_save and len(self._home.spaces) <= MAX_HINTED_SPACES:
            for space in self._home.spaces:
                self._client.hint_soon(space, keys, hint, scope=self._options.scope)

    def _let_others_run(self) -> None:
        waiting = [
            asked.question.future
            for asked in self._asked.values()
            if asked.question is not None and not asked.question.future.done()
        ]
        if waiting:
            wait(waiting, IDLE_WAIT_S, FIRST_COMPLETED)
