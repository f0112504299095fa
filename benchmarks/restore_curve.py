"""Restored or recomputed: when the first token comes, over the length of the prompt."""

import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.engine.curve import (
    DISK,
    FEW,
    SHARE_OF_PROMPT,
    SHARED,
    SLOW_AS_TOKENS,
    SOURCES,
    STREAM,
    Bench,
)
from benchmarks.engine.models import MAX_TOKENS, Model, demo_model, random_model
from benchmarks.engine.picture import draw
from benchmarks.engine.point import Point, break_even
from benchmarks.proof import Claim, Finding, Proof, Setting, Size, main

LENGTHS: Mapping[Size, Sequence[Sequence[int]]] = {
    "test": ((192, 512),),
    "short": ((192, 2048), (192, 512)),
    "long": ((192, 320, 512, 1024, 2048, MAX_TOKENS - 1), (192, 320, 512, 1024)),
}
"""Of prompts, in tokens: for the demo model, then for the larger one."""
MOST_REGRET = 0.05
REAL = (SHARED, STREAM, DISK)


def models(size: Size, home: Path) -> list[Model]:
    """The demo model, and one of a more usual shape."""
    return [demo_model(), *([random_model(home)] if len(LENGTHS[size]) > 1 else [])]


def measured(setting: Setting) -> tuple[list[Point], int, int]:
    """All points; how many answers were compared with a computed one, and how many differed."""
    points: list[Point] = []
    compared = differing = 0
    with tempfile.TemporaryDirectory(prefix="kvstore-restore-") as name:
        for model, lengths in zip(
            models(setting.size, Path(name)), LENGTHS[setting.size], strict=True
        ):
            with Bench(Path(name) / model.name, model, max(lengths), setting.seed) as bench:
                points += bench.measure(lengths, setting.trials, lambda done: None)
                compared += bench.compared
                differing += bench.differing
    setting.tick(setting.trials)
    return points, compared, differing


def break_evens(points: Sequence[Point]) -> dict[str, dict[str, str]]:
    """For each model and source from how many restored tokens on that pays."""
    return {
        model: {
            source: str(break_even([p for p in points if (p.model, p.source) == (model, source)]))
            for source in SOURCES
        }
        for model in dict.fromkeys(point.model for point in points)
    }


def speed_up(points: Sequence[Point], source: str, prefix: str) -> Finding:
    """How much sooner the first token comes: the median over models and lengths of prompts."""
    chosen = [
        point.speed_up for point in points if (point.source, point.prefix) == (source, prefix)
    ]
    middle = statistics.median(chosen)
    details = {"least": round(min(chosen), 3), "most": round(max(chosen), 3)}
    return Finding(round(middle, 3), middle > 1, details=details)


def gate(points: Sequence[Point]) -> list[Finding]:
    """Whether it decides rightly where that matters, and what its decisions cost."""
    decided = [point for point in points if point.gate_decided]
    clear = [point for point in decided if point.is_clear]
    wrong = [point.as_row() for point in clear if not point.gate_is_right]
    sides = {"restore is better": sum(p.saved_s > 0 for p in clear)}
    sides["recompute is better"] = len(clear) - sides["restore is better"]
    middle = statistics.median(point.regret for point in decided)
    worst = max(decided, key=lambda point: point.regret).as_row()
    return [
        Finding(
            float(len(wrong)), not wrong and all(sides.values()), len(clear), len(wrong),
            details=sides | {"wrong": wrong},
        ),
        Finding(round(middle, 3), middle <= MOST_REGRET, details={"worst": worst}),
    ]  # fmt: skip


def run(setting: Setting) -> list[Finding]:
    """Measures, and says what follows."""
    points, compared, differing = measured(setting)
    details = {
        "pays": break_evens(points), "points": [point.as_row() for point in points],
    }  # fmt: skip
    exact = not differing and compared > 0
    return [
        Finding(float(differing), exact, compared, differing, details=details),
        *(speed_up(points, source, prefix) for source in REAL for prefix in PREFIXES),
        *gate(points),
    ]


PREFIXES = (FEW, SHARE_OF_PROMPT)

PROOF = Proof(
    module="restore_curve",
    about="Time to first token with a prefix restored against everything computed, on the demo "
    "model and on one with random weights, from memory by both paths and cold from disk. One more "
    f"source waits with each load as long as {SLOW_AS_TOKENS} tokens take to compute, so that the "
    "gate has something to decide. Trials are repeats of each point.",
    claims=(
        Claim("restored and computed: first logits that differ", "answers", "0"),
        *(
            Claim(f"first token, {prefix} from {source}", "times sooner", "> 1")
            for source in REAL
            for prefix in PREFIXES
        ),
        Claim("restore gate: points on the wrong side of the break-even", "points", "0"),
        Claim("restore gate: regret, median", "of the better way", f"<= {MOST_REGRET}"),
    ),
    trials={"test": 1, "short": 3, "long": 5},
    run=run,
    draw=draw,
)

if __name__ == "__main__":
    main(PROOF)
