"""What is being forgotten, for those who would bring it back: they look here, nobody waits."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from weakref import WeakSet

from kvstore.api.tier import BlockRef

Concerns = Callable[[BlockRef], bool]
"""Whether a block is among those that somebody forgets."""


class Watch:
    """Some blocks, and which of them were forgotten at any moment since it was made."""

    def __init__(self, refs: Iterable[BlockRef]) -> None:
        self._refs = frozenset(refs)
        self.lost: set[BlockRef] = set()

    def forget(self, concerns: Concerns) -> None:
        """Somebody has begun to forget."""
        self.lost.update(filter(concerns, self._refs))


class Oblivion:
    """All that is being forgotten now. A watch ends when nobody holds it any more."""

    def __init__(self) -> None:
        self._under_way: list[Concerns] = []
        self._watches: WeakSet[Watch] = WeakSet()

    @contextmanager
    def forgetting(self, concerns: Concerns) -> Iterator[None]:
        """While this lasts, and for watches that see it, these blocks are not to come back."""
        self._under_way.append(concerns)
        for watch in self._watches:
            watch.forget(concerns)
        try:
            yield
        finally:
            self._under_way.remove(concerns)

    def concerns(self, ref: BlockRef) -> bool:
        """Whether somebody is forgetting the block now."""
        return any(concerns(ref) for concerns in self._under_way)

    def watch(self, refs: Iterable[BlockRef]) -> Watch:
        """Notes from now on which of the blocks are forgotten, as long as it is held."""
        watch = Watch(refs)
        for concerns in self._under_way:
            watch.forget(concerns)
        self._watches.add(watch)
        return watch
