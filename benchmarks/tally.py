"""What a proof saw while it did harm: trials, controls, and everything that should not be."""

from collections import Counter
from typing import Any

MOST_EXAMPLES = 20
MOST_OF_ONE_KIND = 4


class Tally:
    """Counts by surface, which is the place where harm was done.

    A trial is one mutation, fault or kill. It is harmless if it ended in the right bytes or in a
    miss. A control was left alone and has to be served.
    """

    def __init__(self) -> None:
        self.trials: Counter[str] = Counter()
        self.kinds: Counter[str] = Counter()
        self.failures: Counter[str] = Counter()
        self.controls: Counter[str] = Counter()
        self.lost_controls: Counter[str] = Counter()
        self.noted: Counter[str] = Counter()
        self.examples: list[str] = []

    def tried(self, surface: str, kind: str) -> None:
        """One more trial of some kind."""
        self.trials[surface] += 1
        self.kinds[f"{surface}: {kind}"] += 1

    def failed(self, surface: str, what: str, example: str) -> None:
        """Something happened that must not; `example` says how to see it again."""
        self.failures[f"{surface}: {what}"] += 1
        if self.failures[f"{surface}: {what}"] <= MOST_OF_ONE_KIND:
            self._show(f"{surface}: {what}: {example}")

    def control(self, surface: str, served: bool, example: str) -> None:
        """What was left alone was served, or was not."""
        self.controls[surface] += 1
        if not served:
            self.lost_controls[surface] += 1
            self._show(f"{surface}: control lost: {example}")

    def note(self, what: str, times: int = 1) -> None:
        """Something happened that may, and is worth counting."""
        self.noted[what] += times

    def details(self) -> dict[str, Any]:
        """For the row's `details`."""
        counted = {
            "by_surface": self.trials,
            "by_kind": self.kinds,
            "failed": self.failures,
            "controls": self.controls,
            "lost_controls": self.lost_controls,
            "noted": self.noted,
        }
        tables = {name: dict(sorted(counts.items())) for name, counts in counted.items() if counts}
        return tables | ({"examples": self.examples} if self.examples else {})

    def _show(self, example: str) -> None:
        if len(self.examples) < MOST_EXAMPLES:
            self.examples.append(example)
