"""The `kvstore` command. Its subcommands are found by entry point and imported when invoked.

So one command serves the base install and all extras, and `kvstore --help` imports nothing heavy.
"""

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import EntryPoint, entry_points

import click

from kvstore import __version__

GROUP = "kvstore.commands"
INTERRUPTED = 130
"""Exit status of a program that Ctrl-C ended: 128 and the number of SIGINT."""

SHORT_HELP = {
    "serve": "Run a store node until SIGTERM or Ctrl-C.",
    "config": "Print a settings file with every setting and its meaning.",
    "token": "Make a bearer token for a tenant.",
    "status": "Show a node's tiers, leases, spaces and neighbours.",
    "scrub": "Check that what lies on disk is as it was written.",
    "clear": "Forget what was stored in a space.",
    "replay": "Run a trace through eviction policies, beside the optimum.",
    "plan": "Say how much memory and disk a hit rate takes.",
    "demo": "Watch a cache survive kill -9, from an empty start to a report.",
}
"""What `kvstore --help` says about each command without importing it."""

_EPILOG = """\b
Try it:
  kvstore serve                          a node on 127.0.0.1:7070, for this host
  kvstore status                         in another terminal: what it holds
  kvstore config > kvstore.toml          every setting, to edit
  kvstore serve --config kvstore.toml

\b
The base install is the client. What else there is:
  pip install 'kvstore-llm[server]'      serve, config, token, scrub
  pip install 'kvstore-llm[demo]'        demo: server, workers, an embedded Redis
"""


class MissingExtra(click.ClickException):
    """When a command is installed without the libraries that it needs."""

    exit_code = 2


class Commands(click.Group):
    """The commands that the installed distributions offer under `kvstore.commands`."""

    def __init__(self, find: Callable[[], Iterable[EntryPoint]], *, help: str, epilog: str) -> None:
        super().__init__(help=help, epilog=epilog, no_args_is_help=True)
        self._find = find

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Their names, those that we know in the order in which one meets them."""
        known = list(SHORT_HELP)
        names = {entry.name for entry in self._find()}
        return [name for name in known if name in names] + sorted(names - set(known))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command itself, imported now. Raises `MissingExtra` if it cannot be."""
        entry = next((entry for entry in self._find() if entry.name == cmd_name), None)
        if entry is None:
            return None
        command = _load(entry)
        if not isinstance(command, click.Command):
            raise click.ClickException(f"{entry.value}: the entry point is not a click command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the list of commands without importing one of them."""
        rows = [(name, SHORT_HELP.get(name, "")) for name in self.list_commands(ctx)]
        if rows:
            with formatter.section("Commands"):
                formatter.write_dl(rows)


def _load(entry: EntryPoint) -> object:
    try:
        return entry.load()
    except ImportError as error:
        if not entry.extras or _is_ours(error.name):
            raise
        wanted = ",".join(entry.extras)
        raise MissingExtra(
            f'kvstore {entry.name} needs the extra "{wanted}" ({error}): '
            f"pip install 'kvstore-llm[{wanted}]'"
        ) from None


def _is_ours(module: str | None) -> bool:
    """True if a module of this project is missing, which no extra would bring."""
    return module is not None and module.partition(".")[0].startswith("kvstore")


def build(find: Callable[[], Iterable[EntryPoint]]) -> click.Group:
    """The `kvstore` command over the entry points that `find` answers."""
    commands = Commands(
        find,
        help=(
            "A tiered store for the KV cache of LLM serving: what an engine computed once is "
            "restored from memory, Redis, disk or another node."
        ),
        epilog=_EPILOG,
    )
    return click.version_option(__version__, prog_name="kvstore")(commands)


def installed() -> Iterable[EntryPoint]:
    """The entry points of all installed distributions."""
    return entry_points(group=GROUP)


def main(
    arguments: Sequence[str] | None = None,
    find: Callable[[], Iterable[EntryPoint]] = installed,
) -> None:
    """Runs the command line and ends the process: 0, 1 for a failure, 2 for wrong use."""
    try:
        status = build(find).main(arguments, prog_name="kvstore", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output has seen enough; nothing may be flushed to it at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    sys.exit(status if isinstance(status, int) else 0)
