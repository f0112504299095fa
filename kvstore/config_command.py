"""`kvstore config`: the sample file, made from the settings themselves."""

import os
from pathlib import Path
from typing import Any

import click

from kvstore.api.errors import ConfigError
from kvstore.config import Settings, fields, load_settings


@click.command()
@click.option(
    "--check",
    "file",
    type=click.Path(path_type=Path),
    help="Read this file and the environment, and say what is wrong with them.",
)
def config(file: Path | None) -> None:
    """Print every setting with its meaning and default, as a TOML file to start from."""
    if file is None:
        click.echo(sample(), nl=False)
        return
    try:
        load_settings(file, os.environ, {})
    except ConfigError as error:
        raise click.ClickException(str(error)) from None
    click.echo(f"{file}: all settings are valid")


def sample() -> str:
    """The sample file: all settings commented out, at their defaults."""
    lines = ["# Settings of `kvstore serve`. What is commented out is the default."]
    current = ""
    for section, name, field in fields():
        if section != current:
            lines += ["", f"# {Settings.model_fields[section].annotation.__doc__}", f"[{section}]"]
            current = section
        default = field.get_default(call_default_factory=True)
        lines += [f"# {field.description}", f"# {name} = {_toml(default)}"]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if value is None:
        return '""'
    if isinstance(value, bool):
        return str(value).lower()
    if hasattr(value, "human_readable") and value:
        return f'"{value.human_readable(separator=" ")}"'
    if isinstance(value, str | Path):
        return f'"{value}"'
    return str(value)
