"""The command line of the benchmark."""

import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.dataplane.child import ChildGone
from benchmarks.dataplane.measure import measure
from benchmarks.dataplane.options import Amounts, Names, Seconds
from benchmarks.dataplane.plan import PATHS, Plan
from benchmarks.dataplane.report import as_dict, draw, table, warning
from benchmarks.dataplane.stage import Refused
from benchmarks.proof import machine
from kvstore.api.errors import ConfigError
from kvstore.replay.picture import require_pictures

PAGE_BYTES = 4096
MOST_BLOCK_BYTES = 64 << 20
"""As large as a slab of the node that is measured."""
MOST_BATCH = 4096
MOST_CLIENTS = 64
MOST_MATCH = 65_536
_WIDTH = 140
"""Columns of a table that nobody looks at in a terminal."""
_FILE = click.Path(dir_okay=False, path_type=Path)
_FULL: dict[str, Any] = {
    "block_bytes": (256 << 10, 2 << 20, 16 << 20), "clients": (1, 2), "repeats": 9,
    "sample_s": 0.12,
}  # fmt: skip
_QUICK: dict[str, Any] = {
    "block_bytes": (2 << 20,), "clients": (1,), "repeats": 3, "sample_s": 0.1,
}  # fmt: skip


def _png(context: click.Context, parameter: click.Parameter, value: Path | None) -> Path | None:
    if value is not None:
        require_pictures()
    return value


@contextmanager
def _progress(cells: int) -> Iterator[Callable[[str], None]]:
    """A bar on standard error, gone at the end; where that is no terminal, a line for each cell."""
    with Progress(
        TextColumn("{task.description}", table_column=None),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as bar:
        task = bar.add_task("starting", total=cells)
        done = -1

        def tick(what: str) -> None:
            nonlocal done
            done += 1
            bar.update(task, completed=done, description=f"{what:<26}")
            if not bar.console.is_terminal:
                bar.console.print(f"{done + 1} of {cells}: {what}")

        yield tick


@contextmanager
def _ending_in_order() -> Iterator[None]:
    """SIGTERM would end this process at once; the children are to end first, as at Ctrl-C."""

    def end(number: int, frame: object) -> None:
        click.echo(f"Ended by {signal.Signals(number).name}.", err=True)
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@click.command(
    epilog="""\b
Examples:
  python -m benchmarks.dataplane --quick
  python -m benchmarks.dataplane --json dataplane.json --png dataplane.png
  python -m benchmarks.dataplane --paths grpc --block-bytes 2MiB --batch 32 --clients 1,4
"""
)
@click.option(
    "--paths", type=Names(), default=",".join(PATHS), show_default=True, metavar="LIST",
    help="Which of our paths, each beside its floor; peer, from node to node, only if named.",
)  # fmt: skip
@click.option(
    "--block-bytes", type=Amounts(PAGE_BYTES, MOST_BLOCK_BYTES, PAGE_BYTES), metavar="LIST",
    show_default="256KiB,2MiB,16MiB", help="Sizes of blocks.",
)  # fmt: skip
@click.option(
    "--batch", "batches", type=Amounts(1, MOST_BATCH), default="1,32", show_default=True,
    metavar="LIST", help="How many blocks one call moves.",
)  # fmt: skip
@click.option(
    "--clients", type=Amounts(1, MOST_CLIENTS), metavar="LIST", show_default="1,2",
    help="How many clients call at the same time.",
)  # fmt: skip
@click.option(
    "--match", "match_blocks", type=Amounts(1, MOST_MATCH), default="1000,10000",
    show_default=True, metavar="LIST",
    help="Of how many blocks chains are that are matched, with leases (belongs to grpc).",
)  # fmt: skip
@click.option(
    "--repeats", type=click.IntRange(1, 1000), metavar="N", show_default="9",
    help="Samples of each path and of its floor, in turn; their medians are shown. Three are "
    "enough where they take long and no goal is set.",
)  # fmt: skip
@click.option(
    "--sample-s", type=Seconds(0.001, 60), metavar="SECONDS", show_default="0.12",
    help="How long a sample makes calls; it ends earlier once the rotation is through.",
)  # fmt: skip
@click.option(
    "--rotation-bytes", type=Amounts(PAGE_BYTES, 16 << 30), metavar="SIZE",
    show_default="half of the caches, eight calls, at most 512MiB",
    help="Memory that each client goes round in, on either side of a copy.",
)  # fmt: skip
@click.option(
    "--quick", is_flag=True, help="Blocks of 2MiB, one client, three short samples: under a minute."
)
@click.option(
    "--home", type=click.Path(file_okay=False, exists=True, path_type=Path), metavar="DIRECTORY",
    help="Where files are written; its file system is what is measured.  [default: TMPDIR]",
)  # fmt: skip
@click.option("--json", "json_file", type=_FILE, help="Write the rows to this file, too.")
@click.option(
    "--png", "png_file", type=_FILE, callback=_png,
    help="Draw the largest batches into this file (needs matplotlib).",
)  # fmt: skip
def main(
    paths: Sequence[str],
    block_bytes: Sequence[int] | None,
    batches: Sequence[int],
    clients: Sequence[int] | None,
    match_blocks: Sequence[int],
    repeats: int | None,
    sample_s: float | None,
    rotation_bytes: Sequence[int] | None,
    quick: bool,
    home: Path | None,
    json_file: Path | None,
    png_file: Path | None,
) -> None:
    """Measure how fast blocks move on each path, beside what the machine allows.

    A path and its floor are sampled in turn, with the same blocks in the same order: shm beside
    memcpy in the same memory, bulk beside a raw socket stream, grpc beside bare grpcio with its
    best message size, disk beside a raw O_DIRECT file and redis beside a raw RESP stream, both at
    their best depth.
    Node, Redis and clients are processes of their own on this host; nothing leaves it. Memory is
    faulted in beforehand, the copy into the caller's buffer is included, and a put to disk is
    over once the bytes are on the device. What cannot run is a row that says why.

    A full run takes about ten minutes and 6 GiB of memory, on an idle machine.
    """
    usual = _QUICK if quick else _FULL
    plan = Plan(
        paths=paths,
        block_bytes=block_bytes or usual["block_bytes"],
        batches=batches,
        clients=clients or usual["clients"],
        match_blocks=match_blocks,
        repeats=repeats or usual["repeats"],
        sample_s=sample_s or usual["sample_s"],
        rotation_bytes=max(rotation_bytes or [0]),
    )
    load_before = os.getloadavg()[0]
    cells = sum(len(plan.cells(size)) for size in plan.block_bytes) + len(plan.match_cells())
    try:
        with (
            _ending_in_order(),
            tempfile.TemporaryDirectory(prefix="kvstore-dataplane-", dir=home) as files,
            _progress(cells) as tick,
        ):
            rows = measure(plan, Path(files), tick)
    except (ChildGone, Refused, ConfigError, OSError) as error:
        raise click.ClickException(str(error)) from None
    said = machine()
    if json_file is not None:
        json_file.write_text(json.dumps(as_dict(said, rows, load_before), indent=1) + "\n")
    if png_file is not None:
        draw(said, rows, png_file, warning(load_before))
    console = Console()
    Console(width=max(console.width, _WIDTH)).print(table(said, rows, warning(load_before)))
