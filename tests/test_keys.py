"""Names: chained keys, spaces, namespaces; against an independent few lines and fixed values."""

import hashlib
import hmac
import random
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import pytest

from kvstore.api.digest import DIGEST_BYTES, block_digest
from kvstore.api.errors import InvalidArgument
from kvstore.api.keys import MAX_TOKEN, chain_keys, root_key
from kvstore.api.space import MAX_BLOCK_BYTES, MatchRule, SpaceDescriptor
from kvstore.api.tier import BlockRef
from kvstore.names import block_name, namespace, namespace_tag
from tests.sim.nodes import descriptor_of


def lengthed(part: bytes) -> bytes:
    """A part with its length before it."""
    return len(part).to_bytes(8, "little") + part


def root_by_hand(salt: bytes, content: bytes) -> bytes:
    return hashlib.sha256(b"kvstore root 1" + lengthed(salt) + lengthed(content)).digest()


def chain_by_hand(root: bytes, tokens: Sequence[int], step: int) -> list[bytes]:
    keys = [root]
    for start in range(0, len(tokens) - step + 1, step):
        block = b"".join(token.to_bytes(4, "little") for token in tokens[start : start + step])
        keys.append(hashlib.sha256(keys[-1] + block).digest())
    return keys[1:]


def space_by_hand(descriptor: SpaceDescriptor) -> bytes:
    values = {field.name: getattr(descriptor, field.name) for field in fields(descriptor)}
    values["match_rule"] = descriptor.match_rule.value
    text = b"".join(
        lengthed(name.encode()) + lengthed(str(values[name]).encode()) for name in sorted(values)
    )
    return hashlib.sha256(b"kvstore space 1" + text).digest()


# Keys.


def test_roots_are_the_documented_ones() -> None:
    """The root of a chain is keyed by salt and content, each with its length."""
    assert root_key() == root_by_hand(b"", b"")
    assert root_key(b"salt", b"content") == root_by_hand(b"salt", b"content")
    assert root_key().hex() == "ca9c1443a55d0b5033fab4ebfa2e86999e71b6a9df4606084e4942be5d051f9b"
    parts = [(b"", b""), (b"a", b""), (b"", b"a"), (b"ab", b"c"), (b"a", b"bc"), (b"abc", b"")]
    assert len({root_key(*part) for part in parts}) == len(parts)


def test_keys_are_the_documented_ones(rng: random.Random) -> None:
    """SHA-256 of the parent's key and the block's tokens, for any tokens and block size."""
    golden = chain_keys(root_key(b"salt", b"content"), range(10), 4)
    assert [key.hex() for key in golden] == [
        "c0830c57de45264e161a913bd67c9501146618986e212757f1eb43283e71ea03",
        "3d94a0c66cce110c2c3552301a43b7598bfb66cc1dd6b49fd22c34765051b11e",
    ]
    for _ in range(200):
        tokens = [
            rng.choice([0, 1, 255, 2**31, MAX_TOKEN, rng.randrange(2**32)])
            for _ in range(rng.randrange(70))
        ]
        step = rng.randint(1, 20)
        root = rng.randbytes(32)
        assert chain_keys(root, tokens, step) == chain_by_hand(root, tokens, step)


def test_a_key_names_its_whole_prefix(rng: random.Random) -> None:
    """A changed token changes its block's key and all later ones, and none before."""
    tokens = [rng.randrange(2**32) for _ in range(60)]
    keys = chain_keys(root_key(), tokens, 6)
    assert chain_keys(root_key(), [*tokens, 1, 2, 3], 6) == keys, "a partial tail has no key"
    assert chain_keys(root_key(), tokens[:30], 6) == keys[:5]
    for place in range(60):
        changed = list(tokens)
        changed[place] ^= 1 << rng.randrange(32)
        others = chain_keys(root_key(), changed, 6)
        same = [one == two for one, two in zip(keys, others, strict=True)]
        assert same == [block < place // 6 for block in range(10)]
    assert not set(keys) & set(chain_keys(root_key(b"another"), tokens, 6))
    assert not set(keys) & set(chain_keys(root_key(), tokens, 12))


@pytest.mark.parametrize("tokens", [[-1], [2**32], [1, 2, 2**40]])
def test_a_token_out_of_range_is_refused(tokens: list[int]) -> None:
    """Four bytes hold it, or it has no key."""
    with pytest.raises(ValueError, match="tokens: each must lie in 0 … 4294967295"):
        chain_keys(root_key(), tokens, 1)


def test_a_wrong_root_or_block_size_is_refused() -> None:
    """A root is a key, and a block has a token."""
    with pytest.raises(ValueError, match="root: a key has 32 bytes, got 31"):
        chain_keys(bytes(31), [1], 1)
    with pytest.raises(ValueError, match="block_tokens: must be 1 or more, got 0"):
        chain_keys(root_key(), [1], 0)


# Spaces.

CHANGES: dict[str, Any] = {
    "model": "other",
    "revision": "2",
    "dtype": "float16",
    "layout": "KHLD",
    "block_tokens": 2,
    "block_bytes": 6001,
    "format_version": 2,
    "layer_group": "1",
    "tp_rank": 1,
    "tp_size": 5,
    "rope_scaling": "yarn",
    "quantization": "fp8",
    "numerics": "cut 512",
    "match_rule": MatchRule.BOUNDARY,
    "trailing_blocks": 7,
}


def base() -> SpaceDescriptor:
    """A space in which every single field may change."""
    return descriptor_of(tp_size=4, match_rule=MatchRule.TRAILING, trailing_blocks=3)


def test_a_space_is_the_documented_digest() -> None:
    """SHA-256 over label and every field by name, each with its length."""
    assert base().space_id == space_by_hand(base())
    assert (
        descriptor_of().space_id.hex()
        == "244857c4841c09e84c853970521c42b1c8f83dd3faf74f5cac560de3e52b1bcc"
    )


def test_one_changed_field_is_another_space() -> None:
    """Every field of the descriptor counts, and equal ones are the same space."""
    assert set(CHANGES) == {field.name for field in fields(SpaceDescriptor)}
    ids = {base().space_id}
    for name, value in CHANGES.items():
        changes = {name: value}
        if name == "match_rule":
            changes["trailing_blocks"] = 0
        changed = replace(base(), **changes)
        assert changed.space_id == space_by_hand(changed)
        assert changed.space_id not in ids, name
        ids.add(changed.space_id)
    assert descriptor_of().space_id == descriptor_of().space_id


def test_text_does_not_run_from_field_to_field() -> None:
    """What moves from one field to the next, or looks like another type, is another space."""
    pairs = [("a", "bc"), ("ab", "c"), ("abc", "1"), ("a", "b\0c"), ("1", "abc")]
    ids = {descriptor_of(model=model, revision=revision).space_id for model, revision in pairs}
    assert len(ids) == len(pairs)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", ""), ("model", "m" * 257), ("revision", ""), ("revision", "r" * 257),
        ("dtype", ""), ("dtype", "d" * 33), ("layout", ""), ("layout", "l" * 257),
        ("layer_group", "g" * 257), ("rope_scaling", "r" * 1025), ("quantization", "q" * 257),
        ("numerics", "n" * 257), ("format_version", 0), ("format_version", 2**16 + 1),
        ("block_tokens", 0), ("block_tokens", 2**16 + 1), ("block_bytes", 0), ("block_bytes", -1),
        ("block_bytes", MAX_BLOCK_BYTES + 1), ("tp_size", 0), ("tp_rank", 1), ("tp_rank", -1),
        ("trailing_blocks", 1), ("trailing_blocks", -1),
    ],
)  # fmt: skip
def test_a_field_out_of_range_is_named(field: str, value: Any) -> None:
    """The message says which one, and what is allowed."""
    with pytest.raises(InvalidArgument, match=rf"^descriptor\.{field}: must lie in .* got "):
        descriptor_of(**{field: value})


def test_a_window_needs_its_length() -> None:
    """The rule `trailing` without blocks, or with too many, is a mistake."""
    for blocks in (0, 2**16 + 1):
        with pytest.raises(InvalidArgument, match=r"descriptor\.trailing_blocks"):
            descriptor_of(match_rule=MatchRule.TRAILING, trailing_blocks=blocks)


# Namespaces and names.


def test_names_are_the_documented_ones() -> None:
    """HMAC over tenant, scope and space; HMAC under the namespace; and a tag of it."""
    secret, space_id, key = bytes(range(32)), b"s" * 32, b"k" * 32
    message = b"kvstore namespace 1" + lengthed(b"acme") + lengthed(b"team") + lengthed(space_id)
    owned = hmac.new(secret, message, hashlib.sha256).digest()
    assert namespace(secret, "acme", "team", space_id) == owned
    ref = BlockRef(owned, key)
    assert block_name(ref) == hmac.new(owned, key, hashlib.sha256).digest()
    tag = hmac.new(owned, b"kvstore tag 1", hashlib.sha256).digest()[:16]
    assert namespace_tag(owned) == tag
    names = [owned.hex(), block_name(ref).hex(), namespace_tag(owned).hex()]
    assert names == [
        "6b1eec245886f6a2b0994cd27d08ca571b0ee891c0bc050cae3203b304261d0f",
        "5aedc5400e6699d7c402fc6e7c4c041aa2f611e7ef4c4a6c235622a8743c7f27",
        "b5c04e1e68ec13ed91e8393ce1212907",
    ]


def test_each_part_of_a_namespace_counts() -> None:
    """Another secret, tenant, scope or space is another namespace; parts do not run together."""
    parts = [
        (bytes(32), "acme", "", b"s" * 32), (b"\1" * 32, "acme", "", b"s" * 32),
        (bytes(32), "acm", "e", b"s" * 32), (bytes(32), "acme", "e", b"s" * 32),
        (bytes(32), "", "acme", b"s" * 32), (bytes(32), "acme", "", b"t" * 32),
        (bytes(32), "acmes", "", b"s" * 31),
    ]  # fmt: skip
    owned = {namespace(*part) for part in parts}
    assert len(owned) == len(parts)
    assert len({namespace_tag(each) for each in owned}) == len(parts)
    assert len({block_name(BlockRef(each, b"k" * 32)) for each in owned}) == len(parts)


# Digests.


def test_a_digest_binds_space_key_length_and_bytes(rng: random.Random) -> None:
    """Any flipped bit of any of them is another digest; so is a byte more or less."""
    space_id, key, data = rng.randbytes(32), rng.randbytes(32), rng.randbytes(500)
    digest = block_digest(space_id, key, data)
    assert len(digest) == DIGEST_BYTES
    assert digest == block_digest(space_id, key, memoryview(bytearray(data)))
    seen = {digest}
    for part in range(3):
        for bit in range(8 * (32, 32, 500)[part]):
            parts = [bytearray(space_id), bytearray(key), bytearray(data)]
            parts[part][bit // 8] ^= 1 << bit % 8
            seen.add(block_digest(bytes(parts[0]), bytes(parts[1]), bytes(parts[2])))
    seen |= {block_digest(space_id, key, data[:-1]), block_digest(space_id, key, data + b"\0")}
    assert len(seen) == 1 + 8 * (32 + 32 + 500) + 2
    assert block_digest(b"s" * 32, b"k" * 32, b"data").hex() == "1049c489ab474d5ce1d40df3ec0c6317"
