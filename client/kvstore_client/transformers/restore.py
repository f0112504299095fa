"""Brings what is stored of some prompts into a cache."""

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field

import torch
from transformers.cache_utils import DynamicCache

from kvstore.api.hint import ReuseHint
from kvstore.api.tier import Loaded
from kvstore_client.client import Client
from kvstore_client.engine.options import EngineOptions
from kvstore_client.match import Match
from kvstore_client.restore_gate import RestoreGate
from kvstore_client.space import Space
from kvstore_client.transformers.groups import Filling, LayerGroup, block_views

STAGING_BYTES = 64 << 20
"""Of host memory, for blocks on their way into the cache."""
MAX_MATCHES = 4
"""Times that a batch is matched again because its rows were found at different lengths."""

_log = logging.getLogger("kvstore.transformers.restore")


@dataclass(frozen=True, slots=True, eq=False)
class Prompts:
    """What a session is about: rows of equal length, and where their blocks belong."""

    spaces: Sequence[Space]
    """One for each group of layers."""
    keys: Sequence[Sequence[bytes]]
    """Of each row the keys of its whole chunks."""
    restorable_blocks: int
    """Leading chunks that may be restored: the last token of a prompt is always computed."""
    hint: ReuseHint | None = None


@dataclass(slots=True)
class Restored:
    """What came of a restore."""

    blocks: int = 0
    """Of each row."""
    tiers: Counter[str] = field(default_factory=Counter)
    """Blocks by the tier that they lay in, of all rows and groups."""


class Restorer:
    """Matches and loads, within the budgets of the options."""

    def __init__(
        self,
        client: Client,
        options: EngineOptions,
        groups: Sequence[LayerGroup],
        gate: RestoreGate | None,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self.counters: Counter[str] = Counter()
        """Tokens: asked, matched, restored, recomputed (sooner than loaded)."""
        self._client = client
        self._options = options
        self._groups = groups
        self._gate = gate
        self._monotonic_s = monotonic_s

    def restore(self, prompts: Prompts, cache: DynamicCache, device: torch.device) -> Restored:
        """Fills an empty cache with what is stored. It stays empty where that is nothing.

        Never raises: a store that is gone, late or broken restores nothing.
        """
        self.counters["asked"] += self._tokens(prompts, prompts.restorable_blocks)
        restored, fillings, empty = Restored(), list[Filling](), deepcopy(cache.layers)
        try:
            self._load(prompts, device, restored, fillings)
            for filling in fillings if restored.blocks else ():
                filling.install(cache, restored.blocks)
        except Exception:  # noqa: BLE001  the store's edge: what is lost is computed
            _log.exception("what was stored of a prompt is lost")
            restored, cache.layers = Restored(), empty  # No layer may be ahead of another.
        self.counters["restored"] += self._tokens(prompts, restored.blocks)
        return restored

    @torch.no_grad()
    def _load(
        self, prompts: Prompts, device: torch.device, restored: Restored, fillings: list[Filling]
    ) -> None:
        matches = self._match(prompts)
        try:
            found = min(match.blocks for match in matches)
            worth = self._worth(matches[0], found)
            self.counters["matched"] += self._tokens(prompts, found)
            self.counters["recomputed"] += self._tokens(prompts, found - worth)
            ends_s = self._monotonic_s() + self._options.load_budget_s
            restored.blocks = worth
            for group, space in zip(self._groups, prompts.spaces, strict=True):
                if restored.blocks:
                    filling = Filling(group, len(matches), restored.blocks, device)
                    fillings.append(filling)
                    self._fill(filling, space, prompts, matches, restored, ends_s)
        finally:
            for match in matches:
                self._client.release(match)

    def _match(self, prompts: Prompts) -> list[Match]:
        """A match of each row, all of which can be restored at the shortest of their lengths."""
        ends_s = self._monotonic_s() + self._options.match_budget_s
        length = prompts.restorable_blocks
        for _ in range(MAX_MATCHES):
            matches = [
                self._client.match(
                    prompts.spaces,
                    keys[:length],
                    scopes=self._options.scopes,
                    lease_ms=self._options.lease_ms,
                    hint=prompts.hint,
                    budget_s=ends_s - self._monotonic_s(),
                )
                for keys in prompts.keys
            ]
            length = min(match.blocks for match in matches)
            if not self._windows or all(match.blocks == length for match in matches):
                return matches
            # What a window needs at one length says nothing of a shorter one.
            for match in matches:
                self._client.release(match)
        return [Match.none() for _ in prompts.keys]

    @property
    def _windows(self) -> bool:
        return any(group.window for group in self._groups)

    def _worth(self, match: Match, found: int) -> int:
        """How many of the blocks that were found are loaded sooner than they are computed."""
        if self._gate is None or not match.spaces or not found:
            return found
        worth = min(self._gate.worth(match.spaces[0]), found)
        return found if worth and self._windows else worth

    def _fill(
        self,
        filling: Filling,
        space: Space,
        prompts: Prompts,
        matches: Sequence[Match],
        restored: Restored,
        ends_s: float,
    ) -> None:
        staging = filling.staging(STAGING_BYTES)
        for row, match in enumerate(matches):
            keys = prompts.keys[row][filling.places.start : filling.places.stop]
            came = 0
            while came < len(keys):
                wanted = keys[came : came + len(staging)]
                loaded = self._load_some(space, wanted, staging, match, ends_s)
                filling.put(row, came, staging[: len(loaded)])
                came += len(loaded)
                restored.tiers.update(each.tier for each in loaded)
                if len(loaded) < len(wanted):
                    break
            if came < len(keys):
                # A window is of use only whole, and layers only together.
                restored.blocks = 0 if self._windows else min(restored.blocks, came)

    def _load_some(
        self,
        space: Space,
        keys: Sequence[bytes],
        staging: torch.Tensor,
        match: Match,
        ends_s: float,
    ) -> list[Loaded]:
        started_s = self._monotonic_s()
        loaded = self._client.load(
            space,
            keys,
            block_views(staging[: len(keys)]),
            scopes=self._options.scopes,
            lease=match,
            budget_s=ends_s - started_s,
        )
        if self._gate is not None and space.block_bytes == self._groups[0].block_bytes:
            self._gate.loaded([each.tier for each in loaded], self._monotonic_s() - started_s)
        return loaded

    def _tokens(self, prompts: Prompts, blocks: int) -> int:
        return blocks * len(prompts.keys) * self._groups[0].chunk_tokens
