"""Checks the files of a data directory that no node uses, without changing them."""

from collections.abc import Iterator
from typing import NamedTuple

from kvstore.files import PAGE_BYTES, Files
from kvstore.record import HEADER_BYTES, Damaged, Header, Kind
from kvstore.staging import Staging
from kvstore.tiers.segment import (
    Placed,
    check_first_page,
    file_name,
    is_intact,
    read_footer,
    record_bytes,
    scan,
    segment_ids,
)

KEEP_BYTES = 16 << 20


class Checked(NamedTuple):
    """What was found in one segment. `problems` are sentences; damaged blocks are misses."""

    file: str
    sealed: bool
    """It has a footer; another one is walked through when the node starts."""
    blocks: int
    size_bytes: int
    damaged_blocks: int
    problems: list[str]


def check_directory(files: Files) -> Iterator[Checked]:
    """Reads every record of every segment, oldest first. Raises OSError if the device fails."""
    staging = Staging(KEEP_BYTES)
    for segment_id in segment_ids(files.names()):
        handle = files.open(file_name(segment_id), create=False)
        try:
            yield _check_segment(files, handle, segment_id, staging)
        finally:
            files.close(handle)


def _check_segment(files: Files, handle: int, segment_id: int, staging: Staging) -> Checked:
    name, size = file_name(segment_id), files.size_bytes(handle)
    try:
        intact, numbers = check_first_page(files, handle, segment_id, staging)
    except Damaged as error:
        return Checked(name, False, 0, size, 0, [f"{error}: the next start deletes the file"])
    problems = [] if intact else ["its first page is not as written; its records are looked at"]
    records = read_footer(files, handle, numbers, staging)
    if records is None:
        return _walked(name, size, list(scan(files, handle, numbers, staging)), problems)
    damaged = [
        f"the record at {place.offset} is not as written: its block is a miss"
        for place in records
        if not _is_as_listed(files, handle, place, size, staging)
    ]
    return Checked(name, True, _blocks(records), size, len(damaged), problems + damaged)


def _walked(name: str, size: int, records: list[Placed], problems: list[str]) -> Checked:
    """A segment without footer: what cannot be a record lies between and behind those that are."""
    end = PAGE_BYTES
    for place in records:
        if place.offset > end:
            problems.append(f"{place.offset - end} bytes from {end} on are no record")
        end = place.offset + record_bytes(place.header)
    if size > end:
        problems.append(f"{size - end} bytes at the end are no record: the next start cuts them")
    return Checked(name, False, _blocks(records), size, 0, problems)


def _blocks(records: list[Placed]) -> int:
    return sum(place.header.kind is Kind.BLOCK for place in records)


def _is_as_listed(files: Files, handle: int, place: Placed, size: int, staging: Staging) -> bool:
    with staging.lent(PAGE_BYTES) as page:
        if files.read_into(handle, [page], place.offset) < PAGE_BYTES:
            return False
        try:
            header = Header.unpack(page[:HEADER_BYTES])
        except Damaged:
            return False
    return header == place.header and is_intact(files, handle, place, size, staging)
