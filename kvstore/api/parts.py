"""Parts of blocks as they travel in `ReadReply` and `WriteRequest`, without protobuf's copies.

Protobuf copies a field of bytes when it is set, when the message is packed, and when it is parsed.
Blocks are nearly all of what is sent; so these two messages are packed and parsed here: one copy
to pack, none to parse. What travels is what protobuf would write (encoding: protobuf.dev).
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from google.protobuf.message import DecodeError

from kvstore.api.errors import InvalidArgument
from kvstore.api.v1 import kvstore_pb2 as pb

_BEGIN = pb.WriteRequest.DESCRIPTOR.fields_by_name["begin"].number
_REQUEST_PIECES = pb.WriteRequest.DESCRIPTOR.fields_by_name["pieces"].number
_REPLY_PIECES = pb.ReadReply.DESCRIPTOR.fields_by_name["pieces"].number
_BLOCK = pb.Piece.DESCRIPTOR.fields_by_name["block"].number
_HEADER = pb.Piece.DESCRIPTOR.fields_by_name["header"].number
_DATA = pb.Piece.DESCRIPTOR.fields_by_name["data"].number
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
"""Wire types."""
_VARINT_BITS = 64
_UINT32 = (1 << 32) - 1

Bytes = bytes | memoryview


class Part(NamedTuple):
    """A `Piece`. Its data is not copied: it is the sender's, or lies in the message."""

    block: int
    header: pb.BlockHeader | None
    data: Bytes

    @classmethod
    def of(cls, piece: pb.Piece) -> "Part":
        """The same as a message says it."""
        return cls(piece.block, piece.header if piece.HasField("header") else None, piece.data)


class WriteParts(NamedTuple):
    """A `WriteRequest`."""

    begin: pb.WriteBegin | None
    parts: Sequence[Part]


def pack_reply(parts: Sequence[Part]) -> bytes:
    """A `ReadReply` of these parts."""
    return b"".join(_pieces(_REPLY_PIECES, parts))


def pack_request(request: WriteParts) -> bytes:
    """A `WriteRequest`."""
    packed = list(_pieces(_REQUEST_PIECES, request.parts))
    if request.begin is not None:
        begin = request.begin.SerializeToString()
        packed = [_tag(_BEGIN) + _varint(len(begin)), begin, *packed]
    return b"".join(packed)


def parse_reply(message: bytes) -> list[Part]:
    """The parts of a `ReadReply`. Raises ValueError for what is none."""
    return [
        _part(value)
        for number, value in _fields(memoryview(message))
        if number == _REPLY_PIECES and isinstance(value, memoryview)
    ]


def parse_request(message: bytes) -> WriteParts:
    """What a `WriteRequest` says. Raises InvalidArgument for what is none."""
    begin: pb.WriteBegin | None = None
    parts: list[Part] = []
    try:
        for number, value in _fields(memoryview(message)):
            if number == _BEGIN and isinstance(value, memoryview):
                begin = begin or pb.WriteBegin()
                begin.MergeFromString(bytes(value))
            elif number == _REQUEST_PIECES and isinstance(value, memoryview):
                parts.append(_part(value))
    except (ValueError, DecodeError) as error:
        raise InvalidArgument(f"message: {error}") from None
    return WriteParts(begin, parts)


def _pieces(number: int, parts: Sequence[Part]) -> Iterator[Bytes]:
    for part in parts:
        head = b""
        if part.block:
            head += _varint(_BLOCK << 3 | _VARINT) + _varint(part.block)
        if part.header is not None:
            header = part.header.SerializeToString()
            head += _tag(_HEADER) + _varint(len(header)) + header
        if len(part.data):
            head += _tag(_DATA) + _varint(len(part.data))
        yield _tag(number) + _varint(len(head) + len(part.data)) + head
        yield part.data


def _part(message: memoryview) -> Part:
    block, header, data = 0, None, memoryview(b"")
    for number, value in _fields(message):
        if number == _BLOCK and isinstance(value, int):
            block = value & _UINT32
        elif number == _HEADER and isinstance(value, memoryview):
            header = header or pb.BlockHeader()
            header.MergeFromString(bytes(value))
        elif number == _DATA and isinstance(value, memoryview):
            data = value
    return Part(block, header, data)


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Numbers and values of the fields of a message; bytes are views. Raises ValueError."""
    at, end = 0, len(message)
    while at < end:
        tag, at = _read_varint(message, at)
        number, kind = tag >> 3, tag & 7
        if number == 0:
            raise ValueError("a field without a number")
        if kind == _VARINT:
            value, at = _read_varint(message, at)
            yield number, value
            continue
        if kind == _BYTES:
            size, at = _read_varint(message, at)
        elif kind in (_FIXED32, _FIXED64):
            size = 4 if kind == _FIXED32 else 8
        else:
            raise ValueError(f"a field of unknown kind {kind}")
        if size > end - at:
            raise ValueError("it ends within a field")
        if kind == _BYTES:
            yield number, message[at : at + size]
        at += size


def _read_varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while shift < _VARINT_BITS:
        if at >= len(message):
            raise ValueError("it ends within a number")
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & (1 << _VARINT_BITS) - 1, at
        shift += 7
    raise ValueError("a number of more than 64 bits")


def _varint(value: int) -> bytes:
    packed = bytearray()
    while value > 0x7F:
        packed.append(value & 0x7F | 0x80)
        value >>= 7
    packed.append(value)
    return bytes(packed)


def _tag(number: int) -> bytes:
    return _varint(number << 3 | _BYTES)
