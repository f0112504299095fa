"""All blocks that can exist in a run, and what each of them contains: that follows from its name.

Tenants use the same prompts, scopes and spaces, so that a mix-up of any of these shows as a wrong
byte. A block may have been computed in two ways that round differently: two variants are right.
"""

from functools import cache
from typing import NamedTuple

from kvstore.api.digest import block_digest
from kvstore.api.keys import chain_keys, root_key
from kvstore.api.space import MatchRule, SpaceDescriptor
from kvstore.api.tier import BlockRef
from kvstore.names import block_name, namespace
from tests.sim.blocks import data_of, namespace_of

SECRET = bytes(range(32))
TENANTS = ("ann", "bob")
SCOPES = ("", "shared")
VARIANTS = 2


class Name(NamedTuple):
    """What tells one block from every other."""

    tenant: str
    scope: str
    space: int
    key: bytes


def _space(block_bytes: int, group: str, rule: MatchRule, trailing: int = 0) -> SpaceDescriptor:
    return SpaceDescriptor(
        model="tiny", revision="1", dtype="bfloat16", layout="LKHD", block_tokens=1,
        block_bytes=block_bytes, layer_group=group, match_rule=rule, trailing_blocks=trailing,
    )  # fmt: skip


SPACES = (
    _space(900, "full", MatchRule.ALL),
    _space(5000, "window", MatchRule.TRAILING, 2),
    _space(8192, "state", MatchRule.BOUNDARY),
)
SPACE_IDS = tuple(space.space_id for space in SPACES)


def _prompts() -> list[list[bytes]]:
    """Chains of keys that branch: common beginnings of several lengths, then tails of their own."""
    return [
        chain_keys(root_key(word.encode()), [*range(trunk), *range(100 * tail, 100 * tail + 7)], 1)
        for word in ("a", "b", "c")
        for tail, trunk in enumerate((5, 5, 3, 1), start=1)
    ]


PROMPTS = _prompts()
LAST_PROMPT = chain_keys(root_key(b"last"), range(24), 1)
"""Nobody asks for it before the end of a run."""
PARENTS: dict[bytes, bytes | None] = {
    key: above
    for keys in [*PROMPTS, LAST_PROMPT]
    for key, above in zip(keys, [None, *keys], strict=False)
}
KEYS = tuple(PARENTS)


@cache
def needs(space: int, key: bytes) -> frozenset[bytes]:
    """The keys without which a block is useless: its own and, in some spaces, those above."""
    above = PARENTS[key] if SPACES[space].needs_parents else None
    return frozenset([key]) | (needs(space, above) if above is not None else frozenset())


@cache
def ref_of(name: Name) -> BlockRef:
    """What a node calls the block."""
    return BlockRef(namespace(SECRET, name.tenant, name.scope, SPACE_IDS[name.space]), name.key)


@cache
def stored_name(name: Name) -> bytes:
    """What the block is called outside of memory."""
    return block_name(ref_of(name))


@cache
def names_by_ref() -> dict[BlockRef, Name]:
    """Every block there can be."""
    return {
        ref_of(name): name
        for tenant in TENANTS
        for scope in SCOPES
        for space in range(len(SPACES))
        for key in KEYS
        if (name := Name(tenant, scope, space, key))
    }


@cache
def names_by_stored_name() -> dict[bytes, Name]:
    """The same, by what they are called outside of memory."""
    return {stored_name(name): name for name in names_by_ref().values()}


@cache
def content(name: Name, variant: int) -> bytes:
    """The bytes of a block."""
    owner = namespace_of(f"{name.tenant} {name.scope} {name.space}")
    return data_of(BlockRef(owner, name.key), SPACES[name.space].block_bytes, variant)


@cache
def digest(name: Name, variant: int) -> bytes:
    """The digest that the writer of that variant computes."""
    return block_digest(SPACE_IDS[name.space], name.key, content(name, variant))


def variant_of(name: Name, data: bytes | memoryview) -> int | None:
    """Which variant these bytes are; None: they are none of this block."""
    data = bytes(data)  # Views are compared byte by byte, which takes long.
    for variant in range(VARIANTS):
        if data == content(name, variant):
            return variant
    return None


def short(name: Name) -> str:
    """The name as the log shows it."""
    return f"{name.tenant}/{name.scope}/{name.space}/{name.key[:3].hex()}"
