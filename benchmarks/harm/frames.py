"""Harm to messages on the wire: to their bytes, and to what well-formed messages say."""

import random
from collections.abc import Callable, Sequence

from benchmarks.harm.mutants import HOSTILE_LENGTHS, cut, flipped, scribbled, shifted
from kvstore.api.v1 import kvstore_pb2 as pb

Pieces = list[pb.Piece]
HOSTILE_INDEXES = (2**31 - 1, 2**31, 2**32 - 1)


def pieces_of(rng: random.Random, blocks: Sequence[tuple[bytes, bytes]], tier: str) -> Pieces:
    """The pieces of whole blocks, given as digest and bytes, cut in various places."""
    pieces: Pieces = []
    for index, (digest, data) in enumerate(blocks):
        step = rng.choice((len(data), max(1, len(data) // 2), max(1, len(data) // 3 + 1)))
        for start in range(0, len(data), step):
            pieces.append(pb.Piece(block=index, data=data[start : start + step]))
            if not start:
                header = pb.BlockHeader(bytes=len(data), digest=digest, tier=tier)
                pieces[-1].header.CopyFrom(header)
    return pieces


def in_messages(rng: random.Random, pieces: Pieces) -> list[Pieces]:
    """Pieces as they travel: a few in each message."""
    messages: list[Pieces] = []
    while pieces:
        count = rng.randrange(1, len(pieces) + 1)
        messages.append(pieces[:count])
        pieces = pieces[count:]
    return messages


def _header_piece(rng: random.Random, pieces: Pieces) -> pb.Piece:
    return rng.choice([piece for piece in pieces if piece.HasField("header")])


def _lost(rng: random.Random, pieces: Pieces) -> None:
    del pieces[rng.randrange(len(pieces))]


def _doubled(rng: random.Random, pieces: Pieces) -> None:
    pieces.insert(rng.randrange(len(pieces) + 1), rng.choice(pieces))


def _swapped(rng: random.Random, pieces: Pieces) -> None:
    one, two = rng.randrange(len(pieces)), rng.randrange(len(pieces))
    pieces[one], pieces[two] = pieces[two], pieces[one]


def _swapped_data(rng: random.Random, pieces: Pieces) -> None:
    one, two = rng.choice(pieces), rng.choice(pieces)
    one.data, two.data = two.data, one.data


def _swapped_digests(rng: random.Random, pieces: Pieces) -> None:
    one, two = _header_piece(rng, pieces), _header_piece(rng, pieces)
    one.header.digest, two.header.digest = two.header.digest, one.header.digest


def _swapped_indexes(rng: random.Random, pieces: Pieces) -> None:
    one, two = rng.choice(pieces), rng.choice(pieces)
    one.block, two.block = two.block, one.block


def _other_index(rng: random.Random, pieces: Pieces) -> None:
    rng.choice(pieces).block = rng.choice((*range(10), *HOSTILE_INDEXES))


def _other_length(rng: random.Random, pieces: Pieces) -> None:
    header = _header_piece(rng, pieces).header
    header.bytes = rng.choice((*HOSTILE_LENGTHS, header.bytes - 1, header.bytes + 1))


def _other_digest(rng: random.Random, pieces: Pieces) -> None:
    header = _header_piece(rng, pieces).header
    header.digest = rng.choice((b"", header.digest[:-1], header.digest + b"\0", rng.randbytes(16)))


def _without_header(rng: random.Random, pieces: Pieces) -> None:
    _header_piece(rng, pieces).ClearField("header")


def _longer_data(rng: random.Random, pieces: Pieces) -> None:
    rng.choice(pieces).data += rng.randbytes(rng.randrange(1, 100))


def _damaged_data(rng: random.Random, pieces: Pieces) -> None:
    piece = rng.choice(pieces)
    damage = rng.choice((lambda d: flipped(d, rng.randrange(8 * len(d))), _worse(rng)))
    piece.data = damage(piece.data)


def _worse(rng: random.Random) -> Callable[[bytes], bytes]:
    return lambda data: rng.choice((scribbled, cut, shifted))(rng, data)


PIECE_MUTATIONS: dict[str, Callable[[random.Random, Pieces], None]] = {
    "lost piece": _lost,
    "doubled piece": _doubled,
    "swapped pieces": _swapped,
    "swapped data": _swapped_data,
    "swapped digests": _swapped_digests,
    "swapped indexes": _swapped_indexes,
    "other index": _other_index,
    "other length": _other_length,
    "other digest": _other_digest,
    "piece without header": _without_header,
    "longer data": _longer_data,
    "damaged data": _damaged_data,
}

FRAME_MUTATIONS: dict[str, Callable[[random.Random, bytes], bytes]] = {
    "bit of a frame": lambda rng, frame: flipped(frame, rng.randrange(8 * len(frame))),
    "byte run in a frame": scribbled,
    "frame cut": cut,
    "frame shifted": shifted,
}


def mutate_pieces(rng: random.Random, pieces: Pieces) -> str:
    """Harms well-formed pieces in place and says how."""
    kind = rng.choice(list(PIECE_MUTATIONS))
    PIECE_MUTATIONS[kind](rng, pieces)
    return kind


def mutate_frames(rng: random.Random, frames: list[bytes]) -> str:
    """Harms one of several serialized messages, or their order, in place and says how."""
    kind = rng.choice([*FRAME_MUTATIONS, "frames swapped", "frame lost", "frame doubled"])
    at = rng.randrange(len(frames))
    if kind == "frames swapped":
        other = rng.randrange(len(frames))
        frames[at], frames[other] = frames[other], frames[at]
    elif kind == "frame lost":
        del frames[at]
    elif kind == "frame doubled":
        frames.insert(rng.randrange(len(frames) + 1), frames[at])
    elif frames[at]:
        frames[at] = FRAME_MUTATIONS[kind](rng, frames[at])
    return kind
