"""A plan for people: tables, sentences, a picture."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.table import Table

from kvstore.replay.picture import new_picture
from kvstore.replay.plan import GIB, Plan, Row

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def size_text(size_bytes: float) -> str:
    """A size in three digits and a binary unit."""
    unit = 0
    while size_bytes >= 1000 and unit < len(_UNITS) - 1:
        size_bytes /= 1024
        unit += 1
    return f"{size_bytes:.3g} {_UNITS[unit]}"


def tables(plan: Plan) -> Iterator[Table]:
    """Memory alone, and the given memory with disks."""
    yield _table("Memory alone", plan.memory_alone, plan)
    memory = size_text(plan.question.memory_bytes)
    yield _table(f"{memory} of memory, with a disk", plan.with_disk, plan)


def _table(title: str, rows: Sequence[Row], plan: Plan) -> Table:
    disks = any(row.disk_bytes for row in rows)
    table = Table(title=title, title_justify="left")
    headings = ["disk", "from memory", "from disk", "together", "next GiB", "disk writes"]
    for heading in headings if disks else ["memory", "hit rate", "next GiB"]:
        table.add_column(heading, justify="right")
    following = [*(f"{100 * row.per_gib:+.3g}" for row in rows[1:]), ""]
    for row, gain in zip(rows, following, strict=True):
        rates = row.rates
        total = f"{100 * rates.total:.2f} %"
        if disks:
            written = size_text(rates.written_blocks * plan.question.block_bytes)
            table.add_row(
                size_text(row.disk_bytes), f"{100 * rates.memory:.2f} %",
                f"{100 * rates.disk:.2f} %", total, gain, written,
            )  # fmt: skip
        else:
            table.add_row(size_text(row.memory_bytes), total, gain)
    return table


def sentences(plan: Plan) -> Iterator[str]:
    """The answers, one for each question."""
    question, trace = plan.question, plan.question.trace
    yield (
        f"{trace.name}: {len(trace.requests):,} requests, {trace.unique_blocks:,} blocks of "
        f"{trace.block_tokens} tokens and {size_text(question.block_bytes)}, together "
        f"{size_text(question.footprint_bytes)}; a cache that forgets nothing has "
        f"{100 * trace.infinite_token_hit_rate:.2f} %."
    )
    asked = f"{size_text(question.memory_bytes)} of memory"
    if question.disk_bytes:
        asked += f" and {size_text(question.disk_bytes)} of disk"
    yield (
        f"{asked}: {100 * plan.asked.memory:.2f} % from memory + {100 * plan.asked.disk:.2f} % "
        f"from disk = {100 * plan.asked.total:.2f} %. The next GiB of memory brings "
        f"{100 * plan.per_gib_of_memory:+.3g} points"
        + (f", of disk {100 * plan.per_gib_of_disk:+.3g}." if question.disk_bytes else ".")
    )
    if plan.used != question.asked():
        yield (
            f"{question.policy} has that with {size_text(plan.used_memory_bytes())} of the memory"
            + (
                f" and {size_text(plan.used_disk_bytes())} of the disk"
                if question.disk_bytes
                else ""
            )
            + "; on this trace, all of it is worth no more."
        )
    goal = f"{100 * question.hit_rate:.3g} %"
    memory, disk = plan.memory_for_goal_bytes(), plan.disk_for_goal_bytes()
    if memory is None:
        yield f"{goal}: no size of memory reaches it on this trace."
    else:
        yield f"{goal}: about {size_text(memory)} of memory alone."
    beside = f"beside {size_text(question.memory_bytes)} of memory"
    if disk is None:
        yield f"{goal}: no disk {beside} reaches it on this trace."
    elif disk == 0:
        yield f"{goal}: {size_text(question.memory_bytes)} of memory have it without a disk."
    else:
        yield f"{goal}: about {size_text(disk)} of disk {beside}."


def draw(plan: Plan, file: Path) -> None:
    """Hit rate over size: memory alone, and disk beside the memory that was given."""
    question = plan.question
    figure, axes = new_picture(f"{question.trace.name}: what memory and disk buy")
    alone = [(row.memory_bytes / GIB, 100 * row.rates.total) for row in plan.memory_alone]
    beside = [(row.disk_bytes / GIB, 100 * row.rates.total) for row in plan.with_disk[1:]]
    axes.plot(*zip(*alone, strict=True), marker="o", label="memory alone")
    memory = size_text(question.memory_bytes)
    axes.plot(*zip(*beside, strict=True), marker="s", label=f"disk beside {memory} of memory")
    axes.axhline(100 * question.hit_rate, color="black", linestyle="--", linewidth=1, label="goal")
    axes.axhline(
        100 * question.trace.infinite_token_hit_rate, color="0.7", linewidth=1,
        label="forgets nothing",
    )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlabel("size, GiB")
    axes.set_ylabel("token hit rate, %")
    axes.set_ylim(bottom=0)
    axes.legend(loc="lower right")
    figure.savefig(file)
