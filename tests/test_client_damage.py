"""The client against nodes that lie: damaged bytes, wrong sizes, streams without sense."""

import tracemalloc
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.api.digest import block_digest
from kvstore.api.errors import (
    KvstoreError,
)
from kvstore.api.parts import Part
from kvstore.api.v1 import kvstore_pb2 as pb
from kvstore_client import AsyncClient, Match, Space
from kvstore_client.arrivals import Arrivals
from tests.client_rig import (
    BLOCK_BYTES,
    altered,
    buffers,
    fill,
)
from tests.scripted_node import ScriptedNode, block, key

pytest_plugins = ["tests.client_fixtures"]


def flip_last_byte(pieces: list[pb.Piece]) -> list[pb.Piece]:
    """One wrong bit in the block under index 1."""
    pieces[1].data = pieces[1].data[:-1] + bytes([pieces[1].data[-1] ^ 1])
    return pieces


def swap_bytes_of_blocks(pieces: list[pb.Piece]) -> list[pb.Piece]:
    """Blocks 1 and 2 under each other's name, digests included."""
    one, two = pieces[1], pieces[2]
    one.data, two.data = two.data, one.data
    one.header.digest, two.header.digest = two.header.digest, one.header.digest
    return pieces


def claim_a_huge_block(pieces: list[pb.Piece]) -> list[pb.Piece]:
    """A header that declares more than any machine has."""
    pieces[1].header.bytes = 2**62
    return pieces


def claim_a_small_block(pieces: list[pb.Piece]) -> list[pb.Piece]:
    """A header that declares less than the block has."""
    pieces[1].header.bytes -= 1
    return pieces


def shorten_the_digest(pieces: list[pb.Piece]) -> list[pb.Piece]:
    """A digest that is none."""
    pieces[1].header.digest = b""
    return pieces


@pytest.mark.parametrize(
    "damage",
    [
        flip_last_byte,
        swap_bytes_of_blocks,
        claim_a_huge_block,
        claim_a_small_block,
        shorten_the_digest,
    ],
)
async def test_damage_is_a_miss_and_counted(
    node: ScriptedNode,
    client: AsyncClient,
    space: Space,
    damage: Callable[[list[pb.Piece]], list[pb.Piece]],
) -> None:
    """A block that is not what it says never counts as loaded; those around it do."""
    keys = fill(node, space, 4)
    node.play("Read", altered(node, damage), altered(node, damage))
    tracemalloc.start()
    try:
        assert len(await client.load(space, keys, buffers(4))) == 1
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()
    assert client.counters == {"load_corrupt": 1}
    answers = await client.load_any(space, keys, buffers(4))
    assert answers[0] is not None
    assert answers[1] is None
    assert answers[3] is not None


def out_of_order(pieces: list[pb.Piece]) -> list[pb.Piece]:
    """Block 0 after block 1."""
    return [pieces[1], pieces[0]]


def twice(pieces: list[pb.Piece]) -> list[pb.Piece]:
    """Block 0 two times."""
    return [pieces[0], pieces[0]]


def without_header(pieces: list[pb.Piece]) -> list[pb.Piece]:
    """Data that nothing announced."""
    pieces[1].ClearField("header")
    return pieces


def too_long(pieces: list[pb.Piece]) -> list[pb.Piece]:
    """More data than the header said, aimed at what lies behind the buffer."""
    pieces[1].data += b"!"
    return pieces


def interrupted(pieces: list[pb.Piece]) -> list[pb.Piece]:
    """The next block begins before this one is whole."""
    pieces[1].data = pieces[1].data[:10]
    return pieces


def outside(pieces: list[pb.Piece]) -> list[pb.Piece]:
    """A block that nobody asked for."""
    pieces[1].block = 2**31
    return pieces


@pytest.mark.parametrize(
    "nonsense", [out_of_order, twice, without_header, too_long, interrupted, outside]
)
async def test_nonsense_ends_a_read(
    node: ScriptedNode,
    client: AsyncClient,
    space: Space,
    nonsense: Callable[[list[pb.Piece]], list[pb.Piece]],
) -> None:
    """A stream that no honest node sends is left at once; nothing is written past a buffer."""
    keys = fill(node, space, 4)
    node.play("Read", altered(node, nonsense))
    whole = bytearray(6 * BLOCK_BYTES)
    slots = [
        memoryview(whole)[at : at + BLOCK_BYTES] for at in range(0, 4 * BLOCK_BYTES, BLOCK_BYTES)
    ]
    answers = await client.load_any(space, keys, slots)
    assert sum(answer is not None for answer in answers) == 1
    assert whole[4 * BLOCK_BYTES :] == bytes(2 * BLOCK_BYTES)
    assert client.counters["load_failed"] == 1


@pytest.mark.parametrize("kept_bytes", [0, 10])
async def test_a_truncated_stream_is_short(
    node: ScriptedNode, client: AsyncClient, space: Space, kept_bytes: int
) -> None:
    """The node ends with success, between two blocks or inside one: what is whole counts."""
    keys = fill(node, space, 3)

    def cut(pieces: list[pb.Piece]) -> list[pb.Piece]:
        pieces[1].data = pieces[1].data[:kept_bytes]
        return pieces[: 1 + (kept_bytes > 0)]

    node.play("Read", altered(node, cut))
    assert len(await client.load(space, keys, buffers(3))) == 1
    assert client.counters == {"load_short": 1}


@pytest.mark.parametrize(
    "replies",
    [
        [],
        [pb.WriteReply()],
        [pb.WriteReply(done=pb.WriteDone())],
        [pb.WriteReply(offer=pb.WriteOffer(wanted=[1, 0]))],
        [pb.WriteReply(offer=pb.WriteOffer(wanted=[2]))],
    ],
)
async def test_nonsense_ends_a_store(
    node: ScriptedNode, client: AsyncClient, space: Space, replies: list[pb.WriteReply]
) -> None:
    """An offer that is missing or impossible stores nothing and raises nothing."""

    async def script(
        messages: AsyncIterator[pb.WriteRequest], context: object
    ) -> AsyncIterator[pb.WriteReply]:
        for reply in replies:
            yield reply

    node.play("Write", script)
    blocks = [bytes(BLOCK_BYTES)] * 2
    assert await client.store(space, [key(1), key(2)], blocks) == [False, False]
    assert client.counters == {"store_failed": 1}


@pytest.mark.parametrize(
    "reply",
    [
        pb.MatchReply(matched_blocks=3, spaces=[pb.SpaceMatch(runs=[pb.Run(blocks=3)])]),
        pb.MatchReply(matched_blocks=1, spaces=[pb.SpaceMatch()]),
        pb.MatchReply(matched_blocks=1),
    ],
)
async def test_a_match_that_contradicts_itself_is_a_miss(
    node: ScriptedNode, client: AsyncClient, space: Space, reply: pb.MatchReply
) -> None:
    """More blocks than keys, runs that do not add up, a space without an answer."""

    async def script(request: object, context: object) -> pb.MatchReply:
        return reply

    node.play("Match", script)
    assert await client.match([space], [key(1), key(2)]) == Match.none()
    assert client.counters == {"match_failed": 1}


HEADERS = [(size, digest) for size in (0, 1, 7, 8, 2**40) for digest in ("right", "wrong", "short")]
PIECES = st.tuples(
    st.integers(0, 4),
    st.none() | st.sampled_from(HEADERS),
    st.sampled_from([b"", b"right"]) | st.binary(max_size=9),
)


@given(st.lists(PIECES, max_size=20))
def test_no_stream_makes_a_wrong_block_count(stream: list[tuple[int, Any, bytes]]) -> None:
    """Whatever arrives in whatever order: what counts is intact, what lies beside is untouched."""
    keys = [key(number) for number in range(3)]
    right = [block(number, 8) for number in range(3)]
    memory = bytearray(b"." * 40)
    slots = [memoryview(memory)[12 * n : 12 * n + 8] for n in range(3)]
    arrivals = Arrivals(bytes(32), keys, slots)
    for index, header, data in stream:
        known = min(index, 2)
        piece = pb.Piece(block=index, data=right[known] if data == b"right" else data)
        if header is not None:
            size_bytes, kind = header
            digest = block_digest(bytes(32), keys[known], right[known])
            changed = {"right": digest, "wrong": bytes(16), "short": b"x"}[kind]
            piece.header.CopyFrom(pb.BlockHeader(bytes=size_bytes, digest=changed))
        try:
            arrivals.add(Part.of(piece))
        except KvstoreError:
            break
    for number, answer in enumerate(arrivals.loaded):
        assert answer is None or bytes(slots[number]) == right[number]
    assert all(memory[12 * n + 8 : 12 * n + 12] == b"...." for n in range(3))
    assert len(arrivals.leading()) == next(
        (at for at, answer in enumerate(arrivals.loaded) if answer is None), 3
    )


@pytest.mark.parametrize("spoilt", [0, 1, 2])
def test_damage_in_any_piece_is_found_and_does_not_reach_the_next_block(spoilt: int) -> None:
    """Blocks are digested piece by piece as they come, each from its own beginning."""
    keys, right = [key(0), key(1)], [block(0, 9), block(1, 9)]
    slots = [memoryview(bytearray(9)) for _ in keys]
    arrivals = Arrivals(bytes(32), keys, slots)
    cuts = [right[0][at : at + 3] for at in (0, 3, 6)]
    cuts[spoilt] = bytes([cuts[spoilt][0] ^ 1]) + cuts[spoilt][1:]
    for number, pieces in enumerate([cuts, [right[1][:4], right[1][4:]]]):
        digest = block_digest(bytes(32), keys[number], right[number])
        header: pb.BlockHeader | None = pb.BlockHeader(bytes=9, digest=digest)
        for data in pieces:
            arrivals.add(Part(number, header, data))
            header = None
    assert [answer is None for answer in arrivals.loaded] == [True, False]
    assert arrivals.corrupt_blocks == 1
    assert arrivals.complete


def test_a_read_that_broke_off_in_a_block_leaves_nothing_behind() -> None:
    """It is sent again from the start; what had come of the first time does not count."""
    keys, right = [key(0)], block(0, 8)
    arrivals = Arrivals(bytes(32), keys, [memoryview(bytearray(8))])
    header = pb.BlockHeader(bytes=8, digest=block_digest(bytes(32), keys[0], right))
    arrivals.add(Part(0, header, right[:5]))
    arrivals.restart()
    arrivals.add(Part(0, header, right))
    assert arrivals.loaded[0] is not None
