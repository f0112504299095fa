"""Harm to the frames of a read, judged by the client's own assembling of blocks."""

import random

from google.protobuf.message import DecodeError

from benchmarks.harm.frames import in_messages, mutate_frames, mutate_pieces, pieces_of
from benchmarks.tally import Tally
from kvstore.api.errors import KvstoreError
from kvstore.api.parts import parse_reply
from kvstore.api.tier import Block
from kvstore.api.v1 import kvstore_pb2 as pb
from kvstore_client.arrivals import Arrivals
from tests.sim.blocks import chain_of, namespace_of

SURFACE = "read frames"
SPACE = namespace_of("read")
SIZES = (1, 64, 300, 1000)
BLOCKS = 5
BATCH = 100
CONTROLS = 5
GUARD_BYTES = 16


class ReadHarm:
    """Mutates what a node answers, before the client sees it."""

    def __init__(self) -> None:
        self._runs = [chain_of(f"read {size}", BLOCKS, SPACE, size) for size in SIZES]

    async def trials(self, rng: random.Random, note: str, tally: Tally) -> None:
        """One batch of answers with one mutation each, and a few without."""
        for at in range(BATCH + CONTROLS):
            run = rng.choice(self._runs)
            pieces = pieces_of(rng, [(b.digest, bytes(b.data)) for b in run], "memory")
            kind = ""
            if at < BATCH and rng.random() < 0.5:
                kind = mutate_pieces(rng, pieces)
            messages = in_messages(rng, pieces)
            frames = [pb.ReadReply(pieces=each).SerializeToString() for each in messages]
            if at < BATCH and not kind:
                kind = mutate_frames(rng, frames)
            self._judge(run, frames, kind, note, tally)

    def _judge(self, run: list[Block], frames: list[bytes], kind: str, note: str, t: Tally) -> None:
        try:
            delivered, clean = assemble(run, frames)
        except Exception as error:  # noqa: BLE001 - whatever it is, it must not be
            t.failed(SURFACE, f"{kind} raised {type(error).__name__}", note)
            return
        if not kind:
            t.control(SURFACE, delivered == [bytes(b.data) for b in run] and clean, note)
            return
        t.tried(SURFACE, kind)
        if not clean:
            t.failed(SURFACE, f"{kind} wrote past a buffer", note)
        if any(got not in (None, b.data) for got, b in zip(delivered, run, strict=True)):
            t.failed(SURFACE, f"{kind} gave wrong bytes", note)

    async def close(self) -> None:
        """There is nothing to let go of."""


def assemble(run: list[Block], frames: list[bytes]) -> tuple[list[bytes | None], bool]:
    """What a client takes out of an answer, and whether all around its buffers is untouched."""
    size = len(run[0].data)
    stride = size + GUARD_BYTES
    memory = bytearray(b"\xee" * (stride * len(run)))
    slots = [memoryview(memory)[stride * at :][:size] for at in range(len(run))]
    arrivals = Arrivals(SPACE, [block.ref.key for block in run], slots)
    try:
        for frame in frames:
            for part in parse_reply(frame):
                arrivals.add(part)
            if arrivals.complete:
                break
    except (DecodeError, ValueError, KvstoreError):
        pass  # The client leaves such a stream and keeps what was whole.
    guards = (memory[stride * at + size : stride * (at + 1)] for at in range(len(run)))
    clean = all(guard == b"\xee" * GUARD_BYTES for guard in guards)
    answers = zip(arrivals.loaded, slots, strict=True)
    return [bytes(slot) if loaded is not None else None for loaded, slot in answers], clean
