"""Which primaries there are, which replicas each has, and which models live where. Pure.

Made from ``settings.SCALEDB``, whose values `django_scaledb.conf` has looked at.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

#: Always read from the primary: a session that is read before it arrives looks like a logout.
ALWAYS_FROM_PRIMARY = ("sessions",)


@dataclass(frozen=True)
class SetConfig:
    """A primary and its replicas (alias -> weight); times are in seconds."""

    primary: str
    replicas: Mapping[str, float] = field(default_factory=dict)
    models: frozenset[str] = frozenset()
    max_lag: float = 10.0
    poll_interval: float = 0.25
    read_deadline: float = 1.0
    warm_up: float = 0.25


@dataclass(frozen=True)
class RoutingConfig:
    """All sets, the one that takes what no other names first; labels are lower case."""

    sets: tuple[SetConfig, ...]
    from_primary: frozenset[str]

    def set_of(self, app_label: str, model_name: str | None) -> SetConfig:
        """The set of a model, or of an app when `model_name` is None."""
        for config in self.sets[1:]:
            if _named(config.models, app_label, model_name):
                return config
        return self.sets[0]

    def is_from_primary(self, app_label: str, model_name: str) -> bool:
        return _named(self.from_primary, app_label, model_name)


def _named(labels: Iterable[str], app_label: str, model_name: str | None) -> bool:
    return app_label.lower() in labels or f"{app_label}.{model_name}".lower() in labels


def weights(replicas: Iterable[str] | Mapping[str, float]) -> dict[str, float]:
    """``["a", "b"]`` means equal weights; ``{"a": 2, "b": 1}`` gives them."""
    if isinstance(replicas, Mapping):
        return {alias: float(weight) for alias, weight in replicas.items()}
    return dict.fromkeys(replicas, 1.0)


def build(values: Mapping[str, Any]) -> RoutingConfig:
    """The configuration that the values of ``settings.SCALEDB`` (defaults filled in) describe."""
    common: dict[str, Any] = {
        "max_lag": float(values["MAX_LAG"]),
        "poll_interval": float(values["POLL_INTERVAL"]),
        "read_deadline": float(values["READ_DEADLINE"]),
    }
    sets = [SetConfig(values["PRIMARY"], weights(values["REPLICAS"]), **common)]
    sets += [
        SetConfig(
            primary,
            weights(entry.get("REPLICAS", ())),
            frozenset(label.lower() for label in entry.get("MODELS", ())),
            **common,
        )
        for primary, entry in values["MORE_PRIMARIES"].items()
    ]
    named = {label.lower() for label in (*ALWAYS_FROM_PRIMARY, *values["READ_FROM_PRIMARY"])}
    return RoutingConfig(tuple(sets), frozenset(named))
