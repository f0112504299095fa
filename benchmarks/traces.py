"""Traces of our own: seeded workloads of shapes that no single policy is good at.

Each shape is a mixture of few kinds of client over a stretch of time. Every client knows what it
will do next, so each trace comes with true hints; `misled` makes some of them false.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count

from kvstore.api.hint import MAX_RETURN_MS, Reuse, ReuseHint
from kvstore.replay.trace import Trace, TraceBuilder

BLOCK_TOKENS = 512
SMALL_BLOCK_TOKENS = 16


@dataclass(slots=True)
class Prompt:
    """One request: its text is what its pieces say, each so many tokens of its own content."""

    at_s: float
    pieces: Sequence[tuple[object, int]]
    hint: ReuseHint


@dataclass(slots=True)
class World:
    """What the clients of one trace share."""

    rng: random.Random
    numbers: Iterator[int] = field(default_factory=count)

    def fresh(self, tokens: float) -> tuple[object, int]:
        """A piece of text that nobody wrote before."""
        return ("fresh", next(self.numbers)), max(1, int(tokens))

    def popular(self, kind: str, choices: int, skew: float, tokens: int) -> tuple[object, int]:
        """A piece that others use too: the i-th of `choices`, by Zipf's law."""
        rank = 1
        while True:
            # By rejection, so that no table of all choices is needed.
            rank = int((choices + 1) ** self.rng.random())
            if (rank <= choices and self.rng.random() < rank ** (1 - skew)) or skew == 1:
                break
        # Lengths belong to the piece: the same for everyone who uses it.
        scale = 0.3 + 1.4 * random.Random(f"{kind} {rank}").random()
        return (kind, rank), max(1, int(tokens * scale))

    def lognormal(self, median: float, spread: float) -> float:
        """Times and lengths of people: `spread` is the factor of one standard deviation."""
        return float(median * spread ** self.rng.gauss(0, 1))


Client = Callable[[World, float], Iterator[Prompt]]
"""The requests of one client that begins at some time, in the order of time."""


def _hint(number: int, reuse: Reuse, back_s: float = 0, spread: float = 1) -> ReuseHint:
    back_ms = min(MAX_RETURN_MS, int(1000 * back_s * spread))
    return ReuseHint(f"{number}".encode(), reuse, back_ms)


def chat(median_think_s: float = 90, mean_turns: float = 3, turn_tokens: float = 900) -> Client:
    """A person in a conversation: the whole history comes again with each turn."""

    def client(world: World, at_s: float) -> Iterator[Prompt]:
        session = next(world.numbers)
        history = [world.popular("system", 20, 1.2, 700), world.fresh(world.lognormal(2000, 3))]
        turns = 1
        while world.rng.random() > 1 / mean_turns and turns < 60:
            turns += 1
        for turn in range(turns):
            think_s = world.lognormal(median_think_s, 3)
            last = turn == turns - 1
            hint = _hint(session, Reuse.FINAL) if last else _hint(
                session, Reuse.INTERACTIVE, think_s, world.lognormal(1, 2)
            )  # fmt: skip
            yield Prompt(at_s, tuple(history), hint)
            history += [world.fresh(300), world.fresh(world.lognormal(turn_tokens, 2))]
            at_s += 5 + think_s

    return client


def agent(world: World, at_s: float) -> Iterator[Prompt]:
    """A loop of tool calls that reads its whole context every few seconds, and then is done."""
    session = next(world.numbers)
    history = [world.popular("tools", 8, 1.1, 6000), world.fresh(world.lognormal(1500, 2))]
    steps = 1 + int(world.rng.expovariate(1 / 14))
    for step in range(steps):
        pause_s = world.lognormal(6, 3)
        last = step == steps - 1
        hint = _hint(session, Reuse.FINAL) if last else _hint(
            session, Reuse.AUTOMATIC, pause_s, world.lognormal(1, 1.5)
        )  # fmt: skip
        yield Prompt(at_s, tuple(history), hint)
        history.append(world.fresh(world.lognormal(800, 2.5)))
        at_s += 2 + pause_s


def retrieval(world: World, at_s: float) -> Iterator[Prompt]:
    """One question about one of many documents, some of them in fashion."""
    pieces = (
        world.popular("instructions", 3, 1.1, 800),
        world.popular("document", 3000, 1.05, 6000),
        world.fresh(200),
    )
    yield Prompt(at_s, pieces, _hint(next(world.numbers), Reuse.FINAL))


def few_shot(world: World, at_s: float) -> Iterator[Prompt]:
    """One short question below one of many long prompts with examples."""
    pieces = (world.popular("examples", 600, 1.15, 5000), world.fresh(world.lognormal(500, 2)))
    yield Prompt(at_s, pieces, _hint(next(world.numbers), Reuse.FINAL))


def scan(world: World, at_s: float) -> Iterator[Prompt]:
    """A batch job over texts that nobody reads again."""
    session = next(world.numbers)
    for _ in range(40):
        pieces = (("batch", 0), 600), world.fresh(world.lognormal(9000, 1.5))
        yield Prompt(at_s, pieces, _hint(session, Reuse.FINAL))
        at_s += world.rng.expovariate(2)


def cycle(world: World, at_s: float) -> Iterator[Prompt]:
    """An evaluation that asks the same long list of prompts again and again."""
    session = next(world.numbers)
    length, gap_s = 120, 1.5
    for _ in range(4):
        for item in range(length):
            pieces = (("suite", session), 500), (("item", session, item), 4000)
            yield Prompt(at_s, pieces, _hint(session, Reuse.AUTOMATIC, length * gap_s))
            at_s += gap_s


Mixture = Mapping[Client, float]
"""Clients that begin per second, by kind."""

_CHAT = {chat(): 0.5}
_LONG_CHAT: Mixture = {chat(median_think_s=40, mean_turns=12, turn_tokens=1500): 0.12}
_AGENTS: Mixture = {agent: 0.12}
_RETRIEVAL: Mixture = {retrieval: 1.5}
_FEW_SHOT: Mixture = {few_shot: 2.0}
_SCANS: Mixture = {**_CHAT, scan: 0.01}
_CYCLES: Mixture = {**_CHAT, cycle: 0.003}
_MIXED: Mixture = {chat(): 0.25, agent: 0.04, retrieval: 0.4, few_shot: 0.4, scan: 0.003}


@dataclass(frozen=True, slots=True)
class Shape:
    """A workload: stretches of mixtures, one after the other, each an equal share of the trace."""

    stretches: Sequence[Mixture]
    block_tokens: int = BLOCK_TOKENS
    share: float = 1.0
    """Of the number of requests that is asked for."""


SHAPES: Mapping[str, Shape] = {
    "chat": Shape([_CHAT]),
    "long-chat": Shape([_LONG_CHAT]),
    "agents": Shape([_AGENTS]),
    "retrieval": Shape([_RETRIEVAL]),
    "few-shot": Shape([_FEW_SHOT]),
    "scans": Shape([_SCANS]),
    "cycles": Shape([_CYCLES]),
    "mixed": Shape([_MIXED]),
    "phases": Shape([_CHAT, _RETRIEVAL, _AGENTS, _FEW_SHOT, _CHAT]),
    "tiny": Shape([_MIXED], share=0.03),
    "small-blocks": Shape([_MIXED], block_tokens=SMALL_BLOCK_TOKENS, share=0.15),
}


def generate(shape_name: str, requests: int, seed: str) -> Trace:
    """A trace of one of the `SHAPES`, with true hints."""
    shape = SHAPES[shape_name]
    wanted = max(1, int(requests * shape.share))
    world = World(random.Random(f"{seed} {shape_name}"))
    builder = TraceBuilder(f"{shape_name} (seed {seed})", shape.block_tokens)
    for prompt in _prompts(world, shape.stretches, wanted):
        tokens = sum(length for _, length in prompt.pieces)
        builder.add(prompt.at_s, tokens, _names(prompt, shape.block_tokens), prompt.hint)
    return builder.finish()


def _prompts(world: World, stretches: Sequence[Mixture], wanted: int) -> Iterator[Prompt]:
    """The requests of all clients in the order of time."""
    waiting: list[tuple[float, int, Prompt, Iterator[Prompt]]] = []
    arrival_s, ties = 0.0, count()
    for number in range(wanted):
        mixture = stretches[number * len(stretches) // wanted]
        while not waiting or waiting[0][0] > arrival_s:
            kinds, rates = list(mixture), list(mixture.values())
            client = world.rng.choices(kinds, rates)[0](world, arrival_s)
            first = next(client)
            heappush(waiting, (first.at_s, next(ties), first, client))
            arrival_s += world.rng.expovariate(sum(rates))
        _, _, prompt, client = heappop(waiting)
        yield prompt
        following = next(client, None)
        if following is not None:
            heappush(waiting, (following.at_s, next(ties), following, client))


def _names(prompt: Prompt, block_tokens: int) -> Iterator[object]:
    """A name for each block: what lies in it, and where in its pieces it begins and ends."""
    inside: list[tuple[object, int]] = []
    room = block_tokens
    for piece, length in prompt.pieces:
        start = 0
        while length - start >= room:
            yield (*inside, (piece, start))
            start += room
            inside, room = [], block_tokens
        if length > start:
            inside.append((piece, start))
            room -= length - start
    if inside:
        # A partial block: its content is what it holds so far.
        yield (*inside, room)


def misled(trace: Trace, share: float, seed: str) -> list[ReuseHint | None]:
    """The hints of a trace, of which this share is false: the flag inverted, the time at random."""
    rng = random.Random(f"{seed} misled")
    hints: list[ReuseHint | None] = []
    for request in trace.requests:
        hint = request.hint
        if hint is not None and rng.random() < share:
            others = [Reuse.FINAL] if hint.reuse is not Reuse.FINAL else [
                Reuse.INTERACTIVE, Reuse.AUTOMATIC
            ]  # fmt: skip
            back_ms = int(10 ** rng.uniform(2.5, 6.5))
            hint = ReuseHint(hint.session_id, rng.choice(others), back_ms)
        hints.append(hint)
    return hints
