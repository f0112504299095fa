"""What a proof is: a program that tries to break promises, and says how often it could not.

Every proof is a module with a `PROOF` and `main(PROOF)` at its end. Run alone it prints a table,
and writes JSON if asked; `benchmarks.prove` runs all of them and writes `proofs.json`.
"""

import json
import os
import platform
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.code_digest import code_digest
from kvstore.replay.picture import require_pictures

Size = Literal["test", "short", "long"]

SEED_VARIABLE = "KVSTORE_TEST_SEED"
TRACE_VARIABLE = "KVSTORE_TRACE"
HINTS_VARIABLE = "KVSTORE_HINTS"


@dataclass(frozen=True, slots=True)
class Claim:
    """One row of the result: a figure that must reach a goal.

    With `trials_goal` the figure counts failures, the goal is none in at least so many trials,
    and the trials of several runs add up.
    """

    name: str
    unit: str
    goal: str
    trials_goal: int = 0


@dataclass(frozen=True, slots=True)
class Finding:
    """What one run saw of one claim. `figure` and `ok` None: it did not run; `reason` says why."""

    figure: float | None
    ok: bool | None
    trials: int = 0
    failures: int = 0
    reason: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Setting:
    """What one run is given. All randomness follows from `seed`."""

    trials: int
    seed: str
    size: Size
    tick: Callable[[int], None]
    """To be called with the number of trials that were done since the last call."""
    trace: Path | None = None
    hints: Path | None = None


@dataclass(frozen=True, slots=True)
class Proof:
    """A program: its claims, how many trials it makes in each size, and the run itself."""

    module: str
    """As in `python -m benchmarks.<module>`."""
    about: str
    """What is tried, for `--help`."""
    claims: Sequence[Claim]
    trials: Mapping[Size, int]
    run: Callable[[Setting], Sequence[Finding]]
    """One finding for each claim, in their order."""
    beside: Sequence[str] = ("kvstore/policy/", "kvstore/replay/", "kvstore/cli.py")
    """Where the code lies that it loads and does not test: figures outlive changes of it."""
    draw: Callable[[Sequence[Mapping[str, Any]], Path], None] | None = None
    """Draws the rows, where a picture says more; `--png` is then an option."""


def passed(failures: int, trials: int, **details: Any) -> Finding:
    """The finding of a claim that counts failures."""
    return Finding(float(failures), failures == 0 and trials > 0, trials, failures, "", details)


def not_run(reason: str) -> Finding:
    """The finding of a claim that could not be tried."""
    return Finding(None, None, reason=reason)


def machine() -> str:
    """The machine in words."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{model}, {os.cpu_count()} CPUs, {memory_gib:.1f} GiB, {platform.system()} "
        f"{platform.release()}, Python {platform.python_version()}"
    )


def row(
    claim: Claim, finding: Finding, command: str, seconds: float, seed: str
) -> dict[str, object]:
    """A row of `proofs.json`."""
    return {
        "name": claim.name,
        "command": command,
        "figure": finding.figure,
        "unit": claim.unit,
        "goal": claim.goal,
        "ok": finding.ok,
        "seconds": round(seconds, 1),
        "trials": finding.trials,
        "failures": finding.failures,
        "seed": seed,
        "reason": finding.reason,
        "details": dict(finding.details),
    }


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Rows as people read them."""
    shown = Table()
    for heading in ("what", "figure", "goal", "trials", "seconds", ""):
        shown.add_column(heading, overflow="fold")
    for each in rows:
        verdict = {True: "[green]holds[/]", False: "[red]BROKEN[/]", None: "not run"}[each["ok"]]
        figure = "" if each["figure"] is None else f"{each['figure']:g} {each['unit']}"
        shown.add_row(
            each["name"], figure or each["reason"], each["goal"],
            f"{each['trials']:,}" if each["trials"] else "", f"{each['seconds']:g}", verdict,
        )  # fmt: skip
    return shown


def trace_options(command: Callable[..., None]) -> Callable[..., None]:
    """Adds `--trace` and `--hints`."""
    file = click.Path(exists=True, dir_okay=False, path_type=Path)
    trace = click.option(
        "--trace", envvar=TRACE_VARIABLE, show_envvar=True, type=file, metavar="FILE",
        help="Trace to replay, where one is; without it a generator of our own is used.",
    )  # fmt: skip
    hints = click.option(
        "--hints", envvar=HINTS_VARIABLE, show_envvar=True, type=file, metavar="FILE",
        help="Hints that belong to the trace.",
    )  # fmt: skip
    return trace(hints(command))


def trace_arguments(trace: Path | None, hints: Path | None) -> list[str]:
    """The same options for another program."""
    given = (("--trace", trace), ("--hints", hints))
    return [word for flag, path in given if path is not None for word in (flag, str(path))]


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )


def main(proof: Proof) -> None:
    """The command line of a proof. Exits with 1 if a claim is broken."""

    @click.command(help=proof.about)
    @click.option(
        "--size",
        type=click.Choice(["test", "short", "long"]),
        default="short",
        show_default=True,
        help=", ".join(f"{size}: {count:,} trials" for size, count in proof.trials.items()),
    )
    @click.option("--trials", type=click.IntRange(1), help="Another number of trials.")
    @click.option("--seed", envvar=SEED_VARIABLE, help="Repeats a run exactly.", show_envvar=True)
    @trace_options
    @click.option(
        "--json",
        "json_file",
        type=click.Path(dir_okay=False, path_type=Path),
        help="Write the rows here.",
    )
    @click.option(
        "--png",
        "png_file",
        type=click.Path(dir_okay=False, path_type=Path),
        hidden=proof.draw is None,
        help="Draw a picture here.",
    )
    def command(
        size: Size,
        trials: int | None,
        seed: str | None,
        trace: Path | None,
        hints: Path | None,
        json_file: Path | None,
        png_file: Path | None,
    ) -> None:
        if png_file is not None:
            require_pictures()
            if proof.draw is None:
                raise click.UsageError("--png: this proof draws nothing")
        seed = seed or secrets.token_hex(4)
        trials = trials or proof.trials[size]
        said = f"python -m benchmarks.{proof.module} --size {size} --trials {trials} --seed {seed}"
        console = Console(stderr=True)
        console.print(said, highlight=False)
        started = time.monotonic()
        with _progress(console) as bar:
            task = bar.add_task(proof.module, total=trials)
            tick = lambda done: bar.advance(task, done)  # noqa: E731
            findings = proof.run(Setting(trials, seed, size, tick, trace, hints))
        seconds = time.monotonic() - started
        rows = [
            row(claim, finding, said, seconds, seed) | {"code": code_digest(proof.beside)}
            for claim, finding in zip(proof.claims, findings, strict=True)
        ]
        if json_file is not None:
            json_file.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
        if proof.draw is not None and png_file is not None:
            proof.draw(rows, png_file)
        Console(width=None).print(table(rows))
        if any(each["ok"] is False for each in rows):
            raise SystemExit(1)

    command()
