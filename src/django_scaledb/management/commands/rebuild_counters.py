"""Repair counters, or fill new ones, while writers go on."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

from django.core.management.base import CommandError, CommandParser
from django.db import connections

from django_scaledb.counters import rebuild
from django_scaledb.management._counters import CounterCommand
from django_scaledb.progress import Progress


class Command(CounterCommand):
    help = (
        "Adds to each key what it lacks. Nobody waits for it; killed, it has spoilt nothing, "
        "and running it again "
        "does the rest. Exits with 1 when a counter could not be repaired."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        super().add_arguments(parser)
        parser.add_argument("--format", choices=("text", "json"), default="text")
        parser.add_argument(
            "--read-from", metavar="ALIAS", help="a replica to count on, once it has caught up"
        )
        parser.add_argument(
            "--batch-keys",
            type=int,
            default=rebuild.BATCH_KEYS,
            metavar="N",
            help=f"keys repaired per transaction (default: {rebuild.BATCH_KEYS})",
        )

    def handle(self, *args: Any, **options: Any) -> None:
        using, read_from = options["using"], options["read_from"]
        if read_from is not None and read_from not in connections:
            raise CommandError(
                f"there is no database {read_from!r} in DATABASES; there is {', '.join(connections)}"
            )
        if options["batch_keys"] < 1:
            raise CommandError("--batch-keys must be 1 or more")
        results: list[dict[str, Any]] = []
        for counter in self.find_counters(options["counters"], using):
            label = counter._meta.label
            progress: list[Progress] = []

            def follow(what: str, done: int, total: int, progress: list[Progress] = progress) -> None:
                if options["verbosity"] == 0:
                    return
                if not progress or progress[-1].what != what:
                    if progress:
                        progress[-1].__exit__()
                    progress.append(Progress(total, what).__enter__())
                progress[-1].advance(done - progress[-1].done)

            try:
                repaired = rebuild.rebuild(
                    counter,
                    using,
                    leaving=partial(self.leaving, counter),
                    read_from=read_from,
                    batch_keys=options["batch_keys"],
                    on_progress=follow,
                )
            except self.failures as error:
                results.append({"counter": label, "ok": False, "error": self.one_line(error)})
                self.stderr.write(self.style.ERROR(f"{label}: {self.one_line(error)}"))
                continue
            finally:
                if progress:
                    progress[-1].__exit__()
            results.append({"counter": label, "ok": True, "repaired": repaired})
            if options["format"] == "text" and options["verbosity"] > 0:
                keys = (
                    f"{repaired} key{'' if repaired == 1 else 's'} repaired" if repaired else "exact already"
                )
                self.stdout.write(f"{label}: {keys}")
        ok = all(result["ok"] for result in results)
        if options["format"] == "json":
            self.stdout.write(json.dumps({"ok": ok, "counters": results}, indent=2, ensure_ascii=False))
        if not ok:
            raise SystemExit(1)
