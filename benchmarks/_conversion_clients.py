"""One client of `benchmarks/conversion.py`, in a process of its own, through Django's models.

``python -m benchmarks._conversion_clients`` reads what it is to do as one line of JSON, says ``ready``,
works until its standard input is closed, and prints what it did and saw as JSON.
"""

from __future__ import annotations

import json
import random
import select
import sys
import time
from datetime import UTC, datetime, timedelta
from typing import Any

TRACE_SECONDS = 0.01
"""Statements that took longer are told one by one."""

EPOCH = datetime(2026, 1, 1, tzinfo=UTC)


def base_total(number: int) -> int:
    return number % 100


def base_moment(number: int) -> datetime:
    return EPOCH - timedelta(days=number % 1000)


class Client:
    """`ledger` is what the rows that this client alone writes must be: total and moment, None if deleted."""

    def __init__(self, model: Any, number: int, writers: int, rows: int) -> None:
        self.model, self.number, self.writers, self.rows = model, number, writers, rows
        self.random = random.Random(number)
        self.ledger: dict[int, tuple[int, datetime] | None] = {}
        self.slots: dict[tuple[int, datetime], int] = {}
        self.mine: list[int] = []
        self.count = 0

    def act(self) -> None:
        if self.number < self.writers:
            self.write()
        else:
            self.read()

    def write(self) -> None:
        what, total = self.random.random(), self.random.randrange(100)
        if what < 0.35:
            moment = datetime.now(UTC) - timedelta(days=self.random.randrange(900))
            row = self.model(
                customer_id=1 + total, owner=1 + self.number, slot=self.count, total=total, placed_at=moment
            )
            row.save()
            self.ledger[row.id] = (total, moment)
            self.slots[self.count, moment] = row.id
            self.mine.append(row.id)
        elif what < 0.5 and self.slots:
            slot, moment = self.random.choice(list(self.slots))
            row = self.model(customer_id=1, owner=1 + self.number, slot=slot, total=total, placed_at=moment)
            self.model.objects.bulk_create(
                [row],
                update_conflicts=True,
                unique_fields=["owner", "slot", "placed_at"],
                update_fields=["total"],
            )
            self.ledger[self.slots[slot, moment]] = (total, moment)
        else:
            self.change(what, total, self.choose())

    def choose(self) -> int:
        """A row of its own, or one of those that were there before."""
        if self.mine and self.random.random() < 0.5:
            return self.random.choice(self.mine)
        while True:
            number = 1 + self.random.randrange(self.rows)
            if number % 3 and number % self.writers == self.number and self.ledger.get(number, 1) is not None:
                return number

    def change(self, what: float, total: int, pk: int) -> None:
        if what < 0.7:
            row = self.model.objects.get(pk=pk)
            row.total = total
            row.save()
        elif what < 0.85:
            updated = self.model.objects.filter(pk=pk).update(total=total)
            assert updated == 1, f"{updated} rows updated"
        else:
            row = self.model.objects.get(pk=pk)
            count, _ = row.delete()
            assert count == 1, f"{count} rows deleted"
            self.ledger[pk] = None
            if pk in self.mine:
                self.mine.remove(pk)
                self.slots = {place: owner for place, owner in self.slots.items() if owner != pk}
            return
        before = self.ledger.get(pk)
        self.ledger[pk] = (total, before[1] if before else base_moment(pk))

    def read(self) -> None:
        from django.db import connection

        number = 3 * (1 + self.random.randrange(self.rows // 3))
        row = self.model.objects.get(pk=number)
        assert (row.total, row.placed_at) == (base_total(number), base_moment(number)), f"row {number}"
        with connection.cursor() as cursor:
            cursor.execute("SELECT count(*) FROM dear WHERE id BETWEEN %s AND %s", [number, number + 1000])
            cursor.fetchone()


def model_of(code: str) -> Any:
    """The model as old code or new code has it."""
    from django.db import models

    from django_scaledb.models import PartitionedModel

    class Meta:
        app_label, db_table = "bench", "orders"

    class PartitioningMeta:
        key = ("placed_at",)
        interval = "3 months"
        premake = 2

    base = PartitionedModel if code == "new" else models.Model
    body: dict[str, Any] = {
        "__module__": "benchmarks",
        "Meta": Meta,
        "customer_id": models.BigIntegerField(),
        "owner": models.IntegerField(default=0),
        "slot": models.IntegerField(default=0),
        "total": models.IntegerField(),
        "note": models.TextField(default="x"),
        "placed_at": models.DateTimeField(),
    }
    if code == "new":
        body["PartitioningMeta"] = PartitioningMeta
    return type(base)("Order", (base,), body)


def configure(database: dict[str, Any]) -> None:
    import django
    from django.conf import settings

    settings.configure(
        INSTALLED_APPS=["django_scaledb"],
        DATABASES={"default": database},
        USE_TZ=True,
        DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
        LOGGING_CONFIG=None,
    )
    django.setup()


def main() -> None:
    wanted = json.loads(sys.stdin.readline())
    configure(wanted["database"])
    from django.db import connection

    client = Client(model_of(wanted["code"]), wanted["number"], wanted["writers"], wanted["rows"])
    with connection.cursor() as cursor:
        cursor.execute("SELECT 1")
    print("ready", flush=True)
    sys.stdin.readline()
    errors: list[str] = []
    slow: list[tuple[float, float]] = []
    while not select.select([sys.stdin], [], [], wanted["pause"] * client.random.uniform(0.5, 1.5))[0]:
        at, begun = time.time(), time.monotonic()
        try:
            client.act()
        except Exception as error:  # every error of a client counts
            errors.append(f"{type(error).__name__}: {error}"[:200])
        client.count += 1
        spent = time.monotonic() - begun
        if spent > TRACE_SECONDS:
            slow.append((at, spent))
    ledger = {
        pk: None if entry is None else (entry[0], entry[1].isoformat()) for pk, entry in client.ledger.items()
    }
    json.dump({"count": client.count, "errors": errors, "slow": slow, "ledger": ledger}, sys.stdout)


if __name__ == "__main__":
    main()
