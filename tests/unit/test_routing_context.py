"""Who knows of a write, and for how long a block counts: threads, tasks, generators, forks. No database."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import Context

import pytest
from asgiref.sync import async_to_sync, sync_to_async

from django_scaledb.routing import current_token, state, use_primary, use_replica, use_token
from django_scaledb.routing.policy import Mode
from django_scaledb.routing.token import UNREACHABLE, Identity, Position, decode, encode

LOG = Identity(system=7, timeline=1)


@pytest.fixture(autouse=True)
def _in_a_context_of_its_own() -> Iterator[None]:
    state.thread.frame = state.Frame(state.Scope())
    before = state.current.get()
    state.current.set(None)
    yield
    state.current.set(before)


def mode() -> Mode | None:
    return state.frame().mode


def write(lsn: int, log: Identity = LOG) -> None:
    """What a connection to a primary says after a COMMIT."""
    state.frame().scope.wrote(log, b"%X/%X" % divmod(lsn, 1 << 32))


def known() -> list[int]:
    return [position.lsn for position in decode(current_token())]


# Blocks


def test_the_innermost_block_wins_and_what_was_before_comes_back() -> None:
    with use_primary():
        with use_replica():
            assert mode() is Mode.REPLICA
            with use_replica(stale_ok=True):
                assert mode() is Mode.STALE_REPLICA
            assert mode() is Mode.REPLICA
        assert mode() is Mode.PRIMARY
    with pytest.raises(LookupError), use_primary():
        raise LookupError
    assert mode() is None


def test_one_object_is_entered_any_number_of_times() -> None:
    block = use_primary()
    with block, block:
        assert mode() is Mode.PRIMARY
    assert mode() is None

    @block
    def again(depth: int) -> list[Mode | None]:
        return [mode(), *(again(depth - 1) if depth else [])]

    assert again(2) == [Mode.PRIMARY] * 3
    assert mode() is None


def test_coroutines() -> None:
    @use_primary()
    async def function() -> Mode | None:
        await asyncio.sleep(0)
        return mode()

    async def run() -> list[Mode | None]:
        async with use_replica():
            return [await function(), mode(), await sync_to_async(mode)()]

    assert asyncio.run(run()) == [Mode.PRIMARY, Mode.REPLICA, Mode.REPLICA]
    assert async_to_sync(run)() == [Mode.PRIMARY, Mode.REPLICA, Mode.REPLICA]
    assert mode() is None


def test_a_generator_is_in_the_block_and_its_consumer_is_not() -> None:
    caught = []

    @use_primary()
    def pieces() -> Iterator[Mode | None]:
        try:
            sent = yield mode()
            caught.append((sent, mode()))
            yield mode()
        except LookupError:
            caught.append(mode())
            yield mode()
        finally:
            caught.append(mode())

    generator = pieces()
    assert (next(generator), mode()) == (Mode.PRIMARY, None)
    assert (generator.send("x"), mode()) == (Mode.PRIMARY, None)
    assert (generator.throw(LookupError()), mode()) == (Mode.PRIMARY, None)
    generator.close()
    assert caught == [("x", Mode.PRIMARY), Mode.PRIMARY, Mode.PRIMARY]
    assert list(pieces()) == [Mode.PRIMARY] * 2


def test_an_asynchronous_generator_is_in_the_block_and_its_consumer_is_not() -> None:
    ended = []

    @use_primary()
    async def pieces() -> AsyncIterator[Mode | None]:
        try:
            for _ in range(3):
                await asyncio.sleep(0)
                yield mode()
        finally:
            ended.append(mode())

    async def run() -> list[Mode | None]:
        seen = []
        generator = pieces()
        async for piece in generator:
            seen += [piece, mode()]
            if len(seen) == 4:
                break
        await generator.aclose()
        return seen

    assert asyncio.run(run()) == [Mode.PRIMARY, None] * 2
    assert ended == [Mode.PRIMARY]


def test_blocks_that_end_out_of_order_leave_nothing_behind() -> None:
    def within(block: state.Block) -> Iterator[None]:
        with block:
            yield

    one, two = within(use_primary()), within(use_replica())
    next(one)
    next(two)
    one.close()
    assert mode() is Mode.REPLICA
    two.close()
    assert mode() is None


# Who knows


def test_a_thread_and_a_new_context_know_nothing_of_another_thread() -> None:
    write(100)
    with ThreadPoolExecutor(1) as other:
        assert other.submit(known).result() == []
    assert Context().run(known) == [100], "code of one thread that no block surrounds"


def test_child_tasks_and_their_threads_share_with_their_parent() -> None:
    async def child(lsn: int) -> None:
        await asyncio.to_thread(write, lsn)

    async def run() -> list[int]:
        with use_token(""):
            await asyncio.gather(*(asyncio.create_task(child(n), name=str(n)) for n in (100, 200, 300)))
            return known()

    assert asyncio.run(run()) == [300]


def test_what_a_block_with_a_token_wrote_is_known_after_it_and_what_it_took_is_not() -> None:
    with use_token(encode([Position(7, 1, 500)])):
        assert known() == [500]
        write(100)
    assert known() == [100]
    with use_token("nothing of ours"):
        assert known() == [100]


# Writes


@pytest.mark.parametrize("writes", [1, 255, 256, 1000])
def test_the_last_of_many_writes_counts(writes: int) -> None:
    scope = state.frame().scope
    for n in range(1, writes + 1):
        write(1000 * n)
        assert scope.known
    assert len(scope.unread) < 256
    assert known() == [1000 * writes]
    assert not scope.unread


def test_what_threads_and_logs_have_to_say_to_one_another() -> None:
    with use_token(""), ThreadPoolExecutor(1) as other:
        scope = state.frame().scope
        other.submit(scope.wrote, LOG, b"0/300").result()
        write(0x200)
        assert known() == [0x300]
        write(50, log=Identity(system=7, timeline=2))
        assert known() == [50], "on a newer timeline"
        write(9000, log=Identity(system=8, timeline=1))
        assert known() == [50, 9000]


def test_a_position_that_could_not_be_asked_is_never_reached() -> None:
    state.frame().scope.wrote(LOG, None)
    assert known() == [UNREACHABLE]


def test_threads_that_share_a_scope_lose_nothing() -> None:
    scope = state.frame().scope
    begin = threading.Barrier(4)

    def run(by: int) -> None:
        begin.wait()
        for n in range(2000):
            lsn = 10 * n + by + 1
            scope.wrote(LOG, b"0/%X" % lsn)
            assert scope.positions[7].lsn >= lsn

    with ThreadPoolExecutor(4) as threads:
        for done in [threads.submit(run, by) for by in range(4)]:
            done.result()
    assert scope.positions[7].lsn == 10 * 1999 + 4


def test_what_is_written_while_positions_are_read_is_read_next() -> None:
    scope = state.frame().scope

    class Meanwhile(Identity):
        def position(self, text: bytes | None) -> Position:
            scope.wrote(LOG, b"0/900")
            return super().position(text)

    scope.wrote(Meanwhile(7, 1), b"0/800")
    assert known() == [0x800]
    assert scope.unread
    assert known() == [0x900]


def test_a_fork_while_another_thread_reads_positions_does_not_hang() -> None:
    write(100)
    scope = state.frame().scope

    def child() -> None:
        signal.alarm(5)
        os._exit(0 if known() == [100] else 1)

    with scope.lock:
        assert _in_a_child(child) == 0


def _in_a_child(function: Callable[[], None]) -> int:
    if not (pid := os.fork()):
        try:
            function()
        finally:
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
