"""What the commands write down about how they ended."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from django_scaledb.exceptions import ConfigurationError
from django_scaledb.partitions.report import Report, Status
from django_scaledb.routing.registry import registry
from django_scaledb.runs import Outcome


def home(using: str) -> str:
    """The database in which a run on `using` is written down: of a replica, its primary."""
    try:
        members = registry().set_with(using)
    except ConfigurationError:
        return using
    return members.primary if members else using


def rotation_outcomes(report: Report, labels: Sequence[str]) -> Iterator[Outcome]:
    """One for each of the models (`labels`) that the run was to work on."""
    found = {model.label: model for model in report.models}
    reasons: dict[str, list[str]] = {label: [] for label in labels}
    if report.error is not None:
        reasons = {label: [str(report.error)] for label in labels}
    for label, reason in report.failures():
        reasons[label].append(reason)
    for label in labels:
        results = found[label].results if label in found else []
        done = Counter(result.action for result in results if result.status is Status.DONE)
        ok = report.error is None and found[label].ok
        yield Outcome(label, ok, {"done": dict(done), "reasons": reasons[label]})


def check_outcome(result: Mapping[str, Any]) -> Outcome:
    """The outcome of one counter's check, from what ``check_counters --format json`` says of it."""
    if "error" in result:
        return Outcome(result["counter"], False, {"reasons": [result["error"]]})
    drifted = len(result["drift"])
    return Outcome(
        result["counter"],
        result["ok"],
        {"drifted_keys": drifted, "reasons": list(result["trigger_problems"])},
    )
