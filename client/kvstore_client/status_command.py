"""`kvstore status`: what a node is and how full its tiers are."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import click
from google.protobuf.json_format import MessageToDict
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvstore.api.v1 import kvstore_pb2 as pb
from kvstore_client.endpoint_options import ask, endpoint_options

_STEP = 1024
_CODEC_BLOCKS = re.compile(
    r'kvstore_codec_blocks_total(?P<labels>\{tier="(?P<tier>[^"]*)",codec="(?P<codec>[^"]*)"\})'
)
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


@click.command()
@endpoint_options
@click.option("--json", "as_json", is_flag=True, help="Print the whole answer as JSON instead.")
@click.option("--health", is_flag=True, help="Only say whether it serves; needs no token.")
def status(
    endpoint: str,
    token_file: Path | None,
    tls_ca_file: Path | None,
    as_json: bool,
    health: bool,
) -> None:
    """Show a node's tiers, leases, spaces and neighbours.

    Exits with 1 and one line on standard error if the node cannot be reached; with --health also
    if it does not serve, which is what a container's health check wants to know.
    """
    if health:
        if not ask(endpoint, token_file, tls_ca_file, lambda client: client.health()):
            raise click.ClickException(f"{endpoint}: does not serve")
        click.echo("serving")
        return
    reply = ask(endpoint, token_file, tls_ca_file, lambda client: client.status())
    if as_json:
        click.echo(json.dumps(as_dict(reply), indent=2, sort_keys=True))
        return
    console = Console()
    console.print(_summary(endpoint, reply))
    console.print(_tiers(reply))
    if codecs := codecs_of(reply.counters):
        console.print(_codecs(codecs))
    if reply.nodes:
        console.print(_nodes(reply))


def as_dict(reply: pb.StatusReply) -> dict[str, object]:
    """The answer for JSON: names as in the contract, every number a number, no field left out."""
    values: dict[str, object] = MessageToDict(
        reply, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    # The protobuf mapping writes 64-bit integers as text; ours fit a JSON number.
    for name in ("leases", "leased_bytes", "spaces"):
        values[name] = getattr(reply, name)
    values["tiers"] = [
        {
            "name": tier.name,
            "capacity_bytes": tier.capacity_bytes,
            "used_bytes": tier.used_bytes,
            "blocks": tier.blocks,
            "serving": tier.serving,
        }
        for tier in reply.tiers
    ]
    return values


def size_text(size_bytes: int) -> str:
    """A size for people: three digits and a binary unit."""
    value = float(size_bytes)
    for unit in _UNITS:
        if value < _STEP or unit == _UNITS[-1]:
            break
        value /= _STEP
    digits = 0 if unit == "B" else 1
    return f"{value:.{digits}f} {unit}"


def _summary(endpoint: str, reply: pb.StatusReply) -> Text:
    state = "draining" if reply.draining else "serving"
    return Text(
        f"{reply.node_id or 'node'} at {endpoint}: {state}, version {reply.version}, "
        f"up {reply.uptime_s:.0f} s, {reply.spaces} spaces, {reply.leases} leases "
        f"({size_text(reply.leased_bytes)})"
    )


def _tiers(reply: pb.StatusReply) -> Table:
    table = Table("tier", title="Tiers", title_justify="left")
    for name in ("capacity", "used", "full", "blocks"):
        table.add_column(name, justify="right")
    table.add_column("serving")
    for tier in reply.tiers:
        known = tier.capacity_bytes > 0
        table.add_row(
            tier.name,
            size_text(tier.capacity_bytes) if known else "?",
            size_text(tier.used_bytes),
            f"{tier.used_bytes / tier.capacity_bytes:.0%}" if known else "",
            str(tier.blocks),
            "yes" if tier.serving else "no",
        )
    return table


class CodecUse(NamedTuple):
    """What one codec has done for one tier since the node's start."""

    tier: str
    codec: str
    blocks: int
    block_bytes: int
    stored_bytes: int


def codecs_of(counters: Mapping[str, float]) -> list[CodecUse]:
    """The codecs that were used, by tier."""
    used: list[CodecUse] = []
    for name, blocks in counters.items():
        if match := _CODEC_BLOCKS.fullmatch(name):
            before, after = (
                int(counters.get(f"kvstore_codec_{way}_bytes_total{match['labels']}", 0))
                for way in ("in", "out")
            )
            used.append(CodecUse(match["tier"], match["codec"], int(blocks), before, after))
    return sorted(used)


def _codecs(used: Sequence[CodecUse]) -> Table:
    table = Table("tier", "codec", title="Codecs, since its start", title_justify="left")
    for name in ("blocks", "bytes", "stored", "times smaller"):
        table.add_column(name, justify="right")
    for each in used:
        before, after = size_text(each.block_bytes), size_text(each.stored_bytes)
        smaller = f"{each.block_bytes / each.stored_bytes:.2f}" if each.stored_bytes else ""
        table.add_row(each.tier, each.codec, str(each.blocks), before, after, smaller)
    return table


def _nodes(reply: pb.StatusReply) -> Table:
    table = Table("node", "endpoint", title="Nodes", title_justify="left")
    for node in reply.nodes:
        table.add_row(node.node_id, node.endpoint)
    return table
