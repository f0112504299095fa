"""The options that every command that talks to a node has, and how it reaches the node."""

from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

import click

from kvstore.api.errors import KvstoreError
from kvstore_client.client import Client

DEFAULT_ENDPOINT = "127.0.0.1:7070"

Parameters = ParamSpec("Parameters")
Answer = TypeVar("Answer")


def endpoint_options(command: Callable[Parameters, Answer]) -> Callable[Parameters, Answer]:
    """Adds `--endpoint`, `--token-file` and `--tls-ca-file`."""
    endpoint = click.option(
        "--endpoint",
        default=DEFAULT_ENDPOINT,
        show_default=True,
        metavar="HOST:PORT",
        help="The node to ask.",
    )
    token_file = click.option(
        "--token-file",
        type=click.Path(dir_okay=False, path_type=Path),
        metavar="FILE",
        help="A file that holds the bearer token, as `kvstore token` printed it.",
    )
    tls_ca_file = click.option(
        "--tls-ca-file",
        type=click.Path(dir_okay=False, path_type=Path),
        metavar="FILE",
        help="Certificates (PEM) that the node's is signed with; without it, no TLS.",
    )
    return endpoint(token_file(tls_ca_file(command)))


def ask(
    endpoint: str,
    token_file: Path | None,
    tls_ca_file: Path | None,
    question: Callable[[Client], Answer],
) -> Answer:
    """What the node answers. Ends the command with one line and exit status 1 if it does not."""
    try:
        with Client(endpoint, token=_token(token_file), tls_ca_file=tls_ca_file) as client:
            return question(client)
    except (KvstoreError, ValueError) as error:
        raise click.ClickException(f"{endpoint}: {type(error).__name__}: {error}") from None


def _token(token_file: Path | None) -> str | None:
    if token_file is None:
        return None
    try:
        return token_file.read_text().strip()
    except OSError as error:
        raise click.ClickException(f"--token-file: {error}") from None
