"""Carries what a browser or an API client has written from one request to the next.

``MIDDLEWARE = [..., "django_scaledb.routing.ReadYourWritesMiddleware"]``, as the last: what middleware
outside of it writes (a session that is saved at the end) neither sets the cookie nor counts in the next
request.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

from asgiref.sync import iscoroutinefunction, markcoroutinefunction
from django.conf import settings as django_settings
from django.core import signing
from django.core.signals import request_finished, request_started
from django.http import HttpRequest
from django.http.response import HttpResponseBase

from django_scaledb.conf import settings
from django_scaledb.routing.state import Frame, Scope, current, frame, leave
from django_scaledb.routing.token import encode

COOKIE = "scaledb_position"
#: For API clients that keep no cookies: what a response says here, the next request says again.
HEADER = "X-ScaleDB-Position"
_SALT = "django_scaledb.routing.position"
_AN_HOUR = 3600

GetResponse = Callable[[HttpRequest], HttpResponseBase | Awaitable[HttpResponseBase]]


def max_age() -> int:
    """How long a position is of use, in seconds: no replica is read that is further behind than
    ``MAX_LAG``."""
    return min(_AN_HOUR, int(3 * settings.MAX_LAG) + 30)


class ReadYourWritesMiddleware:
    """Requests of one client never read older data than its earlier requests wrote.

    A response to a request that wrote carries the position in a signed cookie (HttpOnly, SameSite=Lax,
    Secure where the session cookie is) and in the header ``X-ScaleDB-Position``; a request that only reads
    changes neither. A forged or outdated one is ignored.
    """

    sync_capable = True
    async_capable = True

    def __init__(self, get_response: GetResponse) -> None:
        self.get_response = get_response
        if iscoroutinefunction(get_response):
            markcoroutinefunction(self)

    def __call__(self, request: HttpRequest) -> Any:
        if iscoroutinefunction(self):
            return self._answer_async(request)
        opened = self._open(request)
        try:
            response: Any = self.get_response(request)
        finally:
            self._close(opened)
        return self._finish(response, opened)

    async def _answer_async(self, request: HttpRequest) -> HttpResponseBase:
        opened = self._open(request)
        try:
            response: Any = await self.get_response(request)  # type: ignore[misc]
        finally:
            self._close(opened)
        return self._finish(response, opened)

    def _open(self, request: HttpRequest) -> Frame:
        """A scope of this request alone; what the same thread did before does not matter to this client."""
        outer = frame()
        scope = Scope(outer.scope.positions if outer.is_request else None)
        for value in (request.COOKIES.get(COOKIE), request.headers.get(HEADER)):
            if value:
                scope.accept(_unsign(value))
        opened = Frame(scope, None, outer, owner=scope)
        current.set(opened)
        return opened

    def _close(self, opened: Frame) -> None:
        leave(opened.owner)
        if opened.parent is not None and opened.parent.is_request:
            opened.parent.scope.absorb(opened.scope)

    def _finish(self, response: HttpResponseBase, opened: Frame) -> HttpResponseBase:
        scope = opened.scope
        if scope.written:
            signed = signing.TimestampSigner(salt=_SALT).sign(encode(scope.positions.values()))
            response.headers[HEADER] = signed
            response.set_cookie(
                COOKIE,
                signed,
                max_age=max_age(),
                path=django_settings.SESSION_COOKIE_PATH,
                domain=django_settings.SESSION_COOKIE_DOMAIN,
                secure=django_settings.SESSION_COOKIE_SECURE,
                httponly=True,
                samesite="Lax",
            )
        if response.streaming:
            streaming: Any = response
            if streaming.is_async:
                streaming.streaming_content = _stream_async(streaming.streaming_content, opened)
            else:
                streaming.streaming_content = _stream(streaming.streaming_content, opened)
        return response


def _unsign(value: str) -> str:
    try:
        return signing.TimestampSigner(salt=_SALT).unsign(value, max_age=max_age())
    except signing.BadSignature:
        return ""


# A streamed body is made after the middleware has returned: each piece within the request's scope.


class _Within:
    def __init__(self, opened: Frame) -> None:
        self.opened = opened

    def __enter__(self) -> None:
        current.set(Frame(self.opened.scope, self.opened.mode, frame(), self))

    def __exit__(self, *exc_info: object) -> None:
        leave(self)


def _stream(content: Iterator[Any], opened: Frame) -> Iterator[Any]:
    iterator = iter(content)
    try:
        while True:
            with _Within(opened):
                try:
                    piece = next(iterator)
                except StopIteration:
                    return
            yield piece
    finally:
        close = getattr(iterator, "close", None)
        if close is not None:
            with _Within(opened):
                close()


async def _stream_async(content: AsyncIterator[Any], opened: Frame) -> AsyncIterator[Any]:
    iterator = aiter(content)
    while True:
        with _Within(opened):
            try:
                piece = await anext(iterator)
            except StopAsyncIteration:
                return
        yield piece


# What happens in a thread around this middleware belongs to the request as well, and ends with it.


def _request_started(**_: Any) -> None:
    outer = frame()
    while outer.is_request and outer.parent is not None:  # one that never said that it had finished
        outer = outer.parent
    current.set(Frame(Scope(), None, outer, owner=_request_started, is_request=True))


def _request_finished(**_: Any) -> None:
    leave(_request_started)


request_started.connect(_request_started, dispatch_uid="django_scaledb.routing.middleware")
request_finished.connect(_request_finished, dispatch_uid="django_scaledb.routing.middleware")

__all__ = ["COOKIE", "HEADER", "ReadYourWritesMiddleware"]
