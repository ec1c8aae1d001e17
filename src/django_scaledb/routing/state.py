"""What a context knows: the log positions it must not read before, and what its blocks asked for.

A `Scope` holds positions. It is shared by reference, so that what a child task writes its parent knows:
child tasks copy the context, not the scope. A `Frame` is one `with` block: a scope and perhaps a mode;
frames form a chain from the innermost block outwards.

Code that no block surrounds shares the scope of its thread; code of an event loop, which is passed
from thread to thread, shares one scope. Sharing is safe: at worst a read is sent to the primary that
need not be.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextvars import ContextVar
from functools import wraps
from threading import get_ident
from types import TracebackType
from typing import Any, Self, TypeVar, cast

from asgiref.sync import SyncToAsync, iscoroutinefunction

from django_scaledb.routing.policy import Mode
from django_scaledb.routing.token import Identity, Position, decode, encode, later

_Callable = TypeVar("_Callable", bound=Callable[..., Any])


#: A `Position` that the router takes apart faster.
_Plain = tuple[int, int, int]
#: Writes of a scope are read all at once when there are so many.
_UNREAD = 256


class Scope:
    """The positions, by system identifier, that whoever shares this scope must not read before.

    A write leaves its position as PostgreSQL sent it: what it says matters to the next read only, and of many
    writes only the last one's does.
    """

    __slots__ = ("known", "lock", "own", "since", "unread", "written")

    def __init__(self, positions: dict[int, Position] | None = None) -> None:
        #: Not empty when anything was written or seen; complete when `unread` is empty.
        self.known: dict[int, _Plain] = {}
        self._add(self.known, (positions or {}).values())
        #: By which thread, in whose log, where.
        self.unread: list[tuple[int, Identity, bytes | None]] = []
        self.lock = threading.Lock()
        #: Those that were reached here and did not come from outside.
        self.own: dict[int, _Plain] = {}
        self.written = False
        self.since = time.monotonic()

    @property
    def positions(self) -> dict[int, Position]:
        if self.unread:
            self._read()
        return {system: Position(*position) for system, position in self.known.copy().items()}

    def advance(self, *positions: Position) -> None:
        """From now on no read here comes before these."""
        with self.lock:
            self._add(self.known, positions)
            self._add(self.own, positions)

    def wrote(self, identity: Identity, text: bytes | None) -> None:
        """A write of ours ended at `text` in the log of `identity`; None when nobody could ask."""
        self.written = True
        self.unread.append((get_ident(), identity, text))
        if not self.known:
            self.known[identity.system] = (identity.system, identity.timeline, 0)
        elif len(self.unread) >= _UNREAD:
            self._read()

    def _read(self) -> None:
        with self.lock:
            unread = self.unread[:]
            # What one thread writes ends ever later.
            last = {(by, identity.system): (identity, text) for by, identity, text in unread}
            positions = [identity.position(text) for identity, text in last.values()]
            self._add(self.known, positions)
            self._add(self.own, positions)
            # Last: who finds nothing unread believes what is known.
            del self.unread[: len(unread)]

    def absorb(self, other: Scope) -> None:
        """Take over what was reached in `other`, a block that ends."""
        if other.unread:
            other._read()
        self.advance(*(Position(*position) for position in other.own.values()))
        self.written = self.written or other.written

    def accept(self, token: object) -> None:
        """Take a token from outside; what is none is ignored."""
        with self.lock:
            self._add(self.known, decode(token))
        self.since = time.monotonic()

    @staticmethod
    def _add(to: dict[int, _Plain], positions: Iterable[Position]) -> None:
        for system, timeline, lsn in positions:
            to[system] = later(to.get(system), (system, timeline, lsn))


#: Not empty, and not the position of any cluster.
_A_MODE = {-1: (-1, 0, 0)}


class Frame:
    """One block of a context; `owner` is the object that opened it."""

    __slots__ = ("is_request", "mode", "owner", "parent", "scope", "unless")

    def __init__(
        self,
        scope: Scope,
        mode: Mode | None = None,
        parent: Frame | None = None,
        owner: object = None,
        *,
        is_request: bool = False,
    ) -> None:
        self.scope = scope
        self.mode = mode
        #: What keeps the router from its short cut: positions, which may be none, or that there is a mode.
        self.unless = scope.known if mode is None else _A_MODE
        self.parent = parent
        self.owner = owner
        self.is_request = is_request


class _Thread(threading.local):
    """Of this thread: its scope outside all blocks, and its connections with an open transaction."""

    def __init__(self) -> None:
        self.frame = Frame(Scope())
        #: alias -> the connection's wrapper
        self.open: dict[str, Any] = {}


current: ContextVar[Frame | None] = ContextVar("django_scaledb.routing", default=None)
thread = _Thread()
#: Whether any thread has a transaction open: spares the others a look at their own.
open_anywhere: set[int] = set()
_event_loops = Frame(Scope())


def frame() -> Frame:
    """The innermost frame of this context."""
    return current.get() or outermost()


def outermost() -> Frame:
    """The frame of code that no block surrounds, made current."""
    found = _event_loops if _serves_an_event_loop() else thread.frame
    current.set(found)
    return found


def _serves_an_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        pass
    else:
        return True
    this = threading.current_thread()
    # The default executor of a loop (asyncio.to_thread), and asgiref's thread for synchronous code.
    return this.name.startswith("asyncio_") or this in SyncToAsync.single_thread_executor._threads


def enter(new: Frame) -> None:
    current.set(new)


def leave(owner: object) -> Frame | None:
    """End the innermost frame that `owner` opened; also when blocks do not end in order.

    Not `ContextVar.reset()`: generators and executors end blocks out of order and in other contexts.
    """
    inner: Frame | None = None
    candidate = current.get()
    while candidate is not None and candidate.owner is not owner:
        inner, candidate = candidate, candidate.parent
    if candidate is None:
        return None
    if inner is None:
        current.set(candidate.parent)
    else:
        inner.parent = candidate.parent
    return candidate


class Block:
    """A context manager, plain and asynchronous, and a decorator of whatever can be called.

    One object may be entered any number of times, nested and by several threads or tasks.
    """

    def _open(self) -> Frame:
        raise NotImplementedError

    def _close(self, frame: Frame) -> None:
        """Called after `frame` was left."""

    def __enter__(self) -> Self:
        enter(self._open())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        left = leave(self)
        if left is not None:
            self._close(left)

    async def __aenter__(self) -> Self:
        return self.__enter__()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.__exit__(kind, error, traceback)

    def __call__(self, function: _Callable) -> _Callable:
        if inspect.isasyncgenfunction(function):
            wrapper: Callable[..., Any] = self._around_async_generator(function)
        elif inspect.isgeneratorfunction(function):
            wrapper = self._around_generator(function)
        elif iscoroutinefunction(function):

            @wraps(function)
            async def wrapper(*args: Any, **kwargs: Any) -> Any:
                with self:
                    return await function(*args, **kwargs)

        else:

            @wraps(function)
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                with self:
                    return function(*args, **kwargs)

        return cast("_Callable", wrapper)

    # A generator runs piece by piece in its consumer's context: the block is open while it runs, and
    # closed while the consumer does.

    def _around_generator(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Iterator[Any]:
            generator = function(*args, **kwargs)
            resume, value = generator.send, None
            try:
                while True:
                    try:
                        with self:
                            produced = resume(value)
                    except StopIteration as end:
                        return cast("None", end.value)
                    try:
                        resume, value = generator.send, (yield produced)
                    except Exception as error:
                        resume, value = generator.throw, error
            finally:
                with self:
                    generator.close()

        return wrapper

    def _around_async_generator(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        async def wrapper(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
            generator = function(*args, **kwargs)
            resume, value = generator.asend, None
            try:
                while True:
                    try:
                        with self:
                            produced = await resume(value)
                    except StopAsyncIteration:
                        return
                    try:
                        resume, value = generator.asend, (yield produced)
                    except Exception as error:
                        resume, value = generator.athrow, error
            finally:
                with self:
                    await generator.aclose()

        return wrapper


class use_primary(Block):  # reads as a word of its own, like `atomic`
    """Reads inside go to the primary: ``with use_primary():``, ``async with``, ``@use_primary()``.

    Of nested `use_primary()` and `use_replica()` the innermost wins.
    """

    def _open(self) -> Frame:
        outer = frame()
        return Frame(outer.scope, Mode.PRIMARY, outer, self)


class use_replica(Block):
    """Reads inside go to a replica also where a rule or an open transaction would send them to the primary.

    What this context wrote is still honoured: until a replica has replayed it, and in a transaction that has
    written, reads go to the primary. ``use_replica(stale_ok=True)`` gives that up too, for reports to
    which the last seconds do not matter. When no replica is healthy, the primary serves.
    """

    def __init__(self, *, stale_ok: bool = False) -> None:
        self.mode = Mode.STALE_REPLICA if stale_ok else Mode.REPLICA

    def _open(self) -> Frame:
        outer = frame()
        return Frame(outer.scope, self.mode, outer, self)


class use_token(Block):
    """Reads inside come after the position in `token`, which `current_token()` gave, perhaps in another
    process.

    A token of another cluster or of a timeline that is over, and a text that is no token, change nothing.
    """

    def __init__(self, token: object) -> None:
        self.token = token

    def _open(self) -> Frame:
        outer = frame()
        scope = Scope(outer.scope.positions)
        scope.accept(self.token)
        return Frame(scope, outer.mode, outer, self)

    def _close(self, frame: Frame) -> None:
        if frame.parent is not None:
            frame.parent.scope.absorb(frame.scope)


def current_token() -> str:
    """What this context must not read before: a short ASCII text, ``""`` when it has written and seen
    nothing.

    JSON, headers and job arguments can carry it as it is. Writes of a transaction count once it is committed.
    """
    return encode(frame().scope.positions.values())


def _after_fork_in_child() -> None:
    """Another thread of the parent may have held a lock."""
    scopes = {id(_event_loops.scope): _event_loops.scope}
    for innermost in (current.get(), thread.frame):
        each = innermost
        while each is not None:
            scopes[id(each.scope)] = each.scope
            each = each.parent
    for scope in scopes.values():
        scope.lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork_in_child)
