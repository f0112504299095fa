"""What the node has of the chunks that a request could use: asked in few calls, and leased."""

import logging
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
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
        self._groups = {group.index: group for group in groups}
        self._options = options

    def ask(self, request: Request, keys: Collection[bytes]) -> Found:
        """Where the keys of one request lie. Whatever goes wrong, they lie nowhere."""
        found = Found(dict.fromkeys(keys, ""))
        try:
            content = request.content()
        except ValueError as error:
            _log.warning("neither stored nor restored: %s", error)
            return found
        families: dict[int, dict[Group, list[bytes]]] = defaultdict(lambda: defaultdict(list))
        for key in keys:
            group = self._groups.get(index_of(key))
            if group is not None:
                families[group.chunk_tokens][group].append(key)
        for asked in families.values():
            self._ask_family(request, content, asked, found)
        return found

    def _ask_family(
        self,
        request: Request,
        content: bytes,
        asked: Mapping[Group, Sequence[bytes]],
        found: Found,
    ) -> None:
        """Groups of equal chunks, whose prompts have one chain of hashes."""
        whole: dict[Group, dict[bytes, int]] = {}
        for group, keys in asked.items():
            chain_of = {key: at for at, key in enumerate(request.chain(group))}
            whole[group] = {key: chain_of[key] for key in keys if key in chain_of}
        places = self._match(request, content, {g: at for g, at in whole.items() if at}, found)
        for group, keys in asked.items():
            loose = [key for key in keys if not group.needs_parents or key not in whole[group]]
            found.places.update(self._locate(request, content, group, loose))
            if group.needs_parents:
                found.places.update(
                    (key, places[group][at])
                    for key, at in whole[group].items()
                    if at < len(places[group])
                )

    def _match(
        self,
        request: Request,
        content: bytes,
        whole: Mapping[Group, Mapping[bytes, int]],
        found: Found,
    ) -> dict[Group, list[str]]:
        """For each group the tiers of the blocks that a match found, from the chain's start."""
        if not whole:
            return {}
        groups = list(whole)
        longest = max(groups, key=lambda group: max(whole[group].values()))
        count = min(max(whole[longest].values()) + 1, MAX_KEYS // len(groups))
        keys = [request.name(key, content) for key in request.chain(longest)[:count]]
        # What vLLM does not ask for of the chain's start it has itself.
        starts = [min(at.values()) for group, at in whole.items() if group.needs_parents]
        match = self._client.match(
            [group.space for group in groups],
            keys,
            scopes=self._options.scopes,
            lease_ms=self._options.lease_ms,
            held_blocks=min(min(starts, default=0), count),
        )
        if match.lease_id:
            found.leases.update((group.index, match) for group in groups)
        if not match.spaces:
            return {group: [] for group in groups}
        return {
            group: list(chain.from_iterable(repeat(run.tier, run.blocks) for run in runs))
            for group, runs in zip(groups, match.spaces, strict=True)
        }

    def _locate(
        self, request: Request, content: bytes, group: Group, keys: Sequence[bytes]
    ) -> dict[bytes, str]:
        if not keys:
            return {}
        try:
            tiers = self._client.locate(
                group.space,
                [request.name(key, content) for key in keys[:MAX_KEYS]],
                scope=self._options.scope,
                budget_s=self._options.match_budget_s,
            )
        except KvstoreError as error:
            self._client.counters["locate_failed"] += 1
            _log.debug("locate: %s", error)
            return {}
        return {key: tier or "" for key, tier in zip(keys, tiers, strict=False)}
