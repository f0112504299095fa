"""What the device has for certain, as far as the system calls that were made can tell.

Bytes are on the device once their file was synced after they were written. A sync that fails
takes with it what it should have written: the system may have dropped those pages, and a later
sync that succeeds says nothing of them (Linux does so; PostgreSQL lost data to it in 2018).
"""

from collections import defaultdict

from benchmarks.crash.system_calls import SYNCS, WRITES, Call

PAGE_BYTES = 4096


class Durability:
    """Follows the calls of one process and tells which files hold bytes that may be lost."""

    def __init__(self) -> None:
        self._names: dict[int, str] = {}
        self._dirty: defaultdict[str, set[int]] = defaultdict(set)
        self._lost: defaultdict[str, set[int]] = defaultdict(set)

    def forget(self) -> None:
        """Another process begins."""
        self.__init__()  # type: ignore[misc]

    def done(self, call: Call, answer: object) -> None:
        """A call was made and gave this."""
        if call.name == "open" and isinstance(answer, int):
            self._names[answer] = str(call.arguments[0])
        elif call.name == "rename":
            old, new = map(str, call.arguments)
            self._dirty[new] = self._dirty.pop(old, set())
            self._lost[new] = self._lost.pop(old, set())
            self._names = {h: new if name == old else name for h, name in self._names.items()}
        elif call.name in WRITES and isinstance(answer, int):
            self._written(call, answer)
        elif call.name == "ftruncate":
            handle, size = call.arguments
            pages = {p for p in self._dirty[self._name(handle)] if p * PAGE_BYTES < size}
            self._dirty[self._name(handle)] = pages
            self._lost[self._name(handle)] = {
                p for p in self._lost[self._name(handle)] if p * PAGE_BYTES < size
            }
        elif call.name in SYNCS:
            self._dirty[self._name(call.arguments[0])].clear()

    def failed(self, call: Call) -> None:
        """A call did not happen, or not as it was meant."""
        if call.name in SYNCS:
            name = self._name(call.arguments[0])
            self._lost[name] |= self._dirty[name]
            self._dirty[name].clear()

    def safe(self, file: str, offset: int, size: int) -> bool:
        """Whether a stretch of a file is on the device."""
        pages = range(offset // PAGE_BYTES, -(-(offset + size) // PAGE_BYTES))
        return not any(page in self._dirty[file] or page in self._lost[file] for page in pages)

    def _written(self, call: Call, count: int) -> None:
        name, offset = self._name(call.arguments[0]), call.arguments[2]
        pages = set(range(offset // PAGE_BYTES, -(-(offset + count) // PAGE_BYTES)))
        self._dirty[name] |= pages
        self._lost[name] -= pages

    def _name(self, handle: int) -> str:
        return self._names.get(handle, "")
