"""`kvstore clear`: forget what was stored in a space."""

from pathlib import Path

import click

from kvstore.api.space import SPACE_ID_BYTES
from kvstore_client.endpoint_options import ask, endpoint_options


def space_id_from_text(context: click.Context, parameter: click.Parameter, text: str) -> bytes:
    """The id that the hexadecimal digits of an option stand for."""
    try:
        space_id = bytes.fromhex(text)
    except ValueError:
        space_id = b""
    if len(space_id) != SPACE_ID_BYTES:
        raise click.BadParameter(
            f"{2 * SPACE_ID_BYTES} hexadecimal digits are needed", context, parameter
        )
    return space_id


@click.command()
@endpoint_options
@click.option(
    "--space",
    "space_id",
    required=True,
    metavar="HEX",
    callback=space_id_from_text,
    help="The id of the space.",
)
@click.option("--scope", default="", help="The scope to clear; without it, the private one.")
def clear(
    endpoint: str,
    token_file: Path | None,
    tls_ca_file: Path | None,
    space_id: bytes,
    scope: str,
) -> None:
    """Forget every block of your tenant in one space and scope, in every tier."""
    copies = ask(
        endpoint, token_file, tls_ca_file, lambda client: client.clear_space(space_id, scope)
    )
    click.echo(f"{copies} copies forgotten")
