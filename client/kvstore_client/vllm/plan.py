"""Which blocks of a request are loaded and saved, and from where. Plain functions."""

from collections.abc import Iterable, Sequence

from kvstore.api.space import MatchRule
from kvstore_client.match import Match
from kvstore_client.vllm.keys import Chain
from kvstore_client.vllm.layout import Group, Layout
from kvstore_client.vllm.metadata import Pages, Run

Tables = Sequence[Sequence[int]]
"""A request's block table in each of vLLM's groups."""
Offer = tuple[int, int, int]
"""vLLM's group, a page, and the number of tokens after which it holds the state."""


def runs_to_load(
    layout: Layout, chain: Chain, tables: Tables, held: int, total: int
) -> tuple[Run, ...]:
    """What has to be in the KV cache for a hit of `total` blocks, of which `held` are there.

    Pages that the engine has not allocated lie before the window of that hit.
    """
    runs = []
    for place, group in enumerate(layout.groups):
        first = max(held, _first_needed(group, total))
        blocks = [group.block_pages(tables[group.group_id], index) for index in range(first, total)]
        while blocks and not any(blocks[0]):
            del blocks[0]
            first += 1
        if blocks:
            runs.append(Run(place, tuple(chain.keys[first:total]), tuple(blocks)))
    return tuple(runs)


def runs_to_save(layout: Layout, chain: Chain, tables: Tables, first: int, end: int) -> list[Run]:
    """The blocks `first` … `end` that are whole, but for states that the engine offers."""
    runs = []
    for place, group in enumerate(layout.groups):
        if group.offered:
            continue
        table = tables[group.group_id]
        blocks = [(index, group.block_pages(table, index)) for index in range(first, end)]
        runs += _whole_runs(place, group, chain, blocks)
    return runs


def runs_offered(layout: Layout, chain: Chain, offers: Iterable[Offer]) -> list[Run]:
    """The states that the engine offers, those that end with a block."""
    places = {group.group_id: place for place, group in enumerate(layout.groups) if group.offered}
    runs = []
    for group_id, page, tokens in offers:
        index = tokens // layout.unit_tokens - 1
        place = places.get(group_id)
        if place is None or not page or tokens % layout.unit_tokens or index >= len(chain.keys):
            continue
        runs.append(Run(place, (chain.keys[index],), ((page,),), chain.before(index)))
    return runs


def tiers_of(match: Match, held: int, total: int) -> list[str]:
    """For each block from `held` on the farthest tier that any space's part of it lay in.

    Empty where no space needs the block.
    """
    tiers = [""] * total
    for runs in match.spaces:
        index = 0
        for run in runs:
            for block in range(index, min(index + run.blocks, total)):
                tiers[block] = max(tiers[block], run.tier, key=_farness)
            index += run.blocks
    return tiers[held:]


_NEAREST_FIRST = ("", "memory", "peer", "disk")


def _farness(tier: str) -> int:
    return _NEAREST_FIRST.index(tier) if tier in _NEAREST_FIRST else len(_NEAREST_FIRST)


def _first_needed(group: Group, total: int) -> int:
    if group.rule is MatchRule.TRAILING:
        return max(0, total - group.trailing_blocks)
    return total - 1 if group.rule is MatchRule.BOUNDARY else 0


def _whole_runs(
    place: int, group: Group, chain: Chain, blocks: Sequence[tuple[int, Pages]]
) -> list[Run]:
    """Consecutive blocks that are whole; behind a hole only where blocks stand for themselves."""
    runs: list[Run] = []
    start = 0
    while start < len(blocks):
        end = start
        while end < len(blocks) and group.complete(blocks[end][1]):
            end += 1
        if end > start:
            first, last = blocks[start][0], blocks[end - 1][0] + 1
            pages = tuple(each for _, each in blocks[start:end])
            runs.append(Run(place, tuple(chain.keys[first:last]), pages, chain.before(first)))
        if group.rule is MatchRule.ALL and end < len(blocks):
            break
        start = end + 1
    return runs
