"""Records on their way to the disk: made of blocks, complete but for their place in the log."""

from collections.abc import Callable, Sequence

import xxhash

from kvstore.api.tier import Block, Keeper
from kvstore.codec import Codec
from kvstore.files import PAGE_BYTES, begins_on_a_page
from kvstore.record import Header, encode_block
from kvstore.staging import Loan, Staging
from kvstore.tiers.segment import imitates_records, pack_header_page, pages

WHOLE_BYTES = 2 << 20
"""A larger block is digested and written in pieces."""
PIECE_BYTES = 1 << 20
"""So much at a time: by the end of a digest of the whole, its beginning would have left the cache,
and each byte would come from memory twice, for the digest and for the device."""

Write = Callable[[Sequence[memoryview], int], None]
"""Writes whole pages, so many bytes behind the beginning of a record."""


class Staged:
    """A record that is ready to be written.

    Its payload lies behind its first page in borrowed memory, which is the record's own; or still
    where its block lies, in whole pages that a keeper holds, with what is left over in a second
    borrowed page. Call `give_back` in the event loop when it is written, or will not be.
    """

    __slots__ = ("_held", "_keeper", "_kept", "_loan", "header")

    def __init__(
        self,
        header: Header,
        loan: Loan,
        kept: memoryview | None = None,
        keeper: Keeper | None = None,
    ) -> None:
        self.header = header
        self._loan = loan
        self._kept = kept
        self._keeper = keeper
        self._held = False

    @classmethod
    def copied(cls, header: Header, payload: memoryview | bytes, staging: Staging) -> "Staged":
        """A record with a copy of its payload."""
        loan = staging.borrow(PAGE_BYTES + pages(len(payload)))
        end = PAGE_BYTES + len(payload)
        loan.view[PAGE_BYTES:end] = payload
        loan.view[end:] = bytes(len(loan.view) - end)
        return cls(header, loan)

    @classmethod
    def kept(cls, header: Header, block: Block, keeper: Keeper, staging: Staging) -> "Staged":
        """A record whose payload is the block where it lies, which begins on a page."""
        loan = staging.borrow(PAGE_BYTES + pages(len(block.data) % PAGE_BYTES))
        return cls(header, loan, block.data, keeper)

    @property
    def borrowed_bytes(self) -> int:
        """How much memory it takes beside its block's."""
        return len(self._loan.view)

    def hold(self) -> None:
        """Keeps the block in its place from here on, while its caller still does."""
        if self._keeper is not None:
            self._keeper.hold()
            self._held = True

    def write(self, header: Header, write: Write) -> Header | None:
        """Writes the record by calls of `write`; the header that it then has.

        That is `header` and what depends on the bytes; None for a block that holds what could be
        taken for other blocks' records. A client who maps the arena might change the bytes behind
        this look, or behind the digest. The digest then makes the block a miss; and he runs as the
        node's own user, who could write whatever he likes to the files themselves, so the look is
        no defence against him.
        """
        first = self._loan.view[:PAGE_BYTES]
        if self._kept is None:
            first[:] = pack_header_page(header)
            write([self._loan.view], 0)
            return header
        digest, size = xxhash.xxh3_128(), len(self._kept)
        step = size if size <= WHOLE_BYTES else PIECE_BYTES
        parts: list[memoryview] = []
        for start in range(0, size, step):
            piece = self._kept[start : start + step]
            digest.update(piece)
            if imitates_records(piece):
                return None
            parts = self._pages(piece)
            if step < size:
                write(parts, PAGE_BYTES + start)
        header = header.with_payload(digest.digest())
        first[:] = pack_header_page(header)
        write([first] if step < size else [first, *parts], 0)
        return header

    def _pages(self, piece: memoryview) -> list[memoryview]:
        """A piece of the block in whole pages; what is left over is copied to the borrowed one."""
        whole = len(piece) // PAGE_BYTES * PAGE_BYTES
        rest, last = piece[whole:], self._loan.view[PAGE_BYTES:]
        if not len(rest):
            return [piece]
        last[: len(rest)] = rest
        last[len(rest) :] = bytes(len(last) - len(rest))
        return [piece[:whole], last] if whole else [last]

    def give_back(self) -> None:
        """Ends the loan, and lets go of the block; later calls change nothing."""
        self._loan.give_back()
        if self._keeper is not None and self._held:
            self._held = False
            self._keeper.release()


def stage(block: Block, codec: Codec, staging: Staging, now_s: float) -> Staged | None:
    """The record of a block. It owns its bytes, or has a keeper: writing may outlive the caller.

    None for a block that holds what could be taken for other blocks' records. One with a keeper,
    which `hold` then has to be called for, is looked at when it is written, beside other writes.
    """
    keeper = block.keeper if begins_on_a_page(block.data) else None
    header, payload = encode_block(block, codec, now_s=now_s, digest_raw=keeper is None)
    if keeper is not None and payload is block.data:
        return Staged.kept(header, block, keeper, staging)
    if imitates_records(memoryview(payload)):
        return None
    return Staged.copied(header, payload, staging)
