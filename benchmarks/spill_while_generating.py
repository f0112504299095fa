"""Whether spilling costs generation anything: decode speed beside a run that spills nothing."""

import random
import statistics
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.dataplane.child import cpu_s
from benchmarks.engine.models import VOCABULARY, demo_model
from benchmarks.engine.store_node import StoreNode
from benchmarks.proof import Claim, Finding, Proof, Setting, main
from kvstore.api.errors import Unavailable
from kvstore_workers.request import Completion, Request
from kvstore_workers.worker import Worker, WorkerConfig

REQUESTS = 4
"""Short runs, many of them: what else the machine does then falls on all sides alike."""
PROMPT_TOKENS, NEW_TOKENS = 512, 64
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
    beside_s: float
    """CPU time of the node, and of all threads but the generating one."""

    @classmethod
    def of(cls, worker: Worker, requests: Sequence[Request], node: StoreNode) -> "Sample":
        """Runs them. Raises `Unavailable` if the node does not take the blocks."""
        worker.forget_vram()
        cpu_before_s = _cpu_beside_s(node)
        started_s = time.perf_counter()
        answers = worker.generate(requests)
        ended_s = time.perf_counter()
        if not worker.flush_spills(FLUSH_S):
            raise Unavailable("the node does not take the blocks")
        flush_s = time.perf_counter() - ended_s
        beside_s = _cpu_beside_s(node) - cpu_before_s
        return cls(_decode_speed(answers), ended_s - started_s, flush_s, beside_s)


def _cpu_beside_s(node: StoreNode) -> float:
    return cpu_s([node.pid]) + time.process_time() - time.thread_time()


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


@dataclass(frozen=True, slots=True)
class Trial:
    """The same requests three times. Where the runs without a store differ, that is noise."""

    spilling: Sample
    without: Sample
    again: Sample

    @property
    def ratio(self) -> float:
        """Decode speed while spilling, beside the mean of the two others."""
        others = self.without.decode_tokens_per_s + self.again.decode_tokens_per_s
        return 2 * self.spilling.decode_tokens_per_s / others

    @property
    def noise(self) -> float:
        """The same of two runs between which there is no difference."""
        return self.again.decode_tokens_per_s / self.without.decode_tokens_per_s


def measured(setting: Setting, home: Path) -> tuple[list[Trial], Spilled]:
    """Runs in turn, in another order each time, so that none always comes first."""
    rng = random.Random(setting.seed)
    config = WorkerConfig(
        checkpoint=demo_model().checkpoint, threads=1, vram_blocks=128, max_running=REQUESTS
    )
    with ExitStack() as exits:
        node = exits.enter_context(StoreNode(home, memory_bytes=MEMORY_BYTES))
        spilling = exits.enter_context(Worker(replace(config, store_endpoint=node.endpoint)))
        without = exits.enter_context(Worker(config))
        for worker in (spilling, without):
            Sample.of(worker, requests_of(rng), node)  # What is done for the first time is slow.
        trials = []
        for _ in range(setting.trials):
            requests = requests_of(rng)
            runs = {"spilling": spilling, "without": without, "again": without}
            order = rng.sample(list(runs), len(runs))
            samples = {name: Sample.of(runs[name], requests, node) for name in order}
            trials.append(Trial(**samples))
            setting.tick(1)
        return trials, Spilled.of(spilling)


def run(setting: Setting) -> list[Finding]:
    """Speeds of both, and how much was stored."""
    with tempfile.TemporaryDirectory(prefix="kvstore-spill-") as home:
        trials, spilled = measured(setting, Path(home))
    speed = statistics.median(trial.ratio for trial in trials)
    blocks = {"held": spilled.held, "failed": spilled.failed, "dropped": spilled.dropped}
    return [
        Finding(round(speed, 4), speed >= LEAST_SPEED, details=_details(trials)),
        Finding(
            round(spilled.stored, 4), spilled.stored >= LEAST_STORED, details={"blocks": blocks}
        ),
    ]


def _details(trials: Sequence[Trial]) -> dict[str, Any]:
    def quartiles(values: Iterable[float]) -> list[float]:
        found = sorted(values)
        return [round(found[len(found) * part // 4], 3) for part in (1, 2, 3)]

    return {
        "trials": len(trials),
        "ratio_quartiles": quartiles(trial.ratio for trial in trials),
        "noise_quartiles": quartiles(trial.noise for trial in trials),
        "decode_tokens_per_s": {
            "spilling": quartiles(trial.spilling.decode_tokens_per_s for trial in trials),
            "without": quartiles(trial.without.decode_tokens_per_s for trial in trials),
        },
        "whole_run_ratio": quartiles(
            trial.without.total_s / trial.spilling.total_s for trial in trials
        ),
        "flush_s": quartiles(trial.spilling.flush_s for trial in trials),
        "cpu_ms_beside": {
            "spilling": quartiles(1e3 * trial.spilling.beside_s for trial in trials),
            "without": quartiles(1e3 * trial.without.beside_s for trial in trials),
        },
        "run_s": quartiles(trial.without.total_s for trial in trials),
    }


PROOF = Proof(
    module="spill_while_generating",
    about=f"The demo model answers {REQUESTS} requests of {PROMPT_TOKENS} tokens together and "
    "spills all that it computes to a node in a process of its own; in turn it answers the same "
    "requests without a store, twice, which shows the noise. torch has one thread.",
    claims=(
        Claim("decode speed while spilling, median", "of the speed without", f">= {LEAST_SPEED}"),
        Claim("blocks stored while generating", "of the blocks offered", f">= {LEAST_STORED}"),
    ),
    trials={"test": 1, "short": 24, "long": 80},
    run=run,
)

if __name__ == "__main__":
    main(PROOF)
