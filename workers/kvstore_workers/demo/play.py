"""Plays the script: each request with the cache, and again without, and what came of it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from tokenizers import Tokenizer

from kvstore.api.hint import Reuse, ReuseHint
from kvstore_workers.demo.proof import Proof, prove
from kvstore_workers.demo.script import NEW_TOKENS, TEMPERATURE, Round, Turn, question
from kvstore_workers.request import Completion, Request

TIERS = ("vram", "memory", "redis", "disk")


class Workers(Protocol):
    """What the script is played on."""

    def generate(self, worker: str, requests: list[Request]) -> list[Completion]:
        """The answers of one worker."""

    def settle(self, worker: str) -> dict[bytes, bytes]:
        """The SHA-256 of every block that a worker stored, once it has stored all."""


@dataclass(frozen=True, slots=True)
class Played:
    """One request of the demo."""

    tenant: str
    person: str
    worker: str
    shows: str
    prompt_tokens: int
    computed_tokens: int
    restored_tokens: dict[str, int]
    cross_worker_tokens: int
    """Restored from the store, and computed by another worker."""
    ttft_ms: float
    ttft_nocache_ms: float
    proof: Proof


@dataclass(slots=True)
class Player:
    """Holds the conversations, and who computed which block."""

    workers: Workers
    tokenizer: Tokenizer
    documents: dict[str, list[int]]
    block_tokens: int
    advance: Callable[[], None]
    """Called after each request."""
    _histories: dict[tuple[str, str], list[int]] = field(default_factory=dict)
    _turns: dict[tuple[str, str], int] = field(default_factory=dict)
    _produced: dict[bytes, tuple[str, bytes]] = field(default_factory=dict)

    def play(self, act: Round) -> list[Played]:
        """Asks one round's questions, first with the cache, then again without."""
        prompts = [self._prompt(turn) for turn in act.turns]
        pairs = list(zip(act.turns, prompts, strict=True))
        cached = self.workers.generate(act.worker, [_request(t, p, True) for t, p in pairs])
        for key, sha256 in self.workers.settle(act.worker).items():
            self._produced.setdefault(key, (act.worker, sha256))
        plain = self.workers.generate(act.worker, [_request(t, p, False) for t, p in pairs])
        played = []
        for (turn, prompt), answer, reference in zip(pairs, cached, plain, strict=True):
            self._histories[turn.tenant, turn.person] = prompt + list(answer.tokens)
            played.append(self._judge(act, turn, answer, reference))
            self.advance()
        return played

    def _prompt(self, turn: Turn) -> list[int]:
        who = (turn.tenant, turn.person)
        self._turns[who] = self._turns.get(who, 0) + 1
        history = self._histories.get(who, self.documents[turn.tenant])
        asked: list[int] = self.tokenizer.encode(question(turn.person, self._turns[who])).ids
        return history + asked

    def _judge(self, act: Round, turn: Turn, answer: Completion, reference: Completion) -> Played:
        produced = {key: sha256 for key, (_, sha256) in self._produced.items()}
        elsewhere = [
            block
            for block in answer.restored_digests
            if block.tier != "vram" and self._produced[block.key][0] != act.worker
        ]
        return Played(
            tenant=turn.tenant,
            person=turn.person,
            worker=act.worker,
            shows=act.shows,
            prompt_tokens=answer.prompt_tokens,
            computed_tokens=answer.computed_tokens,
            restored_tokens={tier: answer.restored_tokens.get(tier, 0) for tier in TIERS},
            cross_worker_tokens=len(elsewhere) * self.block_tokens,
            ttft_ms=answer.ttft_s * 1000,
            ttft_nocache_ms=reference.ttft_s * 1000,
            proof=prove(answer, reference, produced),
        )


def _request(turn: Turn, prompt: list[int], use_cache: bool) -> Request:
    return Request(
        prompt,
        NEW_TOKENS,
        temperature=TEMPERATURE if turn.sampled else 0.0,
        seed=len(prompt),
        ignore_eos=True,
        tenant=turn.tenant,
        hint=ReuseHint(turn.person.encode(), Reuse.INTERACTIVE) if use_cache else None,
        use_cache=use_cache,
        logits_tokens=1,
        record_digests=use_cache,
    )
