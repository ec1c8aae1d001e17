"""Reads on replicas, without reading older data than one wrote.

What an application uses is imported here; importing it connects to nothing and starts nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .explanation import Explanation as Explanation
    from .explanation import decisions as decisions
    from .explanation import explain as explain
    from .middleware import ReadYourWritesMiddleware as ReadYourWritesMiddleware
    from .router import ReplicaRouter as ReplicaRouter
    from .state import current_token as current_token
    from .state import use_primary as use_primary
    from .state import use_replica as use_replica
    from .state import use_token as use_token

_HOMES = {
    "Explanation": "explanation",
    "ReadYourWritesMiddleware": "middleware",
    "ReplicaRouter": "router",
    "current_token": "state",
    "decisions": "explanation",
    "explain": "explanation",
    "use_primary": "state",
    "use_replica": "state",
    "use_token": "state",
}


def __getattr__(name: str) -> Any:
    try:
        home = _HOMES[name]
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
    value = getattr(import_module(f".{home}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
