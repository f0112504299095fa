"""What engines did, as the tests ask for it, and the comparisons that they make."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

BY_SOURCE = "vllm:prompt_tokens_by_source{source=%s}"
COMPUTED = "local_compute"
LOCAL = "local_cache_hit"
EXTERNAL = "external_kv_transfer"


@dataclass
class Step:
    """One call of `generate`, or several of one prompt each."""

    name: str
    seconds: float
    counters: Mapping[str, int]
    """How vLLM's own counters moved, by name and labels."""
    outputs: list[dict[str, Any]]

    def prompt_tokens(self, source: str) -> int:
        """Prompt tokens by where they came from, in vLLM's count."""
        return int(self.counters.get(BY_SOURCE % source, 0))

    @property
    def tokens(self) -> list[list[int]]:
        """What was generated for each prompt."""
        return [output["tokens"] for output in self.outputs]

    def difference(self, other: "Step") -> float:
        """The largest between the log probabilities of the tokens chosen; tokens must be equal."""
        assert self.tokens == other.tokens, f"{self.tokens} and {other.tokens}"
        return max(
            abs(float(mine) - float(theirs))
            for one, another in zip(self.outputs, other.outputs, strict=True)
            for mine, theirs in zip(one["logprobs"], another["logprobs"], strict=True)
        )


@dataclass
class Engine:
    """One engine, from its start to its end."""

    name: str
    steps: dict[str, Step]
    lines: list[dict[str, Any]] = field(repr=False)
    error: str | None
    init_s: float
    shutdown_s: float

    @classmethod
    def read(cls, out: Mapping[str, Any]) -> Self:
        """From what `engine_run.py` wrote."""
        steps = [Step(**step) for step in out["steps"]]
        return cls(
            out["name"],
            {step.name: step for step in steps},
            list(out["lines"]),
            out["error"],
            out.get("init_s", 0.0),
            out.get("shutdown_s", 0.0),
        )

    def __getitem__(self, name: str) -> Step:
        return self.steps[name]

    def of(self, kind: str) -> list[dict[str, Any]]:
        """The witness's lines of one kind."""
        return [line for line in self.lines if line["kind"] == kind]

    def first_digests(self, kind: str) -> dict[str, str]:
        """By group, rank and key what the pages held when they were first `computed`/`restored`."""
        digests: dict[str, str] = {}
        for line in self.of(kind):
            if "digest" in line:
                digests.setdefault(line["name"], line["digest"])
        return digests

    @property
    def restored_blocks(self) -> list[tuple[str, str]]:
        """Name and digest of every block that a load filled."""
        return [(line["name"], line["digest"]) for line in self.of("restored") if "digest" in line]

    @property
    def failed_blocks(self) -> int:
        """Blocks that vLLM was told to compute after all."""
        return sum(line.get("failed", 0) for line in self.of("restored"))

    @property
    def longest_load_s(self) -> float:
        """From the metadata of a load to its end, the longest."""
        return max((line["seconds"] for line in self.of("restored") if "failed" in line), default=0)

    @property
    def longest_match_s(self) -> float:
        """From the first time that a request was looked up to its answer, the longest."""
        return max((line["waited_s"] for line in self.of("matched")), default=0)

    @property
    def longest_hook_s(self) -> tuple[float, str]:
        """The longest time that the connector kept vLLM waiting in one call, and in which."""
        return max(((line["seconds"], line["hook"]) for line in self.of("hook")), default=(0.0, ""))


def assert_restored(loaded: Engine, *saved: Engine, blocks: int) -> None:
    """Exactly `blocks` were filled by loads, each with the bytes that a saving engine computed."""
    computed: dict[str, str] = {}
    for engine in saved:
        computed = engine.first_digests("computed") | computed
    restored = loaded.restored_blocks
    assert len(restored) == blocks, f"{len(restored)} blocks restored, not {blocks}"
    strange = [name for name, digest in restored if computed.get(name) != digest]
    assert not strange, f"{len(strange)} of {blocks} blocks differ from what was computed"


def assert_same(step: Step, oracle: Step) -> None:
    """Equal tokens, and log probabilities that differ by 0.0."""
    difference = step.difference(oracle)
    assert difference == 0.0, f"log probabilities differ by {difference}"


def assert_nothing_restored(engine: Engine) -> None:
    """No block came from a store, in the engine's pages or in vLLM's count."""
    assert engine.restored_blocks == []
    assert all(step.prompt_tokens(EXTERNAL) == 0 for step in engine.steps.values())
