"""What the default policy costs: time for each block touched, and memory for each block kept."""

import gc
import hashlib
import random
import time
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context

from benchmarks.index_cost import private_bytes
from benchmarks.proof import Claim, Finding, Proof, Setting, main
from kvstore.api.tier import BlockRef
from kvstore.policy.policies import DEFAULT, make_policy
from kvstore.policy.policy import Policy, Use

BLOCK_BYTES = 1 << 16
BLOCK_TOKENS = 16
TURN_BLOCKS = 12
BATCH_REQUESTS = 500
NEW_BLOCKS = 9
"""New blocks that the stream brings, over those that fit: by then all that a policy remembers of
the past is full (eight times the capacity), and blocks leave as fast as they come."""
TIMED_SHARE = 0.9
"""Time is measured from here on, in the steady state."""
TIME_GOAL_US = 20
STATE_GOAL_BYTES = 1536
FIXED_BYTES = 4 << 20
"""Tables whose size does not depend on the number of blocks; nothing where blocks are many."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What one run took."""

    touched: int
    seconds: float
    grown_bytes: int
    resident: int


class Arrivals:
    """Conversations that go on, and new ones: chains of names like a node's."""

    def __init__(self, seed: str, capacity: int) -> None:
        self._rng = random.Random(seed)
        self._namespace = hashlib.sha256(seed.encode()).digest()
        self._started = 0
        # Going on with one of these many, the older the less likely, hits about half of the time.
        self._open: list[tuple[int, int]] = []
        self._most_open = max(2, capacity // TURN_BLOCKS)
        self.new_blocks = 0

    def chains(self, count: int) -> list[list[BlockRef]]:
        """The next requests. Every name is made anew, as from the wire."""
        return [self._chain() for _ in range(count)]

    def _chain(self) -> list[BlockRef]:
        rng = self._rng
        if self._open and rng.random() < 0.5:
            age = min(len(self._open) - 1, int(rng.expovariate(8 / self._most_open)))
            number, length = self._open.pop(len(self._open) - 1 - age)
        else:
            self._started += 1
            number, length = self._started, 0
        length += TURN_BLOCKS
        self.new_blocks += TURN_BLOCKS
        if length < 8 * TURN_BLOCKS:
            self._open.append((number, length))
            if len(self._open) > self._most_open:
                del self._open[: self._most_open // 8]
        return [self._ref(number, at) for at in range(length)]

    def _ref(self, number: int, at: int) -> BlockRef:
        key = hashlib.sha256(b"%d %d" % (number, at)).digest()
        return BlockRef(self._namespace, key)


class Unranked:
    """The least that could stand in for a policy: who came first goes first."""

    def __init__(self) -> None:
        self._order: OrderedDict[BlockRef, None] = OrderedDict()

    def use(self, use: Use[BlockRef]) -> None:
        return

    def advise(self, use: Use[BlockRef]) -> None:
        return

    def __contains__(self, key: BlockRef) -> bool:
        return key in self._order

    def insert(self, key: BlockRef, parent: BlockRef | None, size_bytes: int) -> None:
        self._order[key] = None

    def remove(self, key: BlockRef) -> None:
        del self._order[key]

    def victims(self, now_s: float) -> Iterator[BlockRef]:
        return iter(self._order)

    def __len__(self) -> int:
        return len(self._order)


def measure(name: str | None, capacity: int, seed: str) -> Cost:
    """Fills a tier with chains, keeps it full, and looks at time and memory; None: no policy."""
    arrivals = Arrivals(seed, capacity)
    gc.collect()
    before = private_bytes()
    policy: Policy[BlockRef] = (
        make_policy(name, capacity * BLOCK_BYTES) if name is not None else Unranked()
    )
    here: dict[BlockRef, None] = {}
    touched, seconds, now_s = 0, 0.0, 0.0
    goal = NEW_BLOCKS * capacity
    while arrivals.new_blocks < goal:
        chains = arrivals.chains(BATCH_REQUESTS)
        steady = arrivals.new_blocks > TIMED_SHARE * goal
        started = time.process_time()
        for chain in chains:
            now_s += 0.02
            serve(policy, here, capacity, chain, now_s)
        if steady:
            seconds += time.process_time() - started
            touched += sum(len(chain) for chain in chains)
        del chains
    gc.collect()
    return Cost(touched, seconds, private_bytes() - before, len(policy))


def serve(
    policy: Policy[BlockRef],
    here: dict[BlockRef, None],
    capacity: int,
    chain: list[BlockRef],
    now_s: float,
) -> None:
    """One request: its use, room for what it lacks, and the writes."""
    policy.use(Use(chain, now_s, BLOCK_BYTES, BLOCK_TOKENS))
    lacking = [place for place, ref in enumerate(chain) if ref not in here]
    surplus = len(here) + len(lacking) - capacity
    if surplus > 0:
        for ref in list(islice(policy.victims(now_s), surplus)):
            policy.remove(ref)
            del here[ref]
    for place in lacking:
        ref = chain[place]
        policy.insert(ref, chain[place - 1] if place else None, BLOCK_BYTES)
        here[ref] = None


def run(setting: Setting) -> list[Finding]:
    """Measures in processes of their own, so that no freed memory is taken for little memory."""
    capacity = setting.trials
    costs = []
    for name, share in ((DEFAULT, 0.9), (None, 0.1)):
        with ProcessPoolExecutor(1, get_context("spawn")) as alone:
            costs.append(alone.submit(measure, name, capacity, setting.seed).result())
        setting.tick(int(share * setting.trials))
    ours, bare = costs
    time_us = (ours.seconds / ours.touched - bare.seconds / bare.touched) * 1e6
    grown_bytes = ours.grown_bytes - bare.grown_bytes
    state_bytes = grown_bytes / ours.resident
    small = grown_bytes <= STATE_GOAL_BYTES * ours.resident + FIXED_BYTES
    aside = small and state_bytes > STATE_GOAL_BYTES
    reason = f"{FIXED_BYTES >> 20} MiB of tables of fixed size aside" if aside else ""
    details = {"blocks": ours.resident, "touched": ours.touched}
    return [
        Finding(round(time_us, 2), time_us <= TIME_GOAL_US, details=details),
        Finding(round(state_bytes), small, reason=reason, details=details),
    ]


PROOF = Proof(
    module="policy_cost",
    about="What the default policy costs at so many blocks: time per block touched, and memory.",
    claims=(
        Claim("policy: time of use, insert, victims and remove", "µs/block", f"<= {TIME_GOAL_US}"),
        Claim("policy: state, its history full", "B/block", f"<= {STATE_GOAL_BYTES}"),
    ),
    trials={"test": 1_000, "short": 100_000, "long": 1_000_000},
    run=run,
    beside=(),
)

if __name__ == "__main__":
    main(PROOF)
