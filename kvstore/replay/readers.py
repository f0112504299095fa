"""Trace files: which formats there are, and how one is recognised.

To add a format, write a function that turns one record into a `Record` and add a `Format` with
the fields that tell it from the others to `FORMATS`; docs/eviction.md shows one.
"""

import gzip
import json
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvstore.api.hint import MAX_RETURN_MS, MAX_SESSION_ID_BYTES, Reuse, ReuseHint
from kvstore.replay.trace import Trace, TraceBuilder, TraceError

_GZIP = b"\x1f\x8b"
_MOST = 1 << 53
"""Counts above this are no longer exact as JSON numbers, and no trace has them."""


@dataclass(frozen=True, slots=True)
class Record:
    """One request as a file tells it. `names` has one name for each block of the prompt."""

    at_s: float
    input_tokens: int
    names: list[int | str]


@dataclass(frozen=True, slots=True)
class Format:
    """A kind of trace file: one JSON object per line."""

    name: str
    fields: Mapping[str, str]
    """The fields that a record must have, each with what it says and in which unit."""
    block_tokens: int
    """As it is published; another power of two is found from the lengths."""
    read: Callable[["Fields"], Record]


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

    def names(self, field: str) -> list[int | str]:
        """A list of names of blocks."""
        value = self._get(field)
        if not isinstance(value, list):
            raise self.wrong(field, f"is {_short(value)}, no list")
        for name in value:
            if isinstance(name, bool) or not isinstance(name, int | str):
                raise self.wrong(field, f"holds {_short(name)}")
        return value

    def require(self, names: Iterable[str]) -> None:
        """Raises if one of these fields is missing."""
        for field in names:
            self._get(field)

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
    "output_length": "tokens of the answer, a whole number",
    "hash_ids": "a list with one number for each block of the prompt",
}


def _record(fields: Fields, at_s: float) -> Record:
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
    {
        "chat_id": "the number of the request",
        "parent_chat_id": "the number of the request before it in its chat, or -1",
        "timestamp": "seconds since the start, a number",
        **_COMMON,
        "type": "the kind of request",
        "turn": "its place in the chat",
    },
    block_tokens=16,
    read=lambda fields: _record(fields, fields.number("timestamp")),
)
FORMATS = (BAILIAN, MOONCAKE)
"""All formats; the first whose fields a file's first record has is taken."""


def read_trace(path: Path, limit: int | None = None) -> Trace:
    """The trace in a file, plain or gzipped; of a long one the first `limit` requests."""
    kind: Format | None = None
    records: list[tuple[str, Record]] = []
    for place, values in _objects(path):
        kind = kind or _recognise(place, values)
        fields = Fields(place, values, kind.fields)
        fields.require(kind.fields)
        record = kind.read(fields)
        if records and record.at_s < records[-1][1].at_s:
            raise fields.wrong("timestamp", "goes back; sort the lines by it")
        records.append((place, record))
        if limit is not None and len(records) >= limit:
            break
    if kind is None:
        raise TraceError(str(path), "has no request in it", f"expected lines of {_known()}")
    return _build(path.name, kind, records)


def read_hints(path: Path, trace: Trace) -> list[ReuseHint | None]:
    """The hints in a file: one line for each request of the trace."""
    hints: list[ReuseHint | None] = []
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
    return hints


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
    return "; or ".join(f"{kind.name}: {', '.join(kind.fields)}" for kind in FORMATS)


def _recognise(place: str, values: Mapping[str, Any]) -> Format:
    """The format of a file by its first record; for the error, the one that is nearest."""
    for kind in FORMATS:
        if kind.fields.keys() <= values.keys():
            return kind
    nearest = max(FORMATS, key=lambda kind: len(kind.fields.keys() & values.keys()) * 100
                  - len(kind.fields))  # fmt: skip
    missing = [field for field in nearest.fields if field not in values]
    if len(missing) == len(nearest.fields):
        raise TraceError(place, "is of no known format", f"expected the fields of {_known()}")
    raise TraceError(
        f"{place}: {missing[0]}", "is missing", f"expected {nearest.fields[missing[0]]}"
    )


def _build(name: str, kind: Format, records: list[tuple[str, Record]]) -> Trace:
    block_tokens = _block_tokens(kind, records)
    builder = TraceBuilder(name, block_tokens)
    for _, record in records:
        builder.add(record.at_s, record.input_tokens, record.names)
    return builder.finish()


def _block_tokens(kind: Format, records: list[tuple[str, Record]]) -> int:
    """The size of a block that all lengths agree with: the published one, or a power of two."""
    sizes = [kind.block_tokens, *(1 << power for power in range(13))]
    for size in sizes:
        if all(_fits(record, size) for _, record in records):
            return size
    # Where nothing fits all, what does not fit the published size is most likely wrong.
    place, record = next(each for each in records if not _fits(each[1], kind.block_tokens))
    raise TraceError(
        f"{place}: hash_ids",
        f"has {len(record.names)} entries for {record.input_tokens} tokens",
        f"expected {-(-record.input_tokens // kind.block_tokens)}, one for each "
        f"{kind.block_tokens} tokens",
    )


def _fits(record: Record, block_tokens: int) -> bool:
    # Both ways to treat a partial block at the end are in use: to name it, and to leave it out.
    full, rest = divmod(record.input_tokens, block_tokens)
    return full <= len(record.names) <= full + (rest > 0)
