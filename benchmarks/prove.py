"""Runs every proof, short, and writes `proofs.json`: what is promised, and what was seen."""

import json
import os
import secrets
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from benchmarks.proof import SEED_VARIABLE, machine, table, trace_arguments, trace_options

MODULES = (
    "mutations",
    "kill_anywhere",
    "kill_every_call",
    "failing_io",
    "full_disk",
    "redis_faults",
    "simulator",
    "herd",
    "overload",
    "cancelled",
    "eviction",
    "hints",
    "policy_cost",
    "index_cost",
    "spill_while_generating",
    "restore_curve",
    "codecs",
)
"""In the order of the promises; each is `python -m benchmarks.<name>`."""
UNTIMED = frozenset({"mutations", "kill_every_call", "simulator", "hints"})
"""They use one processor and time nothing, so that as many run side by side as there are."""

TIMEOUT_S = 180.0
"""For one short proof, on a busy machine. All together take less than ten minutes."""
REASON_CHARACTERS = 300
"""So much of the end of what a proof wrote is the reason for its end."""


def run_module(
    module: str, arguments: Sequence[str], timeout_s: float | None
) -> tuple[list[dict[str, Any]], str]:
    """The rows of one proof, in a process of its own; and why there are none."""
    with tempfile.TemporaryDirectory() as home:
        result = Path(home) / "rows.json"
        command = [sys.executable, "-m", f"benchmarks.{module}", "--json", str(result), *arguments]
        try:
            ran = subprocess.run(
                command, timeout=timeout_s, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                text=True, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired as late:
            return [], _with_end_of(f"not done within {timeout_s:g} s", late.stderr)
        if result.exists():
            return json.loads(result.read_text())["rows"], ""
        return [], _with_end_of(f"exit status {ran.returncode}", ran.stderr)


def _with_end_of(reason: str, written: str | bytes | None) -> str:
    # What a process had written until it was killed comes as bytes, also where text was asked for.
    text = written.decode(errors="replace") if isinstance(written, bytes) else written or ""
    end = text.strip()[-REASON_CHARACTERS:]
    return f"{reason}: {end}" if end else reason


def failed_row(
    module: str, reason: str, arguments: Sequence[str] = (), seconds: float = 0.0
) -> dict[str, Any]:
    """The row of a proof that broke off: that is no pass. Its command repeats it."""
    command = " ".join(["python -m", f"benchmarks.{module}", *arguments])
    return {
        "name": module, "command": command, "figure": None, "unit": "",
        "goal": "it runs to its end", "ok": False, "seconds": seconds, "trials": 0, "failures": 0,
        "reason": reason, "details": {},
    }  # fmt: skip


def prove(modules: Sequence[str], arguments: Sequence[str], console: Console) -> list[Any]:
    """All rows of these proofs, in their order. What is timed has the machine to itself."""
    rows: dict[str, list[dict[str, Any]]] = {}

    def run(module: str) -> None:
        found, reason = run_module(module, arguments, TIMEOUT_S)
        rows[module] = found or [failed_row(module, reason, arguments)]
        for each in rows[module]:
            verdict = {True: "holds", False: "BROKEN", None: "not run"}[each["ok"]]
            console.print(f"{module}: {each['name']}: {verdict} {each['reason']}", highlight=False)

    together = [module for module in modules if module in UNTIMED]
    with console.status(", ".join(together)), ThreadPoolExecutor(os.cpu_count()) as pool:
        deque(pool.map(run, together), maxlen=0)
    for module in modules:
        if module not in UNTIMED:
            with console.status(module):
                run(module)
    return [row for module in modules for row in rows[module]]


@click.command()
@click.argument("modules", nargs=-1, type=click.Choice(MODULES))
@click.option(
    "--size", type=click.Choice(["test", "short"]), default="short", show_default=True,
    help="How many trials each proof makes; the long form is `python -m benchmarks.soak`.",
)  # fmt: skip
@click.option("--seed", envvar=SEED_VARIABLE, show_envvar=True, help="Repeats a run.")
@trace_options
@click.option(
    "--json", "json_file", default="proofs.json", show_default=True, help="Where rows are written.",
    type=click.Path(dir_okay=False, path_type=Path),
)  # fmt: skip
def main(
    modules: tuple[str, ...],
    size: str,
    seed: str | None,
    trace: Path | None,
    hints: Path | None,
    json_file: Path,
) -> None:
    """Try to break every promise, for less than ten minutes, and write down what was seen.

    MODULES are the proofs to run; without any, all. Exits with 1 if a claim is broken.
    """
    # Drawn here and not by each proof: what ends one may also end its word of how to repeat it.
    seed = seed or secrets.token_hex(4)
    arguments = ["--size", size, "--seed", seed, *trace_arguments(trace, hints)]
    console = Console()
    console.print(f"--seed {seed} repeats this run", highlight=False)
    rows = prove(modules or MODULES, arguments, console)
    json_file.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
    console.print(table(rows))
    if any(row["ok"] is False for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
