"""The promises of the store, checked against what its parts really hold after every step.

For each running node:

1. Everything that memory holds is, byte for byte, a block that was written.
2. What was discarded, or cleared with its space, and not stored again, is in neither its memory
   nor its disk's index. (Stored again: by a client of this node, or in the shared Redis by
   anybody, or by a batch that was on its way to Redis when the discard ended.)
3. What a live lease said to be leased is in memory and pinned, unless it or an ancestor was
   discarded meanwhile.
4. Leased bytes are at most the cap; no lease outlives its time by more than the expiry period.
5. Pins, slots, slabs, index and log agree with one another; so does what attached clients hold.
6. Files together are never larger than the disk's capacity.
7. The disk's index is prefix-closed, and names no segment that is gone.
8. A discard that is over, confirmed or failed, goes on nowhere.
9. A block that needs its parent is in memory only with it, or when the parent was seen on this
   disk or went to Redis, from where it may since have gone; or was discarded.
"""

from kvstore.node import EXPIRY_PERIOD_S
from tests.sim.world.machine import Machine, Running
from tests.sim.world.oracle import Oracle
from tests.sim.world.trace import Broken
from tests.sim.world.universe import (
    digest,
    names_by_ref,
    names_by_stored_name,
    ref_of,
    short,
    variant_of,
)

SLACK_S = 0.01


def check_machine(machine: Machine, oracle: Oracle) -> None:
    """Raises Broken, or AssertionError from a part's own check, if a promise is broken."""
    running = machine.running
    if running is None:
        return
    if machine.files.peak_bytes > machine.limits.disk_bytes:
        raise Broken(
            f"{machine.name}: {machine.files.peak_bytes} bytes on disk, "
            f"{machine.limits.disk_bytes} allowed"
        )
    _check_parts(machine, running)
    _check_content(running, oracle)
    _check_forgotten(machine, running, oracle)
    _check_leases(machine, running, oracle)
    _check_parents(machine, running, oracle)
    if not oracle.discards[machine.name]:
        _check_left_behind(running)


def _check_parts(machine: Machine, running: Running) -> None:
    running.memory.check()
    running.node.leases.check()
    for attachment in running.attached.values():
        attachment.check()
    held_bytes = sum(attachment.held_bytes for attachment in running.attached.values())
    if held_bytes > running.room.held_bytes:
        raise Broken(f"{running.process.name}: {held_bytes} bytes are held, and not all counted")
    fault, machine.files.fault = machine.files.fault, None
    try:
        running.disk.check()
        segments = running.disk._segments._handles
        for name, entry in running.disk._index._entries.items():
            if entry.segment_id not in segments:
                where = f"segment {entry.segment_id}, which is gone"
                raise Broken(f"{running.process.name}: {_shown(name)} lies in {where}")
    finally:
        machine.files.fault = fault


def _check_content(running: Running, oracle: Oracle) -> None:
    names = names_by_ref()
    for slot in running.memory._index.values():
        name = names[slot.ref]
        variant = variant_of(name, slot.view)
        coming = not slot.digest and slot in running.node.tiers.digests._coming
        if variant is None or not (coming or slot.digest == digest(name, variant)):
            raise Broken(f"{running.process.name}: wrong bytes in memory for {short(name)}")
        if not oracle.was_written(name):
            raise Broken(f"{running.process.name}: nobody wrote {short(name)}")


def _check_forgotten(machine: Machine, running: Running, oracle: Oracle) -> None:
    barriers = oracle.barriers.get(machine.name)
    if not barriers:
        return
    refs, stored = names_by_ref(), names_by_stored_name()
    there = [(refs[slot], "memory") for slot in running.memory._index if refs[slot] in barriers]
    there += [
        (stored[name], "disk") for name in running.disk._index._entries if stored[name] in barriers
    ]
    for name, place in there:
        if oracle.resurrected(machine.name, name):
            raise Broken(f"{running.process.name}: {short(name)} was discarded, is in {place}")


def _check_leases(machine: Machine, running: Running, oracle: Oracle) -> None:
    node, now_s = running.node, running.node.clock.monotonic_s()
    for lease in node.leases._leases.values():
        if lease.expires_s < now_s - EXPIRY_PERIOD_S - SLACK_S:
            raise Broken(f"{running.process.name}: a lease outlives its time")
        for held in lease.held:
            known = held.indexed or held in running.memory._unindexed
            if not held.pins or not known:
                raise Broken(f"{running.process.name}: a leased slot is not pinned, or not known")
    for promise in oracle.promises:
        if promise.process != running.process.name or promise.expires_s <= now_s:
            continue
        for name in promise.blocks:
            slot = running.memory.find(ref_of(name))
            kept = slot is not None and slot.pins > 0
            if not kept and oracle.still_promised(machine.name, promise, name):
                raise Broken(f"{running.process.name}: {short(name)} is leased, and gone")


def _check_parents(machine: Machine, running: Running, oracle: Oracle) -> None:
    names = names_by_ref()
    for slot in running.memory._index.values():
        if slot.parent is None or slot.above is not None:
            continue
        parent = names[slot.parent]
        lay_below = slot.parent in machine.ledger.below or oracle.went_to_redis(parent)
        if not lay_below and not oracle.was_forgotten(machine.name, parent):
            child = short(names[slot.ref])
            raise Broken(f"{running.process.name}: {child} is in memory without {short(parent)}")


def _shown(stored: bytes) -> str:
    return short(names_by_stored_name()[stored])


def _check_left_behind(running: Running) -> None:
    for task in running.process.tasks:
        call = getattr(task.get_coro(), "__qualname__", "")
        if call in ("Guarded.discard", "Guarded.clear"):
            raise Broken(f"{running.process.name}: {call} goes on, and nobody waits for it")
