"""Compare counters with their sources; exits with 1 when one has drifted."""

from __future__ import annotations

import json
from typing import Any

from django.core.management.base import CommandParser

from django_scaledb import runs
from django_scaledb.counters import rebuild
from django_scaledb.management._counters import CounterCommand
from django_scaledb.management._runs import check_outcome, home


class Command(CounterCommand):
    help = (
        "Counts each counter's source in one snapshot, so that writers cause no false alarm, "
        "and lists the keys "
        "that differ. Exits with 1 when there are any, or when triggers are missing or outdated."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        super().add_arguments(parser)
        parser.add_argument("--format", choices=("text", "json"), default="text")

    def handle(self, *args: Any, **options: Any) -> None:
        using = options["using"]
        results: list[dict[str, Any]] = []
        ok = True
        for counter in self.find_counters(options["counters"], using):
            try:
                finding = rebuild.check(counter, using, self.leaving(counter, using))
                if finding.drifts:
                    # A partition may have been detached between the look at the catalog and the snapshot.
                    finding = rebuild.check(counter, using, self.leaving(counter, using))
            except self.failures as error:
                ok = False
                results.append({"counter": counter._meta.label, "ok": False, "error": self.one_line(error)})
                self.stderr.write(self.style.ERROR(f"{counter._meta.label}: {self.one_line(error)}"))
                continue
            ok = ok and finding.ok
            results.append(finding.as_json())
            if options["format"] == "text":
                self._write(finding, options["verbosity"])
        runs.write_down(home(using), runs.CHECK_COUNTERS, map(check_outcome, results))
        if options["format"] == "json":
            self.stdout.write(json.dumps({"ok": ok, "counters": results}, indent=2, ensure_ascii=False))
        if not ok:
            raise SystemExit(1)

    def _write(self, finding: rebuild.Finding, verbosity: int) -> None:
        for table in finding.detach_pending:
            self.stdout.write(f"{finding.label}: detach pending: {table} (run manage.py rotate_partitions)")
        for problem in finding.trigger_problems:
            self.stdout.write(f"{finding.label}: {problem}")
        if finding.drifts:
            count = len(finding.drifts)
            self.stdout.write(
                f"{finding.label}: {count} key{'s' if count > 1 else ''} drifted "
                f"(repair: manage.py rebuild_counters {finding.label})"
            )
            for drift in finding.drifts:
                self.stdout.write(f"  {drift}")
        elif finding.ok and verbosity > 0:
            self.stdout.write(f"{finding.label}: exact")
