"""The proofs as one: rows that machines can read, trials that add up, and no pass without a run."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from benchmarks import prove
from benchmarks.code_digest import _meaning
from benchmarks.proof import SEED_VARIABLE
from benchmarks.prove import MODULES, failed_row, run_module
from benchmarks.soak import Soak, trials_goals

ROOT = Path(__file__).resolve().parent.parent
FIELDS = {"name", "command", "figure", "unit", "goal", "ok", "seconds"}


def test_a_proof_writes_rows_that_machines_can_read(tmp_path: Path) -> None:
    """`prove` runs programs, one process each, and writes what they saw."""
    result = tmp_path / "proofs.json"
    command = [sys.executable, "-m", "benchmarks.prove", "--size", "test", "--json", str(result)]
    ran = subprocess.run(
        [*command, "index_cost"], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    written = json.loads(result.read_text())
    assert set(written) == {"machine", "rows"}
    assert len(written["rows"]) == 3
    for row in written["rows"]:
        assert set(row) >= FIELDS
        assert row["ok"] is True
        assert row["seed"] in row["command"]


def test_a_proof_that_breaks_off_is_no_pass() -> None:
    """Neither a crash nor a time-out counts as held."""
    rows, reason = run_module("index_cost", ["--size", "nonsense"], 60)
    assert rows == []
    assert "nonsense" in reason
    assert run_module("index_cost", [], 0.05) == ([], "not done within 0.05 s")
    assert failed_row("index_cost", reason)["ok"] is False


def test_a_time_out_says_what_the_proof_said_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proof that hangs leaves no other word; what it says at length is cut."""

    def hang(command: list[str], timeout: float, **options: Any) -> None:
        raise subprocess.TimeoutExpired(command, timeout, stderr=b"x" * 1000 + b"trial 7 caf\xe9\n")

    monkeypatch.setattr(subprocess, "run", hang)
    rows, reason = run_module("index_cost", [], 5)
    assert rows == []
    assert reason.startswith("not done within 5 s: xxx")
    assert reason.endswith("trial 7 caf\ufffd")
    assert len(reason) < 400


@pytest.mark.parametrize("given", ["", "7"])
def test_the_seed_of_a_proof_that_breaks_off_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    """One is drawn where none was given; it is said at the start and stands in each command."""
    told: list[list[str]] = []

    def late(module: str, arguments: list[str], timeout_s: float | None) -> tuple[list[Any], str]:
        told.append(list(arguments))
        return [], "not done within 1 s"

    monkeypatch.setattr(prove, "run_module", late)
    result = tmp_path / "proofs.json"
    options = ["--json", str(result), *(["--seed", given] if given else [])]
    ran = CliRunner(env={SEED_VARIABLE: ""}).invoke(prove.main, [*options, "herd", "eviction"])
    assert ran.exit_code == 1
    [seed] = {arguments[arguments.index("--seed") + 1] for arguments in told}
    assert seed == given or not given
    assert f"--seed {seed} " in ran.output.splitlines()[0]
    for row in json.loads(result.read_text())["rows"]:
        assert row["command"].endswith(f"--size short --seed {seed}")


@pytest.mark.parametrize("module", MODULES)
def test_every_proof_says_what_it_claims(module: str) -> None:
    """Claims have names of their own, units and goals; all sizes are there."""
    proof = __import__(f"benchmarks.{module}", fromlist=["PROOF"]).PROOF
    assert proof.module == module
    assert len({claim.name for claim in proof.claims}) == len(proof.claims) > 0
    assert all(claim.unit and claim.goal for claim in proof.claims)
    assert set(proof.trials) == {"test", "short", "long"}
    assert set(trials_goals(module)) <= {claim.name for claim in proof.claims}


def row(code: str, trials: int, failures: int = 0) -> dict[str, Any]:
    """What one piece of a proof wrote."""
    return {
        "name": "herd", "command": "x", "figure": failures, "unit": "u", "goal": "g",
        "ok": not failures, "seconds": 1.5, "trials": trials, "failures": failures, "seed": "s",
        "reason": "", "details": {}, "code": code,
    }  # fmt: skip


def test_trials_add_up_while_the_code_stays(tmp_path: Path) -> None:
    """And only then; a failure stays a failure."""
    soak = Soak(tmp_path / "soak.json")
    soak.add("herd", row("one", 40), 100)
    assert not soak.is_done("herd", "one")
    soak.add("herd", row("one", 60), 100)
    assert soak.rows["herd"]["trials"] == 100
    assert [piece["trials"] for piece in soak.rows["herd"]["pieces"]] == [40, 60]
    assert soak.is_done("herd", "one")
    assert not soak.is_done("herd", "two")
    soak.add("herd", row("two", 70), 100)
    assert soak.rows["herd"]["trials"] == 70, "trials of other code were counted"
    soak.add("herd", row("two", 70, failures=1), 100)
    soak.add("herd", row("two", 70), 100)
    assert (soak.rows["herd"]["failures"], soak.rows["herd"]["ok"]) == (1, False)


def test_comments_do_not_change_the_code_and_everything_else_does() -> None:
    """Figures survive a better sentence, and nothing but that."""
    plain = "def f(x):\n    return x + 1\n"
    told = '"""A module."""\n\n\ndef f(x):\n    """One more."""\n    return x + 1  # here\n'
    assert _meaning(plain) == _meaning(told)
    assert _meaning(plain) != _meaning(plain.replace("1", "2"))
