"""`kvstore token`: makes a bearer token and writes its hash into the tokens file."""

import re
import secrets
import tomllib
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
    made = secrets.token_urlsafe(TOKEN_BYTES)
    try:
        check_tenant_name(tenant)
        if path.exists():
            Tenants.from_file(path)
        content = path.read_text() if path.exists() else ""
        content = with_hash(content, tenant, token_hash(made))
    except ConfigError as error:
        raise click.ClickException(str(error)) from None
    path.touch(mode=0o600)
    path.write_text(content)
    click.echo(made)


def with_hash(content: str, tenant: str, value: str) -> str:
    """The file's content with one more hash for a tenant.

    Raises ConfigError where the tenant's entry has a shape that this cannot add to.
    """
    quoted = re.escape(f'"{tenant}"')
    name = quoted if "." in tenant else f"(?:{quoted}|{re.escape(tenant)})"
    known = re.search(rf"\[tenants\.{name}\]\s*token_sha256\s*=\s*\[", content)
    if known is not None:
        changed = f'{content[: known.end()]}"{value}", {content[known.end() :]}'
    else:
        separator = "\n" if content and not content.endswith("\n\n") else ""
        changed = f'{content}{separator}[tenants."{tenant}"]\ntoken_sha256 = ["{value}"]\n'
    if not _lists(changed, tenant, value):
        raise ConfigError(
            f"auth.tokens_file: tenants.{tenant}: write its entry as [tenants.{tenant}] with "
            "token_sha256 = [...] on the next line, then repeat"
        )
    return changed


def _lists(content: str, tenant: str, value: str) -> bool:
    try:
        return value in tomllib.loads(content)["tenants"][tenant]["token_sha256"]
    except (tomllib.TOMLDecodeError, KeyError):
        return False
