"""What the node has of the chunks that a request could use: asked in few calls, and leased."""

import logging
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import chain, repeat

from kvstore.api.errors import KvstoreError
from kvstore.api.wire import MAX_KEYS
from kvstore_client.client import Client
from kvstore_client.match import Match
from kvstore_client.vllm_tier.groups import Group, index_of
from kvstore_client.vllm_tier.options import TierOptions
from kvstore_client.vllm_tier.requests import Request

_log = logging.getLogger("kvstore.vllm_tier")


@dataclass(slots=True)
class Found:
    """The answer: the tier in which each chunk lies, empty if nowhere, and the leases by group."""

    places: dict[bytes, str]
    leases: dict[int, Match] = field(default_factory=dict)


class Asking:
    """Puts a request's keys to the node.

    The chunks of groups that need their parents are one chain, which one match answers and leases,
    together with what the other groups need at the end of it. A window or a state may also be of
    use elsewhere: vLLM asks for each chunk for itself, and so these groups are asked where they
    have one at all, which promises nothing.
    """

    def __init__(self, client: Client, groups: Sequence[Group], options: TierOptions) -> None:
        self._client = client
        self._groups = groups
        self._options = options

    def ask(self, request: Request, keys: Collection[bytes]) -> Found:
        """Where the keys of one request lie. Whatever goes wrong, they lie nowhere."""
        found = Found(dict.fromkeys(keys, ""))
        try:
            content = request.content()
        except ValueError as error:
            _log.warning("neither stored nor restored: %s", error)
            return found
        families: dict[int, list[_Asked]] = defaultdict(list)
        for group in self._groups:
            mine = [key for key in keys if index_of(key) == group.index]
            if mine:
                families[group.chunk_tokens].append(_Asked(group, request.chain(group), mine))
        for family in families.values():
            self._match(request, content, [asked for asked in family if asked.places], found)
            for asked in family:
                found.places.update(self._locate(request, content, asked))
        return found

    def _match(
        self, request: Request, content: bytes, family: Sequence["_Asked"], found: Found
    ) -> None:
        """Asks for groups of equal chunks in one call: their hashes are the same."""
        if not family:
            return
        longest = max(family, key=lambda asked: asked.last)
        count = min(longest.last + 1, MAX_KEYS // len(family))
        # What vLLM does not ask for of the chain's start it has itself.
        held = min((asked.first for asked in family if asked.group.needs_parents), default=0)
        match = self._client.match(
            [asked.group.space for asked in family],
            [request.name(key, content) for key in longest.chain[:count]],
            scopes=self._options.scopes,
            lease_ms=self._options.lease_ms,
            held_blocks=min(held, count),
        )
        if match.lease_id:
            found.leases.update((asked.group.index, match) for asked in family)
        for asked, runs in zip(family, match.spaces, strict=bool(match.spaces)):
            tiers = list(chain.from_iterable(repeat(run.tier, run.blocks) for run in runs))
            found.places.update(
                (key, tiers[at]) for key, at in asked.places.items() if at < len(tiers)
            )

    def _locate(self, request: Request, content: bytes, asked: "_Asked") -> dict[bytes, str]:
        """Where chunks lie that a match says too little of: each may be of use by itself."""
        keys = asked.loose[:MAX_KEYS]
        if not keys:
            return {}
        try:
            tiers = self._client.locate(
                asked.group.space,
                [request.name(key, content) for key in keys],
                scope=self._options.scope,
                budget_s=self._options.match_budget_s,
            )
        except KvstoreError as error:
            self._client.counters["locate_failed"] += 1
            _log.debug("locate: %s", error)
            return {}
        return {key: tier or "" for key, tier in zip(keys, tiers, strict=True)}


class _Asked:
    """What is asked of one group."""

    def __init__(self, group: Group, keys_of_chain: list[bytes], keys: Sequence[bytes]) -> None:
        self.group = group
        self.chain = keys_of_chain
        place_of = {key: at for at, key in enumerate(keys_of_chain)}
        self.places = {key: place_of[key] for key in keys if key in place_of}
        """Of the keys that are whole chunks of the chain, where in it they stand."""
        self.first = min(self.places.values(), default=0)
        self.last = max(self.places.values(), default=-1)
        self.loose = [key for key in keys if not group.needs_parents or key not in self.places]
        """Those that may be of use without the chunks before them, and partial ones."""
