"""Whether spilling costs generation anything: decode speed beside a run that spills nothing."""

import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.engine.models import VOCABULARY, demo_model
from benchmarks.engine.store_node import StoreNode
from benchmarks.proof import Claim, Finding, Proof, Setting, main
from kvstore.api.errors import Unavailable
from kvstore_workers.request import Completion, Request
from kvstore_workers.worker import Worker, WorkerConfig

REQUESTS, RUNNING = 12, 4
PROMPT_TOKENS, NEW_TOKENS = 512, 96
LEAST_SPEED, LEAST_STORED = 0.97, 0.95
MEMORY_BYTES = 64 << 20
"""Of the node. What is spilled in a long run overflows it, and is written to disk beside."""
FLUSH_S = 60.0


@dataclass(frozen=True, slots=True)
class Sample:
    """One run of all requests."""

    decode_tokens_per_s: float
    """Of each request, summed up: the first token and what came before it are not counted."""
    total_s: float
    flush_s: float
    """How long the last blocks took to be stored when generation was over."""

    @classmethod
    def of(cls, worker: Worker, requests: Sequence[Request]) -> "Sample":
        """Runs them. Raises `Unavailable` if the node does not take the blocks."""
        started_s = time.perf_counter()
        answers = worker.generate(requests)
        ended_s = time.perf_counter()
        if not worker.flush_spills(FLUSH_S):
            raise Unavailable("the node does not take the blocks")
        flush_s = time.perf_counter() - ended_s
        return cls(_decode_speed(answers), ended_s - started_s, flush_s)


def _decode_speed(answers: Sequence[Completion]) -> float:
    tokens = sum(len(answer.tokens) - 1 for answer in answers)
    return tokens / sum(answer.total_s - answer.ttft_s for answer in answers)


@dataclass(frozen=True, slots=True)
class Spilled:
    """What became of the blocks that were offered."""

    held: float
    failed: float
    dropped: float

    @classmethod
    def of(cls, worker: Worker) -> "Spilled":
        """So far."""
        stats = worker.stats()
        return cls(*(stats.get(f"spill_{name}", 0.0) for name in ("held", "failed", "dropped")))

    @property
    def stored(self) -> float:
        """The part that the node holds."""
        offered = self.held + self.failed + self.dropped
        return self.held / offered if offered else 0.0


def requests_of(rng: random.Random) -> list[Request]:
    """Prompts that nobody has asked before: whatever is computed for them is spilled."""
    return [
        Request(
            [rng.randrange(1, VOCABULARY) for _ in range(PROMPT_TOKENS)], NEW_TOKENS,
            ignore_eos=True,
        )
        for _ in range(REQUESTS)
    ]  # fmt: skip


def measured(setting: Setting, home: Path) -> tuple[list[tuple[Sample, Sample]], Spilled]:
    """Pairs of a run that spills and one that does not, of the same requests."""
    rng = random.Random(setting.seed)
    config = WorkerConfig(
        checkpoint=demo_model().checkpoint, threads=1, vram_blocks=128, max_running=RUNNING
    )
    with ExitStack() as exits:
        node = exits.enter_context(StoreNode(home, memory_bytes=MEMORY_BYTES))
        spilling = exits.enter_context(Worker(replace(config, store_endpoint=node.endpoint)))
        without = exits.enter_context(Worker(config))
        for worker in (spilling, without):
            Sample.of(worker, requests_of(rng))  # Whatever is done for the first time is slow.
        pairs = []
        for number in range(setting.trials):
            requests = requests_of(rng)
            # In turn, so that neither always comes first.
            order = [spilling, without] if number % 2 else [without, spilling]
            samples = {id(worker): Sample.of(worker, requests) for worker in order}
            pairs.append((samples[id(spilling)], samples[id(without)]))
            setting.tick(1)
        return pairs, Spilled.of(spilling)


def run(setting: Setting) -> list[Finding]:
    """Speeds of both, and how much was stored."""
    with tempfile.TemporaryDirectory(prefix="kvstore-spill-") as home:
        pairs, spilled = measured(setting, Path(home))
    ratios = [own.decode_tokens_per_s / other.decode_tokens_per_s for own, other in pairs]
    speed = statistics.median(ratios)
    details = _details(pairs, ratios) | {
        "blocks": {"held": spilled.held, "failed": spilled.failed, "dropped": spilled.dropped}
    }
    return [
        Finding(round(speed, 4), speed >= LEAST_SPEED, details=details),
        Finding(round(spilled.stored, 4), spilled.stored >= LEAST_STORED, details=details),
    ]


def _details(pairs: Sequence[tuple[Sample, Sample]], ratios: Sequence[float]) -> dict[str, Any]:
    def middle(values: Sequence[float], digits: int = 3) -> float:
        return round(statistics.median(values), digits)

    return {
        "ratios": [round(ratio, 3) for ratio in sorted(ratios)],
        "decode_tokens_per_s": {
            "spilling": middle([own.decode_tokens_per_s for own, _ in pairs], 1),
            "without": middle([other.decode_tokens_per_s for _, other in pairs], 1),
        },
        "whole_run_ratio": middle([other.total_s / own.total_s for own, other in pairs]),
        "flush_s": middle([own.flush_s for own, _ in pairs]),
    }


PROOF = Proof(
    module="spill_while_generating",
    about=f"The demo model answers {REQUESTS} requests of {PROMPT_TOKENS} tokens, {RUNNING} at a "
    "time, and spills all that it computes to a node in a process of its own; then it answers the "
    "same requests without a store. torch has one thread. Trials are such pairs.",
    claims=(
        Claim("decode speed while spilling, median", "of the speed without", f">= {LEAST_SPEED}"),
        Claim("blocks stored while generating", "of the blocks offered", f">= {LEAST_STORED}"),
    ),
    trials={"test": 1, "short": 8, "long": 25},
    run=run,
)

if __name__ == "__main__":
    main(PROOF)
