"""Damage that can be done to bytes in general and to records (docs/format.md) in particular."""

import itertools
import random
import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple

import xxhash

HEADER_BYTES = 256
HEADER_BITS = 8 * HEADER_BYTES
DIGESTED_BYTES = 240
PAGE_BYTES = 4096
HOSTILE_LENGTHS = (0, 1, 2**30, 2**31 - 1, 2**31, 2**32, 2**62, 2**63, 2**64 - 1)
VERSION_AT, KIND_AT, CODEC_AT, ALGORITHM_AT = 4, 6, 7, 8
BLOCK_BYTES_AT, STORED_BYTES_AT, EXPIRES_AT, KEY_ID_AT = 20, 28, 44, 164


class Mutant(NamedTuple):
    """Damaged bytes, and what was done to them."""

    kind: str
    data: bytes


def flipped(data: bytes, bit: int) -> bytes:
    """The bytes with one bit changed."""
    damaged = bytearray(data)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


def scribbled(rng: random.Random, data: bytes) -> bytes:
    """The bytes with a run of them replaced by noise."""
    start = rng.randrange(len(data))
    noise = rng.randbytes(min(rng.choice((1, 2, 7, 16, 100, 512)), len(data) - start))
    return data[:start] + noise + data[start + len(noise) :]


def cut(rng: random.Random, data: bytes) -> bytes:
    """The beginning of the bytes, of any length."""
    return data[: rng.randrange(len(data))]


def zeroed(rng: random.Random, data: bytes) -> bytes:
    """The bytes with one page of theirs, or what there is of it, emptied."""
    start = rng.randrange(0, len(data), PAGE_BYTES)
    end = min(start + PAGE_BYTES, len(data))
    return data[:start] + bytes(end - start) + data[end:]


def shifted(rng: random.Random, data: bytes) -> bytes:
    """The bytes with a few inserted or taken out somewhere."""
    at, size = rng.randrange(len(data)), rng.randrange(1, 17)
    if rng.random() < 0.5:
        return data[:at] + rng.randbytes(size) + data[at:]
    return data[:at] + data[at + size :]


def with_field(record: bytes, at: int, layout: str, value: int) -> bytes:
    """A record whose header says something else, and whose header's digest agrees."""
    header = bytearray(record[:DIGESTED_BYTES])
    struct.pack_into(layout, header, at, value)
    return bytes(header) + xxhash.xxh3_128_digest(bytes(header)) + record[HEADER_BYTES:]


def _other_version(rng: random.Random, record: bytes, other: bytes) -> bytes:
    return with_field(record, VERSION_AT, "<H", rng.choice((0, 2, 3, 256, 65535)))


def _other_algorithm(rng: random.Random, record: bytes, other: bytes) -> bytes:
    return with_field(record, ALGORITHM_AT, "<B", rng.choice((0, 2, 255)))


def _encrypted(rng: random.Random, record: bytes, other: bytes) -> bytes:
    return with_field(record, KEY_ID_AT, "<Q", rng.randrange(1, 2**64))


def _other_kind(rng: random.Random, record: bytes, other: bytes) -> bytes:
    return with_field(record, KIND_AT, "<B", rng.choice((0, 4, 77, 255)))


def _other_codec(rng: random.Random, record: bytes, other: bytes) -> bytes:
    # Never from raw to compressed: the payload's digest is right then, and what a decoder makes
    # of bytes that no encoder wrote is only promised for damage, not for forgery.
    return with_field(record, CODEC_AT, "<B", rng.choice((0, 5, 77, 255)))


def _other_block_bytes(rng: random.Random, record: bytes, other: bytes) -> bytes:
    return with_field(record, BLOCK_BYTES_AT, "<Q", _length(rng, record, BLOCK_BYTES_AT))


def _other_stored_bytes(rng: random.Random, record: bytes, other: bytes) -> bytes:
    return with_field(record, STORED_BYTES_AT, "<Q", _length(rng, record, STORED_BYTES_AT))


def _both_lengths(rng: random.Random, record: bytes, other: bytes) -> bytes:
    value = rng.choice(HOSTILE_LENGTHS)
    return with_field(with_field(record, BLOCK_BYTES_AT, "<Q", value), STORED_BYTES_AT, "<Q", value)


def _length(rng: random.Random, record: bytes, at: int) -> int:
    (true,) = struct.unpack_from("<Q", record, at)
    near = (true - 1, true + 1, 2 * true)
    return max(0, rng.choice(HOSTILE_LENGTHS + near) % 2**64)


def _others_header(rng: random.Random, record: bytes, other: bytes) -> bytes:
    return other[:HEADER_BYTES] + record[HEADER_BYTES:]


def _others_payload(rng: random.Random, record: bytes, other: bytes) -> bytes:
    return record[:HEADER_BYTES] + other[HEADER_BYTES:]


def _others(rng: random.Random, record: bytes, other: bytes) -> bytes:
    return other


def _payload_bit(rng: random.Random, record: bytes, other: bytes) -> bytes:
    return flipped(record, rng.randrange(HEADER_BITS, 8 * len(record)))


RECORD_MUTATIONS: dict[str, Callable[[random.Random, bytes, bytes], bytes]] = {
    "payload bit": _payload_bit,
    "byte run": lambda rng, record, other: scribbled(rng, record),
    "cut": lambda rng, record, other: cut(rng, record),
    "zeroed page": lambda rng, record, other: zeroed(rng, record),
    "shifted": lambda rng, record, other: shifted(rng, record),
    "other version": _other_version,
    "other digest algorithm": _other_algorithm,
    "encrypted": _encrypted,
    "other kind": _other_kind,
    "other codec": _other_codec,
    "other block length": _other_block_bytes,
    "other stored length": _other_stored_bytes,
    "hostile lengths": _both_lengths,
    "another's header": _others_header,
    "another's payload": _others_payload,
    "another's record": _others,
}


class RecordMutations:
    """Endless mutations of records; every bit of the header comes up in turn."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._kinds = list(RECORD_MUTATIONS)
        start = rng.randrange(HEADER_BITS)
        self._bits: Iterator[int] = itertools.cycle([*range(start, HEADER_BITS), *range(start)])

    def mutate(self, record: bytes, other: bytes) -> Mutant:
        """A damaged record; `other` is one of another block, to be mixed up with it."""
        if self._rng.random() < 0.25:
            return Mutant("header bit", flipped(record, next(self._bits)))
        kind = self._rng.choice(self._kinds)
        return Mutant(kind, RECORD_MUTATIONS[kind](self._rng, record, other))
