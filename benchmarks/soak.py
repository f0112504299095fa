"""Runs every proof in its long form, in pieces, and keeps what was reached in `soak.json`.

Trials add up as long as the code that a proof loads stays as it is; a change begins that row anew.
It may be interrupted at any time: what a piece has shown is written when the piece is over.
"""

import fcntl
import json
import secrets
import subprocess
import time
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from benchmarks.proof import machine, table, trace_arguments, trace_options
from benchmarks.prove import MODULES, run_module

PIECES = 4
"""A row that counts trials is run in about so many pieces."""
MOST_PIECES = 200
"""However small a piece turns out: a proof that makes no progress does not go on forever."""


def commit() -> str:
    """What is checked out, with a plus if files differ from it."""

    def git(*words: str) -> str:
        ran = subprocess.run(["git", *words], capture_output=True, text=True, check=False)
        return ran.stdout.strip()

    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain") else "")


class Soak:
    """The file of what was reached so far: a row for each claim, with all seeds it rests on.

    Several soaks may share it: each change begins with what the file says.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        """The rows by name, in the order of the proofs."""
        if not self._path.exists():
            return {}
        rows = json.loads(self._path.read_text())["rows"]
        return {row["name"]: row for row in rows}

    def add(self, module: str, row: dict[str, Any], trials_goal: int) -> None:
        """A piece is over: its trials count together with earlier ones of the same code."""
        with self._path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            rows = self.rows
            rows[row["name"]] = _total(rows.get(row["name"]), row, trials_goal) | {"module": module}
            order = {name: place for place, name in enumerate(MODULES)}
            ordered = sorted(rows.values(), key=lambda each: order[each["module"]])
            scratch = self._path.with_suffix(".part")
            content = {"machine": machine(), "rows": ordered}
            scratch.write_text(json.dumps(content, indent=1) + "\n")
            scratch.replace(self._path)

    def is_done(self, module: str, code: str) -> bool:
        """Whether all rows of a proof were reached, on this code."""
        rows = [row for row in self.rows.values() if row["module"] == module]
        return bool(rows) and all(row["ok"] is not False and row["code"] == code for row in rows)


def _total(known: dict[str, Any] | None, row: dict[str, Any], trials_goal: int) -> dict[str, Any]:
    """A row with what earlier pieces of the same code have shown."""
    piece = {name: row[name] for name in ("seed", "trials", "failures", "seconds", "command")}
    piece["commit"] = commit()
    if not trials_goal:
        return row | {"pieces": [piece]}
    earlier = known["pieces"] if known is not None and known["code"] == row["code"] else []
    pieces = [*earlier, piece]
    trials = sum(each["trials"] for each in pieces)
    failures = sum(each["failures"] for each in pieces)
    return row | {
        "pieces": pieces,
        "trials": trials,
        "failures": failures,
        "figure": failures,
        "ok": not failures and trials >= trials_goal,
        "seconds": round(sum(each["seconds"] for each in pieces), 1),
    }


def soak(module: str, state: Soak, extra: list[str], console: Console) -> None:
    """Runs one proof, piece by piece, until its goals are reached or a claim is broken."""
    goals = trials_goals(module)
    goal = next(iter(goals.values()), 0)  # Trials are counted as the first claim counts them.
    for _ in range(MOST_PIECES):
        trials = ["--trials", str(-(-goal // PIECES))] if goal else []
        seed = secrets.token_hex(4)
        started = time.monotonic()
        arguments = ["--size", "long", "--seed", seed, *trials, *extra]
        rows, reason = run_module(module, arguments, None)
        if not rows:
            raise click.ClickException(f"{module}: {reason}")
        for row in rows:
            state.add(module, row, goals.get(row["name"], 0))
        console.print(f"{module}: a piece of {time.monotonic() - started:.0f} s", highlight=False)
        broken = any(row["failures"] or (row["ok"] is False) for row in rows)
        if broken or not goal or state.is_done(module, rows[0]["code"]):
            return


def trials_goals(module: str) -> dict[str, int]:
    """For each claim of a proof how many trials it needs; those that count none are left out."""
    proof = __import__(f"benchmarks.{module}", fromlist=["PROOF"]).PROOF
    return {claim.name: claim.trials_goal for claim in proof.claims if claim.trials_goal}


@click.command()
@click.argument("modules", nargs=-1, type=click.Choice(MODULES))
@trace_options
@click.option(
    "--json", "json_file", default="docs/figures/soak.json", show_default=True,
    type=click.Path(dir_okay=False, path_type=Path), help="Where what was reached is kept.",
)  # fmt: skip
def main(modules: tuple[str, ...], trace: Path | None, hints: Path | None, json_file: Path) -> None:
    """Run the proofs in their long form; interrupted, it goes on where it was.

    MODULES are the proofs to run; without any, all.
    """
    extra = trace_arguments(trace, hints)
    console, state = Console(), Soak(json_file)
    for module in modules or MODULES:
        soak(module, state, extra, console)
    console.print(table(list(state.rows.values())))
    if any(row["ok"] is False for row in state.rows.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
