"""The ``SCALEDB`` setting: every key is optional, read when it is needed, so that `override_settings` works.

::

    SCALEDB = {
        "LOCK_TIMEOUT": 1000,            # milliseconds that a schema change waits for one lock
        "DDL_DEADLINE": 30,              # seconds after which a run gives up waiting
        "TEST_DEFAULT_PARTITION": True,  # test databases take rows of any date
        "PRIMARY": "default",            # the alias that takes writes
        "REPLICAS": ["replica1"],        # the aliases that may answer reads; {"replica1": 2, ...} for weights
        "MAX_LAG": 10,                   # seconds behind which a replica is left alone
        "READ_FROM_PRIMARY": ["axes"],   # apps and models that are never read from a replica (nor sessions)
        "MORE_PRIMARIES": {},            # {"orders": {"REPLICAS": ["orders1"], "MODELS": ["orders"]}}
        "POLL_INTERVAL": 0.25,           # seconds between two looks at a server
        "READ_DEADLINE": 1.0,            # seconds after which a replica that gives no sign of life is frozen
        "ARCHIVE_STORAGE": "default",    # the alias in STORAGES where archived partitions go
        "UNPRUNED_QUERIES": "ignore",    # or "log" or "raise": for development
    }
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from django.conf import settings as django_settings

from django_scaledb.exceptions import ConfigurationError

SETTING = "SCALEDB"


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with the setting: which key (empty for the whole), what, what to do."""

    key: str
    message: str
    hint: str


@dataclass(frozen=True)
class _Key:
    default: object
    accepts: Callable[[object], bool]
    expected: str


def _is_milliseconds(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 60_000


def _is_seconds(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 3600


def _is_alias(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _are_aliases(value: object) -> bool:
    return isinstance(value, list | tuple) and all(map(_is_alias, value))


def _are_replicas(value: object) -> bool:
    if isinstance(value, Mapping):
        return all(_is_alias(alias) and _is_seconds(weight) for alias, weight in value.items())
    return _are_aliases(value)


def _are_primaries(value: object) -> bool:
    return isinstance(value, Mapping) and all(
        _is_alias(alias)
        and isinstance(entry, Mapping)
        and set(entry) <= {"REPLICAS", "MODELS"}
        and _are_replicas(entry.get("REPLICAS", ()))
        and _are_aliases(entry.get("MODELS", ()))
        for alias, entry in value.items()
    )


def _is_switch(value: object) -> bool:
    return isinstance(value, bool)


def _is_watch(value: object) -> bool:
    return value in ("ignore", "log", "raise")


_SECONDS = "a number of seconds above 0, at most 3600"
_KEYS: Mapping[str, _Key] = {
    "LOCK_TIMEOUT": _Key(1000, _is_milliseconds, "a whole number of milliseconds from 1 to 60000"),
    "DDL_DEADLINE": _Key(30, _is_seconds, _SECONDS),
    "TEST_DEFAULT_PARTITION": _Key(True, _is_switch, "True or False"),
    "PRIMARY": _Key("default", _is_alias, "an alias of DATABASES"),
    "REPLICAS": _Key(
        (), _are_replicas, "a list of aliases of DATABASES, or a dictionary of aliases and their weights"
    ),
    "READ_FROM_PRIMARY": _Key((), _are_aliases, 'a list of app labels and of models ("app.Model")'),
    "MORE_PRIMARIES": _Key(
        {}, _are_primaries, 'a dictionary of aliases: {"orders": {"REPLICAS": [...], "MODELS": [...]}}'
    ),
    "POLL_INTERVAL": _Key(0.25, _is_seconds, _SECONDS),
    "READ_DEADLINE": _Key(1.0, _is_seconds, _SECONDS),
    "MAX_LAG": _Key(10, _is_seconds, _SECONDS),
    "ARCHIVE_STORAGE": _Key("default", _is_alias, "an alias of STORAGES"),
    "UNPRUNED_QUERIES": _Key("ignore", _is_watch, '"ignore", "log" or "raise"'),
}


def problems() -> list[Problem]:
    """Everything that is wrong with ``settings.SCALEDB``; the system checks report it."""
    value = getattr(django_settings, SETTING, {})
    if not isinstance(value, Mapping):
        return [
            Problem("", f"settings.{SETTING} is a {type(value).__name__}, not a dictionary", "Write {...}.")
        ]
    found = []
    for key, entry in value.items():
        if key not in _KEYS:
            found.append(_unknown(key))
        elif not _KEYS[key].accepts(entry):
            found.append(Problem(key, f"{entry!r} is not valid", f"It must be {_KEYS[key].expected}."))
    return found


def _unknown(key: object) -> Problem:
    close = get_close_matches(str(key).upper(), _KEYS, n=1)
    hint = f"Did you mean {close[0]!r}?" if close else f"The keys are {', '.join(sorted(_KEYS))}."
    return Problem(str(key), f"{key!r} is not a key of settings.{SETTING}", hint)


class Settings:
    """Reads ``settings.SCALEDB`` at each access: ``settings.LOCK_TIMEOUT``.

    Raises `ConfigurationError` for a value that `problems()` reports, so that a wrong one is never
    used; keys that nobody asks for harm nobody.
    """

    LOCK_TIMEOUT: int
    DDL_DEADLINE: float
    TEST_DEFAULT_PARTITION: bool
    PRIMARY: str
    REPLICAS: list[str] | dict[str, float]
    MAX_LAG: float
    READ_FROM_PRIMARY: list[str]
    MORE_PRIMARIES: dict[str, dict[str, Any]]
    POLL_INTERVAL: float
    READ_DEADLINE: float
    ARCHIVE_STORAGE: str
    UNPRUNED_QUERIES: str

    def __getattr__(self, name: str) -> Any:
        key = _KEYS.get(name)
        if key is None:
            raise AttributeError(f"settings.{SETTING} has no key {name!r}")
        value = getattr(django_settings, SETTING, {})
        if not isinstance(value, Mapping):
            raise ConfigurationError(f"settings.{SETTING} must be a dictionary")
        entry = value.get(name, key.default)
        if not key.accepts(entry):
            raise ConfigurationError(f"settings.{SETTING}[{name!r}] must be {key.expected}, not {entry!r}")
        return list(entry) if isinstance(entry, tuple) else entry


settings = Settings()
