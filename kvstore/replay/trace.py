"""A trace: who asked for which chain of blocks, when, and perhaps what he said of its future."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from kvstore.api.hint import ReuseHint


class TraceError(ValueError):
    """When a trace or its hints cannot be read: names file, line and field, and what would do."""

    def __init__(self, place: str, problem: str, fix: str) -> None:
        super().__init__(f"{place}: {problem}; {fix}")


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request."""

    at_s: float
    input_tokens: int
    chain: Sequence[int]
    """Its full blocks, parents first. A block is one number for its content and all before it."""
    hint: ReuseHint | None = None
    number: int = 0
    """How many requests came before it in the file, which need not be in the order of time."""


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests in the order of time."""

    name: str
    block_tokens: int
    requests: Sequence[TraceRequest]
    unique_blocks: int
    """Different blocks that occur, partial ones at the end of a prompt among them."""
    infinite_hit_tokens: int
    """Tokens that a cache would have had that forgets nothing and keeps partial blocks too."""
    input_tokens: int = field(default=0)
    notes: Sequence[str] = ()
    """What was odd about the file and how it was taken."""

    @property
    def infinite_token_hit_rate(self) -> float:
        """The share of all input tokens that occurred before as part of the same prefix."""
        return self.infinite_hit_tokens / max(1, self.input_tokens)

    def hinted(self, hints: Sequence[ReuseHint | None]) -> "Trace":
        """The same requests with these hints, one for each."""
        requests = [
            replace(request, hint=hint) for request, hint in zip(self.requests, hints, strict=True)
        ]
        return replace(self, requests=requests)


class TraceBuilder:
    """Numbers the blocks of a trace as a trie: the same name below another parent is another."""

    def __init__(self, name: str, block_tokens: int) -> None:
        self._name = name
        self._block_tokens = block_tokens
        self._nodes: dict[tuple[int, object], int] = {}
        self._requests: list[TraceRequest] = []
        self._hit_tokens = 0
        self._input_tokens = 0

    def add(
        self,
        at_s: float,
        input_tokens: int,
        names: Iterable[object],
        hint: ReuseHint | None = None,
        number: int | None = None,
    ) -> None:
        """Adds a request. `names` covers its blocks; one at the end may be partial.

        Without a `number` it is the next.
        """
        chain: list[int] = []
        parent, known = -1, 0
        for name in names:
            before = len(self._nodes)
            node = self._nodes.setdefault((parent, name), before)
            # What is new has only new blocks below it.
            known += node != before
            chain.append(node)
            parent = node
        self._hit_tokens += min(known * self._block_tokens, input_tokens)
        self._input_tokens += input_tokens
        full = chain[: input_tokens // self._block_tokens]
        number = len(self._requests) if number is None else number
        self._requests.append(TraceRequest(at_s, input_tokens, full, hint, number))

    def finish(self, notes: Sequence[str] = ()) -> Trace:
        """The trace of all that was added."""
        return Trace(
            self._name,
            self._block_tokens,
            self._requests,
            len(self._nodes),
            self._hit_tokens,
            self._input_tokens,
            notes,
        )
