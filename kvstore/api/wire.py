"""Between messages of `kvstore.v1` and the words of this package; both sides of the wire use it."""

import struct
from collections.abc import Iterable
from itertools import chain

from kvstore.api.errors import InvalidArgument
from kvstore.api.hint import Reuse, ReuseHint
from kvstore.api.keys import KEY_BYTES
from kvstore.api.space import SPACE_ID_BYTES, MatchRule, SpaceDescriptor
from kvstore.api.v1 import kvstore_pb2 as pb

MAX_KEYS = 65_536
PIECE_BYTES = 1 << 20
"""Bytes of block data in one message; the measured optimum of bare grpcio lies at 1–4 MiB."""
MESSAGE_BYTES = 4 << 20
"""The largest message that either side accepts unless it is configured otherwise."""
STREAM_OPTIONS: list[tuple[str, int]] = [
    # Block data is read in large pieces, and framed in large ones: gRPC's own choice is 8 KiB at
    # least and frames of 16 KiB, each of which the reader has to take apart and join again.
    ("grpc.experimental.tcp_read_chunk_size", 1 << 20),
    ("grpc.experimental.tcp_min_read_chunk_size", 256 << 10),
    ("grpc.experimental.tcp_max_read_chunk_size", 4 << 20),
    ("grpc.http2.max_frame_size", 1 << 20),
]
"""Of channels and servers that move blocks. A connection keeps 256 KiB to read into."""

_SOME_KEYS = 64
_SPLIT = struct.Struct(f"{KEY_BYTES}s" * _SOME_KEYS)
"""Cuts so many keys apart at once, in a quarter of the time of a slice for each."""

_DESCRIPTOR_FIELDS = [
    field.name for field in pb.SpaceDescriptor.DESCRIPTOR.fields if field.name != "match_rule"
]


def pack_keys(keys: Iterable[bytes]) -> bytes:
    """Keys as one field: 32 bytes each, in order."""
    return b"".join(keys)


def unpack_keys(packed: bytes, field: str = "keys", least: int = 0) -> list[bytes]:
    """The keys of one field. Raises `InvalidArgument` unless it holds `least` … 65,536 of them."""
    count, rest = divmod(len(packed), KEY_BYTES)
    if rest:
        raise InvalidArgument(
            f"{field}: a multiple of {KEY_BYTES} bytes is needed, got {len(packed)}"
        )
    if not least <= count <= MAX_KEYS:
        raise InvalidArgument(f"{field}: {least} … {MAX_KEYS} keys are allowed, got {count}")
    whole = len(packed) - len(packed) % _SPLIT.size
    keys = list(chain.from_iterable(_SPLIT.iter_unpack(memoryview(packed)[:whole])))
    keys += [packed[at : at + KEY_BYTES] for at in range(whole, len(packed), KEY_BYTES)]
    return keys


def check_space_id(space_id: bytes) -> bytes:
    """The id itself. Raises `InvalidArgument` unless it is 32 bytes long."""
    if len(space_id) != SPACE_ID_BYTES:
        raise InvalidArgument(f"space_id: {SPACE_ID_BYTES} bytes are needed, got {len(space_id)}")
    return space_id


def descriptor_to_wire(descriptor: SpaceDescriptor) -> pb.SpaceDescriptor:
    """The message that says the same."""
    message = pb.SpaceDescriptor()
    for name in _DESCRIPTOR_FIELDS:
        setattr(message, name, getattr(descriptor, name))
    message.match_rule = pb.MatchRule.ValueType(descriptor.match_rule.value)
    return message


def descriptor_from_wire(message: pb.SpaceDescriptor) -> SpaceDescriptor:
    """The descriptor that a message stands for. Raises `InvalidArgument`, naming the field."""
    try:
        rule = MatchRule(message.match_rule)
    except ValueError:
        raise InvalidArgument(f"descriptor.match_rule: unknown: {message.match_rule}") from None
    values = {name: getattr(message, name) for name in _DESCRIPTOR_FIELDS}
    return SpaceDescriptor(match_rule=rule, **values)


def hint_to_wire(hint: ReuseHint | None) -> pb.ReuseHint | None:
    """The message that says the same."""
    if hint is None:
        return None
    return pb.ReuseHint(
        session_id=hint.session_id,
        reuse=pb.Reuse.ValueType(hint.reuse.value),
        expected_return_ms=hint.expected_return_ms,
    )


def hint_from_wire(message: pb.ReuseHint) -> ReuseHint:
    """The hint of a message; a value that only newer callers know is UNKNOWN."""
    known = message.reuse in Reuse._value2member_map_
    reuse = Reuse(message.reuse) if known else Reuse.UNKNOWN
    return ReuseHint(message.session_id, reuse, message.expected_return_ms)
