"""Measures one model: each way to the first token in turn, for all lengths and sources."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

from benchmarks.engine.models import VOCABULARY, Model
from benchmarks.engine.point import Point
from benchmarks.engine.sources import Gates, Source
from benchmarks.engine.store_node import StoreNode
from kvstore.api.errors import Unavailable
from kvstore_client import Client
from kvstore_workers.cut import Cut
from kvstore_workers.layout import read_layout
from kvstore_workers.request import Completion, Request
from kvstore_workers.worker import Worker, WorkerConfig

SHARED, STREAM, DISK, SLOW = "memory, shared", "memory, stream", "disk, cold", "slow to answer"
SOURCES = (SHARED, STREAM, DISK, SLOW)
GATED = (SHARED, STREAM, SLOW)
"""Where the gate is asked as well; cold blocks would need one more start of the node for that."""
PATHS = {SHARED: "shm", STREAM: "grpc", DISK: "shm", SLOW: "shm"}
FEW_BLOCKS, SHARE = 8, 0.8
FEW, SHARE_OF_PROMPT = f"{FEW_BLOCKS} blocks", f"{SHARE:.0%} of the prompt"
SLOW_AS_TOKENS = 640
"""A load from the slow source waits as long as so many tokens take to compute."""
UNUSED = "nobody"
"""What its gate learns is not of interest."""
LEAST_BYTES = 64 << 20
FLUSH_S = 60.0
PATIENCE_S = 60.0


@dataclass(frozen=True, slots=True)
class Prompt:
    """How long a prompt is, and how much of it the store has."""

    prefix: str
    tokens: int
    restored_tokens: int


def prompts(lengths: Sequence[int], cut: Cut) -> Iterator[Prompt]:
    """Each length with a prefix of a few blocks, and with one of most of it, in whole chunks."""
    few = FEW_BLOCKS * cut.block_tokens
    for tokens in lengths:
        share = cut.canonical_tokens(int(SHARE * tokens))
        if few < tokens:
            yield Prompt(FEW, tokens, few)
        if share:
            yield Prompt(SHARE_OF_PROMPT, tokens, share)


class Bench:
    """A worker and a node that holds one long chain. Enter it; nothing outlives it."""

    def __init__(self, home: Path, model: Model, most_tokens: int, seed: str) -> None:
        self._model = model
        self._rng = random.Random(f"{seed} {model.name}")
        self._exits = ExitStack()
        self._home = home
        self._most_tokens = most_tokens
        self.differing = 0
        """Answers whose first logits were not those of the recomputed one, bit by bit."""
        self.compared = 0

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self._exits.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._exits.__exit__(kind, error, traceback)

    def measure(
        self, lengths: Sequence[int], repeats: int, tick: Callable[[int], None]
    ) -> list[Point]:
        """All points. A tick is one repeat of one prompt from all sources."""
        asked = list(prompts(lengths, self._cut))
        self._learn(asked)
        points: list[Point] = []
        for prompt in asked:
            of_sources = {
                source: Point(
                    self._model.name, source, prompt.prefix, prompt.tokens, prompt.restored_tokens
                )
                for source in SOURCES
            }
            for _ in range(repeats):
                self._repeat(prompt, of_sources)
                tick(1)
            points += of_sources.values()
        return points

    def _repeat(self, prompt: Prompt, points: Mapping[str, Point]) -> None:
        """One prompt, computed, then from each source restored, and as its gate will have it."""
        tokens = self._tokens(prompt)
        computed = self._ask(tokens, use_cache=False)
        for source, point in points.items():
            restored = self._restore(source, tokens, asked=False)
            came = sum(restored.restored_tokens.values())
            if came != prompt.restored_tokens:
                raise Unavailable(f"{source}: {came} of {prompt.restored_tokens} tokens came")
            point.recompute_s.append(computed.ttft_s)
            point.restore_s.append(restored.ttft_s)
            self._compare(restored, computed)
            if source in GATED:
                gated = self._restore(source, tokens, asked=True)
                point.gated_s.append(gated.ttft_s)
                point.gate_restored.append(bool(gated.restored_tokens))
                self._compare(gated, computed)

    def _compare(self, answer: Completion, computed: Completion) -> None:
        self.compared += 1
        self.differing += answer.logits != computed.logits

    def _restore(self, source: str, tokens: list[int], *, asked: bool) -> Completion:
        """One request that finds nothing in VRAM."""
        if source == DISK:
            self._start_cold()
        self._source.client = self._clients[source]
        self._source.delay_s = self._slow_s if source == SLOW else 0.0
        with self._gates.decided_by(source, asked=asked):
            return self._ask(tokens, use_cache=True)

    def _start_cold(self) -> None:
        """A node whose memory is empty; the first call to it, which is slow, is about others."""
        self._clients[DISK].close()
        self._cold_node.restart(flush=False)
        self._clients[DISK] = self._cold_node.connect(PATHS[DISK], self._worker.descriptor)
        self._source.client = self._clients[DISK]
        with self._gates.decided_by(UNUSED, asked=False):
            self._ask([*self._other_chain, 1], use_cache=True)

    def _learn(self, asked: list[Prompt]) -> None:
        """The gates know the shortest and the longest prefix before they are asked.

        The first of all is thrown away: whatever is done for the first time is slow.
        """
        shortest = min(asked, key=lambda prompt: prompt.restored_tokens)
        longest = max(asked, key=lambda prompt: prompt.restored_tokens)
        self._ask(self._tokens(longest), use_cache=False)
        middle = self._tokens(Prompt("", SLOW_AS_TOKENS, 0))
        self._slow_s = self._ask(middle, use_cache=False).ttft_s
        for source in SOURCES:
            for prompt in (shortest, longest):
                self._restore(source, self._tokens(prompt), asked=False)

    def _tokens(self, prompt: Prompt) -> list[int]:
        """The chain that the store has, and behind it what nobody has ever asked."""
        new = prompt.tokens - prompt.restored_tokens
        return self._chain[: prompt.restored_tokens] + self._draw(new)

    def _draw(self, count: int) -> list[int]:
        return [self._rng.randrange(1, VOCABULARY) for _ in range(count)]

    def _ask(self, tokens: list[int], *, use_cache: bool) -> Completion:
        """The answer, with VRAM empty at its start and nothing left to do at its end."""
        self._worker.forget_vram()
        [answer] = self._worker.generate(
            [Request(tokens, 1, use_cache=use_cache, logits_tokens=1, ignore_eos=True)]
        )
        if not self._worker.flush_spills(FLUSH_S):
            raise Unavailable("the node does not take the blocks")
        return answer

    def _start(self) -> None:
        config = WorkerConfig(
            checkpoint=self._model.checkpoint, threads=1, vram_blocks=self._most_tokens // 16,
            match_budget_s=PATIENCE_S, restore_budget_s=PATIENCE_S, store_budget_s=PATIENCE_S,
        )  # fmt: skip
        self._cut = config.cut
        layout = read_layout(config.checkpoint, config.block_tokens, config.dtype)
        self._chain = self._draw(self._cut.canonical_tokens(int(SHARE * self._most_tokens)))
        self._other_chain = self._draw(self._cut.chunk_tokens)
        memory_bytes = 4 * self._cut.blocks(self._most_tokens) * layout.block_bytes + LEAST_BYTES
        self._node, self._cold_node = (
            self._exits.enter_context(StoreNode(self._home / name, memory_bytes=memory_bytes))
            for name in ("warm", "cold")
        )
        self._source = Source(Client(self._node.endpoint))
        self._exits.callback(lambda: self._source.client.close())
        self._gates = Gates([*SOURCES, UNUSED], config.block_tokens, layout.block_bytes)
        self._worker = self._exits.enter_context(
            Worker(
                replace(config, store_endpoint=self._node.endpoint),
                connect=lambda endpoint, token: self._source,
                gate=self._gates,
            )
        )
        self._connect()
        self._fill()

    def _connect(self) -> None:
        descriptor = self._worker.descriptor
        self._source.client.close()
        memory = {
            path: self._exits.enter_context(self._node.connect(path, descriptor))
            for path in (PATHS[SHARED], PATHS[STREAM])
        }
        self._clients = {source: memory[PATHS[source]] for source in (SHARED, STREAM, SLOW)}
        self._clients[DISK] = self._cold_node.connect(PATHS[DISK], descriptor)
        self._exits.callback(lambda: self._clients[DISK].close())

    def _fill(self) -> None:
        """Both nodes hold the chains; from then on nothing is stored any more."""
        for source in (SHARED, DISK):
            self._source.client = self._clients[source]
            for chain in (self._chain, self._other_chain):
                self._ask([*chain, 1], use_cache=True)
        self._source.stores = False
        self._cold_node.restart(flush=True)
