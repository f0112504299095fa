"""Between messages and words: nothing is lost, and what is out of range is named."""

import random
from dataclasses import fields

import grpc
import pytest

from kvstore.api import errors
from kvstore.api.errors import (
    STATUS,
    ConfigError,
    InvalidArgument,
    KvstoreError,
    Shed,
    TierError,
    Unavailable,
    from_status,
)
from kvstore.api.hint import Reuse, ReuseHint
from kvstore.api.space import MatchRule, SpaceDescriptor
from kvstore.api.v1 import kvstore_pb2 as pb
from kvstore.api.wire import (
    MAX_KEYS,
    MESSAGE_BYTES,
    PIECE_BYTES,
    check_space_id,
    descriptor_from_wire,
    descriptor_to_wire,
    hint_from_wire,
    hint_to_wire,
    pack_keys,
    unpack_keys,
)
from tests.sim.blocks import keys_of
from tests.sim.nodes import descriptor_of


def test_keys_travel_in_one_field() -> None:
    """32 bytes each, in order; an empty field holds none."""
    for count in (1, 9, 63, 64, 65, 300):
        keys = keys_of("chain", count)
        assert pack_keys(keys) == b"".join(keys)
        assert unpack_keys(pack_keys(keys)) == keys
    assert unpack_keys(b"") == []


@pytest.mark.parametrize("size", [1, 31, 33, 32 * 9 - 1])
def test_half_a_key_is_refused(size: int) -> None:
    """Only whole keys, and the message names the field."""
    with pytest.raises(InvalidArgument, match=f"begin.keys: a multiple of 32 .* got {size}"):
        unpack_keys(bytes(size), "begin.keys")


def test_the_number_of_keys_is_limited() -> None:
    """65,536 are allowed, one more is not; where some are needed, none is not."""
    assert len(unpack_keys(bytes(32 * MAX_KEYS))) == MAX_KEYS == 65_536
    with pytest.raises(InvalidArgument, match=r"keys: 0 … 65536 keys are allowed, got 65537"):
        unpack_keys(bytes(32 * (MAX_KEYS + 1)))
    with pytest.raises(InvalidArgument, match=r"keys: 1 … 65536 keys are allowed, got 0"):
        unpack_keys(b"", least=1)


@pytest.mark.parametrize("size", [0, 31, 33])
def test_a_space_id_has_32_bytes(size: int) -> None:
    """Any other length is refused."""
    assert check_space_id(bytes(32)) == bytes(32)
    with pytest.raises(InvalidArgument, match=f"space_id: 32 bytes are needed, got {size}"):
        check_space_id(bytes(size))


def any_descriptor(rng: random.Random) -> SpaceDescriptor:
    """A descriptor with a value of its own in every field."""
    rule = rng.choice(list(MatchRule))
    words = ["model", "revision", "dtype", "layout", "layer_group", "rope_scaling", "quantization"]
    texts = {word: f"{word} ü {rng.randrange(1000)}" for word in [*words, "numerics"]}
    return SpaceDescriptor(
        block_tokens=rng.randint(1, 2**16),
        block_bytes=rng.randint(1, 2**30),
        format_version=rng.randint(1, 2**16),
        tp_rank=rng.randint(0, 7),
        tp_size=8,
        match_rule=rule,
        trailing_blocks=rng.randint(1, 2**16) if rule is MatchRule.TRAILING else 0,
        **texts,
    )


def test_descriptors_travel_whole(rng: random.Random) -> None:
    """Every field of every descriptor is there on the other side, and so is its id."""
    for _ in range(200):
        descriptor = any_descriptor(rng)
        packed = descriptor_to_wire(descriptor).SerializeToString()
        arrived = descriptor_from_wire(pb.SpaceDescriptor.FromString(packed))
        assert arrived == descriptor
        assert arrived.space_id == descriptor.space_id


def test_every_field_has_its_place_in_the_message() -> None:
    """A field that is added on one side only would silently not count: here it does."""
    declared = {field.name for field in pb.SpaceDescriptor.DESCRIPTOR.fields}
    assert declared == {field.name for field in fields(SpaceDescriptor)}
    assert {rule.value for rule in MatchRule} == set(pb.MatchRule.values())
    assert {reuse.value for reuse in Reuse} == set(pb.Reuse.values())


def test_a_bad_descriptor_is_refused_with_its_field() -> None:
    """Also a match rule of tomorrow: to guess it would be to lie."""
    message = descriptor_to_wire(descriptor_of())
    message.match_rule = 17  # type: ignore[assignment]
    with pytest.raises(InvalidArgument, match=r"descriptor\.match_rule: unknown: 17"):
        descriptor_from_wire(message)
    with pytest.raises(InvalidArgument, match=r"descriptor\.model"):
        descriptor_from_wire(pb.SpaceDescriptor())


def test_hints_travel_whole() -> None:
    """And one of a newer caller is taken for unknown, because it is only advice."""
    for reuse in Reuse:
        hint = ReuseHint(b"session", reuse, 1234)
        message = hint_to_wire(hint)
        assert message is not None
        assert hint_from_wire(message) == hint
    assert hint_to_wire(None) is None
    message = pb.ReuseHint(session_id=b"s")
    message.reuse = 99  # type: ignore[assignment]
    assert hint_from_wire(message) == ReuseHint(b"s", Reuse.UNKNOWN, 0)
    assert hint_from_wire(pb.ReuseHint()) == ReuseHint()
    with pytest.raises(InvalidArgument, match=r"hint\.session_id"):
        hint_from_wire(pb.ReuseHint(session_id=b"s" * 33))


def test_pieces_fit_messages() -> None:
    """A full piece leaves room in the smallest message that a node can be set to accept."""
    piece = pb.Piece(
        block=2**32 - 1,
        header=pb.BlockHeader(bytes=2**30, digest=bytes(16), tier="memory"),
        data=bytes(PIECE_BYTES),
    )
    assert pb.ReadReply(pieces=[piece]).ByteSize() < 2 << 20 <= MESSAGE_BYTES


def test_errors_and_statuses_are_one_table() -> None:
    """Every error that a caller can meet has its status, and comes back as itself."""
    inside = {TierError, ConfigError, Shed}  # Shed arrives as ResourceExhausted.
    named = {
        error
        for error in vars(errors).values()
        if isinstance(error, type) and issubclass(error, KvstoreError)
    }
    assert set(STATUS) == named - inside - {KvstoreError}
    assert len(set(STATUS.values())) == len(STATUS)
    for error, status in STATUS.items():
        again = from_status(status, "the message")
        assert type(again) is error
        assert str(again) == "the message"
    for status in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.INTERNAL):
        unknown = from_status(status, "the message")
        assert type(unknown) is Unavailable
        assert str(unknown) == f"{status.name}: the message"
