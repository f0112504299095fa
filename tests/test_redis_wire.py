"""RESP on a socket: what is sent, what counts as an answer, and which connections are kept."""

import socket
import threading
from collections.abc import Callable, Iterator

import pytest
from redis.connection import Connection

from kvstore.tiers.redis_wire import AHEAD_BYTES, Garbled, Refused, Wire

TIMEOUT_S = 30.0


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Ours, and the server's."""
    ours, theirs = socket.socketpair()
    ours.settimeout(TIMEOUT_S)
    theirs.settimeout(TIMEOUT_S)
    with ours, theirs:
        yield ours, theirs


def read_all(connection: socket.socket) -> bytes:
    """Until the other end has nothing more to say."""
    data = b""
    while part := connection.recv(1 << 16):
        data += part
    return data


def values_of(wire: Wire, count: int) -> list[bytes | Refused | None]:
    """The next answers."""
    values: list[bytes | Refused | None] = []
    for _ in range(count):
        try:
            size = wire.value()
        except Refused as refused:
            values.append(refused)
            continue
        if size is None:
            values.append(None)
            continue
        into = bytearray(size)
        wire.receive(memoryview(into))
        wire.end()
        values.append(bytes(into))
    return values


def asked(connection: socket.socket, count: int) -> Wire:
    """A wire to which so many answers are owed."""
    wire = Wire(connection)
    for number in range(count):
        wire.get(b"key %d" % number)
    wire.flush()
    return wire


def test_commands_are_what_redis_py_would_send(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    """Byte for byte, however many pieces a value lies in, and more than a socket takes at once."""
    ours, theirs = ends
    big = bytes(range(256)) * 40_000
    received: list[bytes] = []
    reader = threading.Thread(target=lambda: received.append(read_all(theirs)))
    reader.start()
    wire = Wire(ours)
    wire.get(b"one")
    wire.set(b"two", [b"head", memoryview(big), b"", memoryview(b"tail")], 600)
    for number in range(300):
        wire.set(b"small %d" % number, [memoryview(b"value")], 1)
    wire.flush()
    ours.shutdown(socket.SHUT_WR)
    reader.join()
    commands = [("GET", b"one"), ("SET", b"two", b"head" + big + b"tail", "EX", 600)]
    commands += [("SET", b"small %d" % number, b"value", "EX", 1) for number in range(300)]
    packed = Connection().pack_commands(commands)  # type: ignore[no-untyped-call]
    assert received == [b"".join(bytes(piece) for piece in packed)]
    assert wire.owed == len(commands)
    assert not wire.is_idle


ANSWERS = b"$5\r\nhello\r\n$-1\r\n-WRONGTYPE not a string\r\n$0\r\n\r\n$2\r\n\r\n\r\n$3\r\nend\r\n"


def check_answers(values: list[bytes | Refused | None]) -> None:
    """What `ANSWERS` mean."""
    assert isinstance(values[2], Refused)
    assert str(values[2]) == "redis: WRONGTYPE not a string"
    assert values[:2] + values[3:] == [b"hello", None, b"", b"\r\n", b"end"]


@pytest.mark.parametrize("at", range(len(ANSWERS) + 1))
def test_answers_may_come_in_two_pieces(ends: tuple[socket.socket, socket.socket], at: int) -> None:
    """Wherever the stream stops for a while, the same is read."""
    ours, theirs = ends
    wire = asked(ours, 6)
    theirs.sendall(ANSWERS[:at])
    answers: list[list[bytes | Refused | None]] = []
    reader = threading.Thread(target=lambda: answers.append(values_of(wire, 6)))
    reader.start()
    theirs.sendall(ANSWERS[at:])
    reader.join()
    check_answers(answers[0])
    assert wire.is_idle


@pytest.mark.parametrize("at", range(len(ANSWERS)))
def test_a_cut_anywhere_is_noticed(ends: tuple[socket.socket, socket.socket], at: int) -> None:
    """No value is made of half a stream, and nobody else gets the connection."""
    ours, theirs = ends
    wire = asked(ours, 6)
    theirs.sendall(ANSWERS[:at])
    theirs.shutdown(socket.SHUT_WR)
    with pytest.raises(Garbled):
        values_of(wire, 6)
    assert not wire.is_idle


def test_a_byte_at_a_time_is_as_good(ends: tuple[socket.socket, socket.socket]) -> None:
    """However slow the server is."""
    ours, theirs = ends
    wire = asked(ours, 6)

    def dribble() -> None:
        for byte in ANSWERS:
            theirs.sendall(bytes([byte]))

    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    writer = threading.Thread(target=dribble)
    writer.start()
    check_answers(values_of(wire, 6))
    writer.join()


STRANGE = [
    b"+OK\r\n", b":1\r\n", b"*2\r\n$1\r\na\r\n$1\r\nb\r\n", b"_\r\n", b">1\r\n", b"%0\r\n",
    b"\r\n", b"$\r\n", b"$-2\r\n", b"$+5\r\nhello\r\n", b"$ 5\r\nhello\r\n", b"$5 \r\nhello\r\n",
    b"$0x5\r\nhello\r\n", b"$?\r\n", b"HTTP/1.1 400 Bad Request\r\n", b"$5\r\nhello, world\r\n",
    b"$5\r\nhel\r\n$1\r\n", b"x" * (AHEAD_BYTES + 1),
]  # fmt: skip


@pytest.mark.parametrize("answer", STRANGE, ids=repr)
def test_what_is_no_value_is_not_taken_for_one(
    ends: tuple[socket.socket, socket.socket], answer: bytes
) -> None:
    """Answers of other types, of other lengths, and no RESP at all."""
    ours, theirs = ends
    wire = asked(ours, 1)
    theirs.sendall(answer + b"\r\n")
    with pytest.raises(Garbled):
        values_of(wire, 1)
    assert not wire.is_idle


def test_a_line_may_end_at_the_end_of_what_was_read(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    """Lines that lie across what is read at once are put together, at each place."""
    ours, theirs = ends
    sizes = [AHEAD_BYTES - 30 + shift for shift in range(60)]
    wire = asked(ours, 2 * len(sizes))
    writer = threading.Thread(
        target=lambda: theirs.sendall(
            b"".join(b"$%d\r\n%s\r\n$-1\r\n" % (size, b"v" * size) for size in sizes)
        )
    )
    writer.start()
    values = values_of(wire, 2 * len(sizes))
    writer.join()
    assert values[::2] == [b"v" * size for size in sizes]
    assert set(values[1::2]) == {None}


def test_what_is_skipped_is_as_long_as_it_was_said_to_be(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    """The next answer is read as if nothing had been there."""
    ours, theirs = ends
    wire = asked(ours, 2)
    writer = threading.Thread(
        target=lambda: theirs.sendall(b"$200000\r\n" + b"\r\n" * 100_000 + b"\r\n$3\r\nend\r\n")
    )
    writer.start()
    assert wire.value() == 200_000
    wire.skip(200_000)
    wire.end()
    assert values_of(wire, 1) == [b"end"]
    writer.join()


@pytest.mark.parametrize(
    ("answer", "is_kept"),
    [
        (b"-OOM command not allowed", True),
        (b"-WRONGTYPE Operation against a key", True),
        (b"-READONLY You can't write against a read only replica.", False),
        (b"-LOADING Redis is loading the dataset in memory", False),
        (b"-NOAUTH Authentication required.", False),
        (b"-NOPERM this user has no permissions", False),
        (b"-MOVED 3999 127.0.0.1:6381", False),
        (b"-MASTERDOWN Link with MASTER is down", False),
        (b"-", False),
    ],
)
def test_errors_are_answered_one_by_one(
    ends: tuple[socket.socket, socket.socket], answer: bytes, is_kept: bool
) -> None:
    """Others' answers are read; a server that is not what it was gets a new connection."""
    ours, theirs = ends
    wire = Wire(ours)
    for number in range(3):
        wire.set(b"%d" % number, [b"value"], 1)
    wire.flush()
    theirs.sendall(b"+OK\r\n" + answer + b"\r\n+OK\r\n")
    refusals = [wire.refusal() for _ in range(3)]
    assert [refusal is None for refusal in refusals] == [True, False, True]
    assert wire.owed == 0
    assert wire.is_idle == is_kept


@pytest.mark.parametrize("wait", [lambda wire: wire.value(), lambda wire: wire.receive(
    memoryview(bytearray(10))
)], ids=["line", "value"])  # fmt: skip
def test_a_wire_that_is_shut_waits_no_longer(
    ends: tuple[socket.socket, socket.socket], wait: Callable[[Wire], object]
) -> None:
    """Whoever stands in a receive comes back at once, without the time that it has."""
    ours, _ = ends
    wire = asked(ours, 1)
    ended: list[Exception] = []

    def stand() -> None:
        try:
            wait(wire)
        except Garbled as error:
            ended.append(error)

    waiting = threading.Thread(target=stand)
    waiting.start()
    wire.shut()
    waiting.join(TIMEOUT_S / 2)
    assert ended
