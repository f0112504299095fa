"""The reading half of the disk tier: records of blocks, verified, or a miss."""

import logging
from collections.abc import Callable

from kvstore.files import PAGE_BYTES
from kvstore.metrics import Metrics
from kvstore.record import HEADER_BYTES, Damaged, Header, check_payload
from kvstore.runner import Runner
from kvstore.staging import Staging
from kvstore.tiers.disk_index import DiskIndex, Entry
from kvstore.tiers.segment_log import SegmentLog

_log = logging.getLogger("kvstore.disk")

TIER = "disk"
"""What the tier is called in answers, metrics and logs."""


class DiskReader:
    """Reads records in threads. What turns out to be damaged leaves the index."""

    def __init__(
        self,
        log: SegmentLog,
        index: DiskIndex,
        runner: Runner,
        staging: Staging,
        metrics: Metrics,
    ) -> None:
        self._segments = log
        self._index = index
        self._runner = runner
        self._staging = staging
        self._metrics = metrics
        self.damaged = 0
        """How many blocks were found damaged, and dropped."""

    async def read(
        self, entry: Entry, judge: Callable[[Header, memoryview], bytes]
    ) -> bytes | None:
        """What `judge`, in a thread, makes of a record; None if it left, or was damaged and left.

        Raises OSError, with the record forgotten, if the device cannot read it.
        """
        segment_id, offset, size = place = _place_of(entry)
        payload_end = PAGE_BYTES + entry.stored_bytes

        def read() -> bytes:
            with self._staging.lent(size) as pages:
                if self._segments.read_into(segment_id, pages, offset) < payload_end:
                    raise Damaged("record: its segment ends before it")
                return judge(Header.unpack(pages[:HEADER_BYTES]), pages[PAGE_BYTES:payload_end])

        try:
            return await self._runner.run(read)
        except (Damaged, OSError) as error:
            if self._index.find(entry.name) is not entry or place != _place_of(entry):
                return None  # It left its segment, which was dropped, during the read.
            _log.warning("a damaged block was dropped from segment %d: %s", segment_id, error)
            self._metrics.corrupt.labels(TIER).inc()
            self.damaged += 1
            self._index.remove([entry.name])
            if isinstance(error, OSError):
                raise
            return None
        except KeyError:
            return None  # Its segment was dropped between the look-up and the read.


def judge(name: bytes, header: Header, payload: memoryview) -> bytes:
    """The digest of the block called `name`. Raises `Damaged` if this is not its record."""
    check_payload(header, name, payload)
    return header.digest


def _place_of(entry: Entry) -> tuple[int, int, int]:
    return entry.segment_id, entry.offset, entry.record_bytes
