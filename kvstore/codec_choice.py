"""Which lossless codec a slower tier uses for a space: what was measured decides.

Plain decisions without clock, lock or I/O: who measures says what he saw, and when.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from kvstore.codec import CodecId, Direction

UNMEASURED = CodecId.BITSHUFFLE_LZ4
"""As long as nothing is known of the link. It costs little wherever it gains nothing."""
TIE = 1.10
"""Codecs within so much of the fastest are as fast; of them the one that stores least is used."""
FIRST_TRIALS = 3
"""So many blocks of a space are tried one after the other; then seldom."""
TRIAL_PERIOD_S = 60.0
TRIAL_BLOCKS = 64
"""Between two trials there are at least so many blocks, and so much time."""
LINK_MEMORY = 0.97
"""What is left of the weight of an observation of the link when the next one comes."""


@dataclass(frozen=True, slots=True)
class Trial:
    """What a codec made of a space's block: stored bytes, and seconds, for each of its bytes."""

    codec: CodecId
    stored: float
    encode_s: float
    decode_s: float

    def mixed(self, later: "Trial") -> "Trial":
        """The mean of this and a later trial, so that older ones count less and less."""
        return Trial(
            self.codec,
            (self.stored + later.stored) / 2,
            (self.encode_s + later.encode_s) / 2,
            (self.decode_s + later.decode_s) / 2,
        )


class Link:
    """How fast stored bytes go to a tier and come from it, as its last some thirty moves were.

    As one mover sees it: what several at once share is a slower link for each of them.
    """

    def __init__(self) -> None:
        self._size_bytes: dict[Direction, float] = {"put": 0.0, "get": 0.0}
        self._seconds: dict[Direction, float] = {"put": 0.0, "get": 0.0}

    def moved(self, direction: Direction, size_bytes: int, seconds: float) -> None:
        """One more observation."""
        self._size_bytes[direction] = self._size_bytes[direction] * LINK_MEMORY + size_bytes
        self._seconds[direction] = self._seconds[direction] * LINK_MEMORY + seconds

    def byte_s(self, direction: Direction) -> float | None:
        """Seconds for each byte; None where nothing was moved yet."""
        size_bytes = self._size_bytes[direction]
        return self._seconds[direction] / size_bytes if size_bytes else None

    @property
    def both_ways_s(self) -> float | None:
        """Seconds for a byte that is stored and loaded once; as one way is known, so is the other.

        None where nothing is known.
        """
        known = [s for s in (self.byte_s("put"), self.byte_s("get")) if s is not None]
        return 2 * sum(known) / len(known) if known else None


def byte_s(trial: Trial, link_s: float) -> float:
    """Seconds that a byte of a block costs which is stored once and loaded once.

    Their sum: a single block is encoded, then moved, and on its way back moved, then decoded.
    Where a tier does both at once with several blocks, what encoding takes is taken from the
    processors that everybody shares.
    """
    return trial.encode_s + trial.stored * link_s + trial.decode_s


def decide(trials: Iterable[Trial], link_s: float) -> CodecId:
    """The codec with which a block is stored and loaded soonest; `trials` are not empty."""
    costs = {trial: byte_s(trial, link_s) for trial in trials}
    soonest = min(costs.values())
    tied = [trial for trial, cost in costs.items() if cost <= TIE * soonest]
    # What gains nothing stores as much as the block has; then it shall not cost anything either.
    return min(tied, key=lambda trial: (round(trial.stored, 2), costs[trial])).codec


class Choice:
    """The codec of one space in one tier."""

    def __init__(self) -> None:
        self._trials: dict[CodecId, Trial] = {}
        self._tried = 0
        self._tried_s = 0.0
        self._blocks = 0
        self.codec = UNMEASURED

    def due(self, now_s: float) -> bool:
        """Whether the next block is to be tried by all codecs; it counts as one."""
        self._blocks += 1
        rested = now_s - self._tried_s >= TRIAL_PERIOD_S and self._blocks > TRIAL_BLOCKS
        if self._tried >= FIRST_TRIALS and not rested:
            return False
        self._tried += 1
        self._tried_s = now_s
        self._blocks = 0
        return True

    def learn(self, trials: Iterable[Trial]) -> None:
        """What a trial has shown."""
        for trial in trials:
            before = self._trials.get(trial.codec)
            self._trials[trial.codec] = before.mixed(trial) if before is not None else trial

    def choose(self, link: Link) -> CodecId:
        """The codec for the next block."""
        link_s = link.both_ways_s
        if self._trials and link_s is not None:
            self.codec = decide(self._trials.values(), link_s)
        return self.codec
