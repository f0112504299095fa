"""Restored or recomputed on a GPU: when the first token of a model of usual size comes."""

import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.engine.models import Model, eight_billion
from benchmarks.engine.sources import Gates, Source
from benchmarks.engine.store_node import StoreNode
from benchmarks.proof import Claim, Finding, Proof, Setting, Size, main, not_run
from kvstore.api.errors import Unavailable
from kvstore_client import Client
from kvstore_workers.cut import Cut
from kvstore_workers.layout import read_layout
from kvstore_workers.request import Completion, Request
from kvstore_workers.worker import Worker, WorkerConfig

LENGTHS: Mapping[Size, Sequence[int]] = {
    "test": (8192,), "short": (8192, 32_768), "long": (2048, 4096, 8192, 16_384, 32_768),
}  # fmt: skip
"""Of prompts, in tokens."""
CLAIMED = (8192, 32_768)
SHARE = 0.8
SHARE_OF_PROMPT, ALL_BUT_A_CHUNK = f"{SHARE:.0%} of the prompt", "all but the last chunk"
PREFIXES = (SHARE_OF_PROMPT, ALL_BUT_A_CHUNK)
MEMORY, DISK = "memory", "disk"
UNUSED = "nobody"
"""What its gate learns is not of interest."""
MOST_REGRET = 0.1
CHUNK_TOKENS = 1024
VOCABULARY = 100_000
SLAB_BYTES = 64 << 20
PATIENCE_S = 120.0
POLL_S = 0.01


@dataclass(frozen=True, slots=True)
class Point:
    """One length of prompt with a prefix from one source. Seconds to the first token."""

    source: str
    prefix: str
    prompt_tokens: int
    restored_tokens: int
    restored_s: list[float] = field(default_factory=list)
    recomputed_s: list[float] = field(default_factory=list)
    """By the same worker."""
    plain_s: list[float] = field(default_factory=list)
    """By transformers, which computes the whole prompt at once and keeps nothing."""
    gated_s: list[float] = field(default_factory=list)
    """As the worker's gate has it, restored or recomputed."""

    @property
    def times_sooner(self) -> float:
        """Than the sooner of both ways to compute it; of the medians."""
        restored, *computed = map(
            statistics.median, (self.restored_s, self.recomputed_s, self.plain_s)
        )
        return min(computed) / restored

    @property
    def regret(self) -> float:
        """Time lost where the gate decides, as a part of the better of the worker's two ways."""
        ways = (self.restored_s, self.recomputed_s)
        return statistics.median(self.gated_s) / min(map(statistics.median, ways)) - 1

    def as_row(self, token_bytes: int) -> dict[str, Any]:
        """For JSON; milliseconds."""
        times = {"restored": self.restored_s, "recomputed": self.recomputed_s}
        times |= {"computed_by_transformers": self.plain_s, "gated": self.gated_s}
        return {
            "source": self.source, "prefix": self.prefix, "prompt_tokens": self.prompt_tokens,
            "restored_tokens": self.restored_tokens,
            "restored_bytes": self.restored_tokens * token_bytes,
            **{f"{way}_ms": round(1e3 * statistics.median(s), 1) for way, s in times.items()},
            "times_sooner": round(self.times_sooner, 2), "repeats": len(self.restored_s),
        }  # fmt: skip


class Bench:
    """A worker on the GPU and a node that holds one long chain, in memory and on disk."""

    def __init__(self, home: Path, model: Model, plain: Any, most_tokens: int, seed: str) -> None:
        self._plain = plain
        self._rng = random.Random(seed)
        self._cut = Cut(block_tokens=32, chunk_tokens=CHUNK_TOKENS)
        layout = read_layout(model.checkpoint, self._cut.block_tokens, "bfloat16")
        self.token_bytes = layout.block_bytes // self._cut.block_tokens
        self._chain = self._draw(self._cut.canonical_tokens(most_tokens - 1))
        self._other = self._draw(CHUNK_TOKENS)
        kept_bytes = (len(self._chain) + len(self._other)) * self.token_bytes
        self._node = StoreNode(
            home / "node", memory_bytes=kept_bytes * 5 // 4 + SLAB_BYTES, slab_bytes=SLAB_BYTES
        )
        self._node.__enter__()
        self._source = Source(Client(self._node.endpoint))
        self._gates = Gates([MEMORY, DISK, UNUSED], self._cut.block_tokens, layout.block_bytes)
        self._worker = Worker(
            WorkerConfig(
                checkpoint=model.checkpoint, vram_blocks=most_tokens // 16, max_running=1,
                block_tokens=self._cut.block_tokens, chunk_tokens=CHUNK_TOKENS,
                store_endpoint=self._node.endpoint,
                spill_queue_bytes=2 * kept_bytes, match_budget_s=PATIENCE_S,
                restore_budget_s=PATIENCE_S, store_budget_s=PATIENCE_S,
            ),
            connect=lambda endpoint, token: self._source,
            gate=self._gates,
        )  # fmt: skip
        self.compared = self.differing = 0
        for chain in (self._chain, self._other):
            self._ask([*chain, 1])
        self._source.stores = False
        self._restart(flush=True)

    def close(self) -> None:
        """Ends worker and node."""
        self._worker.close()
        self._source.client.close()
        self._node.__exit__(None, None, None)

    def measure(self, lengths: Sequence[int], repeats: int) -> list[Point]:
        """All points, one after the other. What is done for the first time is not counted.

        Each is told on stderr as soon as it is known: all of them take minutes of a dear machine.
        """
        self._compute_plainly(self._draw(max(lengths)))
        points: list[Point] = []
        for tokens in lengths:
            for prefix, restored in self._prefixes(tokens):
                memory, disk = (Point(at, prefix, tokens, restored) for at in (MEMORY, DISK))
                for _ in range(repeats):
                    self._repeat(memory, disk)
                self._gate(memory, disk)
                for point in (memory, disk):
                    click.echo(json.dumps(point.as_row(self.token_bytes)), err=True)
                    points.append(point)
        return points

    def _prefixes(self, tokens: int) -> Iterator[tuple[str, int]]:
        shares = (int(SHARE * tokens), tokens - 1)
        for prefix, share in zip(PREFIXES, map(self._cut.canonical_tokens, shares), strict=True):
            if share:
                yield prefix, share

    def _repeat(self, memory: Point, disk: Point) -> None:
        """One prompt: computed in both ways, then restored from disk, then from memory."""
        tokens = self._tokens(memory)
        plain_s = self._compute_plainly(tokens)
        computed = self._ask(tokens, use_cache=False)
        self._restart(flush=False)
        for point in (disk, memory):  # What came from disk lies in memory afterwards.
            with self._gates.decided_by(point.source, asked=False):
                answer = self._ask(tokens)
            if answer.restored_tokens != {point.source: point.restored_tokens}:
                raise Unavailable(f"{point.source}: {answer.restored_tokens} tokens came")
            point.restored_s.append(answer.ttft_s)
            point.recomputed_s.append(computed.ttft_s)
            point.plain_s.append(plain_s)
            self._compare(answer, computed)

    def _gate(self, memory: Point, disk: Point) -> None:
        """The same as the gate has it by now; memory after a restore, whatever it chose of disk."""
        tokens = self._tokens(memory)
        computed = self._ask(tokens, use_cache=False)
        self._restart(flush=False)
        for point in (disk, memory):
            with self._gates.decided_by(point.source, asked=True):
                answer = self._ask(tokens)
            point.gated_s.append(answer.ttft_s)
            self._compare(answer, computed)
            with self._gates.decided_by(UNUSED, asked=False):
                self._ask(tokens)

    def _compare(self, answer: Completion, computed: Completion) -> None:
        self.compared += 1
        self.differing += answer.logits != computed.logits

    def _tokens(self, point: Point) -> list[int]:
        """The chain that the store has, and behind it what nobody has ever asked."""
        new = point.prompt_tokens - point.restored_tokens
        return self._chain[: point.restored_tokens] + self._draw(new)

    def _restart(self, *, flush: bool) -> None:
        """A node that has all on disk and nothing in memory, and its memory pinned."""
        self._source.client.close()
        self._node.restart(flush=flush)
        self._source.client = self._node.connect("shm", self._worker.descriptor)
        until_s = time.monotonic() + PATIENCE_S
        while True:
            with self._gates.decided_by(UNUSED, asked=False):
                self._ask([*self._other, 1])
            if self._worker.stats()["arenas_pinned"]:
                return
            if time.monotonic() > until_s:
                raise Unavailable("the node's memory cannot be pinned")
            time.sleep(POLL_S)

    def _ask(self, tokens: Sequence[int], *, use_cache: bool = True) -> Completion:
        self._worker.forget_vram()
        request = Request(list(tokens), 1, use_cache=use_cache, logits_tokens=1, ignore_eos=True)
        [answer] = self._worker.generate([request])
        if not self._worker.flush_spills(PATIENCE_S):
            raise Unavailable("the node does not take the blocks")
        return answer

    @torch.inference_mode()
    def _compute_plainly(self, tokens: Sequence[int]) -> float:
        torch.cuda.synchronize()
        started_s = time.perf_counter()
        ids = torch.tensor([list(tokens)], device=self._plain.device)
        logits = self._plain(ids, use_cache=True, logits_to_keep=1).logits
        int(logits[0, -1].argmax())
        return time.perf_counter() - started_s

    def _draw(self, count: int) -> list[int]:
        return [self._rng.randrange(1, VOCABULARY) for _ in range(count)]


def speed_up(point: Point) -> Finding:
    """How much sooner the first token comes from memory."""
    times = point.times_sooner
    return Finding(round(times, 2), times > 1, len(point.restored_s))


def gate(point: Point) -> Finding:
    """What the gate's choice costs, where either way may be the better one."""
    regret, details = point.regret, {"times_sooner": round(point.times_sooner, 2)}
    return Finding(round(regret, 3), regret <= MOST_REGRET, len(point.gated_s), details=details)


def run(setting: Setting) -> list[Finding]:
    """Measures, and says what follows."""
    if not torch.cuda.is_available():
        return [not_run("torch sees no CUDA device")] * len(PROOF.claims)
    lengths = LENGTHS[setting.size]
    with tempfile.TemporaryDirectory(prefix="kvstore-restore-") as name:
        model, plain = eight_billion(Path(name), torch.device("cuda"))
        with closing(Bench(Path(name), model, plain, max(lengths), setting.seed)) as bench:
            points = bench.measure(lengths, setting.trials)
    setting.tick(setting.trials)
    details = {
        "gpu": torch.cuda.get_device_name(), "model": model.name,
        "points": [point.as_row(bench.token_bytes) for point in points],
    }  # fmt: skip
    found = {(p.source, p.prefix, p.prompt_tokens): p for p in points}
    exact = bench.differing == 0 and bench.compared > 0
    return [
        Finding(
            float(bench.differing), exact, bench.compared, bench.differing, details=details
        ),
        *(
            judge(point) if (point := found.get((source, prefix, tokens))) else NOT_MEASURED
            for judge, source, prefix, tokens in _claimed()
        ),
    ]  # fmt: skip


NOT_MEASURED = not_run("only in the longer forms")


def _claimed() -> Iterator[tuple[Callable[[Point], Finding], str, str, int]]:
    for tokens in CLAIMED:
        for prefix in PREFIXES:
            yield speed_up, MEMORY, prefix, tokens
        yield gate, DISK, SHARE_OF_PROMPT, tokens


def _claim(judge: Callable[[Point], Finding], source: str, prefix: str, tokens: int) -> Claim:
    name = f"first token of {tokens:,} tokens, {prefix} from {source}"
    if judge is gate:
        return Claim(f"{name}, gate's regret", "of the better way", f"<= {MOST_REGRET}")
    return Claim(name, "times sooner", "> 1")


PROOF = Proof(
    module="restore_on_gpu",
    about="Time to the first token of a model with the shape of Llama 3.1 8B and random weights "
    "on a GPU: with a prefix restored from a node's memory, against the sooner of the worker's "
    "own computing and of transformers computing the whole prompt at once; and from its disk, "
    "as the restore gate decides. Needs 48 GB of GPU memory, 32 GiB of memory, 24 GB of disk, and "
    "with two lengths of prompt five to ten minutes. "
    "Trials are repeats of each point.",
    claims=(
        Claim("restored and computed: first logits that differ", "answers", "0"),
        *(_claim(*each) for each in _claimed()),
    ),
    trials={"test": 1, "short": 3, "long": 5},
    run=run,
)

if __name__ == "__main__":
    main(PROOF)
