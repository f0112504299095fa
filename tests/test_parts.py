"""Messages of our own making: what protobuf would write, and what it would read."""

import random
from contextlib import suppress

import pytest
from google.protobuf.message import DecodeError

from kvstore.api.errors import InvalidArgument
from kvstore.api.parts import (
    Part,
    WriteParts,
    pack_reply,
    pack_request,
    parse_reply,
    parse_request,
)
from kvstore.api.v1 import kvstore_pb2 as pb


def any_part(rng: random.Random) -> Part:
    """A part of any kind, empty ones included."""
    header = None
    if rng.random() < 0.6:
        header = pb.BlockHeader(
            bytes=rng.choice([0, 1, 1 << 40]),
            digest=rng.randbytes(rng.choice([0, 16])),
            tier=rng.choice(["", "memory"]),
        )
    data = rng.randbytes(rng.choice([0, 1, 127, 128, 5000]))
    return Part(rng.choice([0, 1, 127, 128, 2**32 - 1]), header, memoryview(data))


def piece_of(part: Part) -> pb.Piece:
    return pb.Piece(block=part.block, header=part.header, data=bytes(part.data))


def same(parts: list[Part], pieces: list[pb.Piece]) -> bool:
    return [piece_of(part) for part in parts] == pieces


@pytest.mark.parametrize("turn", range(50))
def test_protobuf_reads_what_we_write_and_we_what_it_writes(turn: int, rng: random.Random) -> None:
    parts = [any_part(rng) for _ in range(rng.randrange(6))]
    pieces = [piece_of(part) for part in parts]
    reply = pb.ReadReply(pieces=pieces)
    assert pb.ReadReply.FromString(pack_reply(parts)) == reply
    assert same(parse_reply(reply.SerializeToString()), pieces)
    begin = pb.WriteBegin(space_id=rng.randbytes(32)) if rng.random() < 0.5 else None
    request = pb.WriteRequest(begin=begin, pieces=pieces)
    assert pb.WriteRequest.FromString(pack_request(WriteParts(begin, parts))) == request
    read = parse_request(request.SerializeToString())
    assert read.begin == begin
    assert same(list(read.parts), pieces)


def test_what_newer_versions_add_is_passed_over() -> None:
    """Fields of every kind that this version does not know."""
    known = pack_reply([Part(3, pb.BlockHeader(bytes=4), b"data")])
    unknown = bytes([0x78, 0x96, 0x01, 0x7D, 1, 2, 3, 4, 0x79, *range(8), 0x7A, 2, 9, 9])
    [part] = parse_reply(unknown + known + unknown)
    assert (part.block, bytes(part.data)) == (3, b"data")


@pytest.mark.parametrize("turn", range(50))
def test_damaged_messages_are_refused_or_read(turn: int, rng: random.Random) -> None:
    """Nothing else is raised, and nothing is read that the message does not hold."""
    message = bytearray(pack_reply([any_part(rng) for _ in range(1 + turn % 3)]))
    for _ in range(40):
        damaged = bytearray(message)
        for _ in range(rng.randrange(1, 4)):
            if damaged:
                damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        damaged = damaged[: rng.choice([len(damaged), rng.randrange(len(damaged) + 1)])]
        with suppress(ValueError, DecodeError):
            parts = parse_reply(bytes(damaged))
            assert sum(len(part.data) for part in parts) <= len(damaged)
            assert all(0 <= part.block < 2**32 for part in parts)


@pytest.mark.parametrize(
    "message",
    [b"\x0a", b"\x0a\x05abc", b"\x80" * 11, b"\x0b", b"\x02\x00", b"\x0d\x01", b"\xff"],
)
def test_a_message_that_breaks_off_is_refused(message: bytes) -> None:
    with pytest.raises(ValueError, match=r"it ends|a field|a number"):
        parse_reply(message)
    with pytest.raises(InvalidArgument, match="message: "):
        parse_request(message)


def test_the_data_of_a_message_is_not_copied() -> None:
    """What is parsed lies in the message."""
    message = pack_reply([Part(0, None, bytes(100_000))])
    [part] = parse_reply(message)
    assert isinstance(part.data, memoryview)
    assert part.data.obj is message
