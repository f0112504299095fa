"""What the tier knows of one request while it lives."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from kvstore_client.engine.adopted import adopted_key
from kvstore_client.match import Match
from kvstore_client.vllm_tier.groups import Group, digest_of, index_of


@dataclass(slots=True, eq=False)
class Request:
    """Made and changed by the scheduler's thread, but for `names`; others read it."""

    positions: Mapping[bytes, int]
    """For each key of the request the token at which its chunk ends. vLLM adds to it."""
    content: Callable[[], bytes] = bytes
    """What completes the names of its blocks. It may take a while, and raises ValueError where
    that cannot be told."""
    places: dict[bytes, str | None] = field(default_factory=dict)
    """The verdict on each key that was asked for: the tier of the node in which it lay, empty if
    nowhere, None as long as nobody has said."""
    wanted: list[bytes] = field(default_factory=list)
    """Keys without a verdict that the node was not asked about yet."""
    leases: dict[int, Match] = field(default_factory=dict)
    """By group, what promises that its blocks stay readable until they are loaded."""
    superseded: list[Match] = field(default_factory=list)
    """Earlier leases, on which loads that are under way may still rely."""
    loads: int = 0
    """How many of its loads are under way."""
    over: bool = False
    names: dict[bytes, bytes] = field(default_factory=dict)
    """Our keys by vLLM's hashes, so that each is made once."""

    def name(self, key: bytes, content: bytes) -> bytes:
        """Our key of a chunk."""
        digest = digest_of(key)
        name = self.names.get(digest)
        if name is None:
            name = self.names[digest] = adopted_key(digest, content)
        return name

    def chain(self, group: Group) -> list[bytes]:
        """vLLM's keys of the whole chunks of a group, from the first one as far as known."""
        ends = self.ends(group)
        chain: list[bytes] = []
        while (key := ends.get((len(chain) + 1) * group.chunk_tokens)) is not None:
            chain.append(key)
        return chain

    def ends(self, group: Group) -> dict[int, bytes]:
        """The keys of a group by the tokens at which they end."""
        # Copied in one step: vLLM's thread adds to it.
        positions = dict(self.positions)
        return {end: key for key, end in positions.items() if index_of(key) == group.index}
