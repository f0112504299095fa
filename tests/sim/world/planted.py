"""Bugs that are planted into the running code, one at a time: the simulator must find each.

A bug is a change of a line or two in the source of one function, which is compiled again in its
own module and put back afterwards. Where the source has moved on, planting fails loudly.
"""

import importlib
import inspect
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Edit:
    """In a function, called `module:qualified.name`, `old` (which is there once) becomes `new`."""

    function: str
    old: str
    new: str


@dataclass(frozen=True, slots=True)
class Bug:
    """A mistake that somebody could make."""

    name: str
    edits: tuple[Edit, ...]
    quick: bool = False
    """Whether it shows in nearly every history."""


def _bug(name: str, *edits: tuple[str, str, str], quick: bool = False) -> Bug:
    return Bug(name, tuple(Edit(*edit) for edit in edits), quick)


_DISK, _LOG = "kvstore.tiers.disk:DiskTier", "kvstore.tiers.segment_log:SegmentLog"
_READER = "kvstore.tiers.disk_reader:DiskReader"
_WRITER = "kvstore.tiers.disk_writer:DiskWriter"
_MEMORY, _TIERED = "kvstore.tiers.memory:Memory", "kvstore.tiers.tiered:Tiered"
_NODE, _LEASES = "kvstore.node:Node", "kvstore.leases:LeaseTable"
_REDIS, _WRITING = "kvstore.tiers.redis:RedisTier", "kvstore.writing:Incoming"
_READING = "kvstore.tiers.redis_parts:Reading"

_ATTACHED = "kvstore.attachment:Attachment"

_UNCHECKED = (
    "(lambda header, name, payload, into:"
    " (__import__('kvstore.codec').codec.decode(header.codec, payload, into), header.digest)[1])("
)
"""What is left of `decode_block` without its checks."""

BUGS = (
    _bug(
        "disk: what comes back is not checked",
        ("kvstore.tiers.disk_reader:_decode", "decode_block(", _UNCHECKED),
        (f"{_READER}._fill", "check_payload(header, name, into)", "pass"),
    ),
    _bug(
        "redis: what comes back is not checked",
        (f"{_READING}._judge", "check_payload(self._header, name, self._payload)", "pass"),
        (f"{_READING}._judge", "decode_block(", _UNCHECKED),
    ),
    _bug(
        "record: a block's name is not checked",
        ("kvstore.record:check_payload", "or header.name != name", ""),
    ),
    _bug(
        "write: a block's digest is not checked",
        (f"{_WRITING}._complete", "!= self._digest", "== b''"),
        quick=True,
    ),
    _bug(
        "write: one that is cancelled keeps its slot",
        (f"{_WRITING}.close", "self._offer.tiers.memory.abort(self._slot)", "pass"),
        quick=True,
    ),
    _bug(
        "eviction ignores leases",
        (f"{_MEMORY}._coldest_of_class", "if slot.pins or", "if"),
        (f"{_TIERED}._demote", "and not slot.pins", ""),
        quick=True,
    ),
    _bug(
        "leases run out by the wall clock",
        (f"{_NODE}._expire_leases", "self.clock.monotonic_s()", "self.clock.wall_s() - 1.7e9"),
    ),
    _bug(
        "leases never run out",
        (f"{_LEASES}.end_expired", "<= now_s", "<= now_s - 1e9"),
        quick=True,
    ),
    _bug(
        "leases have no cap",
        (f"{_LEASES}.reserve", "min(count, room)", "count"),
    ),
    _bug(
        "a repeated match gets a second lease",
        (f"{_NODE}._repeated", "lease.asked == asked", "lease.asked != asked"),
        quick=True,
    ),
    _bug(
        "a read keeps its pins",
        ("kvstore.reading:Reading.blocks", "gathered.close()", "pass"),
        quick=True,
    ),
    _bug(
        "a slot is freed though it is pinned",
        (f"{_MEMORY}.evict", "if not slot.pins:", "if True:"),
        (f"{_MEMORY}.unpin", "if not slot.indexed and not slot.pins:", "if False:"),
    ),
    _bug(
        "a slot is handed out twice",
        ("kvstore.tiers.slabs:Slabs.allocate", "slab.free.pop()", "slab.free[-1]"),
        quick=True,
    ),
    _bug(
        "the head of a chain leaves before its tail",
        (
            f"{_MEMORY}._coldest_of_class",
            "if not parents and any(child.ref not in leaving for child in slot.children()):",
            "if False:",
        ),
        (f"{_TIERED}._demote", "and (slot.first is None or slot.ref in held)", ""),
    ),
    _bug(
        "promotion is not single flight",
        (f"{_TIERED}.acquire", "and want.ref not in self._promoting", ""),
    ),
    _bug(
        "a load that failed counts as a hit",
        (f"{_TIERED}._commit_promoted", "loaded is None or", ""),
        (f"{_TIERED}._commit_promoted", "loaded.digest", "loaded.digest if loaded else b''"),
        (f"{_TIERED}._commit_promoted", "loaded.tier)\n", "'disk')\n"),
        (f"{_TIERED}._commit_promoted", "labels(loaded.tier)", "labels('disk')"),
    ),
    _bug(
        "namespaces without the tenant",
        ("kvstore.names:namespace", "tenant.encode()", "b''"),
        quick=True,
    ),
    _bug(
        "namespaces without the scope",
        ("kvstore.names:namespace", "scope.encode()", "b''"),
        quick=True,
    ),
    _bug(
        "discard writes no tombstone",
        (
            f"{_WRITER}._write_twins",
            "await self._append_or_yield(twins, together=True)",
            "list(twins)",
        ),
    ),
    _bug(
        "discard does not wait for the device",
        (f"{_WRITER}._forget", "await self._runner.run(self._segments.sync)", "pass"),
    ),
    _bug(
        "discard forgets in memory alone",
        (f"{_TIERED}._forget_both", "copies += await below()", "pass"),
        quick=True,
    ),
    _bug(
        "discard overlooks what is being promoted",
        (f"{_TIERED}._commit_promoted", "or want.ref in watch.lost", ""),
        (f"{_TIERED}._forget_both", "copies += await above()", "pass"),
        (f"{_TIERED}.acquire", "and not self.oblivion.concerns(want.ref)", ""),
    ),
    _bug(
        "sealed is said before the sync",
        (f"{_LOG}.sync", "self._sync(self._open_id)", "pass"),
    ),
    _bug(
        "a segment goes before its hot blocks are safe",
        (f"{_LOG}.drop", "self.sync()", "pass"),
    ),
    _bug(
        "sequence numbers begin again after a start",
        (f"{_WRITER}._append", "self._segments.open_id << SEQUENCE_BITS", "0"),
    ),
    _bug(
        "a segment believes what its file was before",
        ("kvstore.tiers.segment:scan", "header.sequence in numbers and", ""),
        (
            "kvstore.tiers.segment:read_footer",
            "if not all(place.header.sequence in numbers for place in records):",
            "if False:",
        ),
    ),
    _bug(
        "recovery believes a torn tail",
        (
            "kvstore.tiers.segment:is_intact",
            "digest == place.header.payload_digest",
            "digest is not None",
        ),
        ("kvstore.tiers.segment:is_intact", "if start + length > size:", "if False:"),
        ("kvstore.tiers.segment:is_intact", "there >= length and", ""),
    ),
    _bug(
        "the disk takes blocks without their parents",
        (f"{_DISK}._rooted", "and block.parent not in rooted", "and False"),
        (f"{_WRITER}._is_superfluous", "return parent is not None and", "return False and"),
        (f"{_WRITER}._write", "header.parent is None or", "True or"),
    ),
    _bug(
        "the disk has no limit",
        (f"{_LOG}.surplus", "if few and", "if True or"),
        quick=True,
    ),
    _bug(
        "a breaker never closes",
        (
            "kvstore.tiers.breaker:Breaker.succeeded",
            "self._failures, self._probing = 0, False",
            "pass",
        ),
        quick=True,
    ),
    _bug(
        "tiers have no deadline",
        (
            "kvstore.tiers.guarded:Guarded._answer",
            "asyncio.timeout(timeout_s)",
            "asyncio.timeout(None)",
        ),
    ),
    _bug(
        "redis keeps blocks for ever",
        (f"{_REDIS}._put", "ex=self._ttl_s", "ex=10**9"),
        quick=True,
    ),
    _bug(
        "an attached reader keeps his pins",
        (f"{_ATTACHED}.done", "self._release(under_way, keep=0)", "pass"),
        quick=True,
    ),
    _bug(
        "an attached reader's window goes back while he copies it",
        (f"{_ATTACHED}.next_window", "keep=1", "keep=0"),
    ),
    _bug(
        "an attached writer keeps his slots",
        ("kvstore.placing:Placing.close", "self._offer.tiers.memory.abort(slot)", "pass"),
        quick=True,
    ),
    _bug(
        "attached clients hold as much as they like",
        (f"{_ATTACHED}._take", "max(0, min(count, left_bytes // share_bytes))", "count"),
        quick=True,
    ),
    _bug(
        "a block leaves memory before its digest is known",
        (f"{_TIERED}._store_below", "await self.digests.settle(kept)", "pass"),
        ("kvstore.tiers.digests:Digests.begin", "self._memory.pin(slot)", "slot"),
        ("kvstore.tiers.digests:Digests._settled", "self._memory.unpin(slot)", "pass"),
    ),
    _bug(
        "a block is read before its digest is known",
        (
            "kvstore.reading:Reading._hold",
            "self._tiers.digests.settle([block.slot for block in held.values()])",
            "self._tiers.digests.settle([])",
        ),
    ),
    _bug(
        "the end of one tier leaves the other's calls behind",
        (
            "kvstore.tiers.beside:_both",
            "return_exceptions=True",
            "return_exceptions=False",
        ),
    ),
)


@contextmanager
def planted(bug: Bug) -> Iterator[None]:
    """The code has this bug until the block is left. Raises LookupError where it does not fit."""
    before: list[tuple[Any, Any]] = []
    try:
        for name in dict.fromkeys(edit.function for edit in bug.edits):
            edits = [edit for edit in bug.edits if edit.function == name]
            function = _find(name)
            before.append((function, function.__code__))
            # Its code alone: other modules may have imported it by its name.
            function.__code__ = _changed(name, function, edits).__code__
        yield
    finally:
        for function, code in before:
            function.__code__ = code


def _find(name: str) -> Any:
    module, _, path = name.partition(":")
    found: Any = importlib.import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    return found


def _changed(name: str, function: Any, edits: list[Edit]) -> Any:
    source = textwrap.dedent(inspect.getsource(function))
    for edit in edits:
        if source.count(edit.old) != 1:
            raise LookupError(f"{name} has {edit.old!r} {source.count(edit.old)} times")
        source = source.replace(edit.old, edit.new)
    names: dict[str, Any] = {}
    exec(compile(source, f"<planted in {name}>", "exec"), function.__globals__, names)
    return names[function.__name__]
