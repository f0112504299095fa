"""`kvstore serve`: a store node, from settings to a clean end."""

import asyncio
import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import click

from kvstore.api.errors import ConfigError
from kvstore.config import Settings, fields, load_settings
from kvstore.heap import keep_freed_memory
from kvstore.server import NodeServer

_log = logging.getLogger("kvstore")


def _setting_flags(command: Callable[..., None]) -> Callable[..., None]:
    """One flag for each setting, in the order of the sample file."""
    for section, name, field in reversed(list(fields())):
        flag = f"--{section}-{name}".replace("_", "-")
        command = click.option(flag, f"{section}__{name}", metavar="VALUE", help=field.description)(
            command
        )
    return command


@click.command()
@click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path),
    help="TOML file of settings; `kvstore config` prints one with every setting and its meaning.",
)
@click.option(
    "--supervised", is_flag=True, help="Drain and stop when standard input closes (for parents)."
)
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"], case_sensitive=False),
    default="info",
    show_default=True,
)
@_setting_flags
def serve(config_file: Path | None, supervised: bool, log_level: str, **flags: str | None) -> None:
    """Run a store node until SIGTERM or Ctrl-C, which drain it; a second one ends it at once.

    Without any setting it keeps blocks in 1 GiB of memory and 10 GiB of disk, and listens on
    127.0.0.1:7070 for this host alone. Once it answers it prints one line of JSON: its endpoint,
    its metrics endpoint and its process id.

    A setting may be given as a flag, as KVSTORE_SECTION__NAME in the environment, or in the file,
    in this order of precedence.
    """
    logging.basicConfig(
        level=log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    given = {_split(flag): value for flag, value in flags.items() if value is not None}
    try:
        settings = load_settings(config_file, os.environ, given)
        keep_freed_memory()
        asyncio.run(_run(settings, supervised))
    except ConfigError as error:
        raise click.ClickException(str(error)) from None


def _split(flag: str) -> tuple[str, str]:
    section, _, name = flag.partition("__")
    return section, name


async def _run(settings: Settings, supervised: bool) -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signal_number, _stop_or_end, stop, signal_number)
    server = await NodeServer.start(settings)
    if supervised:
        loop.add_reader(sys.stdin.fileno(), _stop_at_end_of_input, stop)
    ready = {
        "endpoint": server.endpoint,
        "metrics": server.metrics_endpoint,
        "pid": os.getpid(),
        "node_id": server.node.node_id,
    }
    click.echo(json.dumps(ready))
    await stop.wait()
    _log.info("draining")
    await _end(server)


async def _end(server: NodeServer) -> None:
    status = 0
    try:
        await server.stop()
    except Exception:
        if not server.hangs:
            raise
        _log.exception("not everything was closed")
        status = 1
    if server.hangs:
        logging.shutdown()
        os._exit(status)  # The interpreter would wait for threads that never end.


def _stop_or_end(stop: asyncio.Event, signal_number: int) -> None:
    """The first signal drains. Who sends a second one will not wait for that."""
    if not stop.is_set():
        stop.set()
        return
    name = signal.Signals(signal_number).name
    _log.warning("%s while draining: ending at once, what only memory had is lost", name)
    logging.shutdown()
    os._exit(128 + signal_number)


def _stop_at_end_of_input(stop: asyncio.Event) -> None:
    if not os.read(sys.stdin.fileno(), 4096):
        asyncio.get_running_loop().remove_reader(sys.stdin.fileno())
        stop.set()
