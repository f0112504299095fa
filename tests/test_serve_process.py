"""A node as its own process: what it prints, how it ends, and what is left when it is killed."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from kvstore.api.v1 import kvstore_pb2 as pb
from kvstore.api.v1.kvstore_pb2_grpc import KVStoreStub
from kvstore.api.wire import pack_keys
from kvstore.serve_command import serve
from kvstore_client import AsyncClient, Space
from kvstore_workers.redis_server import RedisServer
from tests.sim.blocks import keys_of
from tests.sim.nodes import PATIENT, descriptor_of, load, raw_channel, store

ROOT = Path(__file__).resolve().parent.parent
BLOCKS = 40
PATIENCE_S = 60.0
SMALL = {
    "--server-listen": "127.0.0.1:0",
    "--server-metrics-listen": "",
    "--server-drain-timeout-s": "30",
    "--memory-capacity-bytes": "128KiB",
    "--memory-slab-bytes": "64KiB",
    "--disk-capacity-bytes": "4MiB",
    "--disk-segment-bytes": "256KiB",
    "--disk-lookup-timeout-s": "30",
    "--disk-timeout-s": "30",
    "--redis-lookup-timeout-s": "30",
    "--redis-timeout-s": "30",
}


@dataclass
class Served:
    """A running `kvstore serve`."""

    process: Process
    ready: dict[str, Any]

    @property
    def endpoint(self) -> str:
        """Where it listens."""
        return str(self.ready["endpoint"])

    async def end(self, signal_number: int) -> tuple[int, str]:
        """Its exit status and what it wrote to standard error, after a signal."""
        self.process.send_signal(signal_number)
        return await self.exited()

    async def exited(self) -> tuple[int, str]:
        """Its exit status and what it wrote to standard error, once it has ended."""
        async with asyncio.timeout(PATIENCE_S):
            assert self.process.stderr is not None
            errors = await self.process.stderr.read()
            return await self.process.wait(), errors.decode()


@dataclass
class Serving:
    """Starts nodes as processes, and leaves none behind."""

    home: Path
    environ: dict[str, str] = field(default_factory=dict)
    program: tuple[str, ...] = ("-m", "kvstore")
    _processes: list[Process] = field(default_factory=list)

    async def spawn(self, flags: Mapping[str, str], *switches: str) -> Process:
        """A process, not waited for."""
        options = SMALL | {"--disk-path": str(self.home / "blocks")} | dict(flags)
        arguments = [part for option in options.items() for part in option]
        process = await asyncio.create_subprocess_exec(
            sys.executable, *self.program, "serve", *arguments, *switches,
            stdin=PIPE, stdout=PIPE, stderr=PIPE,
            env=os.environ | self.environ, cwd=self.home,
        )  # fmt: skip
        self._processes.append(process)
        return process

    async def start(self, *switches: str, **flags: str) -> Served:
        """A node that has said that it is ready."""
        named = {f"--{name.replace('_', '-')}": value for name, value in flags.items()}
        process = await self.spawn(named, *switches)
        assert process.stdout is not None
        async with asyncio.timeout(PATIENCE_S):
            line = await process.stdout.readline()
        if not line:
            assert process.stderr is not None
            pytest.fail((await process.stderr.read()).decode())
        return Served(process, json.loads(line))

    async def finish(self) -> None:
        """Kills what still runs."""
        for process in self._processes:
            if process.returncode is None:
                process.kill()
            await process.communicate()


@pytest.fixture
async def serving(tmp_path: Path) -> AsyncIterator[Serving]:
    """Nodes over one directory."""
    serving = Serving(tmp_path)
    yield serving
    await serving.finish()


@contextlib.asynccontextmanager
async def connected(served: Served) -> AsyncIterator[tuple[AsyncClient, Space]]:
    """A client of the process and a space that is open there."""
    async with AsyncClient(served.endpoint, budgets=PATIENT) as client:
        yield client, await client.open_space(descriptor_of())


async def test_sigterm_flushes_and_the_next_start_is_warm(serving: Serving) -> None:
    """One line of JSON when it is ready; exit status 0; what only memory had is on disk."""
    file = serving.home / "kvstore.toml"
    file.write_text('[cluster]\nnode_id = "first"\n')
    serving.environ["KVSTORE_SERVER__REFLECTION"] = "true"
    served = await serving.start("--supervised", f"--config={file}")
    assert set(served.ready) >= {"endpoint", "metrics", "pid", "node_id"}
    assert served.ready["pid"] == served.process.pid
    assert (served.ready["node_id"], served.ready["metrics"]) == ("first", "")
    host, _, port = served.endpoint.rpartition(":")
    assert (host, int(port) > 0) == ("127.0.0.1", True)
    keys = keys_of("chain", 6)
    async with connected(served) as (client, space):
        assert await store(client, space, keys) == [True] * 6
        assert await client.locate(space, keys) == ["memory"] * 6
    status, errors = await served.end(signal.SIGTERM)
    assert (status, "Traceback" in errors) == (0, False), errors
    served = await serving.start()
    assert served.process.stdin is not None
    served.process.stdin.close()  # Who is not supervised does not read its input.
    async with connected(served) as (client, space):
        assert (await client.match([space], keys, lease_ms=0)).blocks == 6
        assert await load(client, space, keys) == ["disk"] * 6
    status, errors = await served.end(signal.SIGINT)
    assert (status, "Traceback" in errors) == (0, False), errors


async def test_kill_9_loses_nothing_that_was_announced(
    serving: Serving, private_redis: RedisServer
) -> None:
    """With memory and Redis empty the whole chain is matched and served from disk."""
    flags = {"--redis-blocks-url": private_redis.url, "--disk-sync-after-s": "0.1"}
    process = await serving.spawn(flags)
    assert process.stdout is not None
    served = Served(process, json.loads(await process.stdout.readline()))
    keys = keys_of("chain", BLOCKS)
    async with connected(served) as (client, space):
        events = await client.watch()
        assert await store(client, space, keys) == [True] * BLOCKS
        on_disk = (await client.status()).counters['kvstore_tier_blocks{tier="disk"}']
        safe = 0
        while safe < on_disk:
            event = await anext(events)
            assert isinstance(event, pb.SegmentSealed)
            safe += event.blocks
        process.kill()
        await process.wait()
    private_redis.kill()
    private_redis.start()
    served = await serving.start()
    async with connected(served) as (client, space):
        match = await client.match([space], keys, lease_ms=0)
        assert match.blocks >= safe > 0
        assert {run.tier for run in match.spaces[0]} == {"disk"}
        tiers = await load(client, space, keys)
        assert tiers == ["disk"] * match.blocks + [None] * (BLOCKS - match.blocks)


async def test_kill_9_at_any_moment_is_survived(serving: Serving) -> None:
    """Several times in the middle of writing: each start serves, and no byte is wrong."""
    keys = keys_of("chain", 400)
    for _ in range(2):
        served = await serving.start()
        async with connected(served) as (client, space):
            await load(client, space, keys)
            writing = asyncio.create_task(store(client, space, keys))
            events = await client.watch()
            await anext(events)
            served.process.kill()
            await writing
            await served.process.wait()
    served = await serving.start()
    async with connected(served) as (client, space):
        match = await client.match([space], keys, lease_ms=0)
        assert match.blocks > 0
        assert all((await load(client, space, keys))[: match.blocks])


async def test_a_supervised_node_ends_with_its_parent(serving: Serving) -> None:
    """At the end of standard input it drains and exits, as with SIGTERM."""
    served = await serving.start("--supervised")
    keys = keys_of("chain", 6)
    async with connected(served) as (client, space):
        await store(client, space, keys)
        watch = await client.watch()
        assert served.process.stdin is not None
        served.process.stdin.close()
        assert isinstance(await anext(watch), pb.Draining)
    status, errors = await served.exited()
    assert (status, "Traceback" in errors) == (0, False), errors
    served = await serving.start()
    async with connected(served) as (client, space):
        assert await load(client, space, keys) == ["disk"] * 6


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
async def test_a_second_signal_does_not_wait_for_the_drain(
    serving: Serving, second: signal.Signals
) -> None:
    """While a call is being waited for: the process ends at once, and says what that costs."""
    served = await serving.start()
    async with connected(served) as (client, space), raw_channel(served.endpoint) as channel:
        begin = pb.WriteBegin(space_id=space.space_id, keys=pack_keys(keys_of("chain", 1)))
        call = KVStoreStub(channel).Write()
        await call.write(pb.WriteRequest(begin=begin))
        assert isinstance(await call.read(), pb.WriteReply)
        watch = await client.watch()
        served.process.send_signal(signal.SIGTERM)
        assert isinstance(await anext(watch), pb.Draining)
        status, errors = await served.end(second)
    assert status == 128 + second
    assert f"{second.name} while draining: ending at once" in errors.splitlines()[-1]
    assert "Traceback" not in errors


@pytest.mark.parametrize(("also", "status"), [("", 0), ("drain", 1)])
async def test_a_device_that_hangs_does_not_hold_up_the_end(
    serving: Serving, also: str, status: int
) -> None:
    """The process ends although a thread never comes back; its status says if more went wrong."""
    serving.program = (str(ROOT / "tests" / "planted_hang.py"),)
    serving.environ["KVSTORE_PLANTED"] = also
    served = await serving.start(server_drain_timeout_s="0.5")
    async with connected(served) as (client, space):
        assert await store(client, space, keys_of("chain", 6)) == [True] * 6
    ended, errors = await served.end(signal.SIGTERM)
    assert (ended, "Traceback" in errors) == (status, status != 0), errors
    assert "memory was not flushed completely" in errors
    assert "a device does not answer" in errors


@pytest.fixture
def taken_port() -> Iterator[str]:
    """An address at which somebody else listens."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield f"127.0.0.1:{other.getsockname()[1]}"


async def test_a_start_that_cannot_be_is_one_line(serving: Serving, taken_port: str) -> None:
    """Exit status 1, the setting's name, nothing on standard output, and no traceback."""
    served = await serving.start()
    failing = {
        "disk.path": await serving.spawn({}),
        "server.metrics_listen": await serving.spawn(
            {"--disk-path": str(serving.home / "other"), "--server-metrics-listen": taken_port}
        ),
        "server.listen": await serving.spawn({"--server-listen": taken_port}),
    }
    for word, process in failing.items():
        status, errors = await Served(process, {}).exited()
        assert process.stdout is not None
        assert await process.stdout.read() == b""
        assert status == 1
        assert word in errors.splitlines()[-1]
        assert "Traceback" not in errors, errors
    async with connected(served) as (client, space):
        assert await store(client, space, keys_of("chain", 2)) == [True] * 2


BAD: dict[str, tuple[list[str], str]] = {
    "a bad value": (["--disk-threads=0"], "disk.threads"),
    "a mistake between fields": (["--memory-slab-bytes=1GiB"], "memory: slab_bytes"),
    "open to the world": (["--server-listen=0.0.0.0:0"], "server.listen"),
    "no such file": (["--config=absent.toml"], "absent.toml"),
    "no such tokens": (["--auth-tokens-file=absent.toml"], "auth.tokens_file"),
    "no such secret": (["--cluster-secret-file=absent"], "cluster.secret_file"),
    "a directory that cannot be": (["--disk-path=/dev/null/blocks"], "/dev/null"),
    "a host that is not ours": (
        ["--server-listen=192.0.2.1:0", "--auth-tokens-file=TOKENS"], "server.listen",
    ),
    "an unknown option": (["--disk-treads=1"], "--disk-treads"),
    "a strange log level": (["--log-level=loud"], "--log-level"),
    "a file with mistakes": (["--config=FILE"], "cluster.nonsense"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_setting_is_named_on_the_command_line(tmp_path: Path, name: str) -> None:
    """The command ends with a message, not with an exception."""
    arguments, word = BAD[name]
    (tmp_path / "tokens.toml").write_text("")
    (tmp_path / "kvstore.toml").write_text("[cluster]\nnonsense = 1\n")
    names = {"TOKENS": str(tmp_path / "tokens.toml"), "FILE": str(tmp_path / "kvstore.toml")}
    for short, path in names.items():
        arguments = [argument.replace(short, path) for argument in arguments]
    options = SMALL | {"--disk-path": str(tmp_path / "blocks")}
    small = [f"{flag}={value}" for flag, value in options.items()]
    ran = CliRunner().invoke(serve, [*small, *arguments])
    assert ran.exit_code in (1, 2)
    assert isinstance(ran.exception, SystemExit)
    assert word in ran.output
