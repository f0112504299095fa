"""A node's memory of messages: what was freed serves the next one, without page faults."""

import subprocess
import sys

import pytest

_MOVES = """
import resource, sys
from kvstore.heap import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def message():
    return [bytearray(b"x") * (1 << 20) for _ in range(16)]

message()
before = faults()
for _ in range(16):
    message()
print(faults() - before)
"""
PAGES = 16 * 16 * 256
"""Of what those messages hold."""


def faults_of(mode: str) -> int:
    """Page faults of a process that makes messages and frees them, again and again."""
    ran = subprocess.run(
        [sys.executable, "-c", _MOVES, mode], capture_output=True, text=True, check=True, timeout=60
    )
    return int(ran.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="what glibc does, and where it is")
def test_messages_that_follow_each_other_share_their_memory() -> None:
    """One in a hundred pages is faulted in again at most; as glibc comes nearly all are."""
    assert faults_of("keep") < PAGES / 100
    assert faults_of("as it is") > PAGES / 2
