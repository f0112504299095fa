"""Records on their way to the disk: made of blocks, complete but for their place in the log."""

from collections.abc import Sequence

from kvstore.api.tier import Block, Keeper
from kvstore.codec import Codec
from kvstore.files import PAGE_BYTES, begins_on_a_page
from kvstore.record import Header, encode_block, with_payload_digest
from kvstore.staging import Loan, Staging
from kvstore.tiers.segment import imitates_records, pack_header_page, pages


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

    def completed(self, header: Header) -> tuple[Header, Sequence[memoryview]] | None:
        """The header as it is written, which is `header` and what depends on the bytes; the pages.

        None for a block that holds what could be taken for other blocks' records. A client who
        maps the arena might change the bytes behind this look, or behind the digest. The digest
        then makes the block a miss; and he runs as the node's own user, who could write whatever
        he likes to the files themselves, so the look is no defence against him.
        """
        first = self._loan.view[:PAGE_BYTES]
        if self._kept is None:
            first[:] = pack_header_page(header)
            return header, [self._loan.view]
        if imitates_records(self._kept):
            return None
        header = with_payload_digest(header, self._kept)
        first[:] = pack_header_page(header)
        whole = len(self._kept) // PAGE_BYTES * PAGE_BYTES
        rest, last = self._kept[whole:], self._loan.view[PAGE_BYTES:]
        last[: len(rest)] = rest
        last[len(rest) :] = bytes(len(last) - len(rest))
        return header, [part for part in (first, self._kept[:whole], last) if len(part)]

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
