"""`kvstore replay`: its JSON, its table, its picture, and how it refuses."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from kvstore.policy.policies import POLICIES
from kvstore.replay.replay_command import replay


@pytest.fixture
def trace_file(tmp_path: Path) -> Path:
    """300 requests of 40 conversations."""
    path = tmp_path / "trace.jsonl"
    with path.open("w") as file:
        for number in range(300):
            chat = number * 7 % 40
            blocks = 2 + number // 40
            record = {
                "timestamp": number * 1000,
                "input_length": blocks * 512 + 100,
                "output_length": 1,
                "hash_ids": [0, *(1000 * (chat + 1) + at for at in range(blocks))],
            }
            file.write(json.dumps(record) + "\n")
    return path


def test_the_json_has_every_policy_at_every_capacity(trace_file: Path, tmp_path: Path) -> None:
    """Exactly the promised fields, rates as fractions, none above the optimum."""
    out = tmp_path / "out.json"
    ran = CliRunner().invoke(replay, [str(trace_file), "--jobs", "1", "--json", str(out)])
    assert ran.exit_code == 0, ran.output
    found = json.loads(out.read_text())
    assert list(found) == [
        "trace", "requests", "unique_blocks", "infinite_token_hit_rate", "rows",
    ]  # fmt: skip
    assert (found["trace"], found["requests"]) == ("trace.jsonl", 300)
    rows = {(row["policy"], row["capacity_fraction"]): row for row in found["rows"]}
    assert {policy for policy, _ in rows} == {
        "lru", "lru2", "lfuda", "s3fifo", "leaf-gdsf", "default", "min",
    }  # fmt: skip
    assert {share for _, share in rows} == {0.01, 0.02, 0.05, 0.1, 0.2, 0.5}
    for (_, share), row in rows.items():
        assert row["capacity_blocks"] == max(1, int(share * found["unique_blocks"]))
        best = rows["min", share]["token_hit_rate"]
        assert 0 <= row["token_hit_rate"] <= best <= found["infinite_token_hit_rate"] <= 1


def test_processes_find_what_one_finds(trace_file: Path, tmp_path: Path) -> None:
    """The result does not depend on the number of jobs."""
    files = [tmp_path / "one.json", tmp_path / "two.json"]
    for jobs, file in zip("12", files, strict=True):
        arguments = [
            str(trace_file), "--policy", "lru", "--policy", "default", "--capacity", "5%,40",
            "--jobs", jobs, "--json", str(file),
        ]  # fmt: skip
        ran = CliRunner().invoke(replay, arguments)
        assert ran.exit_code == 0, ran.output
    one, two = (json.loads(file.read_text()) for file in files)
    assert one == two
    assert {row["capacity_blocks"] for row in one["rows"]} >= {40}


def test_it_draws_a_picture(trace_file: Path, tmp_path: Path) -> None:
    """A PNG of a size that can be read."""
    pytest.importorskip("matplotlib")
    picture = tmp_path / "out.png"
    arguments = [str(trace_file), "--policy", "lru", "--policy", "min", "--png", str(picture)]
    ran = CliRunner().invoke(replay, [*arguments, "--jobs", "1"])
    assert ran.exit_code == 0, ran.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "optimum" not in ran.output
    assert "min" in ran.output


def test_a_bad_trace_ends_with_one_line(tmp_path: Path) -> None:
    """No traceback: file, line, field, and what to do."""
    path = tmp_path / "bad.jsonl"
    path.write_text('{"timestamp": 0, "hash_ids": [1]}\n')
    ran = CliRunner().invoke(replay, [str(path)])
    assert ran.exit_code == 1
    assert ran.output == (
        f"Error: {path}:1: input_length: is missing; expected tokens of the prompt, a whole "
        "number\n"
    )


def test_what_is_odd_is_said_once_on_standard_error(trace_file: Path) -> None:
    """Not by each process that reads the trace, and not among the results."""
    lines = trace_file.read_text().splitlines()
    trace_file.write_text("\n".join(reversed(lines)) + "\n")
    arguments = [str(trace_file), "--policy", "lru", "--capacity", "5%,10%", "--jobs", "2"]
    ran = CliRunner().invoke(replay, arguments)
    assert ran.exit_code == 0, ran.output
    assert ran.stderr.count("timestamp: goes back in 299 of 300 lines") == 1
    assert "goes back" not in ran.stdout


@pytest.mark.parametrize("capacity", ["0", "-5", "0.0", "many", "5%%", "1,,2", "inf"])
def test_a_capacity_that_makes_no_sense_is_refused(trace_file: Path, capacity: str) -> None:
    """Before anything is read."""
    ran = CliRunner().invoke(replay, [str(trace_file), "--capacity", capacity])
    assert ran.exit_code == 2
    assert "neither 1000 (blocks) nor 0.05 nor 5%" in ran.output


def test_an_interrupt_ends_all_processes(trace_file: Path) -> None:
    """Ctrl-C: exit status 130, no traceback, no process left behind."""
    lines = trace_file.read_text()
    with trace_file.open("a") as file:
        for again in range(1, 60):
            for line in lines.splitlines():
                record = json.loads(line)
                record["timestamp"] += again * 300_000
                record["hash_ids"] = [each + again * 100_000 for each in record["hash_ids"]]
                file.write(json.dumps(record) + "\n")
    code = "from kvstore.cli import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "replay", str(trace_file), "--jobs", "2"],
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while len(_group(process.pid)) < 3 and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    # Python's own tracker of semaphores ends by itself, a moment after the last who has one.
    deadline = time.monotonic() + 5
    while _group(process.pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert _group(process.pid) == []


def _group(leader: int) -> list[str]:
    """The processes of a process group."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == leader and fields[0] != "Z":
            found.append(stat.parent.name)
    return found


def test_policies_of_the_command_are_those_of_the_node() -> None:
    """What can be replayed can be set, and the other way round; the optimum is no policy."""
    kinds = {each.name: each.type for each in replay.params}
    choice = kinds["policies"]
    assert isinstance(choice, click.Choice)
    assert set(choice.choices) == {*POLICIES, "min"}
