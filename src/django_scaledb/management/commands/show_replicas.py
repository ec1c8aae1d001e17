"""Show the primary and its replicas as they answer now.

The JSON of ``--format json`` is described in `django_scaledb.routing.status`.
"""

from __future__ import annotations

import json
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.template.defaultfilters import filesizeformat

from django_scaledb.exceptions import ConfigurationError
from django_scaledb.routing.status import Server, Status, survey

_HEADINGS = ("alias", "role", "state", "lag", "behind", "position", "answers in")


class Command(BaseCommand):
    help = (
        "Shows role, state and lag of the primary and of each replica. With --check exits with 1 when one of "
        "them is down, does not answer, was promoted, or is behind MAX_LAG."
    )
    # A replica that is down is what this command is there to show.
    requires_system_checks: list[str] = []

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--format", choices=("text", "json"), default="text")
        parser.add_argument("--check", action="store_true", help="exit with 1 when a server is out")

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            status = survey()
        except ConfigurationError as error:
            raise CommandError(str(error)) from None
        if options["format"] == "json":
            self.stdout.write(json.dumps(status.as_json(), indent=2))
        else:
            self._write(status)
        if options["check"] and not status.ok:
            raise SystemExit(1)

    def _write(self, status: Status) -> None:
        servers = [server for each in status.sets for server in each.servers]
        rows = [_HEADINGS, *map(_cells, servers)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            self.stdout.write("  ".join(cells).rstrip())
        for server in servers:
            if server.why:
                self.stdout.write(self.style.WARNING(f"{server.alias}: {server.why}"))
        if not any(len(each.servers) > 1 for each in status.sets):
            self.stdout.write("no replica is configured; name them in SCALEDB['REPLICAS']")


def _cells(server: Server) -> tuple[str, ...]:
    return (
        server.alias,
        server.role,
        server.state,
        "" if server.lag_seconds is None else f"{server.lag_seconds:.1f} s",
        "" if server.lag_bytes is None else filesizeformat(server.lag_bytes).replace("\xa0", " "),
        server.position or "",
        "" if server.latency_ms is None else f"{server.latency_ms:.1f} ms",
    )
