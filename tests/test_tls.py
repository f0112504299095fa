"""A node whose gRPC and bulk path have TLS, and who gets through to it."""

import asyncio
import shutil
import socket
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import pytest
from click.testing import CliRunner

from kvstore.api.bulk import CHUNK_BYTES, GREETING
from kvstore.api.errors import ConfigError, Unavailable
from kvstore.scrub_command import scrub
from kvstore.server import NodeServer
from kvstore_client import AsyncClient, Budgets, Client
from kvstore_client.clear_command import clear
from kvstore_client.status_command import status
from tests.sim.blocks import keys_of
from tests.sim.certificates import Certificate, make_certificate
from tests.sim.nodes import PATIENT, Nodes, descriptor_of, expected, load, store
from tests.sim.proxy import Proxy
from tests.test_bulk import LARGE_NODE, bulk, hung_up, hung_up_but, idle, served

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="makes certificates")

HASTY = Budgets(open_s=3, match_s=3, load_s=3, store_s=3, control_s=3)
"""gRPC tries again and again to be understood."""


@pytest.fixture
def certificate(tmp_path: Path) -> Certificate:
    """Of the node."""
    return make_certificate(tmp_path, "node")


@pytest.fixture
async def server(nodes: Nodes, certificate: Certificate) -> AsyncIterator[NodeServer]:
    """A node with TLS and room for large blocks."""
    listen = {"listen": "127.0.0.1:0", "metrics_listen": ""}
    yield await nodes.start(server=listen | certificate.settings, **LARGE_NODE)


def client_of(
    nodes: Nodes, server: NodeServer, ca_file: Path | None, *, shm: bool = False, bulk: bool = True
) -> AsyncClient:
    client = AsyncClient(
        server.endpoint,
        budgets=PATIENT if ca_file is not None else HASTY,
        shared_memory=shm,
        bulk=bulk,
        tls_ca_file=ca_file,
    )
    nodes._clients.append(client)
    return client


@pytest.mark.parametrize(("block_bytes", "count"), [(1, 300), (6000, 40), (CHUNK_BYTES + 77, 6)])
async def test_blocks_move_over_tls_on_every_path(
    nodes: Nodes, server: NodeServer, certificate: Certificate, block_bytes: int, count: int
) -> None:
    """The bulk path, the stream and shared memory bring the same bytes."""
    ca_file = certificate.certificate_file
    far = client_of(nodes, server, ca_file)
    stream = client_of(nodes, server, ca_file, bulk=False)
    near = client_of(nodes, server, ca_file, shm=True)
    for client in (far, stream, near):
        space = await client.open_space(descriptor_of(block_bytes))
    for number, writer in enumerate((far, stream, near)):
        keys = keys_of(f"chat {number}", count)
        assert await store(writer, space, keys) == [True] * count
        for reader in (far, stream, near):
            assert await load(reader, space, keys) == ["memory"] * count
    assert await served(server, "bulk_write") == 1
    assert await served(server, "bulk_read") == 3
    assert await served(server, "write") == 1
    assert await served(server, "local_acquire") == 3
    assert not far.counters
    await idle(server)


def test_a_client_for_threads_speaks_tls(tmp_path: Path) -> None:
    """And so do the commands."""
    certificate = make_certificate(tmp_path, "node")
    ca_file = certificate.certificate_file

    async def serve() -> None:
        nodes = Nodes(tmp_path)
        listen = {"listen": "127.0.0.1:0", "metrics_listen": ""}
        server = await nodes.start(server=listen | certificate.settings)

        def work() -> None:
            with Client(
                server.endpoint, budgets=PATIENT, shared_memory=False, tls_ca_file=ca_file
            ) as client:
                space = client.open_space(descriptor_of())
                keys = keys_of("chat", 3)
                blocks = [expected(space, key) for key in keys]
                assert client.store(space, keys, blocks) == [True] * 3
            arguments = ["--endpoint", server.endpoint, "--tls-ca-file", str(ca_file)]
            for command, more in (
                (status, []),
                (scrub, []),
                (clear, ["--space", space.space_id.hex()]),
            ):
                done = CliRunner().invoke(command, [*arguments, *more])
                assert done.exit_code == 0, done.output
            assert "3 copies" in done.output
            refused = CliRunner().invoke(status, [*arguments[:3], str(certificate.key_file)])
            assert refused.exit_code == 1
            assert "tls_ca_file: " in refused.output

        try:
            await asyncio.to_thread(work)
            assert await served(server, "bulk_write") == 1
        finally:
            await nodes.finish()

    asyncio.run(serve())


REASONS = {
    "another CA": "certificate_verify_failed",
    "another host": "hostname verification check failed",
    "plaintext": "tls_ca_file",
}
"""In the words of gRPC, or with the name of what is missing."""


@pytest.mark.parametrize("who", REASONS)
async def test_who_does_not_know_the_node_hears_why(
    nodes: Nodes, tmp_path: Path, server: NodeServer, certificate: Certificate, who: str
) -> None:
    """He gets no call through, and his blocks are misses."""
    endpoint, ca_file = server.endpoint, None
    if who == "another CA":
        ca_file = make_certificate(tmp_path, "other").certificate_file
    elif who == "another host":
        ca_file = certificate.certificate_file
        endpoint = endpoint.replace("127.0.0.1", "localhost")
    async with AsyncClient(endpoint, budgets=HASTY, tls_ca_file=ca_file) as client:
        with pytest.raises(Unavailable) as refusal:
            await client.open_space(descriptor_of())
        assert REASONS[who] in str(refusal.value).lower()
        assert client._bulk.connections == 0
    assert not bulk(server)._connections


@pytest.mark.parametrize("who", ["another CA", "another host"])
async def test_the_bulk_path_is_verified_by_itself(
    nodes: Nodes, tmp_path: Path, server: NodeServer, certificate: Certificate, who: str
) -> None:
    """Who stands there must be the node: otherwise no ticket is shown, and the stream serves."""
    name, subject = ("other", "IP:127.0.0.1") if who == "another CA" else ("far", "IP:127.0.0.9")
    impostor = make_certificate(tmp_path, name, subject)
    bulk(server)._tls.load_cert_chain(impostor.certificate_file, impostor.key_file)  # type: ignore[union-attr]
    trusted = tmp_path / "trusted.pem"
    known = [certificate] if who == "another CA" else [certificate, impostor]
    trusted.write_text("".join(each.certificate_file.read_text() for each in known))
    client = client_of(nodes, server, trusted)
    space = await client.open_space(descriptor_of())
    assert client._bulk.connections == 0
    assert len(bulk(server)._tickets._given) == 1
    keys = keys_of("chat", 5)
    assert await store(client, space, keys) == [True] * 5
    assert await load(client, space, keys) == ["memory"] * 5
    assert await served(server, "write") == 1
    await hung_up(server)


async def test_the_node_has_one_name_on_both_paths(nodes: Nodes, certificate: Certificate) -> None:
    """The one that the client called it by, also where its bulk path has a host of its own."""
    listen = {"listen": "127.0.0.1:0", "metrics_listen": ""}
    server = await nodes.start(server=listen | certificate.settings, bulk={"listen": "127.0.0.2:0"})
    client = client_of(nodes, server, certificate.certificate_file)
    space = await client.open_space(descriptor_of())
    assert client.bulk_connections == 1
    assert await store(client, space, keys_of("chat", 3)) == [True] * 3
    assert await served(server, "bulk_write") == 1


async def test_who_has_no_tls_is_not_let_in_at_the_bulk_port(
    nodes: Nodes, server: NodeServer
) -> None:
    """With a good ticket neither."""
    shown = GREETING + bulk(server).invite(None, "test").ticket

    def knock() -> bytes:
        with socket.create_connection(("127.0.0.1", bulk(server).port), timeout=30) as connection:
            with suppress(OSError):
                connection.sendall(shown)
                connection.shutdown(socket.SHUT_WR)
                return connection.recv(1)
            return b""

    assert await asyncio.to_thread(knock) != b"\x01"
    await hung_up(server)
    assert len(bulk(server)._tickets._given) == 1


async def test_a_tls_connection_that_breaks_is_made_good_by_the_stream(
    nodes: Nodes, server: NodeServer, certificate: Certificate
) -> None:
    """And one that stands still is left at the deadline, with the buffers."""
    proxy = Proxy()
    await proxy.start(bulk(server).port)
    bulk(server).port = proxy.port
    client = client_of(nodes, server, certificate.certificate_file)
    size = CHUNK_BYTES + 77
    space = await client.open_space(descriptor_of(size))
    keys = keys_of("chat", 4)
    await store(client, space, keys)
    proxy.limit_bytes = 2 * size
    proxy.then = proxy.cut
    assert await load(client, space, keys) == ["memory"] * 4
    assert await served(server, "read") == 1
    client._bulk._next_try_s = 0.0
    await client.open_space(descriptor_of(size))
    assert client._bulk.connections == 1
    proxy.limit_bytes, proxy.then = size // 2, lambda: None
    proxy.stalled.clear()
    buffers = [bytearray(size) for _ in keys]
    loading = asyncio.create_task(client.load_any(space, keys, buffers))
    await proxy.stalled.wait()
    loading.cancel()
    await asyncio.wait([loading])
    for buffer in buffers:
        buffer[:] = b"\xdd" * size
    proxy.release()
    await hung_up_but(server, 0)
    assert all(buffer == b"\xdd" * size for buffer in buffers)
    await proxy.close()
    await idle(server)


async def test_files_that_do_not_serve_are_named(
    nodes: Nodes, tmp_path: Path, certificate: Certificate
) -> None:
    """Missing, empty, or of two different pairs."""
    other = make_certificate(tmp_path, "other")
    empty = tmp_path / "empty.pem"
    empty.write_text("")
    for change, named in (
        ({"tls_certificate_file": tmp_path / "none"}, r"server\.tls_certificate_file: .*none"),
        ({"tls_key_file": tmp_path / "none"}, r"server\.tls_key_file: .*none"),
        ({"tls_certificate_file": empty}, r"server\.tls_certificate_file: .*empty"),
        ({"tls_key_file": other.key_file}, r"server\.tls_key_file: .*other"),
    ):
        listen = {"listen": "127.0.0.1:0", "metrics_listen": ""}
        with pytest.raises(ConfigError, match=named):
            await nodes.start(server=listen | certificate.settings | change)
    for ca_file in (tmp_path / "none", empty):
        with pytest.raises(ValueError, match="tls_ca_file: "):
            AsyncClient("127.0.0.1:1", tls_ca_file=ca_file)
