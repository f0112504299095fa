"""The `kvstore` command: what it lists, what it imports, how it fails and how it ends."""

import json
import os
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType

import click
import pytest
from click.testing import CliRunner

from kvstore import __version__
from kvstore.api.v1 import kvstore_pb2 as pb
from kvstore.cli import GROUP, SHORT_HELP, build
from kvstore_client.clear_command import clear
from kvstore_client.status_command import size_text, status
from tests.client_rig import descriptor
from tests.scripted_node import NodeThread

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def run(*arguments: str, code: str = "") -> subprocess.CompletedProcess[str]:
    """The command in a process of its own; `code` runs in it afterwards."""
    script = (
        "import atexit, sys\n"
        f"atexit.register(lambda: exec({code!r}))\n"
        "from kvstore.cli import main\n"
        f"main({list(arguments)!r})"
    )
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60
    )


@click.command()
def hello() -> None:
    """Say hello."""
    click.echo("hello")


@click.command()
def impatient() -> None:
    """Be interrupted."""
    raise KeyboardInterrupt


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """An importable module with commands, as another distribution would bring it."""
    module = ModuleType("commands_of_a_test")
    module.hello = hello  # type: ignore[attr-defined]
    module.impatient = impatient  # type: ignore[attr-defined]
    module.number = 7  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    yield module


def entry(name: str, value: str) -> EntryPoint:
    """An entry point as an installed distribution declares it."""
    return EntryPoint(name, value, GROUP)


def test_help_lists_every_command_of_the_project() -> None:
    """Each with a line of its own; the table and pyproject.toml name the same."""
    declared = PROJECT["entry-points"][GROUP]
    assert set(declared) == set(SHORT_HELP)
    entries = [entry(name, value) for name, value in declared.items()]
    shown = CliRunner().invoke(build(lambda: entries), ["--help"])
    assert shown.exit_code == 0
    for name, text in SHORT_HELP.items():
        assert f"  {name}" in shown.output
        assert text in shown.output
    assert PROJECT["scripts"]["kvstore"] == "kvstore.cli:main"


def test_help_and_version_import_nothing_heavy() -> None:
    """Neither the libraries of an extra nor the client: only what is invoked is imported."""
    code = (
        "loaded = {m.split('.')[0] for m in sys.modules}; "
        "heavy = {'torch','ray','redis','numpy','pydantic','grpc','kvstore_client'} & loaded; "
        "print('heavy:', sorted(heavy))"
    )
    for argument in ("--help", "--version"):
        done = run(argument, code=code)
        assert done.returncode == 0, done.stderr
        assert "heavy: []" in done.stdout
    assert __version__ in done.stdout


def test_a_missing_extra_is_named() -> None:
    """With the command that installs it, and exit status 2."""
    entries = [entry("serve", "no_such_library.serve:serve [server]")]
    done = CliRunner().invoke(build(lambda: entries), ["serve"])
    assert done.exit_code == 2
    assert 'kvstore serve needs the extra "server"' in done.output
    assert "pip install 'kvstore-llm[server]'" in done.output
    assert "no_such_library" in done.output


def test_our_own_missing_module_is_not_blamed_on_an_extra() -> None:
    """A mistake of ours must not send anyone to pip."""
    entries = [entry("serve", "kvstore.no_such_module:serve [server]")]
    done = CliRunner().invoke(build(lambda: entries), ["serve"])
    assert isinstance(done.exception, ModuleNotFoundError)


def test_commands_of_other_distributions_join(modules: ModuleType) -> None:
    """They are listed after ours and run; what is no command is refused by its name."""
    entries = [
        entry("hello", f"{modules.__name__}:hello"),
        entry("number", f"{modules.__name__}:number"),
        entry("status", "kvstore_client.status_command:status"),
    ]
    command = build(lambda: entries)
    assert command.list_commands(click.Context(command)) == ["status", "hello", "number"]
    assert CliRunner().invoke(command, ["hello"]).output == "hello\n"
    refused = CliRunner().invoke(command, ["number"])
    assert refused.exit_code == 1
    assert "not a click command" in refused.output
    assert CliRunner().invoke(command, ["hallo"]).exit_code == 2


def test_ctrl_c_ends_without_a_traceback() -> None:
    """Exit status 130 and nothing on standard error."""
    script = (
        "import click, sys, types\n"
        "from importlib.metadata import EntryPoint\n"
        "from kvstore import cli\n"
        "from tests.test_cli import impatient\n"
        "import tests.test_cli\n"
        "entry = EntryPoint('impatient', 'tests.test_cli:impatient', cli.GROUP)\n"
        "cli.main(['impatient'], find=lambda: [entry])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert (done.returncode, done.stderr.strip()) == (130, "")


def test_ctrl_c_while_it_waits(remote: NodeThread) -> None:
    """A real SIGINT to a real process that waits for a node."""
    script = (
        "import signal\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from kvstore.cli import main\n"
        f"main(['status', '--endpoint', '{remote.endpoint}'])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )

    async def interrupt(request: object, context: object) -> None:
        process.send_signal(signal.SIGINT)
        await context.cancelled  # type: ignore[attr-defined]

    remote.node.play("Status", interrupt)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors


def test_a_reader_that_leaves_is_no_crash() -> None:
    """`kvstore --help | true` says nothing on standard error."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "kvstore", "--help"],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        cwd=ROOT,
    )
    os.close(writing)
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


@pytest.fixture
def remote() -> Iterator[NodeThread]:
    """A node that is served elsewhere."""
    node = NodeThread()
    yield node
    node.stop()


def test_status_shows_the_node(remote: NodeThread, tmp_path: Path) -> None:
    """Tiers, leases, spaces and neighbours, for people and for programs; the token goes along."""
    token = tmp_path / "token"
    token.write_text("secret-7\n")
    arguments = ["--endpoint", remote.endpoint, "--token-file", str(token)]
    shown = CliRunner().invoke(status, arguments)
    assert shown.exit_code == 0, shown.output
    for text in ("node-a", "memory", "1.0 GiB", "50%", "redis", "?", "10.0.0.2:7070"):
        assert text in shown.output
    printed = CliRunner().invoke(status, [*arguments, "--json"])
    values = json.loads(printed.output)
    assert values["tiers"][0]["capacity_bytes"] == 2**30
    assert values["leased_bytes"] == 4096
    assert values["draining"] is False
    assert set(values) == {field.name for field in pb.StatusReply.DESCRIPTOR.fields}
    assert set(remote.node.tokens) == {"Bearer secret-7"}
    healthy = CliRunner().invoke(status, ["--endpoint", remote.endpoint, "--health"])
    assert (healthy.exit_code, healthy.output) == (0, "serving\n")


@pytest.mark.parametrize("flags", [[], ["--json"], ["--health"]])
def test_status_of_a_node_out_of_reach(flags: list[str]) -> None:
    """Exit status 1 and one clear line."""
    node = NodeThread()
    node.stop()
    done = CliRunner().invoke(status, ["--endpoint", node.endpoint, *flags])
    assert done.exit_code == 1
    assert done.output.startswith(f"Error: {node.endpoint}: ")
    assert done.output.count("\n") == 1


def test_a_token_file_that_is_missing_is_named(tmp_path: Path) -> None:
    """Not a traceback."""
    done = CliRunner().invoke(status, ["--token-file", str(tmp_path / "none")])
    assert done.exit_code == 1
    assert "--token-file" in done.output


def test_clear_forgets_a_space(remote: NodeThread) -> None:
    """By its id in hexadecimal digits; anything else is wrong use."""
    space_id = descriptor().space_id
    remote.node.opened[space_id] = 1
    remote.node.blocks[space_id, bytes(32)] = (b"x", bytes(16))
    arguments = ["--endpoint", remote.endpoint, "--space", space_id.hex()]
    done = CliRunner().invoke(clear, [*arguments, "--scope", "team"])
    assert (done.exit_code, done.output) == (0, "1 copies forgotten\n")
    assert remote.node.requests[-1].scope == "team"
    for wrong in ("zz", "00ff"):
        refused = CliRunner().invoke(clear, ["--space", wrong])
        assert refused.exit_code == 2
        assert "64 hexadecimal digits" in refused.output
    remote.node.opened.clear()
    unknown = CliRunner().invoke(clear, arguments)
    assert unknown.exit_code == 1
    assert "UnknownSpace" in unknown.output


def test_sizes_are_readable() -> None:
    """Three digits and a unit, also at the edges."""
    sizes = [0, 1023, 1024, 1536, 2**30, 2**50, 2**60]
    assert [size_text(size) for size in sizes] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "1.5 KiB",
        "1.0 GiB",
        "1.0 PiB",
        "1024.0 PiB",
    ]
