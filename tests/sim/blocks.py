"""Blocks whose bytes follow from their names, so that any byte can be judged anywhere."""

import hashlib
from functools import lru_cache

from kvstore.api.digest import block_digest
from kvstore.api.keys import chain_keys, root_key
from kvstore.api.tier import Block, BlockRef, Load, Loaded, Tier

_NARROW = bytes(0x3C | byte & 3 for byte in range(256))


def namespace_of(word: str) -> bytes:
    """A namespace of its own for each word."""
    return hashlib.sha256(b"namespace " + word.encode()).digest()


def data_of(ref: BlockRef, size: int, variant: int = 0) -> bytes:
    """What the block contains: every other byte random, as in bf16, so that codecs gain."""
    name = ref.namespace + ref.key + variant.to_bytes(4, "little")
    data = bytearray(hashlib.shake_128(name).digest(size))
    data[::2] = data[::2].translate(_NARROW)
    return bytes(data)


def block_of(ref: BlockRef, parent: BlockRef | None, size: int, variant: int = 0) -> Block:
    """The block of this name. Its digest is bound to the namespace, as if that were the space."""
    data = data_of(ref, size, variant)
    return Block(ref, parent, block_digest(ref.namespace, ref.key, data), memoryview(data))


def keys_of(word: str, count: int) -> list[bytes]:
    """A chain of keys of its own for each word."""
    return chain_keys(root_key(word.encode()), range(count), 1)


def chain_of(word: str, count: int, namespace: bytes, size: int) -> list[Block]:
    """A chain of blocks of its own for each word, parents first."""
    return list(_chain_of(word, count, namespace, size))


@lru_cache(maxsize=256)
def _chain_of(word: str, count: int, namespace: bytes, size: int) -> tuple[Block, ...]:
    refs = [BlockRef(namespace, key) for key in keys_of(word, count)]
    parents = [None, *refs]
    return tuple(block_of(ref, above, size) for ref, above in zip(refs, parents, strict=False))


def buffers_for(blocks: list[Block]) -> list[Load]:
    """A wish for each block, with a buffer whose content is none of any block."""
    return [Load(block.ref, memoryview(bytearray(b"\xee" * len(block.data)))) for block in blocks]


async def load_all(tier: Tier, blocks: list[Block]) -> list[Loaded | None]:
    """Loads blocks and checks every byte and digest that comes back against what was stored."""
    loads = buffers_for(blocks)
    answers = await tier.load(loads)
    assert len(answers) == len(blocks)
    for block, load, loaded in zip(blocks, loads, answers, strict=True):
        if loaded is not None:
            assert load.into == block.data, "a wrong byte"
            assert loaded.digest == block.digest, "a wrong digest"
    return answers


async def present(tier: Tier, blocks: list[Block]) -> list[bool]:
    """Which blocks the tier delivers, intact."""
    return [answer is not None for answer in await load_all(tier, blocks)]
