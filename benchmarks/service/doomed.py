"""Clients that are going to be killed: a warm parent forks one for each line that it reads.

`python -m benchmarks.service.doomed` is that parent. A line is an endpoint and a seed; the
child opens calls of all kinds, leaves them in the middle, says its process id, and goes on with
others.
"""

import asyncio
import os
import random
import signal
import sys
from typing import NoReturn

from benchmarks.service.unfinished import OPERATIONS, Unfinished
from kvstore.api.channel import open_channel
from kvstore.api.v1.kvstore_pb2_grpc import KVStoreStub

LIFE_S = 60
"""At most, should nobody come to end it."""
ROUNDS = 1000


async def live(endpoint: str, seed: str) -> None:
    """Leaves calls in the middle until the end."""
    rng = random.Random(seed)
    async with open_channel(endpoint) as channel:
        unfinished = Unfinished(KVStoreStub(channel), rng)
        calls = []
        for number in range(ROUNDS):
            operation = OPERATIONS[number] if number < 3 else rng.choice(OPERATIONS)
            calls.append(await unfinished.begin(operation))
            if number == 2:
                os.write(sys.stdout.fileno(), b"%d\n" % os.getpid())
            del calls[:-6]


def be_born(endpoint: str, seed: str) -> NoReturn:
    """What a child does."""
    signal.alarm(LIFE_S)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    status = 1
    try:
        asyncio.run(live(endpoint, seed))
        status = 0
    finally:
        os._exit(status)


def main() -> None:
    """Forks until its input ends."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # Nobody asks how they ended.
    for line in sys.stdin:
        endpoint, seed = line.split()
        if os.fork() == 0:
            be_born(endpoint, seed)


if __name__ == "__main__":
    main()
