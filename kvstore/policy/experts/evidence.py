"""Classes of blocks by what is known of them, and at what rate each class comes back.

For each class: how many blocks came back at which age (events), and how many did not yet
(outstanding). From these follows the rate of return at each age, and from that what an age is
worth: the most hits per byte and second that keeping a block of this class promises (Gittins).
Hints enter as classes only: a class that lies is found to lie.
"""

from array import array
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvstore.api.hint import Reuse, ReuseHint
from kvstore.policy.blocks import Blocks
from kvstore.policy.history import PAST

_EDGES_S = [0.0, *(2 ** (i / 2) for i in range(-2, 36))]
"""Ages fall into half octaves from 0.5 s to two days."""
BINS = len(_EDGES_S)
_WIDTHS_S = np.diff([*_EDGES_S, _EDGES_S[-1] * 2**0.5])

_TURN_BUCKETS = 7
_LENGTH_BUCKETS = 5
_RETURN_BUCKETS = 8
_LENGTH_UNIT_TOKENS = 4096
_SHARED = len(Reuse) * _RETURN_BUCKETS * _TURN_BUCKETS * _LENGTH_BUCKETS
"""Classes from here on are of blocks that several sessions used."""
_SESSION_BUCKETS = 8
_USE_BUCKETS = 17
CLASSES = _SHARED + _USE_BUCKETS * _SESSION_BUCKETS
SHARED_SESSIONS = 3

_SAME_HINT = _TURN_BUCKETS * _LENGTH_BUCKETS
"""So many classes, one after the other, have the same hint."""
_GROUPS = _SHARED // _SAME_HINT + 1
"""One for each hint, and one for what is shared."""
_GROUP_PRIOR = 100
"""So many blocks that behave as all do are mixed into those with the same hint."""
_CLASS_PRIOR = 300
"""So many that behave like those with the same hint are mixed into each class."""
_FIRST_REFIT = 50
_REFIT_SHARE = 20
_WINDOW = 20_000
"""Requests after which the past begins to fade."""
_KEEP = 0.95
"""What is left of the past after each refit from then on."""
_FADINGS = 200
_LEAST_S = 1e-300
_SAMPLE = 1 << 15
"""Of more blocks than this a sample is counted, so that a refit takes milliseconds."""

Floats = NDArray[np.float64]
_PAST_TYPE = np.dtype(
    {
        "names": ["last", "used_s", "class"],
        "formats": ["<i8", "<f4", "<u2"],
        "offsets": [0, 8, 20],
        "itemsize": PAST.size,
    }
)


def age_bin(age_s: float) -> int:
    """In which half octave an age lies."""
    return bisect_right(_EDGES_S, age_s) - 1


def age_bins(ages_s: Floats) -> NDArray[np.int64]:
    """The same for many."""
    return np.searchsorted(_EDGES_S, ages_s, side="right") - 1


def class_of_request(hint: ReuseHint | None, turn: int, tokens: int) -> int:
    """The class of a request's own blocks: what was said of it, its turn, its length."""
    reuse, back = 0, 0
    if hint is not None:
        reuse = hint.reuse.value
        if hint.expected_return_ms:
            # Factors of four from a second to an hour.
            back = min(7, 1 + (max(0, hint.expected_return_ms // 1000).bit_length() + 1) // 2)
    turns = min(turn, 4) - 1 if turn < 5 else 4 if turn < 9 else 5 if turn < 17 else 6
    length = min(4, (1 + tokens // _LENGTH_UNIT_TOKENS).bit_length() - 1)
    return ((reuse * _RETURN_BUCKETS + back) * _TURN_BUCKETS + turns) * _LENGTH_BUCKETS + length


def class_of_shared(uses: int, sessions: int) -> int:
    """The class of a block that several sessions used."""
    return _SHARED + uses.bit_length() * _SESSION_BUCKETS + min(sessions.bit_length(), 8) - 1


def classes_of_shared(uses: NDArray[np.int64], sessions: NDArray[np.int64]) -> NDArray[np.int64]:
    """The same for many."""
    use_bits, session_bits = (np.frexp(counts.astype(np.float64))[1] for counts in (uses, sessions))
    return _SHARED + use_bits * _SESSION_BUCKETS + np.minimum(session_bits, 8) - 1


class Evidence:
    """What was seen of each class, and what follows from it: `values`."""

    def __init__(self, blocks: Blocks[Any]) -> None:
        self._blocks = blocks
        self.events = array("d", bytes(8 * CLASSES * BINS))
        """By class × BINS + age bin: blocks that came back."""
        self._lost = array("d", bytes(8 * CLASSES * BINS))
        """The same for those that were forgotten before they came back."""
        # Nothing is known at first: older is worth less.
        unknown = [1 / (edge_s + 1) for edge_s in _EDGES_S]
        self.values: list[list[float]] = [unknown] * CLASSES
        """For each class, what a block is worth in each age bin; comparable between classes."""
        self._requests = 0
        self._refit_at = _FIRST_REFIT
        # When the past faded, and how much of what was before is left: by refit.
        self._faded_s: list[float] = []

    def count_request(self, now_s: float) -> None:
        """To be called for each request; refits when 5 % more have come."""
        self._requests += 1
        if self._requests >= self._refit_at:
            step = max(_FIRST_REFIT, min(self._requests, _WINDOW) // _REFIT_SHARE)
            self._refit_at = self._requests + step
            self._refit(now_s)

    def _refit(self, now_s: float) -> None:
        self._count_forgotten(now_s)
        if self._requests > _WINDOW:
            self._fade(now_s)
        events = np.frombuffer(self.events).reshape(CLASSES, BINS)
        absent = np.frombuffer(self._lost).reshape(CLASSES, BINS) + self._outstanding(now_s)
        (seen,) = np.nonzero((events + absent).sum(axis=1))
        if len(seen):
            self.values = _values(events[seen], absent[seen], seen)

    def _count_forgotten(self, now_s: float) -> None:
        """Whom the history gave up did not come back by the age that he has now."""
        rows = np.frombuffer(b"".join(self._blocks.forgotten), dtype=_PAST_TYPE)
        self._blocks.forgotten.clear()
        lost = np.frombuffer(self._lost)
        self._tally(lost, rows["used_s"], rows["class"], now_s, 1)

    def _fade(self, now_s: float) -> None:
        for column in (self.events, self._lost):
            view = np.frombuffer(column)
            view *= _KEEP
        self._faded_s.append(now_s)
        del self._faded_s[:-_FADINGS]

    def _outstanding(self, now_s: float) -> Floats:
        """How many known blocks wait in each class and age bin; the older, the less they count."""
        counts = np.zeros(CLASSES * BINS)
        blocks = self._blocks
        step = max(1, len(blocks.uses) // _SAMPLE)
        uses = np.frombuffer(blocks.uses, dtype=np.uint16)[::step]
        used_s = np.frombuffer(blocks.used_s)[::step]
        kinds = np.frombuffer(blocks.classes, dtype=np.uint16)[::step]
        known = uses > 0
        self._tally(counts, used_s[known], kinds[known], now_s, step)
        if blocks.history is not None:
            rows = np.frombuffer(blocks.history.rows, dtype=_PAST_TYPE)
            step = max(1, len(rows) // _SAMPLE)
            sample = rows[::step]
            sample = sample[sample["last"] > 0]
            self._tally(counts, sample["used_s"], sample["class"], now_s, step)
        return counts.reshape(CLASSES, BINS)

    def _tally(
        self, counts: Floats, used_s: Floats, kinds: NDArray[Any], now_s: float, weight: float
    ) -> None:
        bins = np.searchsorted(_EDGES_S, now_s - used_s, side="right") - 1
        fadings = len(self._faded_s) - np.searchsorted(self._faded_s, used_s)
        cells = kinds.astype(np.int64) * BINS + np.maximum(bins, 0)
        counts += np.bincount(cells, weight * _KEEP**fadings, len(counts))


def _values(events: Floats, absent: Floats, kinds: NDArray[Any]) -> list[list[float]]:
    """What keeping is worth, by class and age bin, from what was seen of some classes.

    A class with few blocks behaves like those with the same hint, and these like all.
    """
    gone = events + absent
    at_risk = np.cumsum(gone[:, ::-1], axis=1)[:, ::-1] - gone + events + 0.5 * absent
    overall = (events.sum(axis=0) + 0.01) / (at_risk.sum(axis=0) + 1)
    groups = np.minimum(kinds, _SHARED) // _SAME_HINT
    group_events, group_at_risk = np.zeros((_GROUPS, BINS)), np.zeros((_GROUPS, BINS))
    np.add.at(group_events, groups, events)
    np.add.at(group_at_risk, groups, at_risk)
    by_group = (group_events + _GROUP_PRIOR * overall) / (group_at_risk + _GROUP_PRIOR)
    by_class = (events + _CLASS_PRIOR * by_group[groups]) / (at_risk + _CLASS_PRIOR)
    group_rows = _density(by_group).tolist()
    rows = [group_rows[min(kind, _SHARED) // _SAME_HINT] for kind in range(CLASSES)]
    for kind, row in zip(kinds.tolist(), _density(by_class).tolist(), strict=True):
        rows[kind] = row
    return rows


def _density(rates: Floats) -> Floats:
    """The most expected hits per second of keeping, over all horizons, from each age bin on.

    Of blocks that get as far as bin s, hits up to the end of bin e are Σ alive × rate over the
    bins from s to e, divided by those alive at s; seconds likewise, so that `alive` at s cancels.
    """
    alive = np.cumprod(np.hstack([np.ones((len(rates), 1)), 1 - rates[:, :-1]]), axis=1)
    # Sums from a bin to the end: towards the end they are small, and so are their errors.
    hits = _sums_to_the_end(alive * rates)
    spent_s = _sums_to_the_end(alive * _WIDTHS_S * (1 - rates / 2))
    best = np.empty_like(rates)
    for start in range(BINS):
        gained = hits[:, start : start + 1] - hits[:, start + 1 :]
        taken_s = spent_s[:, start : start + 1] - spent_s[:, start + 1 :]
        best[:, start] = (gained / np.maximum(taken_s, _LEAST_S)).max(axis=1)
    return best


def _sums_to_the_end(values: Floats) -> Floats:
    """For each column the sum of it and all after it, and a last one of 0."""
    sums = np.cumsum(values[:, ::-1], axis=1)[:, ::-1]
    return np.hstack([sums, np.zeros((len(values), 1))])


def values_at(values: Sequence[Sequence[float]], kind: int, age_s: float) -> float:
    """What a block of a class is worth at an age."""
    return values[kind][bisect_right(_EDGES_S, age_s) - 1]
