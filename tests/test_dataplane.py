"""The benchmark of the data plane: its rows, its arithmetic, its options; never its figures."""

import asyncio
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from benchmarks.dataplane.command import main
from benchmarks.dataplane.measure import LEAST_SAMPLES, best_knob, measure_cell, why_not
from benchmarks.dataplane.memcpy import Memcpy
from benchmarks.dataplane.mover import Mover
from benchmarks.dataplane.plan import (
    ALL_PATHS,
    FLOORS,
    GOALS,
    MATCH,
    OPS,
    PATHS,
    Cell,
    Plan,
    usual_rotation,
)
from benchmarks.dataplane.report import as_dict, table, warning
from benchmarks.dataplane.ring import Ring
from benchmarks.dataplane.row import row_of
from benchmarks.dataplane.sampler import Sample, take_sample
from benchmarks.dataplane.stage import Refused, Stage
from benchmarks.dataplane.through_client import ThroughClient
from tests.sim.nodes import Nodes

ROOT = Path(__file__).resolve().parent.parent
MIB = 1 << 20
PAGE = 4096
SMALL = [
    "--block-bytes", "64KiB", "--batch", "1,4", "--clients", "1,2", "--match", "20",
    "--repeats", "1", "--sample-s", "0.01", "--rotation-bytes", "1MiB",
]  # fmt: skip
FIELDS = {
    "path", "op", "block_bytes", "batch", "clients", "gb_per_s", "floor", "ratio_to_floor",
    "p50_ms", "p99_ms", "cpu_s_per_gb",
}  # fmt: skip
PATIENCE_S = 60.0


@pytest.mark.timeout(300)
def test_a_small_run_has_a_row_for_every_cell(tmp_path: Path) -> None:
    """All paths, both operations, each with its floor; what this version has not says so."""
    result, picture = tmp_path / "rows.json", tmp_path / "rows.png"
    ran = CliRunner().invoke(
        main,
        [*SMALL, "--paths", ",".join(ALL_PATHS), "--home", str(tmp_path), "--json", str(result),
         "--png", str(picture)],
    )  # fmt: skip
    assert ran.exit_code == 0, ran.output
    written = json.loads(result.read_text())
    assert written["machine"]
    assert written["load_before"] >= 0
    rows = [row for row in written["rows"] if row["op"] != MATCH]
    found = [(row["path"], row["op"], row["batch"], row["clients"]) for row in rows]
    wanted = [(p, op, b, c) for p in PATHS for op in OPS for b in (1, 4) for c in (1, 2)]
    wanted += [("peer", "get", b, c) for b in (1, 4) for c in (1, 2)]
    assert sorted(found) == sorted(wanted)
    for row in rows:
        check_moving(row)
    [match] = [row for row in written["rows"] if row["op"] == MATCH]
    assert (match["path"], match["batch"], match["gb_per_s"]) == ("grpc", 20, None)
    assert match["ratio_to_floor"] == pytest.approx(match["p50_ms"] / match["floor_p50_ms"])
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert all(path in ran.output for path in ALL_PATHS)
    assert {file.name for file in tmp_path.iterdir()} == {"rows.json", "rows.png"}


def check_moving(row: dict[str, Any]) -> None:
    """Every field of a row is there, and means something."""
    assert set(row) >= FIELDS
    assert row["floor"] > 0
    if why_not(row["path"]):
        assert row["reason"] == why_not(row["path"])
        assert (row["gb_per_s"], row["ratio_to_floor"], row["p50_ms"]) == (None, None, None)
        return
    assert row["reason"] == ""
    assert row["gb_per_s"] > 0
    assert row["ratio_to_floor"] == pytest.approx(row["gb_per_s"] / row["floor"])
    assert 0 < row["p50_ms"] <= row["p99_ms"]
    assert row["cpu_s_per_gb"] > 0


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--paths", "grpc,carrier-pigeon", "'carrier-pigeon' is not one of"),
        ("--paths", "", "is not one of"),
        ("--block-bytes", "5000", "a multiple of 4096"),
        ("--block-bytes", "1GiB", "67,108,864"),
        ("--block-bytes", "2 parsecs", "is needed"),
        ("--batch", "0", "1 … 4,096"),
        ("--batch", "1,,2", "1 … 4,096"),
        ("--clients", "-1", "1 … 64"),
        ("--match", "100000", "1 … 65,536"),
        ("--repeats", "0", "1<=x<=1000"),
        ("--sample-s", "nan", "0.001<=x<=60"),
        ("--rotation-bytes", "1", "is needed"),
        ("--home", "/nowhere/at/all", "does not exist"),
    ],
)
def test_bad_options_are_refused(option: str, value: str, said: str) -> None:
    """Before anything is started; the message names what would be right."""
    ran = CliRunner().invoke(main, [option, value])
    assert ran.exit_code == 2
    assert said in ran.output.replace("\n", " ")


def test_sizes_may_have_units() -> None:
    """And lists are put in order, each value once."""
    parse = {option.name: option.type for option in main.params}
    sizes = parse["block_bytes"].convert("2MiB, 64kib,65536", None, None)
    assert sizes == (64 << 10, 2 * MIB)
    assert parse["paths"].convert("redis,shm", None, None) == ("shm", "redis")


def sample(moved_bytes: int, seconds: float, call_ms: list[float], cpu_s: float = 0.0) -> Sample:
    """A sample that began at 100 s."""
    return Sample(moved_bytes, 100.0, 100.0 + seconds, [ms / 1000 for ms in call_ms], cpu_s)


def test_a_row_is_the_median_of_its_samples() -> None:
    """Speed, ratio, percentiles and CPU follow from the samples as they are documented."""
    cell = Cell("grpc", "put", 2 * MIB, 32, 1)
    ours = [sample(10**9, s, [1000 * s], 2 * s) for s in (1.0, 2.0, 4.0)]
    floors = [sample(10**9, s, [1000 * s], s) for s in (1.0, 0.5, 0.1)]
    row = row_of(cell, ours, floors, knob=7)
    assert (row.gb_per_s, row.floor, row.ratio_to_floor) == (0.5, 2.0, 0.25)
    assert row.ratios == pytest.approx((1.0, 0.25, 0.025))
    assert (row.p50_ms, row.p99_ms) == (2000.0, 4000.0)
    assert (row.cpu_s_per_gb, row.floor_cpu_s_per_gb) == (4.0, 0.5)
    assert (row.floor_name, row.floor_knob, row.samples) == ("bare grpcio stream", 7, 3)
    assert (row.goal, row.reached) == (0.9, False)


def test_the_99th_percentile_is_over_all_calls() -> None:
    """Of a hundred calls all but the slowest."""
    calls = [float(ms) for ms in range(1, 101)]
    row = row_of(Cell("shm", "get", PAGE, 1, 1), [sample(PAGE, 1, calls[50:] + calls[:50])], [])
    assert [row.p50_ms, row.p99_ms] == pytest.approx([50.5, 99.0])
    assert (row.floor, row.ratio_to_floor, row.goal, row.reached) == (None, None, None, None)


def test_a_match_is_measured_in_calls_that_do_nothing() -> None:
    """Its ratio is one of times: less is better, and there are no bytes."""
    ours, floors = sample(PAGE, 1, [3.0, 4.0, 9.0]), sample(PAGE, 1, [1.0, 1.0, 2.0])
    row = row_of(Cell("grpc", MATCH, PAGE, 1000, 1), [ours], [floors])
    assert (row.gb_per_s, row.floor, row.cpu_s_per_gb) == (None, None, None)
    assert row.ratio_to_floor == pytest.approx(4.0)
    assert (row.goal, row.reached) == (4.0, True)


def test_clients_count_together() -> None:
    """From the first that began to the last that ended, and with the time of the servers."""
    one, other = sample(10**9, 2.0, [5.0], 1.0), sample(10**9, 4.0, [7.0, 8.0], 2.0)
    both = Sample.together([one, other], 3.0)
    assert (both.gb_per_s, both.cpu_s_per_gb) == (0.5, 3.0)
    assert len(both.call_s) == 3


def test_only_what_the_goals_speak_of_has_one() -> None:
    """2 MiB and 16 MiB in batches of 32, and two lengths of a match."""
    plan = Plan(PATHS, (2 * MIB,), (1, 32), (1, 2), (1000,), 1, 0.1, MIB)
    cells = plan.cells(2 * MIB)
    assert {c.path: c.goal for c in cells if c.batch == 32} == GOALS
    assert {c.goal for c in cells if c.batch == 1} == {None}
    assert [c.goal for c in plan.match_cells()] == [4.0]
    assert set(GOALS) == set(PATHS)
    assert set(FLOORS) == set(ALL_PATHS)
    assert plan.ring_blocks(2 * MIB) == 32


def test_a_turn_is_several_calls_where_that_is_not_too_much_memory() -> None:
    """A single call after a pause would be a sample of the pause."""
    assert usual_rotation(4 * MIB) % (64 * MIB) == 0
    assert usual_rotation(48 * MIB) == 8 * 48 * MIB
    assert usual_rotation(512 * MIB) == 512 * MIB
    plan = Plan(PATHS, (2 * MIB,), (1, 32), (1,), (), 1, 0.1, 0)
    assert len(range(0, plan.ring_blocks(2 * MIB), 32)) == 8


class Scripted:
    """A stage whose samples were written down before: seconds for 10^9 bytes, by way and knob."""

    def __init__(self, seconds: dict[tuple[str, int], list[float]]) -> None:
        self._left = {key: iter(values) for key, values in seconds.items()}
        self._knobs: dict[str, int] = {}

    def prepare(self, way: str, op: str, clients: int, knob: int = 0) -> None:
        """The next samples of a way are those of this knob."""
        self._knobs[way] = knob

    def sample(self, way: str, op: str, batch: int, clients: int, most_s: float) -> Sample:
        """The next one."""
        seconds = next(self._left[way, self._knobs[way]])
        return sample(10**9, seconds, [1000 * seconds])


def test_a_floor_is_measured_with_what_it_is_mostly_fastest_with() -> None:
    """One lucky sample does not choose the depth of all that follow."""
    slow, fast, lucky = [4.0, 4.0, 4.0], [2.0, 2.1, 9.0], [0.1, 5.0, 5.0]
    stage: Any = Scripted(
        {
            ("raw_file", 1): slow,
            ("raw_file", 2): slow,
            ("raw_file", 4): fast,
            ("raw_file", 8): lucky,
        }
    )
    plan = Plan(("disk",), (PAGE,), (1,), (1,), (), 9, 0.1, MIB)
    assert best_knob(plan, stage, Cell("disk", "put", PAGE, 1, 1)) == 4


@pytest.mark.parametrize(("block_bytes", "samples"), [(2 * MIB, 9), (PAGE, LEAST_SAMPLES)])
def test_a_cell_with_a_goal_gets_all_its_samples(
    monkeypatch: pytest.MonkeyPatch, block_bytes: int, samples: int
) -> None:
    """However long they take; others end with fewer."""
    monkeypatch.setattr("benchmarks.dataplane.measure.CELL_S", 0.0)
    stage: Any = Scripted({("raw_resp", 1): [1.0] * 10, ("redis", 0): [2.0] * 10})
    plan = Plan(("redis",), (block_bytes,), (32,), (1,), (), 9, 0.1, MIB)
    row = measure_cell(plan, stage, Cell("redis", "put", block_bytes, 32, 1), 1)
    assert (row.samples, row.ratio_to_floor) == (samples, 0.5)


async def test_shared_memory_and_its_floor_use_the_same_memory(nodes: Nodes) -> None:
    """What the copies of the floor leave there is what our own path reads."""
    node, ring = await nodes.start(), Ring(PAGE, 4, 0)
    path = await ThroughClient.connect(ring, 0, "shm", node.endpoint)
    floor = Memcpy(ring, await ThroughClient.connect(ring, 0, "shm", node.endpoint))
    await path.prepare("get")
    await floor.prepare("get")
    before = bytes(ring.source(range(4)))
    ring.source(range(2, 3))[-1] ^= 1
    floor.put(range(4))
    await path.get(range(4))
    assert ring.target(range(4)) == ring.source(range(4))
    assert ring.target(range(4)) != before
    await floor.close()
    await path.close()


async def test_a_sample_ends_when_its_time_is_over() -> None:
    """But not before one call for each task was made, and each call is made once."""
    calls = [range(number, number + 1) for number in range(100)]
    made: list[int] = []

    async def move(places: range) -> None:
        made.append(places.start)
        await asyncio.sleep(0)

    taken = await take_sample(move, calls, block_bytes=PAGE, tasks=2, most_s=0)
    assert sorted(made) == [0, 1]
    assert taken.moved_bytes == 2 * PAGE
    blocking: list[range] = []
    taken = await take_sample(blocking.append, calls, block_bytes=1, tasks=3, most_s=PATIENCE_S)
    assert sorted(blocking, key=lambda places: places.start) == calls
    assert len(taken.call_s) == 100


async def test_wrong_bytes_are_noticed() -> None:
    """A way that brings back what was not put is no path."""

    class Forgetful(Memcpy):
        """Its second half goes astray."""

        def get(self, places: range) -> None:
            super().get(places)
            self._ring.target(range(places.stop - 1, places.stop))[-1] ^= 1

    ring = Ring(PAGE, 4, 0)
    mover = Mover(0, ring, {})
    mover.ways["memcpy"] = Forgetful(ring)
    await mover.obey({"do": "prepare", "way": "memcpy", "op": "get", "knob": 0})
    assert await mover.obey({"do": "check", "way": "memcpy", "batch": 2}) == {"wrong_blocks": 1}
    mover.ways["memcpy"] = Memcpy(ring)
    await mover.obey({"do": "prepare", "way": "memcpy", "op": "get", "knob": 0})
    assert await mover.obey({"do": "check", "way": "memcpy", "batch": 2}) == {"wrong_blocks": 0}


def test_what_a_client_cannot_do_is_said_and_others_go_on(tmp_path: Path) -> None:
    """The process stays, and is asked the next thing."""
    with Stage(tmp_path, PAGE, 4, 1, set()) as stage:
        with pytest.raises(Refused, match="endpoint"):
            stage.prepare("grpc", "put", 1)
        stage.prepare("memcpy", "put", 1)
        assert stage.sample("memcpy", "put", 1, 1, 1.0).moved_bytes == 4 * PAGE


def test_the_table_says_why_a_row_is_empty() -> None:
    """And JSON has null there."""
    cell = Cell("bulk", "put", 2 * MIB, 32, 1)
    row = row_of(cell, [], [sample(10**9, 1.0, [1.0])], reason="no such path")
    assert "bulk did not run: no such path" in str(table("a machine", [row]).caption)
    [written] = as_dict("a machine", [row])["rows"]
    assert (written["gb_per_s"], written["floor"]) == (None, 1.0)


def test_who_measures_on_a_busy_machine_is_told() -> None:
    """With the load and the CPUs; on an idle one nothing is said."""
    assert warning(0.0) == ""
    cpus = os.cpu_count() or 1
    assert f"load {2.0 * cpus:.1f} on {cpus} CPUs" in warning(2.0 * cpus)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_who_interrupts_a_run_leaves_nothing_behind(tmp_path: Path, number: int) -> None:
    """Node, Redis and clients end with it, and its files are gone."""
    command = [sys.executable, "-m", "benchmarks.dataplane", *SMALL, "--paths", "grpc,redis"]
    process = subprocess.Popen(
        [*command, "--repeats", "1000", "--home", str(tmp_path)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, process_group=0,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert b"1 of " in process.stdout.readline()  # It measures: all its children are there.
        children = children_of(process.pid)
        assert len(children) >= 5, "floors, Redis, a node and two clients"
        os.killpg(process.pid, number)
        output, _ = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
    assert process.returncode not in (0, -number)
    assert b"Traceback" not in output
    wait_for_the_end(children)
    assert list(tmp_path.iterdir()) == []


def children_of(pid: int) -> set[int]:
    """The children that a process has now."""
    words = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return set(map(int, words))


def wait_for_the_end(pids: set[int]) -> None:
    """Who was born as the signal came hears from its closed input that it is not needed."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            ended = os.pidfd_open(pid)
            try:
                assert select.select([ended], [], [], PATIENCE_S)[0], f"{pid} is still there"
            finally:
                os.close(ended)
