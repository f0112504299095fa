"""Harm to single records, judged by the code that every stored byte passes on its way back."""

import random

from benchmarks.harm.mutants import HEADER_BYTES, RecordMutations
from benchmarks.tally import Tally
from kvstore.api.tier import Block, BlockRef
from kvstore.codec import CODECS
from kvstore.names import block_name
from kvstore.record import Damaged, Header, decode_block, encode_block
from tests.sim.blocks import block_of, keys_of, namespace_of

SURFACE = "records"
NAMESPACE = namespace_of("mutated")
SIZES = (1, 64, 500, 1000, 4096, 6000)
BATCH = 500
CONTROLS = 25


class RecordHarm:
    """Mutates records in memory and decodes what came of them."""

    def __init__(self) -> None:
        self._records: list[tuple[Block, bytes]] = []
        for name, codec in CODECS.items():
            for size in SIZES:
                for key in keys_of(f"record {name} {size}", 3):
                    block = block_of(BlockRef(NAMESPACE, key), None, size)
                    header, payload = encode_block(block, codec(), now_s=1_700_000_000)
                    self._records.append((block, header.pack() + bytes(payload)))

    async def trials(self, rng: random.Random, note: str, tally: Tally) -> None:
        """One batch of mutations, with controls among them."""
        mutations = RecordMutations(rng)
        for _ in range(BATCH):
            (block, record), (_, other) = rng.choices(self._records, k=2)
            kind, mutant = mutations.mutate(record, other)
            tally.tried(SURFACE, kind)
            try:
                read = _read(block, mutant)
            except Exception as error:  # noqa: BLE001 - whatever it is, it must not be
                tally.failed(SURFACE, f"{kind} raised {type(error).__name__}", note)
                continue
            if read is not None and read != block.data:
                tally.failed(SURFACE, f"{kind} gave wrong bytes", note)
        for block, record in rng.sample(self._records, k=CONTROLS):
            tally.control(SURFACE, _read(block, record) == bytes(block.data), note)

    async def close(self) -> None:
        """There is nothing to let go of."""


def _read(block: Block, record: bytes) -> bytes | None:
    """What a tier would deliver of these stored bytes; None for a miss."""
    into = bytearray(len(block.data))
    try:
        header = Header.unpack(record[:HEADER_BYTES])
        payload = memoryview(record)[HEADER_BYTES:][: header.stored_bytes]
        decode_block(header, block_name(block.ref), payload, memoryview(into))
    except Damaged:
        return None
    return bytes(into)
