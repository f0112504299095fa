"""Who asks what, when and of whom: the conversations of the demo, as data."""

from dataclasses import dataclass

MODULES = {"acme": "argparse.py", "globex": "tarfile.py", "initech": "asyncio/base_events.py"}
"""The document that each tenant holds."""

DOCUMENT_TOKENS = {"acme": 1100, "globex": 1700, "initech": 2300}


@dataclass(frozen=True, slots=True)
class Turn:
    """One question of one person, at the end of all that he asked and heard before."""

    tenant: str
    person: str
    sampled: bool = False
    """True: drawn at a temperature; else always the likeliest token."""


@dataclass(frozen=True, slots=True)
class Round:
    """Turns that one worker answers together, and what the reader should see in it."""

    worker: str
    turns: tuple[Turn, ...]
    shows: str


BEFORE_CRASH = (
    Round("A", (Turn("acme", "ana"),), "a cold start: everything is computed"),
    Round("A", (Turn("acme", "ana"),), "the same worker: blocks are still in VRAM"),
    Round("B", (Turn("acme", "ben"),), "another worker: blocks come from the store"),
    Round(
        "A",
        (Turn("globex", "gus"), Turn("initech", "ida", sampled=True)),
        "two requests in one batch; VRAM and memory overflow",
    ),
    Round(
        "B",
        (Turn("initech", "ian"), Turn("globex", "gil", sampled=True)),
        "their colleagues on the other worker",
    ),
    Round("A", (Turn("acme", "ana", sampled=True),), "long evicted here: comes from below"),
    Round("B", (Turn("initech", "ian"),), "a longer conversation"),
    Round("A", (Turn("globex", "gus"),), "back to a document that others pushed out"),
    Round("B", (Turn("acme", "ben"),), "and to the first one"),
    Round("A", (Turn("initech", "ida"),), "the longest prompt"),
)

AFTER_CRASH = (
    Round("B", (Turn("globex", "gil"),), "after SIGKILL, memory empty, Redis withheld: disk"),
    Round("A", (Turn("acme", "ana"),), "the same for another tenant"),
    Round("B", (Turn("initech", "ian"),), "and for the longest document"),
)

NEW_TOKENS = 24
"""Of each answer."""

TEMPERATURE = 0.8


def question(person: str, turn: int) -> str:
    """What a person asks in his n-th turn, from 1."""
    asked = (
        "which names does this module export, and which of them are for its users?",
        "write the signature and the docstring of its most important function.",
        "show how a caller would use it, with one short example.",
        "what happens when the input is wrong?",
    )
    return f"\n\n# Question {turn} of {person}: {asked[(turn - 1) % len(asked)]}\n"
