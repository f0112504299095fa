"""Trace files: which formats there are, and how one is recognised.

To add a format, write a function that turns one record into a `Record` and add a `Format` with
the fields that tell it from the others to `FORMATS`; docs/eviction.md shows one.
"""

import gzip
import json
import sys
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from kvstore.api.hint import MAX_RETURN_MS, MAX_SESSION_ID_BYTES, Reuse, ReuseHint
from kvstore.replay.trace import Trace, TraceBuilder, TraceError

_GZIP = b"\x1f\x8b"
_MOST = 1 << 53
"""Counts above this are no longer exact as JSON numbers, and no trace has them."""


@dataclass(frozen=True, slots=True)
class Record:
    """One request as a file tells it."""

    at_s: float
    input_tokens: int
    names: list[int | str] | None
    """One for each block of the prompt; None if the file does not say."""


@dataclass(frozen=True, slots=True)
class _Read:
    """A record, where it stands, and how many came before it in the file."""

    place: str
    number: int
    record: Record


@dataclass(frozen=True, slots=True)
class Format:
    """A kind of trace file: one JSON object per line."""

    name: str
    fields: Mapping[str, str]
    """The fields that are read, each with what it says and in which unit."""
    block_tokens: int
    """As it is published; another power of two is found from the lengths."""
    read: Callable[["Fields"], Record]
    marks: Collection[str] = ()
    """Any one of these tells a record from other formats; without them, all of `fields` do."""

    def has(self, values: Mapping[str, Any]) -> bool:
        """Whether a record is of this format."""
        if self.marks:
            return any(mark in values for mark in self.marks)
        return self.fields.keys() <= values.keys()


class Fields:
    """The fields of one line, checked as they are read."""

    def __init__(self, place: str, values: Mapping[str, Any], meanings: Mapping[str, str]) -> None:
        self.place = place
        self._values = values
        self._meanings = meanings

    def wrong(self, field: str, problem: str) -> TraceError:
        """The error of a field that cannot be used."""
        return TraceError(
            f"{self.place}: {field}", problem, f"expected {self._meanings.get(field, 'another')}"
        )

    def number(self, field: str) -> float:
        """A finite number of 0 or more."""
        value = self._get(field)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
            raise self.wrong(field, f"is {_short(value)}, no number of 0 or more")
        if value > sys.float_info.max:
            raise self.wrong(field, f"is {_short(value)}, too large a number")
        return float(value)

    def count(self, field: str) -> int:
        """A whole number of 0 or more."""
        value = self.number(field)
        if value > _MOST:
            raise self.wrong(field, f"is {_short(self._get(field))}, too large a number")
        if value != int(value):
            raise self.wrong(field, f"is {_short(value)}, no whole number")
        return int(value)

    def names(self, field: str) -> list[int | str] | None:
        """A list of names of blocks; None where the field is missing or null."""
        value = self.optional(field, None)
        if value is None:
            return None
        if not isinstance(value, list):
            raise self.wrong(field, f"is {_short(value)}, no list")
        for name in value:
            if isinstance(name, bool) or not isinstance(name, int | str):
                raise self.wrong(field, f"holds {_short(name)}")
        return value

    def optional(self, field: str, default: object) -> Any:
        """A field that may be left out."""
        return self._values.get(field, default)

    def _get(self, field: str) -> Any:
        if field not in self._values:
            raise self.wrong(field, "is missing")
        return self._values[field]


def _short(value: object) -> str:
    try:
        text = json.dumps(value)
    except RecursionError:
        return "nested too deeply"
    return text if len(text) <= 40 else text[:37] + "..."


_COMMON = {
    "input_length": "tokens of the prompt, a whole number",
    "hash_ids": "a list with one number for each block of the prompt",
}


def _record(fields: Fields, at_s: float) -> Record:
    # A replay does not need the answer's length, but a wrong one says that the line is damaged.
    if fields.optional("output_length", None) is not None:
        fields.count("output_length")
    return Record(at_s, fields.count("input_length"), fields.names("hash_ids"))


MOONCAKE = Format(
    "Mooncake",
    {"timestamp": "milliseconds since the start, a number", **_COMMON},
    block_tokens=512,
    read=lambda fields: _record(fields, fields.number("timestamp") / 1000),
)
BAILIAN = Format(
    "Qwen-Bailian",
    {"timestamp": "seconds since the start, a number", **_COMMON},
    block_tokens=16,
    read=lambda fields: _record(fields, fields.number("timestamp")),
    marks=("chat_id", "parent_chat_id"),
)
FORMATS = (BAILIAN, MOONCAKE)
"""All formats; the first that a file's first record has is taken."""

_UNUSED = {"output_length": "tokens of the answer, a whole number; may be left out"}

_ODD_SHARE = 0.05
"""So many requests may have another number of names than of blocks. More of them mean that the
size of a block is not what we take it for."""


def read_trace(path: Path, limit: int | None = None) -> Trace:
    """The trace in a file, plain or gzipped; of a long one the first `limit` lines.

    Requests are put in the order of time. What a reader should know of is in the trace's `notes`.
    """
    kind: Format | None = None
    found: list[_Read] = []
    for place, values in _objects(path):
        kind = kind or _recognise(place, values)
        if _format_of(values) not in (kind, None):
            raise TraceError(place, "is of another format", f"the first line is {kind.name}")
        record = kind.read(Fields(place, values, {**kind.fields, **_UNUSED}))
        found.append(_Read(place, len(found), record))
        if limit is not None and len(found) >= limit:
            break
    if kind is None:
        raise TraceError(str(path), "has no request in it", f"expected lines of {_known()}")
    return _build(path.name, kind, found)


def read_hints(path: Path, trace: Trace) -> list[ReuseHint | None]:
    """The hints in a file, whose lines are in the order of the trace's file; in the trace's."""
    hints: list[ReuseHint] = []
    for place, values in _objects(path):
        if len(hints) == len(trace.requests):
            break
        hints.append(_hint(Fields(place, values, _HINT_FIELDS)))
    if len(hints) < len(trace.requests):
        raise TraceError(
            str(path),
            f"has {len(hints):,} lines for {len(trace.requests):,} requests",
            "one line is needed for each request",
        )
    return [hints[request.number] for request in trace.requests]


_HINT_FIELDS = {
    "session_id": f"text of at most {MAX_SESSION_ID_BYTES} bytes",
    "reuse": "one of " + ", ".join(reuse.name.lower() for reuse in Reuse),
    "expected_return_ms": "milliseconds until the next request on the chain, 0 if unknown",
}


def _hint(fields: Fields) -> ReuseHint:
    session = fields.optional("session_id", "")
    # Half of a surrogate pair is no text, though JSON can say it.
    name = session.encode(errors="replace") if isinstance(session, str) else None
    if name is None or name.decode() != session or len(name) > MAX_SESSION_ID_BYTES:
        raise fields.wrong("session_id", f"is {_short(session)}")
    reuse = fields.optional("reuse", Reuse.UNKNOWN.name)
    if not isinstance(reuse, str) or reuse.upper() not in Reuse.__members__:
        raise fields.wrong("reuse", f"is {_short(reuse)}")
    given = fields.optional("expected_return_ms", None) is not None
    back = fields.count("expected_return_ms") if given else 0
    return ReuseHint(name, Reuse[reuse.upper()], min(back, MAX_RETURN_MS))


def _objects(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Each line as an object, with its place for error messages."""
    with path.open("rb") as file:
        zipped = file.peek(len(_GZIP))[: len(_GZIP)] == _GZIP
    try:
        with gzip.open(path) if zipped else path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield f"{path}:{number}", _object(f"{path}:{number}", line)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise TraceError(str(path), f"is damaged ({error})", "copy it again") from None


def _object(place: str, line: bytes) -> Mapping[str, Any]:
    try:
        value = json.loads(line)
    except RecursionError:
        raise TraceError(place, "is nested too deeply", "expected one object per line") from None
    except ValueError as error:
        raise TraceError(place, f"is not JSON ({error})", "expected one object per line") from None
    if not isinstance(value, dict):
        raise TraceError(place, f"is {_short(value)}", "expected one JSON object per line")
    return value


def _known() -> str:
    return "; or ".join(
        f"{kind.name}: {', '.join([*kind.marks, *kind.fields])}" for kind in FORMATS
    )


def _format_of(values: Mapping[str, Any]) -> Format | None:
    return next((kind for kind in FORMATS if kind.has(values)), None)


def _recognise(place: str, values: Mapping[str, Any]) -> Format:
    """The format of a file by its first record; for the error, the one that is nearest."""
    if (found := _format_of(values)) is not None:
        return found
    nearest = max((kind for kind in FORMATS if not kind.marks),
                  key=lambda kind: len(kind.fields.keys() & values.keys()) * 100
                  - len(kind.fields))  # fmt: skip
    missing = [field for field in nearest.fields if field not in values]
    if len(missing) == len(nearest.fields):
        raise TraceError(place, "is of no known format", f"expected the fields of {_known()}")
    raise TraceError(
        f"{place}: {missing[0]}", "is missing", f"expected {nearest.fields[missing[0]]}"
    )


def _build(name: str, kind: Format, found: Sequence[_Read]) -> Trace:
    block_tokens = _block_tokens(kind, found)
    notes = [_odd_note(found, block_tokens), _order_note(found)]
    builder = TraceBuilder(name, block_tokens)
    # A stable sort: what came at the same time stays in the order of the file.
    for read in sorted(found, key=lambda read: read.record.at_s):
        record = read.record
        names = (record.names or [])[: -(-record.input_tokens // block_tokens)]
        builder.add(record.at_s, record.input_tokens, names, number=read.number)
    return builder.finish([note for note in notes if note])


def _block_tokens(kind: Format, found: Sequence[_Read]) -> int:
    """The size of a block that all lengths agree with: the published one, or a power of two.

    Where none does, the one that the most agree with, if those that do not are few.
    """
    sizes = [kind.block_tokens, *(1 << power for power in range(13))]
    if not any(read.record.names for read in found):
        # Without names, any size above the longest prompt would agree.
        sizes = sizes[:1]
    for size in sizes:
        if all(_fits(read.record, size) for read in found):
            return size
    odd = {size: sum(not _fits(read.record, size) for read in found) for size in sizes}
    best = min(sizes, key=odd.__getitem__)
    if odd[best] <= _ODD_SHARE * len(found):
        return best
    # Where nothing fits, what does not fit the published size is most likely wrong.
    raise _misfit(kind.block_tokens, found, odd[kind.block_tokens])


def _misfit(block_tokens: int, found: Sequence[_Read], odd: int) -> TraceError:
    read = next(each for each in found if not _fits(each.record, block_tokens))
    tokens, names = read.record.input_tokens, read.record.names
    return TraceError(
        f"{read.place}: hash_ids",
        "is missing" if names is None else f"has {len(names)} entries for {tokens} tokens",
        f"expected {-(-tokens // block_tokens)}, one for each {block_tokens} tokens; "
        f"{odd:,} of {len(found):,} requests are like that",
    )


def _odd_note(found: Sequence[_Read], block_tokens: int) -> str:
    """What is said of lengths that disagree; empty if all agree."""
    odd = [read for read in found if not _fits(read.record, block_tokens)]
    if not odd:
        return ""
    return (
        f"{odd[0].place}: hash_ids: not one for each {block_tokens} tokens in {len(odd):,} of "
        f"{len(found):,} requests, this the first; tokens without one count as never stored, "
        "entries beyond the prompt are left out"
    )


def _order_note(found: Sequence[_Read]) -> str:
    """What is said of lines that are not in the order of time; empty if all are."""
    back = [late for early, late in pairwise(found) if late.record.at_s < early.record.at_s]
    if not back:
        return ""
    return (
        f"{back[0].place}: timestamp: goes back in {len(back):,} of {len(found):,} lines, this "
        "the first; requests are replayed in the order of time"
    )


def _fits(record: Record, block_tokens: int) -> bool:
    # Both ways to treat a partial block at the end are in use: to name it, and to leave it out.
    full, rest = divmod(record.input_tokens, block_tokens)
    if record.names is None:
        return record.input_tokens == 0
    return full <= len(record.names) <= full + (rest > 0)
