"""What the engines' adapters share: settings, names of weights and blocks, stores behind a step."""

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvstore.api.v1 import kvstore_pb2 as pb
from kvstore_client import Client, Space
from kvstore_client.engine.adopted import adopted_key
from kvstore_client.engine.options import EngineOptions
from kvstore_client.engine.uploads import Uploads
from kvstore_client.engine.weights import checkpoint_digest, model_revision
from tests.client_rig import BLOCK_BYTES, PATIENT, descriptor
from tests.scripted_node import NodeThread, block, key

WAIT_S = 30.0


@pytest.fixture
def remote() -> Iterator[NodeThread]:
    """A node that is served elsewhere."""
    node = NodeThread()
    yield node
    node.stop()


@pytest.fixture
def client(remote: NodeThread) -> Iterator[Client]:
    """A patient client of that node."""
    with Client(remote.endpoint, budgets=PATIENT) as client:
        yield client


@pytest.fixture
def space() -> Space:
    """A space of small blocks, which no node knows yet."""
    return Space.of(descriptor())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"endpiont": "a:1"}, "here.endpiont: no such setting; did you mean endpoint?"),
        ({"zzz": 1}, "here.zzz: no such setting; there are endpoint, token"),
        ({"endpoint": 7070}, "here.endpoint: a text is needed, got 7070"),
        ({"lease_ms": "10"}, "here.lease_ms: a whole number is needed"),
        ({"lease_ms": True}, "here.lease_ms: a whole number is needed"),
        ({"lease_ms": 0}, "here.lease_ms: must lie in 1"),
        ({"bulk": 1}, "here.bulk: true or false is needed"),
        ({"load_budget_s": 0}, "here.load_budget_s: must lie above 0"),
        ({"load_budget_s": float("nan")}, "here.load_budget_s: must lie above 0"),
        ({"match_budget_s": 1e9}, "match_s"),
        ({"max_saving_bytes": -1}, "here.max_saving_bytes: must be 0 or more"),
        ({"token": "a", "token_file": "b"}, "here.token, token_file: one of them"),
    ],
)
def test_a_bad_setting_is_named(values: dict[str, Any], message: str) -> None:
    """Unknown names and bad values are refused, and the message says where."""
    with pytest.raises(ValueError, match=r"\w+") as error:
        EngineOptions.read(values, "here")
    assert message in str(error.value)


def test_settings_reach_the_client(tmp_path: Path) -> None:
    """A whole number may stand for seconds; the token comes from its file and is never shown."""
    (tmp_path / "token").write_text("secret\n")
    values = {"endpoint": "127.0.0.1:9", "load_budget_s": 3, "token": "secret"}
    options = EngineOptions.read(values, "here")
    assert "secret" not in repr(options)
    with options.connect() as client:
        assert client.budgets.load_s == 3
        assert client.endpoint == "127.0.0.1:9"
    with EngineOptions(token_file=str(tmp_path / "token")).connect():
        pass
    for name in ("token_file", "tls_ca_file"):
        with pytest.raises(ValueError, match=name):
            EngineOptions.read({name: str(tmp_path / "none")}, "here").connect()


def test_adopted_keys_tell_hashes_and_content_apart() -> None:
    """Nothing that moves a byte from one part to the other gives the same key."""
    parts = [(b"ab", b""), (b"a", b"b"), (b"", b"ab"), (b"ab", b"c"), (b"abc", b"")]
    keys = {adopted_key(*part) for part in parts}
    assert len(keys) == len(parts)
    assert {len(each) for each in keys} == {32}
    assert adopted_key(b"ab") == adopted_key(b"ab", b"")


def checkpoint(path: Path, weights: bytes = b"weights") -> Path:
    """A directory that looks like a checkpoint."""
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(weights)
    (path / "README.md").write_text(str(path))
    return path


def test_a_checkpoint_is_named_by_its_content(tmp_path: Path) -> None:
    """Neither its place nor its readme matter; weights, settings, code and their names do."""
    one, other = checkpoint(tmp_path / "one"), checkpoint(tmp_path / "two" / "deeper")
    digest = checkpoint_digest(one)
    assert checkpoint_digest(other) == digest == model_revision(str(one))
    seen = {digest}
    changed = {
        "config.json": b"{ }",
        "model.safetensors": b"Weights",
        "preprocessor_config.json": b"{}",
        "processor_config.json": b"{}",
        "video_preprocessor_config.json": b"{}",
        "modeling.py": b"",
        "b.bin": b"",
    }
    for name, content in changed.items():
        (other / name).write_bytes(content)
        assert checkpoint_digest(other) not in seen
        seen.add(checkpoint_digest(other))
    (other / "b.bin").rename(other / "c.bin")
    assert checkpoint_digest(other) not in seen
    assert checkpoint_digest(one / "model.safetensors") not in seen


def test_weights_replaced_under_their_old_path_have_another_name(tmp_path: Path) -> None:
    """Also where length and time of change were kept."""
    path = checkpoint(tmp_path / "adapter")
    before = checkpoint_digest(path)
    file = path / "model.safetensors"
    times = file.stat()
    file.write_bytes(b"WEIGHTS")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert checkpoint_digest(path) != before


def test_weights_that_cannot_be_read_do_not_hold_up_the_end(tmp_path: Path) -> None:
    """The interpreter joins the threads of pools when it ends, and a file system may hang."""
    path = checkpoint(tmp_path / "model")
    code = """
import pathlib, sys, threading
from kvstore_client.engine import background, weights
begun = threading.Event()
weights._content_digest = lambda file: (begun.set(), threading.Event().wait())
background.in_background(lambda: weights.checkpoint_digest(pathlib.Path(sys.argv[1])))
assert begun.wait(30)
"""
    subprocess.run([sys.executable, "-c", code, str(path)], check=True, timeout=60)


def test_a_model_without_a_name_for_its_weights_is_refused(tmp_path: Path) -> None:
    """A name on the hub needs a commit, a directory needs weights; the message says what to set."""
    commit = "0123456789" * 4
    assert model_revision("acme/no-such-model", commit) == commit
    with pytest.raises(ValueError, match="set model_revision"):
        model_revision("acme/no-such-model", "main")
    with pytest.raises(ValueError, match="no weights there"):
        model_revision(str(tmp_path))


def test_uploads_store_behind_the_callers_back(
    remote: NodeThread, client: Client, space: Space
) -> None:
    """What is taken is stored, and the buffers come back with what the node holds."""
    done: list[list[bool]] = []
    uploads = Uploads(client, 10 * BLOCK_BYTES)
    keys = [key(number) for number in range(4)]
    blocks = [block(number, BLOCK_BYTES) for number in range(4)]
    assert uploads.offer(space, keys[:2], blocks[:2], on_done=done.append)
    assert uploads.offer(space, keys[2:], blocks[2:], parent_key=keys[1], on_done=done.append)
    assert uploads.drain(WAIT_S)
    assert done == [[True, True], [True, True]]
    assert uploads.counters == {"held": 4, "failed": 0}
    assert remote.node.blocks[space.space_id, keys[3]][0] == blocks[3]
    uploads.close()


def test_uploads_are_bounded_and_drops_are_counted(
    remote: NodeThread, client: Client, space: Space
) -> None:
    """Behind a node that does not answer the queue fills up, and nobody waits."""
    released = threading.Event()
    arrived = threading.Event()

    async def script(requests: Any, context: object) -> AsyncIterator[pb.WriteReply]:
        arrived.set()
        await asyncio.to_thread(released.wait, WAIT_S)
        yield pb.WriteReply()

    remote.node.play("Write", script)
    uploads = Uploads(client, 3 * BLOCK_BYTES)
    blocks = [block(number, BLOCK_BYTES) for number in range(4)]
    done: list[list[bool]] = []
    assert uploads.offer(space, [key(0), key(1)], blocks[:2], on_done=done.append)
    assert arrived.wait(WAIT_S)
    assert not uploads.drain(0)
    assert not uploads.offer(space, [key(2), key(3)], blocks[2:], on_done=done.append)
    assert uploads.offer(space, [key(2)], blocks[2:3], on_done=done.append)
    assert uploads.room_bytes() == 0
    closing = threading.Thread(target=uploads.close)
    closing.start()
    released.set()
    closing.join(WAIT_S)
    assert not uploads.offer(space, [key(2)], blocks[2:3])
    assert sum(uploads.counters.values()) == 6
    assert uploads.counters["dropped"] >= 3
    assert len(done) == 2


def test_a_run_that_cannot_be_stored_does_not_end_the_uploads(client: Client, space: Space) -> None:
    """A block of the wrong length is lost and logged; the next run is stored."""
    uploads = Uploads(client, 10 * BLOCK_BYTES)
    done: list[list[bool]] = []
    assert uploads.offer(space, [key(0)], [b"short"], on_done=done.append)
    assert uploads.offer(space, [key(0)], [block(0, BLOCK_BYTES)], on_done=done.append)
    assert uploads.drain(WAIT_S)
    assert done == [[False], [True]]
    uploads.close()
    uploads.close()
