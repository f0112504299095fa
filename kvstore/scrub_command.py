"""`kvstore scrub`: is what lies on disk still what was written?"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import grpc
from pydantic import ByteSize, TypeAdapter, ValidationError
from rich.console import Console
from rich.progress import Progress

from kvstore.api.errors import ConfigError
from kvstore.api.tls import Trust
from kvstore.api.v1 import kvstore_pb2 as pb
from kvstore.api.v1.kvstore_pb2_grpc import KVStoreStub
from kvstore.files import DirectoryFiles
from kvstore.scrub import Checked, check_directory


@dataclass
class Report:
    """What a scrub found. `problems` name files; a running node tells only counts."""

    checked_blocks: int = 0
    checked_bytes: int = 0
    damaged_blocks: int = 0
    problems: tuple[str, ...] = ()

    @property
    def clean(self) -> bool:
        """Whether everything is as it was written."""
        return not self.damaged_blocks and not self.problems


def byte_size(context: click.Context, parameter: click.Parameter, text: str | None) -> int:
    """The bytes that an option such as 64MiB stands for; 0 without one."""
    try:
        return int(TypeAdapter(ByteSize).validate_python(text or 0))
    except ValidationError:
        raise click.BadParameter("bytes are needed, such as 64MiB", context, parameter) from None


@click.command()
@click.argument(
    "directory", required=False, type=click.Path(exists=True, file_okay=False, path_type=Path)
)
@click.option("--endpoint", metavar="HOST:PORT", help="Check a running node instead.")
@click.option(
    "--token-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A file that holds the bearer token for --endpoint.",
)
@click.option(
    "--tls-ca-file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Certificates (PEM) that the node's is signed with; without it, no TLS.",
)
@click.option(
    "--rate", "bytes_per_s", callback=byte_size, metavar="BYTES",
    help="Read at most so much a second from a running node, such as 32MiB; its own limit "
    "(disk.scrub_bytes_per_s) is the most.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def scrub(
    directory: Path | None,
    endpoint: str | None,
    token_file: Path | None,
    tls_ca_file: Path | None,
    bytes_per_s: int,
    as_json: bool,
) -> None:
    """Read every block on disk and say which are not as they were written.

    DIRECTORY is a node's disk.path while no node runs on it; nothing in it is changed. With
    --endpoint a running node checks itself, and drops what is damaged, so that the next store
    writes it again.

    Exits with 1 if anything was damaged.

    \b
    Examples:
      kvstore scrub ~/.local/share/kvstore/blocks
      kvstore scrub --endpoint 127.0.0.1:7070 --rate 32MiB
    """
    if (directory is None) == (endpoint is None):
        raise click.UsageError("name a DIRECTORY, or a running node with --endpoint")
    if directory is not None:
        report = _scrub_directory(directory)
    else:
        assert endpoint is not None
        report = _scrub_node(endpoint, token_file, tls_ca_file, bytes_per_s)
    if as_json:
        click.echo(json.dumps(asdict(report) | {"clean": report.clean}, indent=2))
    else:
        _print(report)
    if not report.clean:
        raise SystemExit(1)


def _scrub_directory(directory: Path) -> Report:
    report = Report()
    try:
        files = DirectoryFiles(directory)
    except ConfigError as error:
        raise click.ClickException(f"{error}; stop the node, or use --endpoint") from None
    try:
        with Progress(console=Console(stderr=True), transient=True) as bar:
            segments = sum(name.endswith(".segment") for name in files.names())
            task = bar.add_task("segments", total=segments)
            for checked in check_directory(files):
                _add(report, checked)
                bar.advance(task)
    except OSError as error:
        raise click.ClickException(f"{directory}: {error.strerror}") from None
    finally:
        files.shut()
    return report


def _add(report: Report, checked: Checked) -> None:
    report.checked_blocks += checked.blocks
    report.checked_bytes += checked.size_bytes
    report.damaged_blocks += checked.damaged_blocks
    report.problems += tuple(f"{checked.file}: {problem}" for problem in checked.problems)


def _scrub_node(
    endpoint: str, token_file: Path | None, tls_ca_file: Path | None, bytes_per_s: int
) -> Report:
    report = Report()
    try:
        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("blocks", total=None)
            for reply in _replies(endpoint, token_file, tls_ca_file, bytes_per_s):
                bar.update(task, total=reply.total_blocks, completed=reply.checked_blocks)
                report = Report(reply.checked_blocks, reply.checked_bytes, reply.damaged_blocks)
    except grpc.RpcError as error:
        status = error.code().name if isinstance(error, grpc.Call) else "unreachable"
        detail = error.details() if isinstance(error, grpc.Call) else error
        raise click.ClickException(f"{endpoint}: {status}: {detail}") from None
    except ValueError as error:
        raise click.ClickException(str(error)) from None
    return report


def _replies(
    endpoint: str, token_file: Path | None, tls_ca_file: Path | None, bytes_per_s: int
) -> Iterator[pb.ScrubReply]:
    token = token_file.read_text().strip() if token_file is not None else None
    metadata = () if token is None else (("authorization", f"Bearer {token}"),)
    if tls_ca_file is not None:
        opened = grpc.secure_channel(endpoint, Trust.read(tls_ca_file).credentials)
    else:
        opened = grpc.insecure_channel(endpoint)
    with opened as channel:
        request = pb.ScrubRequest(bytes_per_s=bytes_per_s)
        yield from KVStoreStub(channel).Scrub(request, metadata=metadata)


def _print(report: Report) -> None:
    console = Console()
    for problem in report.problems:
        console.print(f"[red]{problem}[/]", highlight=False)
    console.print(
        f"{report.checked_blocks} blocks, {report.checked_bytes / 2**20:.1f} MiB checked: "
        + ("all as written" if report.clean else f"{report.damaged_blocks} blocks damaged")
    )
