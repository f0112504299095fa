"""Options that `kvstore replay` and `kvstore plan` share."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from kvstore.replay.picture import require_pictures
from kvstore.replay.runs import Source
from kvstore.replay.trace import Trace, TraceError

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
NEW_FILE = click.Path(dir_okay=False, path_type=Path)


def trace_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The trace, its hints, and where results go."""
    for option in reversed(
        (
            click.argument("trace_file", metavar="TRACE", type=FILE),
            click.option(
                "--hints",
                "hints_file",
                type=FILE,
                help="What callers said of their requests: one JSON object per line, for the same "
                "line of TRACE.",
            ),
            click.option(
                "--limit",
                type=click.IntRange(1),
                metavar="N",
                help="Only the first N lines of TRACE.",
            ),
            click.option(
                "--jobs",
                type=click.IntRange(1),
                metavar="N",
                default=lambda: os.cpu_count() or 1,
                show_default="one per CPU",
                help="Processes that replay at the same time.",
            ),
            click.option(
                "--json", "json_file", type=NEW_FILE, help="Write the result to this file, too."
            ),
            click.option(
                "--png",
                "png_file",
                type=NEW_FILE,
                callback=_png,
                help="Draw the result into this file (needs matplotlib).",
            ),
        )
    ):
        command = option(command)
    return command


def _png(context: click.Context, parameter: click.Parameter, value: Path | None) -> Path | None:
    if value is not None:
        require_pictures()
    return value


def read_source(source: Source) -> Trace:
    """The trace; what is odd about it is said, what is wrong ends the command with one line."""
    try:
        trace = source.read()
    except TraceError as error:
        raise click.ClickException(str(error)) from None
    except OSError as error:
        raise click.ClickException(f"{error.filename}: {error.strerror}") from None
    for note in trace.notes:
        click.echo(f"Note: {note}", err=True)
    return trace


@contextmanager
def progress(about: str, requests: int) -> Iterator[Callable[[int], None]]:
    """A bar on standard error while requests are replayed; gone at the end."""
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as bar:
        task = bar.add_task(about, total=requests)
        yield lambda done: bar.advance(task, done)
