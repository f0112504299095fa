"""A scrub finds what is not as it was written, on a directory and on a running node."""

import asyncio
import json
import random
from pathlib import Path

import pytest
from click.testing import CliRunner

from kvstore.api.errors import TierError
from kvstore.files import PAGE_BYTES, DirectoryFiles
from kvstore.record import HEADER_BYTES
from kvstore.scrub import check_directory
from kvstore.scrub_command import scrub
from kvstore.tiers.disk import SCRUB_FAILURES, DiskTier, Scrubbed
from tests.sim.blocks import chain_of, keys_of, namespace_of, present
from tests.sim.files import FailAlways, SimulatedFiles
from tests.sim.nodes import Nodes, descriptor_of, load, store
from tests.sim.rig import Rig

MINE = namespace_of("mine")
SIZE = 6000
RECORD_BYTES = 3 * PAGE_BYTES


async def filled(rig: Rig, files: SimulatedFiles | DirectoryFiles, blocks: int = 12) -> DiskTier:
    """A disk tier with one chain."""
    tier = await rig.disk(files, segment_bytes=1 << 16)
    await tier.store(chain_of("chain", blocks, MINE, SIZE))
    return tier


async def test_an_intact_directory_is_clean(rig: Rig) -> None:
    """Sealed segments and the one without a footer: every block is counted, nothing is found."""
    files = SimulatedFiles()
    await filled(rig, files)
    found = list(check_directory(files.copy()))
    assert [checked.sealed for checked in found] == [True, True, False]
    assert sum(checked.blocks for checked in found) == 12
    assert not any(checked.problems for checked in found)


async def test_every_damaged_byte_of_a_record_is_found(rig: Rig, rng: random.Random) -> None:
    """One flipped bit of header or payload, or a byte of a first page: named with its file."""
    files = SimulatedFiles()
    await filled(rig, files)
    name = min(files.names())
    for _ in range(60):
        at = rng.choice([rng.randrange(36), PAGE_BYTES + rng.randrange(PAGE_BYTES // 16)])
        at = rng.choice([at, 2 * PAGE_BYTES + rng.randrange(SIZE)])
        spoilt = files.copy()
        spoilt.flip(name, 8 * at + rng.randrange(8))
        [checked, *others] = check_directory(spoilt)
        # Without its first header a segment's footer is not believed: that is another problem.
        unbelieved = PAGE_BYTES <= at < PAGE_BYTES + HEADER_BYTES
        assert (checked.file, len(checked.problems)) == (name, 2 if unbelieved else 1), at
        assert not any(other.problems for other in others)
    assert files.names()


async def test_the_command_checks_a_directory_and_changes_nothing(rig: Rig, tmp_path: Path) -> None:
    """Exit status 0 and a count; 1 and the file's name after a flipped bit; JSON for machines."""
    home = tmp_path / "blocks"
    files = rig.real_files(home)
    tier = await filled(rig, files)
    busy = CliRunner().invoke(scrub, [str(home)])
    assert busy.exit_code == 1
    assert "in use by another process" in busy.output
    await tier.close()
    rig.gone(tier)
    files.shut()
    rig._closers.clear()
    before = {path.name: path.read_bytes() for path in home.glob("*.segment")}
    clean = CliRunner().invoke(scrub, [str(home), "--json"])
    assert clean.exit_code == 0, clean.output
    assert json.loads(clean.stdout)["checked_blocks"] == 12
    assert {path.name: path.read_bytes() for path in home.glob("*.segment")} == before
    victim = min(home.glob("*.segment"))
    spoilt = bytearray(before[victim.name])
    spoilt[2 * PAGE_BYTES + 100] ^= 1
    victim.write_bytes(spoilt)
    damaged = CliRunner().invoke(scrub, [str(home)])
    assert damaged.exit_code == 1
    assert victim.name in damaged.output.replace("\n", "")


@pytest.mark.parametrize("arguments", [[], [".", "--endpoint", "x"], ["--rate", "x"], ["nowhere"]])
def test_wrong_use_is_explained(arguments: list[str]) -> None:
    """With exit status 2 and what is needed."""
    ran = CliRunner().invoke(scrub, arguments)
    assert ran.exit_code == 2
    assert "Error" in ran.output


async def test_a_running_tier_drops_what_is_damaged_at_a_bounded_rate(rig: Rig) -> None:
    """With its descendants, as a read would; the next store repairs it. Time passes by the rate."""
    files = SimulatedFiles()
    tier = await filled(rig, files)
    blocks = chain_of("chain", 12, MINE, SIZE)
    files.flip(min(files.names()), 8 * (PAGE_BYTES + 2 * RECORD_BYTES + PAGE_BYTES + 10))
    task = asyncio.create_task(reports_of(tier, 10 * RECORD_BYTES))
    while not task.done():
        await rig.clock.advance(0.05)
    reports = task.result()
    assert [report.blocks for report in reports[:2]] == [1, 2], "it did not pause"
    assert rig.clock.monotonic_s() > 0.2
    assert (reports[-1].damaged, reports[-1].total) == (1, 12)
    assert await present(tier, blocks) == [True] * 2 + [False] * 10
    assert rig.counted("corrupt", tier="disk") == 1
    assert await tier.store(blocks) == [True] * 12
    assert await present(tier, blocks) == [True] * 12


async def reports_of(tier: DiskTier, bytes_per_s: float) -> list[Scrubbed]:
    """All that a scrub says."""
    return [report async for report in tier.scrub(bytes_per_s)]


async def test_a_broken_device_ends_a_scrub_and_keeps_the_index(rig: Rig) -> None:
    """Blocks that cannot be read are not damaged; only the first few are given up."""
    files = SimulatedFiles()
    tier = await rig.disk(files)
    chains = [chain_of(str(number), 2, MINE, SIZE) for number in range(6)]
    for blocks in chains:
        await tier.store(blocks)
    files.fault = FailAlways(5, ["read"])
    with pytest.raises(TierError):
        await reports_of(tier, 1 << 40)
    files.fault = None
    held = [await present(tier, blocks) for blocks in chains]
    assert held.count([True] * 2) == len(chains) - SCRUB_FAILURES


async def test_a_running_node_scrubs_itself_when_asked(nodes: Nodes, tmp_path: Path) -> None:
    """The command prints what the node found."""
    server = await nodes.start()
    client = nodes.connect(server)
    space = await client.open_space(descriptor_of())
    keys = keys_of("chain", 10)
    await store(client, space, keys)
    await server.node.tiers.flush()
    ran = await asyncio.to_thread(
        CliRunner().invoke, scrub, ["--endpoint", server.endpoint, "--json"]
    )
    assert ran.exit_code == 0, ran.output
    assert json.loads(ran.stdout)["checked_blocks"] == 10
    assert await load(client, space, keys) == ["memory"] * 10
