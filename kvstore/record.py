"""The self-describing record in which blocks leave memory: a 256-byte header, then the payload.

Redis values and disk segments hold the same records. docs/format.md draws the layout. The header
is covered by a digest of its own, and contains the digest of the payload as stored, so that
nothing is decoded, and no length believed, before it was verified.
"""

import struct
from dataclasses import dataclass, replace
from enum import IntEnum

import xxhash

from kvstore.api.errors import TierError
from kvstore.api.space import MAX_BLOCK_BYTES
from kvstore.api.tier import Block
from kvstore.codec import Codec, CodecId, decode
from kvstore.names import block_name, namespace_tag

HEADER_BYTES = 256
FORMAT_VERSION = 1

MAGIC = b"KVSR"
"""With it every record begins."""
_XXH3_128 = 1
_HAS_PARENT = 1
# magic, version, kind, codec, digest algorithm, flags, 2 reserved; sequence, block bytes,
# stored bytes, created, expires; tag, name, parent, digest, payload digest; encryption key id
# and nonce (zero: not encrypted); forget records so far; reserved; header digest.
_LAYOUT = struct.Struct("<4sHBBBB2x5Q16s32s32s16s16s16s12sQ40x16s")
_DIGEST_OFFSET = HEADER_BYTES - 16


class Damaged(TierError):
    """When stored bytes are not what was written, or not what was asked for."""


class Kind(IntEnum):
    """What a record says."""

    BLOCK = 1
    FORGET_BLOCK = 2
    """The block of this name, if written before this record, is forgotten."""
    FORGET_NAMESPACE = 3
    """So is everything under this tag."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What a record says of itself. Times are seconds since 1970; `expires_s` 0: never."""

    kind: Kind = Kind.BLOCK
    codec: CodecId = CodecId.RAW
    sequence: int = 0
    block_bytes: int = 0
    stored_bytes: int = 0
    created_s: int = 0
    expires_s: int = 0
    tag: bytes = bytes(16)
    name: bytes = bytes(32)
    parent: bytes | None = None
    digest: bytes = bytes(16)
    payload_digest: bytes = xxhash.xxh3_128_digest(b"")
    forgets: int = 0
    """How many forget records the log had seen, this one included: a missing one is noticed."""

    def pack(self) -> bytes:
        """The 256 bytes of the header."""
        body = _LAYOUT.pack(
            MAGIC, FORMAT_VERSION, self.kind, self.codec, _XXH3_128,
            _HAS_PARENT if self.parent is not None else 0,
            self.sequence, self.block_bytes, self.stored_bytes, self.created_s, self.expires_s,
            self.tag, self.name, self.parent or bytes(32), self.digest, self.payload_digest,
            bytes(16), bytes(12), self.forgets, bytes(16),
        )[:_DIGEST_OFFSET]  # fmt: skip
        return body + xxhash.xxh3_128_digest(body)

    @classmethod
    def unpack(cls, packed: bytes | memoryview) -> "Header":
        """The header that 256 bytes hold. Raises `Damaged` for anything else."""
        if len(packed) != HEADER_BYTES:
            raise Damaged(f"record header: {HEADER_BYTES} bytes are needed, got {len(packed)}")
        (magic, version, kind, codec, algorithm, flags, sequence, block_bytes, stored_bytes,
         created_s, expires_s, tag, name, parent, digest, payload_digest, key_id, _nonce,
         forgets, header_digest) = _LAYOUT.unpack(packed)  # fmt: skip
        if magic != MAGIC or header_digest != xxhash.xxh3_128_digest(packed[:_DIGEST_OFFSET]):
            raise Damaged("record header: its digest does not match")
        if version != FORMAT_VERSION or algorithm != _XXH3_128 or key_id != bytes(16):
            raise Damaged(f"record header: written by another version ({version}/{algorithm})")
        if not stored_bytes <= block_bytes <= MAX_BLOCK_BYTES:
            # Encoding never makes a block longer, and readers make room for what is said here.
            raise Damaged(f"record header: no block has {block_bytes} bytes in {stored_bytes}")
        try:
            kind, codec = Kind(kind), CodecId(codec)
        except ValueError as error:
            raise Damaged(f"record header: {error}") from None
        return cls(
            kind=kind, codec=codec, sequence=sequence, block_bytes=block_bytes,
            stored_bytes=stored_bytes, created_s=created_s, expires_s=expires_s, tag=tag,
            name=name, parent=parent if flags & _HAS_PARENT else None, digest=digest,
            payload_digest=payload_digest, forgets=forgets,
        )  # fmt: skip

    def resequenced(self, sequence: int, forgets: int) -> "Header":
        """The same record, written now, after so many records and forget records."""
        return replace(self, sequence=sequence, forgets=forgets)

    def with_payload(self, digest: bytes) -> "Header":
        """The same record for a payload of this digest, whose length it knows already."""
        return replace(self, payload_digest=digest)


def encode_block(
    block: Block, codec: Codec, *, now_s: float, ttl_s: int = 0, digest_raw: bool = True
) -> tuple[Header, memoryview | bytes]:
    """The record of a block: header and payload (`block.data` itself where nothing is gained).

    Without `digest_raw` the header of a payload that is `block.data` itself lacks its digest, see
    `Header.with_payload`.
    """
    codec_id, payload, digest = codec.encode(block)
    digested = b"" if payload is block.data and not digest_raw else payload
    header = Header(
        codec=codec_id,
        block_bytes=len(block.data),
        stored_bytes=len(payload),
        created_s=int(now_s),
        expires_s=int(now_s) + ttl_s if ttl_s else 0,
        tag=namespace_tag(block.ref.namespace),
        name=block_name(block.ref),
        parent=block_name(block.parent) if block.parent is not None else None,
        digest=digest,
        payload_digest=xxhash.xxh3_128_digest(digested),
    )
    return header, payload


def decode_block(header: Header, name: bytes, payload: memoryview, into: memoryview) -> bytes:
    """Fills `into` with the block called `name` and returns the digest of what was written.

    That is its writer's; of a lossy codec, the digest that the encoder gave what this decodes.

    Raises `Damaged` if the record is another block's, of another length, or not as written.
    """
    check_payload(header, name, payload)
    if header.block_bytes != len(into):
        raise Damaged("record: its length is not the block's")
    try:
        decode(header.codec, payload, into)
    except (ValueError, RuntimeError) as error:
        raise Damaged(f"record: {error}") from None
    return header.digest


def check_payload(header: Header, name: bytes, payload: memoryview) -> None:
    """Raises `Damaged` unless this is the record of the block called `name`, as it was written."""
    if header.kind is not Kind.BLOCK or header.name != name:
        raise Damaged("record: it belongs to another block")
    if header.stored_bytes != len(payload):
        raise Damaged("record: its length is not the block's")
    if xxhash.xxh3_128_digest(payload) != header.payload_digest:
        raise Damaged("record: the digest of its payload does not match")
