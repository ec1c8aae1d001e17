"""The example's settings behind the strictest policy that lets a page of its own host work."""

from __future__ import annotations

from collections.abc import Callable

from django.http import HttpRequest, HttpResponse

from pypi_mirror.settings import *  # noqa: F403
from pypi_mirror.settings import MIDDLEWARE as EXAMPLE_MIDDLEWARE

POLICY = "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"


def strict_policy(
    get_response: Callable[[HttpRequest], HttpResponse],
) -> Callable[[HttpRequest], HttpResponse]:
    """Adds the policy to every response, and spares the browser a missing icon."""

    def answer(request: HttpRequest) -> HttpResponse:
        response = HttpResponse(status=204) if request.path == "/favicon.ico" else get_response(request)
        response["Content-Security-Policy"] = POLICY
        return response

    return answer


MIDDLEWARE = ["tests.browser_settings.strict_policy", *EXAMPLE_MIDDLEWARE]
