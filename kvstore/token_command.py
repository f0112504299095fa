"""`kvstore token`: makes a bearer token and writes its hash into the tokens file."""

import re
import secrets
from pathlib import Path

import click

from kvstore.api.errors import ConfigError
from kvstore.tenants import Tenants, check_tenant_name, token_hash

TOKEN_BYTES = 32


@click.command()
@click.argument("tenant")
@click.option(
    "--file",
    "path",
    type=click.Path(path_type=Path),
    required=True,
    help="The tokens file (auth.tokens_file); it is made if it does not exist.",
)
def token(tenant: str, path: Path) -> None:
    """Make a token for TENANT, print it once, and keep its hash in the file.

    A tenant may have several tokens, so that one can be replaced without a gap: add the new one,
    hand it out, then delete the old hash from the file.
    """
    try:
        check_tenant_name(tenant)
        if path.exists():
            Tenants.from_file(path)
    except ConfigError as error:
        raise click.ClickException(str(error)) from None
    made = secrets.token_urlsafe(TOKEN_BYTES)
    path.touch(mode=0o600)
    path.write_text(with_hash(path.read_text(), tenant, token_hash(made)))
    click.echo(made)


def with_hash(content: str, tenant: str, value: str) -> str:
    """The file's content with one more hash for a tenant."""
    header = f'[tenants."{tenant}"]'
    known = re.search(re.escape(header) + r"\s*token_sha256 = \[", content)
    if known is not None:
        return f'{content[: known.end()]}"{value}", {content[known.end() :]}'
    separator = "\n" if content and not content.endswith("\n\n") else ""
    return f'{content}{separator}{header}\ntoken_sha256 = ["{value}"]\n'
