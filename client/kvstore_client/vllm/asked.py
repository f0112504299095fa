"""What the scheduler's side knows of one request."""

from dataclasses import dataclass, field
from typing import Any

from kvstore.api.hint import ReuseHint
from kvstore_client.vllm.adapters import Use
from kvstore_client.vllm.keys import Chain
from kvstore_client.vllm.questions import Question


@dataclass(slots=True, eq=False)
class Loading:
    """A load that the engine waits for."""

    keys: tuple[bytes, ...]
    pages: frozenset[int]
    beside: bool
    failed: bool = False
    ended: bool = False


@dataclass(slots=True, eq=False)
class Asked:
    """One request, from its arrival to its end or that of its load."""

    request: Any
    hint: ReuseHint | None = None
    use: Use | None = None
    """Of an adapter."""
    chain: Chain | None = None
    question: Question | None = None
    came_s: float = 0.0
    attempt: int = 0
    """Questions so far."""
    preemptions: int = 0
    """That have been noticed."""
    named: bool = True
    """False: what it computes rests on KV that is not what its keys say, or may not be."""
    gave_up: bool = False
    """The node or a load has failed: what is left is computed."""
    held: int = 0
    """Blocks that it had itself when it was last told what can be loaded."""
    loading: Loading | None = None
    waiting_for: Loading | None = None
    """Another request's, which brings the same blocks."""
    tiers: list[str] = field(default_factory=list)
    """Where the blocks of its load lay."""
    saved: int = 0
    """Blocks of the chain that were named to the workers to be saved."""
    began_at: int | None = None
    """Its computed tokens when it was first part of a step."""
    finished: bool = False

    def notice_preemption(self) -> None:
        """If it has lost its pages, all of it is asked for, computed and saved anew."""
        if self.request.num_preemptions == self.preemptions:
            return
        self.preemptions = self.request.num_preemptions
        self.drop_question()
        self.saved = 0
        self.began_at = None
        if self.use is not None:
            self.use.begins_anew()

    def drop_question(self) -> None:
        """Gives back what is leased, or will be. Idempotent."""
        if self.question is not None:
            self.question.drop()
            self.question = None
