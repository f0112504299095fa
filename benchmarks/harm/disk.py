"""Harm to the files of the disk tier, judged by a tier that starts over them."""

import random
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harm.mutants import HEADER_BITS, PAGE_BYTES, RecordMutations, flipped
from benchmarks.harm.segment_image import (
    BLOCK_KIND,
    FORGET_BLOCK,
    SEGMENT_MUTATIONS,
    Place,
    SegmentImage,
    harm_record,
    hostile_offset,
)
from benchmarks.tally import Tally
from kvstore.api.tier import Block
from kvstore.codec import LOSSLESS
from kvstore.files import DirectoryFiles
from kvstore.names import block_name
from kvstore.tiers.disk import DiskTier
from tests.sim.blocks import buffers_for, chain_of, namespace_of
from tests.sim.rig import Rig

SURFACE = "disk"
NAMESPACE = namespace_of("mutated")
SEGMENT_BYTES = 1 << 17
CAPACITY_BYTES = 64 * SEGMENT_BYTES
SIZES = (64, 500, 2000, 6000)
SINGLES = 36
CHAINS = 4
CHAIN_BLOCKS = 3
FORGOTTEN = 2
MOST_HARMED = 20
REPAIR_ONE_IN = 8
MEMORY_HOME = Path("/dev/shm")


def fast_directory(prefix: str) -> Path:
    """A temporary directory in memory, where the system has such; else on disk."""
    home = MEMORY_HOME if MEMORY_HOME.is_dir() else None
    return Path(tempfile.mkdtemp(prefix=prefix, dir=home))


class DiskHarm:
    """Mutates segments, starts a tier over them, reads every block, and stores some again."""

    def __init__(self) -> None:
        self._home = fast_directory("kvstore-mutations-")
        self._blocks = [
            block
            for number in range(SINGLES + CHAINS)
            for block in chain_of(
                f"disk {number}",
                1 if number < SINGLES else CHAIN_BLOCKS,
                NAMESPACE,
                SIZES[number % len(SIZES)],
            )
        ]
        self._forgotten = chain_of("disk forgotten", FORGOTTEN, NAMESPACE, SIZES[0])
        self._images: list[SegmentImage] = []

    async def trials(self, rng: random.Random, note: str, tally: Tally) -> None:
        """One directory with harm to a few of its records, or to one of its segments."""
        if not self._images:
            self._images = [await self._image(codec) for codec in LOSSLESS]
            self._images += [_without_footers(image) for image in self._images]
        image = rng.choice(self._images).copy()
        chance = rng.random()
        if chance < 0.05:
            kinds, harmed = _harm_forgetting(rng, image)
        elif chance < 0.3:
            kinds, harmed = _harm_segment(rng, image)
        else:
            kinds, harmed = _harm_records(rng, image)
        for kind in kinds:
            tally.tried(SURFACE, kind)
        rig = Rig()
        try:
            await self._judge(rig, rng, image, harmed, f"{note} ({', '.join(kinds)})", tally)
        except Exception as error:  # noqa: BLE001 - whatever it is, it must not be
            what = f"{kinds[0] if len(kinds) == 1 else 'harm'} raised {type(error).__name__}"
            tally.failed(SURFACE, what, f"{note} ({', '.join(kinds)}): {error}")

    async def _image(self, codec: str) -> SegmentImage:
        rig, files = Rig(), DirectoryFiles(self._home / codec)
        tier = await self._open(rig, files, codec)
        half = SINGLES // 2
        assert all(await tier.store(self._blocks[:half]))
        assert all(await tier.store(self._forgotten))
        assert await tier.discard([b.ref for b in self._forgotten]) == FORGOTTEN
        assert all(await tier.store(self._blocks[half:]))
        await tier.close()
        files.shut()
        return SegmentImage.of(self._home / codec)

    async def _open(self, rig: Rig, files: DirectoryFiles, codec: str = "raw") -> DiskTier:
        return await rig.disk(
            files, codec=codec, capacity_bytes=CAPACITY_BYTES, segment_bytes=SEGMENT_BYTES
        )

    async def _judge(
        self, rig: Rig, rng: random.Random, image: SegmentImage, harmed: set[bytes],
        note: str, tally: Tally,
    ) -> None:  # fmt: skip
        image.write(self._home / "harmed")
        files = DirectoryFiles(self._home / "harmed")
        try:
            tier = await self._open(rig, files)
            try:
                delivered = await self._read(tier, note, tally)
                spoilt = _with_descendants(self._blocks, harmed)
                for block, got in zip(self._blocks, delivered, strict=True):
                    if block_name(block.ref) not in spoilt:
                        tally.control(SURFACE, got, note)
                if any(await tier.locate([block.ref for block in self._forgotten])):
                    tally.failed(SURFACE, "what was forgotten is back", note)
                if rng.random() < 1 / REPAIR_ONE_IN:
                    await self._repair(tier, note, tally)
                tier.check()
            finally:
                await tier.close()
        finally:
            files.shut()

    async def _read(self, tier: DiskTier, note: str, tally: Tally) -> list[bool]:
        loads = buffers_for(self._blocks)
        answers = await tier.load(loads)
        for block, load, loaded in zip(self._blocks, loads, answers, strict=True):
            if loaded is not None and load.into != block.data:
                tally.failed(SURFACE, "wrong bytes", note)
        return [loaded is not None for loaded in answers]

    async def _repair(self, tier: DiskTier, note: str, tally: Tally) -> None:
        """What was damaged and found to be so is stored again by the next store."""
        stored = await tier.store(self._blocks)
        delivered = await self._read(tier, note, tally)
        tally.note("disk: directories repaired")
        if not all(stored) or not all(delivered):
            tally.failed(SURFACE, "not repaired by the next store", note)

    async def close(self) -> None:
        """Deletes the directories."""
        shutil.rmtree(self._home, ignore_errors=True)


def _without_footers(image: SegmentImage) -> SegmentImage:
    """The same directory as it lies there before anything was sealed."""
    ends = {name: image.footer(name)[0] for name in image.files}
    return SegmentImage({name: data[: ends[name]] for name, data in image.files.items()})


def _harm_records(rng: random.Random, image: SegmentImage) -> tuple[list[str], set[bytes]]:
    places = [
        place for name in image.files for place in image.places(name) if place.kind == BLOCK_KIND
    ]
    rng.shuffle(places)
    mutations = RecordMutations(rng)
    kinds: list[str] = []
    harmed: set[bytes] = set()
    for at in range(0, rng.randrange(2, MOST_HARMED + 1), 2):
        pair: list[Place] = places[at : at + 2]  # Each record is harmed once.
        if image.footer(pair[0].file)[1] and rng.random() < 0.05:
            kind, touched = hostile_offset(rng, image, pair[0]), {pair[0].name}
        else:
            kind, touched = harm_record(rng, image, pair, mutations)
        kinds.append(kind)
        harmed |= touched
    return kinds, harmed


def _harm_forgetting(rng: random.Random, image: SegmentImage) -> tuple[list[str], set[bytes]]:
    """Harms a forget record. What is older than it may be gone, what it forgot has to be."""
    places = [place for name in image.files for place in image.places(name)]
    target = rng.choice([place for place in places if place.kind == FORGET_BLOCK])
    page = rng.choice((flipped(image.pages(target), rng.randrange(HEADER_BITS)), bytes(PAGE_BYTES)))
    image.patch(target.file, target.offset, page)
    return ["forget record"], {place.name for place in places if place.sequence < target.sequence}


def _harm_segment(rng: random.Random, image: SegmentImage) -> tuple[list[str], set[bytes]]:
    """Harms one segment; what lay in it, or in its partner, may be gone afterwards."""
    before = {name: (data, image.places(name)) for name, data in image.files.items()}
    kind = rng.choice(list(SEGMENT_MUTATIONS))
    SEGMENT_MUTATIONS[kind](rng, image, rng.choice(list(image.files)))
    changed = [
        place
        for name, (data, places) in before.items()
        if image.files[name] != data
        for place in places
    ]
    # Where a forget record is lost, nobody knows what it forgot: older blocks may go with it.
    until = max((p.sequence for p in changed if p.kind == FORGET_BLOCK), default=0)
    older = {p.name for _, places in before.values() for p in places if p.sequence < until}
    return [f"segment: {kind}"], {place.name for place in changed} | older


def _with_descendants(blocks: Sequence[Block], names: set[bytes]) -> set[bytes]:
    """These blocks and those below them; parents stand before their children."""
    spoilt = set(names)
    for block in blocks:
        if block.parent is not None and block_name(block.parent) in spoilt:
            spoilt.add(block_name(block.ref))
    return spoilt
