"""Messages over a socket: all of them, in their order, whatever the socket's own sizes are."""

import asyncio
import socket
from collections.abc import Callable

import pytest

from kvstore.api.local import LENGTH
from kvstore.api.messages import MAX_GOING_BYTES, Messages
from kvstore.api.wire import MESSAGE_BYTES

PATIENCE_BYTES = 1 << 20


def ends() -> tuple[Messages, Messages]:
    """Both ends of a connection."""
    pair = socket.socketpair()
    for end in pair:
        end.setblocking(False)
    return Messages(pair[0]), Messages(pair[1], PATIENCE_BYTES)


def one_end() -> tuple[Messages, socket.socket]:
    """An end, and the bare socket of the other side."""
    here, there = socket.socketpair()
    here.setblocking(False)
    there.settimeout(30)
    return Messages(here, PATIENCE_BYTES), there


class Ears:
    """Hears, and tells when it has heard so many."""

    def __init__(self) -> None:
        self.heard: list[bytes] = []
        self._news = asyncio.Event()

    def hear(self, message: bytes) -> None:
        self.heard.append(message)
        self._news.set()

    async def count(self, count: int) -> list[bytes]:
        while len(self.heard) < count:
            self._news.clear()
            await self._news.wait()
        return self.heard


async def test_messages_come_whole_and_in_order() -> None:
    """Empty ones and large ones, more than the socket takes at a time, both ways at once."""
    one, other = ends()
    ears = Ears(), Ears()
    tasks = [
        asyncio.create_task(end.listen(each.hear))
        for end, each in zip((one, other), ears, strict=True)
    ]
    said = [bytes([number % 251]) * (number * 9973 % 300_000) for number in range(60)]
    for message in said:
        one.say(message)
        other.say(message)
    for each in ears:
        assert await each.count(len(said)) == said
    one.close()
    await asyncio.gather(*tasks)
    assert one.closed
    assert other.closed


async def test_who_takes_nothing_is_not_heard_until_he_does() -> None:
    """What waits for him is limited by what he may still ask for."""
    here, there = one_end()
    ears = Ears()
    listening = asyncio.create_task(here.listen(ears.hear))
    there.sendall(LENGTH.pack(2) + b"at")
    await ears.count(1)
    answer = bytes(MESSAGE_BYTES)
    here.say(answer)
    there.sendall(LENGTH.pack(4) + b"more")
    for _ in range(20):
        await asyncio.sleep(0)
    assert ears.heard == [b"at"]
    left = len(answer) + LENGTH.size
    assert left > 2 * PATIENCE_BYTES
    while left:
        left -= len(await asyncio.to_thread(there.recv, 1 << 20))
    assert await ears.count(2) == [b"at", b"more"]
    there.close()
    await listening


async def test_nothing_is_heard_while_it_is_paused() -> None:
    """Also of what had come already; afterwards nothing is missing."""
    here, there = one_end()
    heard: list[bytes] = []

    def hear(message: bytes) -> None:
        heard.append(message)
        here.pause()

    listening = asyncio.create_task(here.listen(hear))
    there.sendall(b"".join(LENGTH.pack(1) + bytes([number]) for number in range(3)))
    for number in range(3):
        while len(heard) <= number:  # noqa: ASYNC110
            await asyncio.sleep(0)
        for _ in range(5):
            await asyncio.sleep(0)
        assert heard == [bytes([each]) for each in range(number + 1)]
        here.resume()
    there.close()
    await listening


async def test_an_answer_is_heard_in_place() -> None:
    """Without a turn of the loop, and not longer than it was asked for."""
    here, there = one_end()
    ears = Ears()
    listening = asyncio.create_task(here.listen(ears.hear))
    await asyncio.sleep(0)
    here.wait(1)
    assert not ears.heard
    there.sendall(LENGTH.pack(2) + b"it")
    here.wait(30_000)
    assert ears.heard == [b"it"]
    there.close()
    here.wait(30_000)
    assert here.closed
    await listening


async def test_what_came_before_anybody_listened_is_heard() -> None:
    """Who waited in place has received it; nothing else comes that would call attention to it."""
    messages, there = one_end()
    with there:
        there.sendall(LENGTH.pack(5) + b"early")
        messages.wait(30_000)
        ears = Ears()
        listening = asyncio.create_task(messages.listen(ears.hear))
        async with asyncio.timeout(30):
            assert await ears.count(1) == [b"early"]
        messages.close()
        await listening


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (LENGTH.pack(MESSAGE_BYTES + 1), "a message of"),
        (LENGTH.pack(8) + b"half", "inside a message"),
        (b"\x01", "inside a message"),
    ],
)
async def test_what_is_no_message_ends_the_connection(said: bytes, why: str) -> None:
    """And says so to who listens."""
    here, there = one_end()
    with there:
        there.sendall(said)
        there.shutdown(socket.SHUT_WR)
        with pytest.raises(ValueError, match=why):
            await here.listen(lambda _: None)
        assert here.closed
        assert there.recv(1) == b""


async def test_an_error_of_who_hears_ends_the_connection() -> None:
    """He sees it himself."""
    here, there = one_end()

    def hear(message: bytes) -> None:
        raise KeyError(message)

    with there:
        there.sendall(LENGTH.pack(1) + b"x")
        with pytest.raises(KeyError):
            await here.listen(hear)
        assert there.recv(1) == b""


async def test_who_hangs_does_not_fill_the_memory_of_one_without_patience() -> None:
    """What he does not take is kept up to a limit; then the connection has ended."""
    pair = socket.socketpair()
    for end in pair:
        end.setblocking(False)
    messages = Messages(pair[0])
    with pair[1], pytest.raises(OSError, match="not taken"):
        async with asyncio.timeout(30):
            listening = asyncio.create_task(messages.listen(lambda message: None))
            await asyncio.sleep(0)
            said = 0
            while not messages.closed:
                messages.say(bytes(MESSAGE_BYTES))
                said += MESSAGE_BYTES
            assert said <= MAX_GOING_BYTES + 2 * MESSAGE_BYTES
            await listening


def close(messages: Messages, listening: asyncio.Task[None]) -> None:
    messages.close()


def cancel(messages: Messages, listening: asyncio.Task[None]) -> None:
    listening.cancel()


@pytest.mark.parametrize("end", [close, cancel])
async def test_however_it_ends_the_other_side_sees_it(
    end: Callable[[Messages, asyncio.Task[None]], None],
) -> None:
    """Nothing is said afterwards, and nothing raised by who tries."""
    here, there = one_end()
    listening = asyncio.create_task(here.listen(lambda _: None))
    await asyncio.sleep(0)
    end(here, listening)
    await asyncio.gather(listening, return_exceptions=True)
    assert here.closed
    here.say(b"too late")
    here.wait(30_000)
    here.close()
    with there:
        assert there.recv(1) == b""
