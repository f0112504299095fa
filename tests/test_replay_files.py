"""Trace files: what is read, and what is said of those that cannot be."""

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest

from kvstore.api.hint import Reuse
from kvstore.replay.readers import read_hints, read_trace
from kvstore.replay.trace import TraceError

MOONCAKE: dict[str, Any] = {
    "timestamp": 1500,
    "input_length": 1100,
    "output_length": 5,
    "hash_ids": [1, 2, 3],
}
BAILIAN: dict[str, Any] = {
    "chat_id": 7,
    "parent_chat_id": -1,
    "timestamp": 1.5,
    "input_length": 33,
    "output_length": 5,
    "type": "text",
    "turn": 1,
    "hash_ids": [1, 2, 3],
}


def written(path: Path, *records: object) -> Path:
    """A file with one line for each record."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_a_mooncake_trace_is_read(tmp_path: Path) -> None:
    """Milliseconds, blocks of 512 tokens, the partial one at the end left out of the chain."""
    later = MOONCAKE | {"timestamp": 2500, "hash_ids": [1, 2, 4]}
    trace = read_trace(written(tmp_path / "t.jsonl", MOONCAKE, later))
    assert trace.block_tokens == 512
    assert [request.at_s for request in trace.requests] == [1.5, 2.5]
    assert [len(request.chain) for request in trace.requests] == [2, 2]
    assert trace.requests[0].chain == trace.requests[1].chain
    assert trace.unique_blocks == 4
    assert trace.infinite_token_hit_rate == pytest.approx(1024 / 2200)


def test_a_bailian_trace_is_read(tmp_path: Path) -> None:
    """Seconds, blocks of 16 tokens; the partial block may be named or not."""
    later = BAILIAN | {"timestamp": 4, "hash_ids": [1, 2]}
    trace = read_trace(written(tmp_path / "t.jsonl", BAILIAN, later))
    assert trace.block_tokens == 16
    assert [request.at_s for request in trace.requests] == [1.5, 4.0]
    assert [len(request.chain) for request in trace.requests] == [2, 2]


@pytest.mark.parametrize("mark", ["chat_id", "parent_chat_id"])
def test_one_of_its_own_fields_makes_a_bailian_trace(tmp_path: Path, mark: str) -> None:
    """Its seconds are never taken for milliseconds, whichever fields were dropped."""
    kept = {"timestamp", "input_length", "hash_ids", mark}
    record = {key: value for key, value in BAILIAN.items() if key in kept}
    trace = read_trace(written(tmp_path / "t.jsonl", record))
    assert (trace.requests[0].at_s, trace.block_tokens) == (1.5, 16)


@pytest.mark.parametrize("record", [MOONCAKE, BAILIAN])
def test_the_length_of_the_answer_may_be_left_out(tmp_path: Path, record: dict[str, Any]) -> None:
    """A replay does not need it."""
    without = {key: value for key, value in record.items() if key != "output_length"}
    path = written(tmp_path / "t.jsonl", without, record | {"output_length": None})
    assert len(read_trace(path).requests) == 2


def test_requests_are_replayed_in_the_order_of_time(tmp_path: Path) -> None:
    """Whatever the order of the lines; of the same time the earlier line first; it is said."""
    times = [5000, 3000, 5000, 4000]
    records = [MOONCAKE | {"timestamp": at, "hash_ids": [n, n, n]} for n, at in enumerate(times)]
    path = written(tmp_path / "t.jsonl", *records)
    trace = read_trace(path)
    assert [request.number for request in trace.requests] == [1, 3, 0, 2]
    assert [request.at_s for request in trace.requests] == [3, 4, 5, 5]
    assert trace.notes == [
        f"{path}:2: timestamp: goes back in 2 of 4 lines, this the first; "
        "requests are replayed in the order of time"
    ]


def test_hints_follow_their_requests_into_the_order_of_time(tmp_path: Path) -> None:
    """A line of hints is for the same line of the trace."""
    records = [MOONCAKE | {"timestamp": at} for at in (5000, 3000, 4000)]
    trace = read_trace(written(tmp_path / "t.jsonl", *records))
    said = [{"session_id": name} for name in "abc"]
    hints = read_hints(written(tmp_path / "h.jsonl", *said), trace)
    assert [hint.session_id for hint in hints if hint] == [b"b", b"c", b"a"]


ODD: dict[str, tuple[dict[str, Any], int]] = {
    "too few": ({"hash_ids": [1]}, 1),
    "too many": ({"hash_ids": [1, 2, 3, 4, 5]}, 2),
    "null": ({"hash_ids": None}, 0),
}


@pytest.mark.parametrize("case", ODD)
def test_a_few_odd_lengths_do_not_refuse_a_trace(tmp_path: Path, case: str) -> None:
    """Their tokens count, what no name covers is no hit, and it is said."""
    change, blocks = ODD[case]
    path = written(tmp_path / "t.jsonl", *[BAILIAN] * 19, BAILIAN | change)
    trace = read_trace(path)
    assert trace.block_tokens == 16
    assert trace.input_tokens == 20 * 33
    assert (len(trace.requests[19].chain), trace.unique_blocks) == (blocks, 3)
    (note,) = trace.notes
    assert note.startswith(f"{path}:20: hash_ids: not one for each 16 tokens in 1 of 20 requests")


def test_a_trace_as_it_should_be_needs_no_note(tmp_path: Path) -> None:
    """Nothing is said where nothing is odd."""
    assert not read_trace(written(tmp_path / "t.jsonl", MOONCAKE, MOONCAKE)).notes


def test_a_gzipped_trace_and_a_limit(tmp_path: Path) -> None:
    """Recognised by its first bytes; only so many requests are read."""
    path = tmp_path / "t.jsonl.gz"
    path.write_bytes(gzip.compress((json.dumps(MOONCAKE) + "\n").encode() * 5))
    assert len(read_trace(path).requests) == 5
    assert len(read_trace(path, limit=2).requests) == 2
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(TraceError, match=r"is damaged .*copy it again"):
        read_trace(path)


def test_another_block_size_is_found(tmp_path: Path) -> None:
    """What all lengths agree on, where they disagree with the published size."""
    short = MOONCAKE | {"input_length": 300, "hash_ids": [1, 2, 3]}
    long = MOONCAKE | {"input_length": 1281, "hash_ids": list(range(11))}
    assert read_trace(written(tmp_path / "t.jsonl", short, long)).block_tokens == 128


def test_the_same_name_below_another_parent_is_another_block(tmp_path: Path) -> None:
    """Names need not be chained: position in the tree is what counts."""
    one = MOONCAKE | {"input_length": 1024, "hash_ids": [1, 9]}
    two = MOONCAKE | {"input_length": 1024, "hash_ids": [2, 9]}
    trace = read_trace(written(tmp_path / "t.jsonl", one, two))
    assert trace.unique_blocks == 4
    assert trace.infinite_token_hit_rate == 0


WRONG: dict[str, tuple[list[object], str]] = {
    "missing": (
        [{k: v for k, v in MOONCAKE.items() if k != "input_length"}],
        r":1: input_length: is missing; expected tokens of the prompt",
    ),
    "missing later": ([MOONCAKE, {"timestamp": 1600}], r":2: input_length: is missing"),
    "text for a number": (
        [MOONCAKE | {"timestamp": "now"}],
        r':1: timestamp: is "now", no number of 0 or more; expected milliseconds',
    ),
    "a fraction of a token": ([MOONCAKE | {"input_length": 0.5}], r"no whole number"),
    "truth for a number": ([MOONCAKE | {"output_length": True}], r":1: output_length: is true"),
    "negative": ([MOONCAKE | {"input_length": -1}], r":1: input_length: is -1"),
    "no list": ([MOONCAKE | {"hash_ids": 5}], r":1: hash_ids: is 5, no list"),
    "no name": ([MOONCAKE | {"hash_ids": [1, None, 2]}], r":1: hash_ids: holds null"),
    "too few names": (
        [MOONCAKE, MOONCAKE | {"hash_ids": [1]}],
        r":2: hash_ids: has 1 entries for 1100 tokens; expected 3, one for each 512",
    ),
    "no names at all": (
        [{k: v for k, v in BAILIAN.items() if k != "hash_ids"}],
        r":1: hash_ids: is missing; expected 3, one for each 16 tokens; 1 of 1",
    ),
    "empty names everywhere": (
        [BAILIAN | {"hash_ids": []}],
        r":1: hash_ids: has 0 entries for 33 tokens; expected 3",
    ),
    "two formats": ([MOONCAKE, BAILIAN], r":2: is of another format; the first line is Mooncake"),
    "no object": ([[1, 2]], r":1: is \[1, 2\]; expected one JSON object per line"),
    "another format": ([{"time": 1}], r":1: is of no known format; expected the fields of"),
    "empty": ([], r"has no request in it; expected lines of"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_with_its_place(tmp_path: Path, case: str) -> None:
    """File, line and field, what stands there, and what should."""
    records, message = WRONG[case]
    path = written(tmp_path / "trace.jsonl", *records)
    with pytest.raises(TraceError, match=message) as raised:
        read_trace(path)
    assert str(raised.value).startswith(str(path))


def test_a_line_that_is_not_json_is_named(tmp_path: Path) -> None:
    """With its number."""
    path = tmp_path / "trace.jsonl"
    path.write_text(json.dumps(MOONCAKE) + "\n{'timestamp': 1}\n")
    with pytest.raises(TraceError, match=r":2: is not JSON"):
        read_trace(path)


def test_no_damaged_file_is_read_or_breaks_the_reader(tmp_path: Path, rng: random.Random) -> None:
    """Whatever happens to its bytes: a trace, or the one kind of error."""
    path = written(tmp_path / "trace.jsonl", *[MOONCAKE] * 5)
    whole = path.read_bytes()
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged[: rng.randint(1, len(damaged))])
        try:
            read_trace(path)
        except TraceError as error:
            assert str(path) in str(error)


def test_hints_belong_to_requests(tmp_path: Path) -> None:
    """One line for each; fields may be left out."""
    trace = read_trace(written(tmp_path / "t.jsonl", MOONCAKE, MOONCAKE))
    said = {"session_id": "s", "reuse": "interactive", "expected_return_ms": 2000}
    hints = read_hints(written(tmp_path / "h.jsonl", said, {}), trace)
    assert [hint.reuse for hint in hints if hint] == [Reuse.INTERACTIVE, Reuse.UNKNOWN]
    assert trace.hinted(hints).requests[0].hint == hints[0]


@pytest.mark.parametrize("number", ["Infinity", "1e400", "NaN", "1" + "0" * 400])
@pytest.mark.parametrize("field", ["timestamp", "input_length", "output_length"])
def test_a_number_that_nothing_can_hold_is_named(tmp_path: Path, field: str, number: str) -> None:
    """JSON has no such numbers, but its readers take them."""
    path = tmp_path / "trace.jsonl"
    path.write_text(json.dumps(MOONCAKE | {field: "?"}).replace('"?"', number) + "\n")
    with pytest.raises(TraceError, match=rf":1: {field}: is .*, (no|too large a) number.*expected"):
        read_trace(path)


def test_a_line_nested_too_deeply_is_named(tmp_path: Path) -> None:
    """It would end the parser otherwise, and with it the command."""
    path = tmp_path / "trace.jsonl"
    path.write_text(json.dumps(MOONCAKE) + "\n" + "[" * 100_000 + "\n")
    with pytest.raises(TraceError, match=r":2: is nested too deeply; expected one object"):
        read_trace(path)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ([{}], r"has 1 lines for 2 requests"),
        ([{}, {"reuse": "maybe"}], r':2: reuse: is "maybe"; expected one of unknown, final'),
        ([{"session_id": "s" * 33}, {}], r":1: session_id"),
        ([{"session_id": "\ud800"}, {}], r':1: session_id: is "\\ud800"; expected text'),
        ([{"expected_return_ms": -1}, {}], r":1: expected_return_ms: is -1"),
    ],
)
def test_wrong_hints_are_named(tmp_path: Path, said: list[object], message: str) -> None:
    """As traces are."""
    trace = read_trace(written(tmp_path / "t.jsonl", MOONCAKE, MOONCAKE))
    with pytest.raises(TraceError, match=message):
        read_hints(written(tmp_path / "h.jsonl", *said), trace)
