"""Records: what leaves memory is decoded exactly as it was written, or not at all."""

import random
from dataclasses import fields, replace

import pytest
import xxhash

from kvstore.api.tier import Block, BlockRef
from kvstore.codec import CODECS, LOSSLESS, Codec, CodecId, decode
from kvstore.names import block_name, namespace_tag
from kvstore.record import HEADER_BYTES, Damaged, Header, Kind, decode_block, encode_block
from tests.sim.blocks import block_of, keys_of, namespace_of

MINE = namespace_of("mine")
NOW_S = 1_700_000_000.7
MUTATIONS = 20_000


@pytest.fixture(params=sorted(CODECS))
def codec(request: pytest.FixtureRequest) -> Codec:
    """Every codec in turn."""
    return CODECS[request.param]()


def block(size: int, word: str = "block") -> Block:
    """A block with a parent."""
    parent, key = keys_of(word, 2)
    return block_of(BlockRef(MINE, key), BlockRef(MINE, parent), size)


def encode(block: Block, codec: Codec) -> tuple[Header, bytes]:
    """The record of a block, its payload as owned bytes."""
    header, payload = encode_block(block, codec, now_s=NOW_S, ttl_s=60)
    return header, bytes(payload)


def decoded(packed: bytes, block: Block, payload: bytes) -> bytes | None:
    """What a reader of this record gets: bytes, or None where it is damaged."""
    into = bytearray(len(block.data))
    try:
        header = Header.unpack(packed)
        digest = decode_block(header, block_name(block.ref), memoryview(payload), memoryview(into))
    except Damaged:
        return None
    assert digest == block.digest
    return bytes(into)


@pytest.mark.parametrize("size", [1, 2, 3, 255, 4096, 6001, 100_000])
def test_a_record_comes_back_as_it_was(codec: Codec, size: int) -> None:
    """Every size, odd ones too, through every codec; the header says all there is to say."""
    original = block(size)
    header, payload = encode(original, codec)
    assert decoded(header.pack(), original, payload) == bytes(original.data)
    assert Header.unpack(header.pack()) == header
    assert header.kind is Kind.BLOCK
    assert (header.block_bytes, header.stored_bytes) == (size, len(payload))
    assert (header.created_s, header.expires_s) == (1_700_000_000, 1_700_000_060)
    assert header.name == block_name(original.ref)
    assert header.tag == namespace_tag(MINE)
    assert original.parent is not None
    assert header.parent == block_name(original.parent)
    assert header.digest == original.digest
    assert header.payload_digest == xxhash.xxh3_128_digest(payload)
    assert len(payload) <= size


def test_a_codec_gains_on_kv_and_steps_aside_on_noise(rng: random.Random) -> None:
    """What looks like bf16 gets smaller; noise is stored as it is, without a copy."""
    original = block(64_000)
    noise = original._replace(data=memoryview(rng.randbytes(64_000)))
    for name in ("bitshuffle-lz4", "planes-zstd"):
        codec = CODECS[name]()
        gained, payload, _ = codec.encode(original)
        assert gained is LOSSLESS[name]
        assert len(payload) < 0.8 * 64_000
        kept, payload, digest = codec.encode(noise)
        assert (kept, payload, digest) == (CodecId.RAW, noise.data, noise.digest)
    assert CODECS["raw"]().encode(noise).payload is noise.data


def test_a_header_is_256_bytes_with_all_its_fields(rng: random.Random) -> None:
    """Any header packs and unpacks to itself; a missing parent is not one of zeros."""
    for _ in range(500):
        header = Header(
            kind=rng.choice(list(Kind)),
            codec=rng.choice(list(CodecId)),
            sequence=rng.randrange(2**64),
            block_bytes=rng.randrange(2**29, 2**30 + 1),
            stored_bytes=rng.randrange(2**29),
            created_s=rng.randrange(2**64),
            expires_s=rng.randrange(2**64),
            tag=rng.randbytes(16),
            name=rng.randbytes(32),
            parent=rng.choice([None, bytes(32), rng.randbytes(32)]),
            digest=rng.randbytes(16),
            payload_digest=rng.randbytes(16),
        )
        assert len(header.pack()) == HEADER_BYTES
        assert Header.unpack(header.pack()) == header
        later = header.resequenced(7, 3)
        assert later == replace(header, sequence=7, forgets=3)


def test_the_layout_is_the_documented_one() -> None:
    """Each field lies where docs/format.md says: what older nodes wrote stays readable."""
    header = Header(
        kind=Kind.FORGET_BLOCK, codec=CodecId.BITSHUFFLE_LZ4, sequence=2, block_bytes=3,
        stored_bytes=4, created_s=5, expires_s=6, tag=b"t" * 16, name=b"n" * 32,
        parent=b"p" * 32, digest=b"d" * 16, payload_digest=b"q" * 16,
    )  # fmt: skip
    numbers = b"".join(number.to_bytes(8, "little") for number in (2, 3, 4, 5, 6))
    body = b"KVSR" + bytes([1, 0, 2, 1, 1, 1, 0, 0]) + numbers
    body += b"t" * 16 + b"n" * 32 + b"p" * 32 + b"d" * 16 + b"q" * 16
    body = body.ljust(HEADER_BYTES - 16, b"\0")
    assert header.pack() == body + xxhash.xxh3_128_digest(body)


@pytest.mark.parametrize(
    ("block_bytes", "stored_bytes"), [(4, 5), (2**30 + 1, 4), (2**30, 2**31), (2**63, 2**63)]
)
def test_lengths_that_no_block_has_are_refused(block_bytes: int, stored_bytes: int) -> None:
    """Readers make room for what a header says, so a right digest alone is not believed."""
    header = Header(block_bytes=block_bytes, stored_bytes=stored_bytes)
    with pytest.raises(Damaged):
        Header.unpack(header.pack())


def test_every_flipped_bit_of_a_header_is_noticed(codec: Codec) -> None:
    """No bit of the 256 bytes can change unnoticed."""
    original = block(6000)
    header, payload = encode(original, codec)
    packed = header.pack()
    for bit in range(8 * HEADER_BYTES):
        damaged = bytearray(packed)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(Damaged):
            Header.unpack(bytes(damaged))
    assert decoded(packed, original, payload) == bytes(original.data)


@pytest.mark.parametrize("size", [0, 1, 255, 257, 512])
def test_a_header_of_another_length_is_refused(size: int) -> None:
    """Neither truncated nor longer."""
    packed = (block_header().pack() * 2)[:size]
    with pytest.raises(Damaged, match=f"256 bytes are needed, got {size}"):
        Header.unpack(packed)


def block_header() -> Header:
    return encode(block(100), CODECS["raw"]())[0]


@pytest.mark.parametrize(
    ("place", "value"),
    [(4, b"\2\0"), (6, b"\0"), (6, b"\4"), (7, b"\5"), (8, b"\2"), (8, b"\0"), (164, b"key")],
    ids=["version", "no kind", "new kind", "new codec", "new digest", "no digest", "encrypted"],
)
def test_what_a_newer_version_wrote_is_refused(place: int, value: bytes) -> None:
    """A header that is intact, but says what this version does not know, is not guessed at."""
    packed = bytearray(block_header().pack())
    packed[place : place + len(value)] = value
    packed[-16:] = xxhash.xxh3_128_digest(bytes(packed[:-16]))
    with pytest.raises(Damaged):
        Header.unpack(bytes(packed))


def test_no_mutation_is_decoded_to_wrong_bytes(codec: Codec, rng: random.Random) -> None:
    """20,000 damaged records: none decodes to anything but the original; unharmed ones all do."""
    originals = [block(size, str(size)) for size in (1, 100, 4000, 6000)]
    records = [(each, *encode(each, codec)) for each in originals]
    if (used := records[-1][1].codec) is not CodecId.RAW:
        assert {header.codec for _, header, _ in records} == {CodecId.RAW, used}
    refused = 0
    for number in range(MUTATIONS):
        original, header, payload = records[number % len(records)]
        if number % 50 == 0:
            assert decoded(header.pack(), original, payload) == bytes(original.data)
        packed, harmed = mutate(rng, header.pack(), payload, records)
        got = decoded(packed, original, harmed)
        assert got is None or got == bytes(original.data), "wrong bytes"
        unharmed = (packed, harmed) == (header.pack(), payload)
        assert (got is not None) == unharmed
        refused += got is None
    assert refused > 0.95 * MUTATIONS


def mutate(
    rng: random.Random, header: bytes, payload: bytes, records: list[tuple[Block, Header, bytes]]
) -> tuple[bytes, bytes]:
    """A record after one of the things that happen to stored bytes."""
    packed, harmed = bytearray(header), bytearray(payload)
    target = rng.choice([packed, harmed])
    kind = rng.randrange(6)
    if kind == 0:
        for _ in range(rng.randint(1, 3)):
            target[rng.randrange(len(target))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        start = rng.randrange(len(target))
        target[start : start + rng.randint(1, 64)] = rng.randbytes(rng.randint(0, 64))
    elif kind == 2:
        del target[rng.randrange(len(target)) :]
    elif kind == 3:
        target += rng.randbytes(rng.randint(1, 100))
    elif kind == 4:
        start = rng.randrange(len(target))
        target[start:] = bytes(len(target) - start)
    else:
        _, other, stolen = rng.choice(records)
        packed, harmed = rng.choice([
            (packed, bytearray(stolen)), (bytearray(other.pack()), harmed),
            (bytearray(other.pack()), bytearray(stolen)),
        ])  # fmt: skip
    return bytes(packed), bytes(harmed)


@pytest.mark.parametrize("name", sorted(CODECS))
def test_an_intact_record_of_another_codec_is_refused(name: str) -> None:
    """Where header and payload are each as written but do not fit, there is an error, no crash."""
    original = block(6000)
    header, payload = encode(original, CODECS[name]())
    assert decoded(header.pack(), original, payload) == bytes(original.data)
    for other in set(CodecId) - {header.codec}:
        assert decoded(replace(header, codec=other).pack(), original, payload) is None


def test_a_payload_that_claims_another_length_is_refused(codec: Codec) -> None:
    """A record of a block that is longer or shorter than the buffer is not decoded."""
    original = block(6000)
    header, payload = encode(original, codec)
    for size in (0, 1, 5999, 6001, 12_000):
        into = bytearray(size)
        with pytest.raises(Damaged, match="length"):
            decode_block(header, header.name, memoryview(payload), memoryview(into))
        assert into == bytes(size)
        lying = replace(header, block_bytes=size)
        with pytest.raises(Damaged):
            decode_block(lying, header.name, memoryview(payload), memoryview(into))


def test_another_blocks_record_is_refused(codec: Codec) -> None:
    """Intact, of the right length, but by another name; or no block at all."""
    one, two = block(6000, "one"), block(6000, "two")
    header, payload = encode(two, codec)
    assert decoded(header.pack(), one, payload) is None
    for kind in (Kind.FORGET_BLOCK, Kind.FORGET_NAMESPACE):
        assert decoded(replace(header, kind=kind).pack(), two, payload) is None


def test_a_record_without_payload_has_a_digest_of_nothing() -> None:
    """So that whoever scans for records finds it intact."""
    header = Header(kind=Kind.FORGET_NAMESPACE, tag=b"t" * 16)
    assert header.payload_digest == xxhash.xxh3_128_digest(b"")
    assert {field.name for field in fields(Header)} >= {"kind", "sequence", "tag", "name"}


def test_decoding_checks_the_declared_length_first() -> None:
    """Blosc's own header is not believed: another length is an error before it decodes."""
    original = block(6000)
    codec_id, payload, _ = CODECS["bitshuffle-lz4"]().encode(original)
    assert codec_id is CodecId.BITSHUFFLE_LZ4
    for size in (5999, 6001):
        with pytest.raises(ValueError, match="decodes to 6000 bytes"):
            decode(codec_id, memoryview(payload), memoryview(bytearray(size)))
    with pytest.raises((ValueError, RuntimeError)):
        decode(codec_id, memoryview(b""), memoryview(bytearray(6000)))
